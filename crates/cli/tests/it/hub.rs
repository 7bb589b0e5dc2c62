//! Models and data sets of a hub that runs on this machine.

use crate::support::{Place, model};
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Serves these answers by their path, and notes what was asked.
fn serve(answers: Vec<(&str, Vec<u8>)>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answers: HashMap<String, Vec<u8>> =
        answers.into_iter().map(|(path, body)| (path.to_owned(), body)).collect();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let path = line.split(' ').nth(1).unwrap_or("").to_owned();
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {}
            noted.lock().unwrap().push(path.clone());
            let (status, body) = match answers.get(&path) {
                Some(body) => (200, body.clone()),
                None => (404, b"no".to_vec()),
            };
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    (address, asked)
}

fn file(name: &str) -> Vec<u8> {
    fs::read(model().join(name)).unwrap()
}

/// A hub with the small model under `org/tiny`, one of a type that is not known, and a data set.
fn hub() -> (String, Arc<Mutex<Vec<String>>>) {
    let listed = |names: &[&str]| {
        let names = names.iter().map(|name| serde_json::json!({"rfilename": name}));
        serde_json::json!({"siblings": names.collect::<Vec<_>>()}).to_string().into_bytes()
    };
    let files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let odd = String::from_utf8(file("config.json")).unwrap().replace("\"llama\"", "\"mamba\"");
    let parquet =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/fixtures/qa-snappy.parquet");
    serve(vec![
        ("/api/models/org/tiny/revision/main", listed(&files)),
        ("/org/tiny/resolve/main/config.json", file(files[0])),
        ("/org/tiny/resolve/main/model.safetensors", file(files[1])),
        ("/org/tiny/resolve/main/tokenizer.json", file(files[2])),
        ("/org/tiny/resolve/main/tokenizer_config.json", file(files[3])),
        ("/api/models/org/odd/revision/main", listed(&files)),
        ("/org/odd/resolve/main/config.json", odd.into_bytes()),
        ("/org/odd/resolve/main/model.safetensors", file(files[1])),
        (
            "/api/datasets/org/qa/revision/refs%2Fconvert%2Fparquet",
            listed(&["default/train/0000.parquet", "default/test/0000.parquet"]),
        ),
        (
            "/datasets/org/qa/resolve/refs%2Fconvert%2Fparquet/default/train/0000.parquet",
            fs::read(parquet).unwrap(),
        ),
    ])
}

#[test]
fn a_model_of_the_hub_is_called_by_its_id() {
    let place = Place::new();
    let (address, asked) = hub();
    let online = [("HF_ENDPOINT", address.as_str()), ("HF_HUB_OFFLINE", "0")];
    let set = ["--set", "model.path=org/tiny", "--set", "train.max_steps=2", "--quiet"];
    let ran = place.run_in(&online, &[&["train", "recipe.yaml"], &set[..]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let config: serde_json::Value =
        serde_json::from_str(&place.read("run/adapter/adapter_config.json")).unwrap();
    assert_eq!(config["base_model_name_or_path"], "org/tiny");
    assert!(place.read("run/adapter/hydralora.json").contains("\"base_model\": \"org/tiny\""));
    assert!(place.read("run/report.html").contains("hydralora on org/tiny"));
    // From the cache, by what the adapter says.
    place.succeed(&[
        "generate",
        "--adapter",
        "run",
        "--raw",
        "--prompt",
        "a",
        "--max-new-tokens",
        "1",
    ]);
    place.succeed(&["train", "run/recipe.yaml", "--quiet", "--resume"]);
    let asked = asked.lock().unwrap();
    let at = |end: &str| asked.iter().position(|path| path.ends_with(end)).unwrap();
    assert!(at("/config.json") < at("/model.safetensors"), "{asked:?}");
    assert_eq!(asked.iter().filter(|path| path.ends_with("config.json")).count(), 2, "{asked:?}");
}

#[test]
fn what_cannot_work_is_said_before_weights_are_fetched() {
    let place = Place::new();
    let (address, asked) = hub();
    let online = [("HF_ENDPOINT", address.as_str()), ("HF_HUB_OFFLINE", "0")];
    let refused = |set: &[&str], part: &str| {
        let ran = place.run_in(&online, &[&["check", "recipe.yaml"], set].concat());
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    };
    refused(&["--set", "model.path=org/odd"], "model_type `mamba` is not supported");
    let tiny = "model.path=org/tiny";
    refused(
        &["--set", tiny, "--set", "method.targets=w1"],
        "--set method.targets=w1: method.targets",
    );
    refused(&["--set", tiny, "--set", "data.max_seq_len=600"], "the model's context holds 512");
    let ran = place.run_in(&online, &["generate", "--model", "org/odd", "--raw", "--prompt", "a"]);
    assert!(ran.stderr.contains("`mamba`"), "{}", ran.stderr);
    let asked = asked.lock().unwrap();
    assert!(!asked.iter().any(|path| path.ends_with(".safetensors")), "{asked:?}");
}

#[test]
fn a_data_set_of_the_hub_is_trained_on_by_its_id() {
    let place = Place::new();
    let (address, _) = hub();
    let online = [("HF_ENDPOINT", address.as_str()), ("HF_HUB_OFFLINE", "0")];
    let fields = "fields: {instruction: question, output: answer}";
    let check = |source: &str| {
        let set = format!("data.train=[{{path: org/qa, {fields}{source}}}]");
        place.run_in(&online, &["check", "recipe.yaml", "--set", &set])
    };
    let ran = check("");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("org/qa"), "{}", ran.stdout);
    let ran = check(", split: tset");
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("no split of it; expected one of test, train"), "{}", ran.stderr);
    let ran = check(", name: big");
    assert!(
        ran.stderr.contains("no configuration of it; expected one of default"),
        "{}",
        ran.stderr
    );
    // What was fetched is found without a network.
    let set = format!("data.train=[{{path: org/qa, split: train, {fields}}}]");
    place.succeed(&["check", "recipe.yaml", "--set", &set]);
    let ran = place.run(&["check", "recipe.yaml", "--set", "data.train=[{path: org/none}]"]);
    assert_eq!(ran.code, Some(2));
    for part in ["no file org/none", "HF_HUB_OFFLINE"] {
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
}

#[test]
fn a_model_in_the_shared_cache_is_used() {
    let place = Place::new();
    let at = "shared/models--org--tiny/snapshots/0123abc";
    fs::create_dir_all(place.path(at)).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(model().join(name), place.path(at).join(name)).unwrap();
    }
    place.write("shared/models--org--tiny/refs/main", "0123abc");
    let set = ["--set", "model.path=org/tiny", "--set", "train.max_steps=2", "--quiet"];
    place.succeed(&[&["train", "recipe.yaml"], &set[..]].concat());
    assert!(place.read("run/adapter/adapter_config.json").contains("\"org/tiny\""));
    let ran = place.succeed(&["inspect", "--model", "org/tiny"]);
    assert!(ran.stdout.contains("model              tiny"), "{}", ran.stdout);
}

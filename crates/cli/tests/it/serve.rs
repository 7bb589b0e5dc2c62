//! `serve`: from the command line to an answer, and to the end.

use crate::support::{Place, model, ran};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Child;

/// Asks, and gives the status and the body.
fn ask(address: &str, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Starts a server on a free port; its address.
fn start(place: &Place, more: &[&str]) -> (Child, String) {
    let base = model().display().to_string();
    let mut child = place.start(&[&["serve", "--model", &base, "--port", "0"][..], more].concat());
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let address = line.trim().rsplit_once("http://").unwrap_or_else(|| panic!("{line:?}")).1;
    (child, address.to_owned())
}

/// What tokens there are is settled when the server begins.
#[test]
fn adapters_with_other_tokens_are_refused_by_name() {
    let place = crate::added_tokens::place();
    let method = "method={name: lora, rank: 2, targets: qv}";
    let train = ["train", "recipe.yaml", "--quiet", "--set", method, "--set", "train.max_steps=2"];
    place.succeed(&train);
    let none = ["--set", "data.add_tokens=[]", "--set", "output=none"];
    place.succeed(&[&train[..], &none].concat());
    // As another program leaves it.
    let foreign = place.path("foreign");
    std::fs::create_dir(&foreign).unwrap();
    for entry in place.path("run/adapter").read_dir().unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.starts_with("adapter_") || name == "tokenizer.json" {
            std::fs::copy(&path, foreign.join(name)).unwrap();
        }
    }
    let load = |address: &str, folder: &str| {
        let body = json!({"lora_name": "x", "lora_path": folder, "load_inplace": true});
        ask(address, "POST", "/v1/load_lora_adapter", &body.to_string())
    };
    let refused = |answer: (u16, String), says: &str| {
        let (status, body) = answer;
        let error = serde_json::from_str::<Value>(&body).unwrap()["error"].take();
        assert_eq!((status, error["param"].as_str()), (400, Some("lora_path")), "{body}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(says) && message.contains("--adapter"), "{message}");
    };
    let (mut child, address) = start(&place, &["--adapter-root", "."]);
    refused(load(&address, "run/adapter"), "adds the token \"<act>\"");
    refused(load(&address, "foreign"), "adds the token \"<act>\"");
    assert_eq!(load(&address, "none/adapter").0, 200);
    child.kill().unwrap();
    child.wait().unwrap();
    let (mut child, address) = start(&place, &["--adapter-root", ".", "--adapter", "mine=run"]);
    assert_eq!(load(&address, "run/adapter").0, 200);
    assert_eq!(load(&address, "foreign").0, 200);
    // The base does not write what it knows nothing of.
    let text = |model: &str| {
        let body = json!({"model": model, "prompt": "Sky", "max_tokens": 3, "temperature": 0,
            "logit_bias": {"512": 100}});
        let answer = ask(&address, "POST", "/v1/completions", &body.to_string());
        serde_json::from_str::<Value>(&answer.1).unwrap()["choices"][0]["text"].to_string()
    };
    assert_eq!(text("mine").matches("<act>").count(), 3);
    assert!(!text("stories260K").contains("<act>"));
    refused(load(&address, "none/adapter"), "without the token \"<act>\"");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[cfg(unix)]
#[test]
fn a_trained_adapter_is_served_until_the_server_is_told_to_end() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--json", "--set", "train.max_steps=4"]);
    let base = model().display().to_string();
    let mut child = place.start(&[
        "serve",
        "--model",
        &base,
        "--adapter",
        "mine=run",
        "--port",
        "0",
        "--served-model-name",
        "tales",
        "--adapter-root",
        ".",
    ]);
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    let address = line.trim().rsplit_once("http://").unwrap_or_else(|| panic!("{line:?}")).1;
    assert!(line.starts_with("serving tales at "), "{line}");
    assert_eq!(ask(address, "GET", "/health", "").0, 200);
    let (_, listed) = ask(address, "GET", "/v1/models", "");
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let ids: Vec<&str> =
        listed["data"].as_array().unwrap().iter().filter_map(|card| card["id"].as_str()).collect();
    assert_eq!(ids, ["tales", "mine"]);
    assert_eq!(listed["data"][1]["parent"], "tales");
    // Nothing of where it lies is told.
    let folder = place.path("").display().to_string();
    assert!(!listed.to_string().contains(folder.trim_end_matches('/')), "{listed}");
    assert!(!listed.to_string().contains(&base), "{listed}");
    for name in ids {
        let body = json!({"model": name, "prompt": "Once", "max_tokens": 4, "temperature": 0});
        let (status, answer) = ask(address, "POST", "/v1/completions", &body.to_string());
        assert_eq!(status, 200, "{answer}");
    }
    let again = json!({"lora_name": "again", "lora_path": "run/adapter"}).to_string();
    let (status, answer) = ask(address, "POST", "/v1/load_lora_adapter", &again);
    assert_eq!(status, 200, "{answer}");
    let broken = json!({"lora_name": "x", "lora_path": "run"}).to_string();
    let (status, answer) = ask(address, "POST", "/v1/load_lora_adapter", &broken);
    assert_eq!(status, 400, "{answer}");
    assert!(!answer.contains(folder.trim_end_matches('/')), "{answer}");
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let ended = ran(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn what_cannot_be_served_is_said_at_once() {
    let place = Place::new();
    let base = model().display().to_string();
    place.write("empty", "# nothing\n");
    place.write("short", "abc\n");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (arguments, said) in [
        (&["--adapter", "x"][..], "expected a name, `=`"),
        (&["--adapter", "x=nowhere"], "there is no such folder"),
        (&["--api-key-file", "missing"], "--api-key-file: missing"),
        (&["--api-key-file", "empty"], "holds no key"),
        (&["--api-key-file", "short"], "line 1"),
        (&["--adapter-root", "nowhere"], "--adapter-root"),
        (&["--adapter-domain", "x=law"], "no --adapter has this name"),
        (&["--cors-origin", "a.example"], "http://HOST"),
        (&["--cache-dtype", "f8"], "expected f32, f16 or q8"),
        (&["--max-batch", "0"], "--max-batch"),
        (&["--port", &port], "cannot listen"),
        (&["--served-model-name", "a b"], "--served-model-name"),
    ] {
        let mut all = vec!["serve", "--model", &base];
        all.extend(arguments);
        if !arguments.contains(&"--port") {
            all.extend(["--port", "0"]);
        }
        let ran = place.run(&all);
        assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(said), "{arguments:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("abc"), "{}", ran.stderr);
    }
}

//! Files, recipes and models that strangers made: nothing of them speaks to the terminal, and nothing
//! of them is believed before it is compared with what is there.

use crate::support::{Place, Ran, model};
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::fs;

/// Sets a window's title, in two ways, and turns the writing round.
const ESCAPES: &str = "\u{1b}]0;owned\u{7}\u{9b}31m\u{202e}";

fn is_harmless(ran: &Ran, place: &str) {
    for text in [&ran.stdout, &ran.stderr] {
        let wild = text.chars().find(|c| {
            (c.is_control() && !matches!(c, '\n' | '\t')) || matches!(c, '\u{202a}'..='\u{202e}')
        });
        assert_eq!(wild, None, "{place}: {text:?}");
    }
    assert!(!ran.stderr.contains("panicked"), "{place}: {}", ran.stderr);
}

#[test]
fn nothing_foreign_speaks_to_the_terminal() {
    let place = Place::new();
    let record = |instruction: &str, output: &str| {
        let line =
            serde_json::json!({"instruction": instruction, "output": output, "domain": ESCAPES});
        format!("{line}\n")
    };
    place.write("animals.jsonl", &record(&format!("What {ESCAPES}?"), ESCAPES).repeat(30));
    let check = ["check", "recipe.yaml"];
    let shown = place.run(&check);
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    is_harmless(&shown, "a record");
    let domain = format!("data.train.0.domain={ESCAPES}");
    let named = place.run(&["check", "recipe.yaml", "--set", &domain]);
    is_harmless(&named, "a domain");
    assert!([named.stdout, named.stderr].concat().contains("\\u{1b}]0;owned\\u{7}"));

    place.write("animals.jsonl", &format!("{{\"instruct{ESCAPES}ion\": 1}}\n").repeat(3));
    is_harmless(&place.run(&check), "a field's name");
    place.write("animals.jsonl", &format!("{{\"instruction\": \"{ESCAPES}\n"));
    is_harmless(&place.run(&check), "what is no JSON");
    place.write("odd.yaml", &format!("\"mod{}el\": 1\ntrain: {{\"x\\e[1m\": 2}}\n", "\\e]0;x\\a"));
    is_harmless(&place.run(&["check", "odd.yaml"]), "a recipe's key");

    let place = Place::new();
    place.write("wild.jinja", &format!("{{{{ raise_exception('no {ESCAPES}') }}}}"));
    let refused = place.run(&["check", "recipe.yaml", "--set", "data.template=wild.jinja"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    is_harmless(&refused, "a template's message");

    let folder = place.path("model");
    fs::create_dir(&folder).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(model().join(file), folder.join(file)).unwrap();
    }
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    let bytes = serialize([(format!("model.{ESCAPES}.weight"), view)], None).unwrap();
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
    let folder = folder.display().to_string();
    let refused = place.run(&["generate", "--model", &folder, "--prompt", "Hi"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    is_harmless(&refused, "a tensor's name");
    is_harmless(&place.run(&["inspect", &folder]), "inspecting it");
}

#[test]
fn values_that_multiply_are_refused_before_the_work() {
    let place = Place::new();
    for (change, part) in [
        (
            "train.epochs=1e18",
            "train.epochs: is 1000000000000000000; expected a positive number up to",
        ),
        ("train.epochs=1e8", "train.epochs"),
        ("data.train.0.weight=1e9", "an epoch would draw"),
        ("data.train.0.weight=1e300", "an epoch would draw"),
        ("method.rank=1000000000", "for the adapter alone"),
        ("method.num_experts=1000000000", "for the adapter alone"),
    ] {
        for command in ["check", "train"] {
            let refused = place.run(&[command, "recipe.yaml", "--set", change]);
            assert_eq!(refused.code, Some(2), "{command} {change}: {}", refused.stderr);
            assert!(refused.stderr.contains(part), "{command} {change}: {}", refused.stderr);
        }
    }
    assert!(!place.path("run/adapter").exists());
    // Many passes over little, of which few steps are wanted, begin at once.
    let started = std::time::Instant::now();
    let changes = ["--set", "train.epochs=90000", "--set", "train.max_steps=2"];
    place.succeed(&[&["train", "recipe.yaml"][..], &changes].concat());
    assert!(started.elapsed() < std::time::Duration::from_secs(60));
}

/// A count of layers that no file has, with an adapter that asks for all of them.
#[test]
fn layers_that_a_model_only_claims_are_not_listed() {
    let place = Place::new();
    let folder = place.path("deep");
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let config = fs::read_to_string(model().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    place.succeed(&["train", "recipe.yaml", "--set", "train.max_steps=1"]);
    fs::remove_file(place.path("run/adapter/hydralora.json")).unwrap();
    for layers in [1_u64 << 31, 4_000] {
        config["num_hidden_layers"] = layers.into();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let deep = folder.display().to_string();
        for arguments in [
            &["merge", "--model", &deep, "--adapter", "run/adapter", "--out", "merged"][..],
            &[
                "export",
                "--model",
                &deep,
                "--adapter",
                "run/adapter",
                "--out",
                "lora",
                "--as",
                "lora",
            ],
        ] {
            let refused = place.run(arguments);
            assert_ne!(refused.code, Some(0), "{arguments:?}");
            assert!(refused.code.is_some(), "{arguments:?}: {}", refused.stderr);
            is_harmless(&refused, "a deep model");
        }
    }
}

/// A library that panics over a file is told as the error that it is, and as nothing else.
#[test]
fn a_library_that_panics_is_told_in_a_line() {
    let place = Place::new();
    let folder = place.path("odd");
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.join("tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    // Longer than the tokens it is taken off when merges are read.
    json["model"]["continuing_subword_prefix"] = "a long prefix".into();
    fs::write(&path, json.to_string()).unwrap();
    let refused = place.run(&["inspect", "--model", "odd"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    is_harmless(&refused, "a tokenizer whose parts contradict each other");
    assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
}

#[test]
#[cfg(unix)]
fn a_pipe_in_the_place_of_a_file_is_not_waited_for() {
    let place = Place::new();
    let folder = place.path("pipes");
    fs::create_dir(&folder).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(model().join(file), folder.join(file)).unwrap();
    }
    for pipe in [folder.join("model.safetensors"), place.path("animals.jsonl")] {
        let _ = fs::remove_file(&pipe);
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
    }
    let folder = folder.display().to_string();
    let commands =
        [&["generate", "--model", &folder, "--prompt", "Hi"][..], &["check", "recipe.yaml"]];
    for arguments in commands {
        let mut child = place.start(arguments);
        let started = std::time::Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() > std::time::Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("{arguments:?} waits");
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        };
        assert_eq!(status.code(), Some(2), "{arguments:?}");
    }
}

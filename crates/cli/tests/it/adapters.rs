//! Adapters as people name them, and the base models that they name.

use crate::support::{Place, model};
use serde_json::Value;
use std::fs;

fn json(place: &Place, name: &str) -> Value {
    serde_json::from_str(&place.read(name)).unwrap()
}

#[test]
fn an_adapter_is_found_by_its_run_and_its_base_by_the_adapter() {
    let place = Place::new();
    let method = "method={name: lora, rank: 2, targets: qv}";
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", method]);
    let base = model().canonicalize().unwrap();
    let config = json(&place, "run/adapter/adapter_config.json");
    let named = config["base_model_name_or_path"].as_str().unwrap();
    assert!(std::path::Path::new(named).is_absolute(), "{named}");
    assert_eq!(fs::canonicalize(named).unwrap(), base);
    assert_eq!(json(&place, "run/adapter/hydralora.json")["base_model"], named);
    assert!(place.read("run/report.html").contains(&format!("lora on {named}")));

    let generate = |more: &[&str]| {
        let arguments = ["generate", "--raw", "--prompt", "Sky", "--max-new-tokens", "4"];
        place.succeed(&[&arguments[..], more].concat()).stdout
    };
    let given = base.display().to_string();
    let expected = generate(&["--model", &given, "--adapter", "run/adapter"]);
    assert_eq!(generate(&["--adapter", "run"]), expected);
    assert_eq!(generate(&["--adapter", "run/adapter"]), expected);
    place.succeed(&["merge", "--adapter", "run", "--out", "merged", "--dtype", "f32"]);
    assert_eq!(generate(&["--model", "merged"]), expected);
    place.succeed(&["inspect", "--adapter", "run"]);
    place.succeed(&["eval", "--adapter", "run", "--tasks", "loss:animals.jsonl", "--skip-base"]);
    place.succeed(&["export", "--adapter", "run", "--as", "lora", "--out", "lora"]);
    assert_eq!(json(&place, "lora/adapter_config.json")["base_model_name_or_path"], named);

    // Adapters of earlier builds, which name their base by a folder's name alone.
    let metadata = place.read("run/adapter/hydralora.json");
    let mut old: Value = serde_json::from_str(&metadata).unwrap();
    old["base_model"] = "stories260K".into();
    place.write("run/adapter/hydralora.json", &old.to_string());
    let text = place.read("run/adapter/adapter_config.json").replace(named, "stories260K");
    place.write("run/adapter/adapter_config.json", &text);
    assert_eq!(generate(&["--model", &given, "--adapter", "run"]), expected);
    let ran = place.run(&["generate", "--adapter", "run", "--raw", "--prompt", "a"]);
    assert_eq!(ran.code, Some(2));
    for part in ["--model: is left out", "`stories260K`", "give the base model"] {
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
}

#[test]
fn what_is_no_model_and_what_is_no_adapter_is_said() {
    let place = Place::new();
    let method = "method={name: lora, rank: 2, targets: qv}";
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", method]);
    let refused = |arguments: &[&str], parts: &[&str]| {
        let ran = place.run(arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
        }
        assert!(!ran.stderr.contains("fetching"), "{}", ran.stderr);
    };
    let prompt = ["--raw", "--prompt", "a"];
    let generate = |more: &[&'static str]| -> Vec<&'static str> {
        [&["generate"], &prompt[..], more].concat()
    };
    refused(&generate(&["--model", "run/adapter"]), &["this is an adapter and no model"]);
    refused(&generate(&["--model", "run"]), &["the folder of a run", "run/adapter"]);
    refused(
        &["check", "recipe.yaml", "--set", "model.path=run/adapter"],
        &["model.path", "adapter"],
    );
    // Before anything is looked for on the hub.
    refused(
        &generate(&["--model", "smollm2-135m", "--adapter", "nope"]),
        &["nope", "no such folder"],
    );
    refused(
        &["eval", "--model", "smollm2-135m", "--adapter", "x=nope", "--tasks", "gsm8k"],
        &["nope"],
    );
    refused(&generate(&[]), &["--model"]);
    // Another base: by its name, and not by shapes.
    place.widened_model("wide");
    let wide = generate(&["--model", "wide", "--adapter", "run"]);
    refused(&wide, &["was trained on `", "the model given is `", "/wide`"]);
    let ran = place.run(&wide);
    assert!(!ran.stderr.contains("shape"), "{}", ran.stderr);
    // Files that tell no fingerprint name a base all the same.
    fs::remove_file(place.path("run/adapter/hydralora.json")).unwrap();
    let text = place.read("run/adapter/adapter_config.json").replace("\"r\": 2", "\"r\": 3");
    place.write("run/adapter/adapter_config.json", &text);
    refused(&wide, &["as its base model, and the model given is `", "has shape"]);
}

//! An adapter with an update for each domain, from its recipe to its use.

use crate::support::{Place, model};
use serde_json::Value;

fn logits(place: &Place, model: &str, more: &[&str]) -> Vec<f64> {
    let text = ["inspect", "--model", model, "--logits", "Who barks", "--json"];
    let found = place.succeed(&[&text[..], more].concat());
    let found: Value = serde_json::from_str(&found.stdout).unwrap();
    found["logits"]["last"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let largest = a.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

#[test]
fn a_domain_is_named_and_its_update_folds() {
    let place = Place::new();
    let folder = model().display().to_string();
    let method = |domains: &str| format!("method={{name: mtl-lora, rank: 2, domains: {domains}}}");
    let refused = |arguments: &[&str], parts: &[&str]| {
        let ran = place.run(arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "{part} is missing in {}", ran.stderr);
        }
    };
    let wrong = method("[animals, colors]");
    refused(
        &["train", "recipe.yaml", "--quiet", "--set", &wrong],
        &["`colours` too", "`colors` is no"],
    );
    let right = method("[colours, animals]");
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", &right]);

    let adapter = "run/adapter";
    let [animals, colours] = ["animals", "colours"]
        .map(|domain| logits(&place, &folder, &["--adapter", adapter, "--domain", domain]));
    assert!(distance(&animals, &colours) > 1e-3);
    let use_it = ["generate", "--model", &folder, "--raw", "--prompt", "a", "--adapter", adapter];
    refused(&use_it, &["--domain", "colours, animals"]);
    refused(&[&use_it[..], &["--domain", "law"]].concat(), &["`law`", "colours, animals"]);
    let brief = ["--domain", "animals", "--max-new-tokens", "2"];
    place.succeed(&[&use_it[..], &brief].concat());
    // A task is scored as of the domain it is named after, unless one is given.
    let score = |tasks: &str, more: &[&str]| {
        let start = ["eval", "--model", &folder, "--adapter", adapter, "--json", "--tasks", tasks];
        let found = place.succeed(&[&start[..], more].concat()).stdout;
        let found: Value = serde_json::from_str(&found).unwrap();
        ["animals", "colours"].map(|domain| {
            found["models"]["run"]["results"][format!("loss_{domain}")]["loss,none"].as_f64()
        })
    };
    let both = score("loss:animals.jsonl,loss:colours.jsonl", &[]);
    let [of_animals, _] = score("loss:animals.jsonl", &["--domain", "animals"]);
    let [_, of_colours] = score("loss:colours.jsonl", &["--domain", "colours"]);
    let [mistaken, _] = score("loss:animals.jsonl", &["--domain", "colours"]);
    assert_eq!(both, [of_animals, of_colours]);
    assert!(of_animals.is_some() && of_animals != mistaken);
    place.write("law.jsonl", &place.read("animals.jsonl"));
    let score = ["eval", "--model", &folder, "--adapter", adapter, "--tasks", "loss:law.jsonl"];
    refused(&score, &["--domain", "`loss_law`", "colours, animals"]);

    let fold = ["--model", &folder, "--adapter", adapter, "--out"];
    refused(&[&["merge"], &fold[..], &["never"]].concat(), &["--domain", "colours, animals"]);
    let merge = ["merged", "--dtype", "f32", "--domain", "animals"];
    place.succeed(&[&["merge"], &fold[..], &merge].concat());
    let merged = logits(&place, &place.path("merged").display().to_string(), &[]);
    assert!(distance(&animals, &merged) < 1e-5);
    let export = ["plain", "--as", "lora", "--domain", "colours"];
    place.succeed(&[&["export"], &fold[..], &export].concat());
    let plain = logits(&place, &folder, &["--adapter", "plain"]);
    assert!(distance(&colours, &plain) < 1e-5);
    // One that treats all alike has none to choose.
    let arguments = ["inspect", "--model", &folder, "--logits", "a", "--adapter", "plain"];
    refused(&[&arguments[..], &["--domain", "animals"]].concat(), &["treats all domains alike"]);
}

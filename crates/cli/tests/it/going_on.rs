//! Runs that are made longer, and runs that start from an adapter.

use crate::support::Place;
use std::fs;

fn tensors(place: &Place, folder: &str) -> Vec<u8> {
    fs::read(place.path(folder).join("adapter_model.safetensors")).unwrap()
}

fn rates(place: &Place, run: &str) -> Vec<f64> {
    let rows = place.read(&format!("{run}/metrics.jsonl"));
    let rows = rows.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    rows.filter_map(|row| row["learning_rate"].as_f64()).collect()
}

#[test]
fn a_finished_run_is_made_longer() {
    let place = Place::new();
    let constant = ["--quiet", "--set", "train.schedule=constant", "--set", "train.warmup_steps=1"];
    let train =
        |more: &[&str]| place.succeed(&[&["train", "recipe.yaml"], &constant[..], more].concat());
    train(&["--set", "output=long"]);
    train(&["--set", "output=short", "--set", "train.max_steps=12"]);
    let ran = place.succeed(&[
        "train",
        "recipe.yaml",
        "--resume",
        "--set",
        "output=short",
        "--set",
        "train.schedule=constant",
        "--set",
        "train.warmup_steps=1",
    ]);
    for part in
        ["train.max_steps was 12 and is 20 now", "over the new length", "going on after step 12"]
    {
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
    // With a rate that does not follow the length, it is the longer run bit for bit.
    assert!(tensors(&place, "short/adapter") == tensors(&place, "long/adapter"));
    // With one that does, the rest follows the longer run's.
    let cosine =
        |more: &[&str]| place.succeed(&[&["train", "recipe.yaml", "--quiet"], more].concat());
    cosine(&["--set", "output=all"]);
    cosine(&["--set", "output=part", "--set", "train.max_steps=10"]);
    cosine(&["--set", "output=part", "--resume"]);
    assert_eq!(rates(&place, "part")[10..], rates(&place, "all")[10..]);
    assert_ne!(rates(&place, "part")[..10], rates(&place, "all")[..10]);
    // Where nothing changed, going on from the end trains nothing more.
    let before = tensors(&place, "all/adapter");
    cosine(&["--set", "output=all", "--resume"]);
    assert!(before == tensors(&place, "all/adapter"));
    // AdaLoRA's ranks are planned by the length.
    let adalora =
        "method={name: adalora, init_r: 3, target_r: 2, tinit: 2, tfinal: 2, targets: qv}";
    let ada = ["train", "recipe.yaml", "--quiet", "--set", adalora, "--set", "output=ada"];
    place.succeed(&[&ada[..], &["--set", "train.max_steps=8"]].concat());
    let ran = place.run(&[&ada[..], &["--resume"]].concat());
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("follow the length of the run"), "{}", ran.stderr);
}

#[test]
fn training_starts_from_an_adapter() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", "output=first"]);
    let train = |output: &str, more: &[&str]| {
        let output = format!("output={output}");
        let arguments = ["train", "recipe.yaml", "--quiet", "--set", &output];
        place.run(&[&arguments[..], more].concat())
    };
    // The first loss is where the adapter stood, far below the base's.
    let ran = train("second", &["--set", "method.init_from=first", "--set", "method.dropout=0"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let first_loss = |run: &str| -> f64 {
        let rows = place.read(&format!("{run}/metrics.jsonl"));
        let row: serde_json::Value = serde_json::from_str(rows.lines().next().unwrap()).unwrap();
        row["loss"].as_f64().unwrap()
    };
    assert!(first_loss("second") < 0.8 * first_loss("first"));
    assert!(place.read("second/recipe.yaml").contains("init_from: ../first/adapter"));
    place.succeed(&["check", "second/recipe.yaml"]);
    // A learning rate of nearly nothing leaves it as it was.
    let still = ["--set", "method.init_from=first/adapter", "--set", "train.learning_rate=1e-30"];
    assert_eq!(train("still", &still).code, Some(0));
    assert!(tensors(&place, "still/adapter") == tensors(&place, "first/adapter"));

    let refused = |more: &[&str], parts: &[&str]| {
        let ran = train("refused", more);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
        }
        assert!(!place.path("refused/adapter").exists());
    };
    let from = "method.init_from=first";
    refused(
        &["--set", "method.init_from=none"],
        &["--set method.init_from=none", "no such folder"],
    );
    refused(&["--set", "method.init_from=3"], &["expected the folder of an adapter"]);
    refused(&["--set", from, "--set", "method.rank=4"], &["method.rank is 2 there and 4 here"]);
    refused(&["--set", from, "--set", "method.targets=qv"], &["method.init_from", "q_proj"]);
    refused(&["--set", from, "--set", "method.router_init=centroids"], &["router_init", "use one"]);
    let lora = "method={name: lora, rank: 2, alpha: 16, targets: ffn, init_from: first}";
    refused(&["--set", lora], &["holds a `hydralora`, and method.name is `lora`"]);
    let full = "method={name: full, init_from: first}";
    refused(&["--set", full], &["method.name is `full`"]);

    // LoRAs become a HydraLoRA by `import`, which then trains on.
    let lora = "method={name: lora, rank: 2, alpha: 16, targets: ffn}";
    assert_eq!(train("one", &["--set", lora]).code, Some(0));
    refused(&["--set", "method.init_from=one"], &["hydralora import --from lora"]);
    let lora = "method={name: lora, rank: 2, alpha: 16, targets: ffn, init_from: one}";
    assert_eq!(train("two", &["--set", lora]).code, Some(0));
    place.succeed(&["import", "--from", "lora", "one", "two", "--out", "both"]);
    let both = ["--set", "method.init_from=both", "--set", "method.num_experts=2"];
    let ran = train("hydra", &both);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}

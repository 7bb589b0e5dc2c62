//! `eval` from the command line, on the bundled sample.

use crate::support::{Place, model};
use serde_json::Value;
use std::path::Path;

fn sample() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/eval-sample").display().to_string()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn base_and_adapters_are_scored_in_one_pass_and_compared() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let (model, data) = (model().display().to_string(), sample());
    let arguments = [
        "eval",
        "--model",
        &model,
        "--adapter",
        "run/adapter",
        "--adapter",
        "again=run/best",
        "--data",
        &data,
        "--tasks",
        "mmlu,mmlu_ppl_law,loss:animals.jsonl",
        "--samples",
        "samples.jsonl",
        "--out",
        "results.json",
        "--json",
    ];
    let ran = place.succeed(&arguments);
    let models = &json(&ran.stdout)["models"];
    assert_eq!(models.as_object().unwrap().keys().collect::<Vec<_>>(), ["base", "run", "again"]);
    let loss = |name: &str| models[name]["results"]["loss"]["loss,none"].as_f64().unwrap();
    assert!(loss("run") < loss("base"), "what was trained on is likelier");
    let adapter = &models["run"]["config"]["identity"]["adapter"];
    assert_eq!(adapter["sha256"]["adapter_model.safetensors"].as_str().unwrap().len(), 64);
    // 10 questions twice (4 of the second kind) and 24 records, for three models, and a header.
    let lines = place.read("samples.jsonl").lines().count();
    assert_eq!(lines, 1 + 3 * (10 + 4 + 24));

    // A second run answers nothing anew.
    let again = place.succeed(&arguments);
    assert_eq!(json(&again.stdout)["models"]["run"]["scores"], models["run"]["scores"]);
    assert_eq!(place.read("samples.jsonl").lines().count(), lines);

    let compared = ["eval", "--compare", "results.base.json", "results.run.json"];
    let ran = place.succeed(&compared);
    assert!(ran.stdout.contains("95 % interval"), "{}", ran.stdout);
    let ran = place.succeed(&[&compared[..], &["--json"]].concat());
    let differences = json(&ran.stdout)["differences"].as_array().unwrap().clone();
    let row = differences.iter().find(|row| row["task"] == "loss_animals").unwrap();
    assert!(row["interval_95"][1].as_f64().unwrap() < 0.0, "a lower loss for certain: {row}");
    assert_eq!(row["lower"], 24);
}

#[test]
fn wrong_arguments_end_with_status_2() {
    let place = Place::new();
    let (model, data) = (model().display().to_string(), sample());
    let refused = |arguments: &[&str], expected: &str| {
        let all = [&["eval", "--model", &model, "--data", &data][..], arguments].concat();
        let ran = place.run(&all);
        assert_eq!(ran.code, Some(2), "{arguments:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{arguments:?}\n{}", ran.stderr);
    };
    refused(&["--tasks", "gms8k"], "did you mean `gsm8k`");
    refused(&["--tasks", "humaneval"], "--allow-code-execution: is not given");
    refused(&["--tasks", "bbh_cot_fewshot"], "is 1024; the model's context holds 512");
    refused(&["--tasks", "mmlu", "--shots", "7"], "--shots: is 7");
    refused(&["--tasks", "mmlu", "--apply-chat-template"], "the model has no chat template");
    refused(&["--tasks", "bbh_fewshot_snarks"], "snarks.json");
    refused(&["--tasks", "exact"], "`--tasks exact:FILE`");
    refused(&["--tasks", "exact:recipe.yaml"], "recipe.yaml");
    refused(&["--tasks", "mmlu", "--adapter", "nowhere"], "nowhere");
    refused(&["--tasks", "mmlu", "--adapter", "base=x"], "`base` is taken");
    refused(&["--tasks", "loss:animals.jsonl"], "");
    place.write("samples.jsonl", "{\"run\": 1}\n");
    refused(&["--tasks", "mmlu", "--samples", "samples.jsonl"], "belongs to a run with another");
}

#[test]
fn a_template_s_missing_tokens_are_named() {
    let place = Place::new();
    let options = ["--set", "data.template=chatml", "--set", "train.max_steps=2", "--quiet"];
    let trained = place.run(&[&["train", "recipe.yaml"][..], &options].concat());
    if trained.code == Some(2) {
        // Training may refuse the template for the same reason.
        assert!(trained.stderr.contains("<|im_"), "{}", trained.stderr);
        return;
    }
    let (model, data) = (model().display().to_string(), sample());
    let ran = place.run(&[
        "eval",
        "--model",
        &model,
        "--data",
        &data,
        "--adapter",
        "run/adapter",
        "--tasks",
        "mmlu",
        "--apply-chat-template",
    ]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("<|im_start|>"), "{}", ran.stderr);
}

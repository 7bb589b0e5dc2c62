//! A run that is killed or interrupted and goes on.

use crate::support::{Place, ran};
use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

fn adapter(place: &Place, run: &str) -> Vec<u8> {
    fs::read(place.path(run).join("adapter/adapter_model.safetensors")).unwrap()
}

fn losses(place: &Place, run: &str) -> Vec<String> {
    let metrics = place.read(&format!("{run}/metrics.jsonl"));
    let value = |line: &str, key: &str| {
        serde_json::from_str::<serde_json::Value>(line).unwrap()[key].to_string()
    };
    metrics
        .lines()
        .map(|line| {
            format!("{} {} {}", value(line, "step"), value(line, "loss"), value(line, "valid_loss"))
        })
        .collect()
}

/// Waits until the run has written a checkpoint of step 10.
fn wait_for_step_10(place: &Place, child: &mut Child, run: &str) {
    let state = place.path(run).join("checkpoints/step-000010/state.json");
    let deadline = Instant::now() + Duration::from_secs(120);
    while !state.exists() {
        assert!(Instant::now() < deadline, "no checkpoint after two minutes");
        assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn killed_and_resumed_equals_straight_through_bit_for_bit() {
    let place = Place::new();
    // Long enough that the kill lands inside the run.
    let long = ["--set", "train.max_steps=60", "--set", "train.save_every=10", "--quiet"];
    let train = |output: &'static str, more: &[&'static str]| {
        let mut arguments = vec!["train", "recipe.yaml", "--set", output];
        arguments.extend(long);
        arguments.extend(more);
        arguments
    };
    place.succeed(&train("output=straight", &[]));
    let mut child = place.start(&train("output=killed", &[]));
    wait_for_step_10(&place, &mut child, "killed");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!place.path("killed/adapter").exists(), "it was killed before the end");
    place.succeed(&train("output=killed", &["--resume"]));
    assert!(adapter(&place, "straight") == adapter(&place, "killed"), "adapters differ");
    assert_eq!(losses(&place, "straight"), losses(&place, "killed"));
}

#[cfg(unix)]
#[test]
fn an_interrupt_saves_first() {
    let place = Place::new();
    let steps = ["--set", "train.max_steps=4000", "--set", "train.epochs=2000"];
    let mut arguments = vec!["train", "recipe.yaml"];
    arguments.extend(steps);
    arguments.extend(["--set", "train.save_every=10", "--set", "train.eval_every=0"]);
    let mut child = place.start(&arguments);
    wait_for_step_10(&place, &mut child, "run");
    let kill = std::process::Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    let ended = ran(child.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert!(ended.stdout.contains("--resume"), "{}", ended.stdout);
    let last = place.read("run/metrics.jsonl").lines().count();
    let saved = place.path(&format!("run/checkpoints/step-{last:06}/state.json"));
    assert!(saved.exists(), "step {last} was not saved");
}

#[test]
fn another_recipe_or_no_checkpoint_is_refused() {
    let place = Place::new();
    let ran = place.run(&["train", "recipe.yaml", "--resume"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("holds no checkpoint"), "{}", ran.stderr);
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let ran = place.run(&["train", "recipe.yaml"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("holds a run already"), "{}", ran.stderr);
    let refused = |set: &str, part: &str| {
        let ran = place.run(&["train", "recipe.yaml", "--resume", "--set", set]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    };
    refused("train.learning_rate=0.5", "train.learning_rate was 0.01 and is 0.5 now");
    refused("method.rank=3", "method.rank was 2 and is 3 now");
    refused("data.train.1.weight=2", "data.train[1].weight was 1.0 and is 2.0 now");
    refused("train.max_steps=10", "has taken 20 steps, and the run is to have 10");
    let text = place.read("animals.jsonl").replace("barks", "sings");
    place.write("animals.jsonl", &text);
    refused("train.seed=41", "the training data are others");
    let wide = place.widened_model("wide").display().to_string();
    let more = place.read("animals.jsonl").replace("sings", "barks");
    place.write("animals.jsonl", &more);
    refused(&format!("model.path={wide}"), "the base model was `");
}

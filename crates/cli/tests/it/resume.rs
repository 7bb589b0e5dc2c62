//! A run that is killed or interrupted and goes on.

use crate::files::all_below;
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

#[test]
fn a_refused_resume_changes_nothing() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let before = all_below(&place.path("run"));
    for change in ["train.learning_rate=9.0", "method.rank=3", "data.max_seq_len=64"] {
        let ran = place.run(&["train", "recipe.yaml", "--resume", "--set", change]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(before == all_below(&place.path("run")), "{change}");
    }
}

#[test]
fn a_finished_run_says_so_and_stays_as_it_is() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let before = all_below(&place.path("run"));
    let resume = ["train", "recipe.yaml", "--resume"];
    let again = place.succeed(&resume);
    assert!(again.stdout.contains("already finished after 20 steps"), "{}", again.stdout);
    assert!(again.stdout.contains("animals"), "losses are shown: {}", again.stdout);
    assert!(before == all_below(&place.path("run")), "a finished run was changed");
    // What a crash after the last checkpoint kept from being written is made up for.
    for missing in ["adapter", "report.html", "routing.json"] {
        let path = place.path("run").join(missing);
        let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
    }
    place.succeed(&resume);
    let mut after = all_below(&place.path("run"));
    for timed in ["report.html", "data.json"] {
        assert_eq!(after.remove(timed).is_some(), before.contains_key(timed));
    }
    for (name, bytes) in &after {
        assert!(before.get(name) == Some(bytes), "{name} differs");
    }
    let report = place.read("run/report.html");
    assert!(report.contains("Held-out loss per domain") && report.contains("Routing"));
}

#[test]
fn early_stopping_is_not_forgotten() {
    let place = Place::new();
    // Steps so short that nothing gets better, and yet each changes the adapter.
    let patience = ["--set", "train.early_stopping_patience=1", "--set", "train.eval_every=2"];
    let rate = ["--set", "train.learning_rate=1e-30"];
    let first = [&["train", "recipe.yaml"][..], &patience, &rate].concat();
    let stopped = place.succeed(&first);
    assert!(stopped.stdout.contains("stopped early after"), "{}", stopped.stdout);
    let before = all_below(&place.path("run"));
    let resume = [&first[..], &["--resume"]].concat();
    let again = place.succeed(&resume);
    assert!(again.stdout.contains("already stopped early after"), "{}", again.stdout);
    assert!(before == all_below(&place.path("run")), "one step more was taken");
    fs::remove_dir_all(place.path("run/adapter")).unwrap();
    place.succeed(&resume);
    let after = all_below(&place.path("run"));
    let file = "adapter/adapter_model.safetensors";
    assert!(before[file] == after[file], "the adapter is that of another step");
}

#[cfg(unix)]
#[test]
fn one_process_has_a_run() {
    let place = Place::new();
    let steps = ["--set", "train.max_steps=4000", "--set", "train.epochs=2000"];
    let save = ["--set", "train.save_every=10", "--set", "train.eval_every=0"];
    let start = [&["train", "recipe.yaml"][..], &steps, &save].concat();
    let mut child = place.start(&start);
    wait_for_step_10(&place, &mut child, "run");
    let ran = place.run(&[&start[..], &["--resume"]].concat());
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("in use by process {}", child.id())), "{}", ran.stderr);
    child.kill().unwrap();
    child.wait().unwrap();
    let lines = place.read("run/metrics.jsonl");
    let numbers = lines
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64());
    assert!(numbers.enumerate().all(|(at, step)| at as u64 + 1 == step), "rows of two runs");
    // Neither does a killed run keep others out.
    let mut child = place.start(&[&start[..], &["--resume"]].concat());
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[cfg(unix)]
#[test]
fn a_closed_terminal_saves_first() {
    let place = Place::new();
    let steps = ["--set", "train.max_steps=4000", "--set", "train.epochs=2000"];
    let save = ["--set", "train.save_every=10", "--set", "train.eval_every=0"];
    let mut child = place.start(&[&["train", "recipe.yaml"][..], &steps, &save].concat());
    wait_for_step_10(&place, &mut child, "run");
    // As `2>&1 | tee log` dies with its terminal, and the signal comes from it and from the shell.
    drop(child.stderr.take());
    drop(child.stdout.take());
    for _ in 0..2 {
        let id = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-HUP", &id]).status().unwrap().success());
    }
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let last = place.read("run/metrics.jsonl").lines().count();
    let saved = place.path(&format!("run/checkpoints/step-{last:06}/state.json"));
    assert!(saved.exists(), "step {last} was not saved");
}

#[cfg(unix)]
#[test]
fn what_is_in_the_way_of_a_run_is_kept_and_what_a_killed_one_left_is_swept() {
    let place = Place::new();
    let steps = ["--set", "train.max_steps=60", "--set", "train.save_every=10"];
    let start =
        [&["train", "recipe.yaml", "--set", "train.keep_checkpoints=1"][..], &steps].concat();
    let mut child = place.start(&start);
    wait_for_step_10(&place, &mut child, "run");
    child.kill().unwrap();
    child.wait().unwrap();
    let kept: Vec<String> = fs::read_dir(place.path("run/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("step-"))
        .collect();
    for name in &kept {
        place.write(&format!("run/checkpoints/{name}/notes.txt"), "mine");
    }
    place.write("run/best/notes.txt", "mine");
    let left = "run/checkpoints/.step-000030.abcdefghijkl.hydralora.tmp";
    place.write(&format!("{left}/state.json"), "{}");
    let ran = place.succeed(&[&start[..], &["--resume"]].concat());
    assert!(ran.stderr.contains("note: an old checkpoint is kept"), "{}", ran.stderr);
    assert!(ran.stderr.contains("notes.txt"), "{}", ran.stderr);
    for name in &kept {
        assert_eq!(place.read(&format!("run/checkpoints/{name}/notes.txt")), "mine");
    }
    let best = ["run/best/notes.txt", "run/best.kept-1/notes.txt"];
    assert_eq!(best.iter().filter(|path| place.path(path).exists()).count(), 1);
    assert!(!place.path(left).exists());
    assert!(place.path("run/adapter/adapter_config.json").exists());
}

#[test]
fn metrics_cut_inside_a_character_are_gone_on_from() {
    let place = Place::new();
    let recipe = place.read("recipe.yaml").replace("domain: colours", "domain: \"色\"");
    place.write("recipe.yaml", &recipe);
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let expected = losses(&place, "run");
    fs::remove_dir_all(place.path("run/adapter")).unwrap();
    fs::remove_dir_all(place.path("run/checkpoints/step-000020")).unwrap();
    let whole = fs::read(place.path("run/metrics.jsonl")).unwrap();
    let at = whole.iter().rposition(|byte| *byte >= 0x80).unwrap();
    fs::write(place.path("run/metrics.jsonl"), &whole[..at]).unwrap();
    place.succeed(&["train", "recipe.yaml", "--quiet", "--resume"]);
    assert_eq!(losses(&place, "run"), expected);
}

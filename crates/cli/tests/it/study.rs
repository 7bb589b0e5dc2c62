//! Studies with a real model: cells as child processes, killed and taken over, quick versions of all files.

use crate::support::{Place, model};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const STUDY: &str = "\
name: small
base:
  model: {path: MODEL}
  data:
    train:
      - {path: animals.jsonl, domain: animals}
      - {path: colours.jsonl, domain: colours}
    template: plain
    max_seq_len: 128
  method: {name: hydralora, rank: 2, alpha: 16, num_experts: 3, dropout: 0.1, targets: ffn}
  train: {batch_size: 4, epochs: 40, max_steps: STEPS, learning_rate: 1.0e-2, eval_every: 0, save_every: 5}
split: {valid: 0.2, test: 0.2}
grid:
  method:
    - {label: hydralora}
    - {label: lora, set: {method: {name: lora, rank: 4, alpha: 32, targets: ffn}}}
  train.learning_rate: [1.0e-3, 1.0e-2]
tune: train.learning_rate
reference: lora
seeds: 2
constraints:
  - equal_parameters: {reference: hydralora, solve: method.rank, tolerance: 0.1}
  - equal_scale: {reference: hydralora, solve: method.alpha}
";

fn place(steps: usize) -> Place {
    let place = Place::new();
    let text = STUDY.replace("MODEL", &model().display().to_string());
    place.write("small.yaml", &text.replace("STEPS", &steps.to_string()));
    place
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Results by cell.
fn results(place: &Place, study: &str) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(place.path(study).join("cells")).unwrap() {
        let path = entry.unwrap().path();
        if let Ok(text) = fs::read_to_string(path.join("result.json")) {
            found.insert(path.file_name().unwrap().to_string_lossy().into_owned(), json(&text));
        }
    }
    found
}

#[test]
fn a_study_is_planned_run_and_reported() {
    let place = place(6);
    let planned = place.succeed(&["--json", "study", "plan", "small.yaml", "--out", "s"]);
    assert_eq!(json(&planned.stdout)["cells"], 8, "{}", planned.stdout);
    let shown = place.succeed(&["study", "plan", "small.yaml", "--out", "s"]);
    assert!(shown.stdout.contains("8 cells, 0 of them new"), "{}", shown.stdout);

    let ran = place.succeed(&["--json", "study", "run", "s", "--jobs", "2"]);
    let ran = json(&ran.stdout);
    assert_eq!((&ran["trained"], &ran["scored"]), (&8.into(), &4.into()), "{ran}");
    let results = results(&place, "s");
    assert_eq!(results.len(), 8);
    for (id, result) in &results {
        let trained = &result["trained"];
        assert!(trained["valid"]["loss"].as_f64().unwrap() > 0.0, "{result}");
        assert!(trained["base"]["domains"]["animals"]["loss"].is_f64(), "{result}");
        assert_eq!(trained["steps"], 6);
        assert!(trained["tokens"].as_u64() > trained["label_tokens"].as_u64());
        assert!(trained["parameters"]["trainable"].as_u64() > Some(1000));
        assert!(trained["energy"]["reason"].is_string() || trained["energy"]["energy_j"].is_f64());
        if cfg!(target_os = "linux") {
            assert!(trained["cpu_s"].as_f64() > Some(0.0), "{result}");
        }
        let gates = result["identity"]["recipe"]["method"]["name"] == "hydralora";
        assert_eq!(trained["gates"].is_object(), gates, "{result}");
        if let Some(test) = result["test"].as_object() {
            assert!(test["tasks"]["loss_animals"]["loss,none"].is_f64(), "{result}");
            assert!(test["tasks"]["loss_colours"]["label_tokens"].as_f64() > Some(0.0));
        }
        // What the study itself takes beside training.
        assert!(result["overhead_s"].as_f64() < Some(2.0), "{id}: {result}");
    }
    assert_eq!(results.values().filter(|result| result["test"].is_object()).count(), 4);
    let again = place.succeed(&["--json", "study", "run", "s"]);
    assert_eq!(json(&again.stdout)["trained"], 0);

    let status = place.succeed(&["study", "status", "s"]);
    assert!(status.stdout.contains("8 cells: 8 trained, 4 scored"), "{}", status.stdout);
    let report = place.succeed(&["study", "report", "s"]);
    assert!(report.stdout.contains("of 1 comparison with lora"), "{}", report.stdout);
    assert!(place.read("s/report/report.md").contains("loss by domain"));
    assert_eq!(place.read("s/report/results.csv").lines().count(), 9);
    for format in ["slurm", "k8s", "snakemake", "sh"] {
        let lines = place.succeed(&["study", "export", "s", "--format", format]);
        assert!(lines.stdout.contains("study run"), "{}", lines.stdout);
    }

    // Data that change after the plan are noticed before anything is trained on them.
    place.write(
        "more.yaml",
        &place
            .read("small.yaml")
            .replace("seeds: 2", "seeds: 3")
            .replace("split: {valid: 0.2, test: 0.2}\n", "")
            .replace("name: small", "name: more"),
    );
    place.succeed(&["study", "plan", "more.yaml", "--out", "m"]);
    place.write("animals.jsonl", "{\"instruction\": \"Who?\", \"output\": \"You.\"}\n");
    let ran = place.run(&["study", "run", "m"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("animals.jsonl: has changed since the cell"), "{}", ran.stderr);
    let planned = place.succeed(&["--json", "study", "plan", "more.yaml", "--out", "m"]);
    assert_eq!(json(&planned.stdout)["new"], 12, "other data make other cells");
}

#[test]
fn faults_of_a_study_file_exit_with_2() {
    let place = place(6);
    let text = place.read("small.yaml");
    let fails = |from: &str, to: &str, expected: &str| {
        place.write("bad.yaml", &text.replacen(from, to, 1));
        let ran = place.run(&["study", "plan", "bad.yaml", "--out", "bad"]);
        assert_eq!(ran.code, Some(2), "{to}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{to}: {}", ran.stderr);
        assert!(ran.stderr.contains("bad.yaml"), "{}", ran.stderr);
        let _ = fs::remove_dir_all(place.path("bad"));
    };
    fails(
        "set: {method: {name: lora, rank: 4",
        "set: {method: {name: lora, rnk: 4",
        "method.rnk: unknown option; did you mean `rank`?",
    );
    fails(
        "train.learning_rate: [1.0e-3, 1.0e-2]\ntune: train.learning_rate",
        "train.learning_rat: [1.0e-3]",
        "did you mean `learning_rate`?",
    );
    fails("tolerance: 0.1}", "tolerance: 0.0001}", "no method.rank gives `lora`");
    fails(
        "train.learning_rate: [1.0e-3, 1.0e-2]",
        "train.learning_rate: []",
        "grid.train.learning_rate: is empty",
    );
    fails("targets: ffn}\n  train:", "targets: [no_proj]}\n  train:", "no_proj");
    fails("seeds: 2", "seeds: 2\ntasks: [\"loss:none.jsonl\"]", "there is no file");
    fails("seeds: 2", "seeds: 2\ntasks: [mmul]", "mmul");
    fails("animals.jsonl", "nothing.jsonl", "nothing.jsonl");
}

/// Step of the newest checkpoint and of the last row of the metrics in a cell's run, where one is under way.
fn under_way(cell: &Path) -> Option<(u64, u64)> {
    let mut found = None;
    for entry in fs::read_dir(cell).ok()? {
        let path = entry.ok()?.path();
        if !path.file_name()?.to_str()?.starts_with("run-") {
            continue;
        }
        let steps =
            fs::read_dir(path.join("checkpoints")).into_iter().flatten().filter_map(|entry| {
                entry.ok()?.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok()
            });
        let saved = steps.max().unwrap_or(0);
        let metrics = fs::read_to_string(path.join("metrics.jsonl")).unwrap_or_default();
        let last = metrics
            .lines()
            .rev()
            .find_map(|line| serde_json::from_str::<Value>(line).ok()?["step"].as_u64());
        found = Some((saved, last.unwrap_or(0)));
    }
    found
}

/// Workers are killed again and again, whatever they are doing; what they began is taken over and gives
/// bit for bit what it would have given.
#[cfg(target_os = "linux")]
#[test]
fn killed_workers_lose_at_most_a_checkpoint_interval() {
    const INTERVAL: u64 = 5;
    let place = place(60);
    place.succeed(&["study", "plan", "small.yaml", "--out", "calm"]);
    place.succeed(&["study", "run", "calm"]);
    place.succeed(&["study", "plan", "small.yaml", "--out", "wild"]);
    let cells: Vec<PathBuf> = {
        let folder = fs::read_dir(place.path("wild/cells")).unwrap();
        folder.map(|entry| entry.unwrap().path()).collect()
    };
    let done = || cells.iter().filter(|cell| cell.join("result.json").is_file()).count();
    let deadline = Instant::now() + Duration::from_secs(400);
    let mut kills = 0_u64;
    // Differently long lives, so that they end in every phase of a cell.
    while done() < cells.len() && kills < 12 {
        assert!(
            Instant::now() < deadline,
            "{} of {} cells after {kills} kills",
            done(),
            cells.len()
        );
        let start =
            || place.start(&["--threads", "1", "study", "run", "wild", "--stale-after", "5"]);
        let mut workers = [start(), start()];
        std::thread::sleep(Duration::from_millis(700 + (kills * 389) % 1900));
        for worker in &mut workers {
            worker.kill().unwrap();
            worker.wait().unwrap();
        }
        kills += 1;
        for cell in &cells {
            if let Some((saved, last)) = under_way(cell) {
                assert!(
                    last <= saved + INTERVAL + 1,
                    "{}: step {last}, saved {saved}",
                    cell.display()
                );
            }
        }
    }
    let ran = place.succeed(&["study", "run", "wild"]);
    assert!(ran.stdout.contains("0 failed here"), "{}", ran.stdout);
    let (calm, wild) = (results(&place, "calm"), results(&place, "wild"));
    assert_eq!(calm.len(), 8);
    assert!(calm.keys().eq(wild.keys()));
    for (id, calm) in &calm {
        for key in ["valid", "steps", "tokens", "curve", "gates", "parameters"] {
            assert_eq!(calm["trained"][key], wild[id]["trained"][key], "{id} {key}");
        }
        assert_eq!(calm["test"]["tasks"], wild[id]["test"]["tasks"], "{id}");
        let left: Vec<PathBuf> = fs::read_dir(place.path("wild/cells").join(id))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.to_string_lossy().contains("run-") || path.ends_with("claims"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let taken_over = wild.values().filter(|result| result["attempts"].as_u64() > Some(1)).count();
    assert!(kills > 0 && taken_over > 0, "{kills} kills, none of them in a cell");
}

/// A disk that is full is named, and with room again the study goes on.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_nothing_is_lost() {
    let place = place(10);
    let disk = place.path("disk");
    fs::create_dir(&disk).unwrap();
    let mount = |arguments: &[&str]| {
        let ran = std::process::Command::new("mount").args(arguments).arg(&disk).output();
        ran.is_ok_and(|ran| ran.status.success())
    };
    if !mount(&["-t", "tmpfs", "-o", "size=700k", "tmpfs"]) {
        return hydralora_testing::skip("mount", "a small disk cannot be mounted here");
    }
    place.succeed(&["study", "plan", "small.yaml", "--out", "disk/s"]);
    let full = place.run(&["study", "run", "disk/s"]);
    let room = mount(&["-o", "remount,size=80m"]);
    let healed = place.run(&["study", "run", "disk/s", "--retry"]);
    let found = results(&place, "disk/s");
    let unmounted = std::process::Command::new("umount").arg(&disk).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    assert_eq!(full.code, Some(1), "{}\n{}", full.stdout, full.stderr);
    assert!(full.stderr.contains("No space left on device"), "{}", full.stderr);
    assert!(room && healed.code == Some(0), "{}\n{}", healed.stdout, healed.stderr);
    assert_eq!(found.len(), 8);
    assert_eq!(found.values().filter(|result| result["test"].is_object()).count(), 4);
}

/// The trained model with a chat template, as base models of studies have one.
fn model_with_template(place: &Place) -> String {
    let folder = place.path("model");
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.join("tokenizer_config.json");
    let mut config = json(&fs::read_to_string(&path).unwrap());
    let template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}";
    config["chat_template"] = template.into();
    fs::write(&path, config.to_string()).unwrap();
    folder.display().to_string()
}

#[test]
fn quick_versions_of_all_studies_end_in_one_report() {
    let place = Place::new();
    let model = model_with_template(&place);
    let ran = place.run(&["study", "quick", "--model", &model, "--out", "q", "--jobs", "2"]);
    assert_eq!(ran.code, Some(0), "{}\n{}", ran.stdout, ran.stderr);
    let page = place.read("q/report/report.html");
    for title in [
        "Observation 1",
        "Observation 2",
        "Single domains",
        "table 3",
        "Merging",
        "RQ4",
        "Ablation",
        "How many heads",
    ] {
        assert!(page.contains(title), "{title}");
    }
    assert!(!page.contains("A router that routes"), "it is not the paper's");
    assert!(!page.contains("NaN") && page.contains("paper's numbers"));
    assert!(fs::metadata(place.path("q/report/results.parquet")).unwrap().len() > 1000);
    // The same command finds everything done.
    let again = place.succeed(&["study", "quick", "--model", &model, "--out", "q"]);
    assert!(!again.stderr.contains("trained  "), "{}", again.stderr);

    let own = ["--studies", "router-search,router-final", "--out", "own", "--jobs", "2"];
    place.succeed(&[&["study", "quick", "--model", &model][..], &own].concat());
    let page = place.read("own/report/report.html");
    for title in ["A router that routes: the search", "A router that routes: the test"] {
        assert!(page.contains(title), "{title}");
    }
    assert!(!page.contains("Single domains"));
}

/// Every study file is planned as it stands, and its other settings are read.
#[test]
fn study_files_of_the_repository_are_right() {
    let place = Place::new();
    let model = model_with_template(&place);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/studies");
    let mut files = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "yaml") {
            continue;
        }
        files += 1;
        let file = path.display().to_string();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let set = format!("model.path={model}");
        place.succeed(&["study", "plan", &file, "--out", &name, "--set", &set]);
        let paper: Value = {
            let text = fs::read_to_string(&path).unwrap();
            serde_saphyr::from_str(&text).unwrap()
        };
        // Those of our own questions have no setting of the paper's.
        if !name.starts_with("router-") {
            assert_eq!(
                paper["settings"]["paper"]["base"]["model"]["path"], "meta-llama/Llama-2-7b-hf",
                "{file}"
            );
        }
        assert!(paper["settings"]["quick"].is_object(), "{file}");
        assert!(paper["paper"]["source"].as_str().unwrap().contains("2404.19245"), "{file}");
    }
    assert_eq!(files, 10);
}

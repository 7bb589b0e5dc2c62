//! Scores over files of one's own from the command line: options compared, texts compared with references.

use crate::support::{Place, model};
use serde_json::Value;
use std::fs;
use std::path::Path;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn sample(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/eval-sample").join(name);
    path.display().to_string()
}

#[test]
fn options_and_references_are_scored() {
    let place = Place::new();
    let model = model().display().to_string();
    let tasks = format!(
        "choices:{},rouge:{}",
        sample("choices/everyday.jsonl"),
        sample("rouge/summaries.jsonl")
    );
    let eval = ["eval", "--model", &model, "--max-new-tokens", "8", "--tasks", &tasks];
    let ran = place.succeed(&[&eval[..], &["--json", "--samples", "log.jsonl"]].concat());
    let found = &json(&ran.stdout)["models"]["base"];
    for (task, metrics) in [
        ("choices_everyday", ["acc", "acc_norm"]),
        ("choices_everyday_causes", ["acc", "acc_norm"]),
        ("choices_everyday_facts", ["acc", "acc_norm"]),
        ("rouge_summaries", ["rougeL", "rougeLsum"]),
    ] {
        for metric in metrics {
            let value = found["results"][task][format!("{metric},none")].as_f64();
            assert!(value.is_some_and(|v| (0.0..=1.0).contains(&v)), "{task} {metric}: {found}");
            assert!(found["results"][task][format!("{metric}_stderr,none")].is_f64(), "{task}");
        }
    }
    assert_eq!(found["n-samples"]["choices_everyday_facts"]["effective"], 4);
    let log = place.read("log.jsonl");
    assert_eq!(log.lines().count(), 1 + 10 + 4);
    // Gone on from the log, with the same result.
    let again = place.succeed(&[&eval[..], &["--json", "--samples", "log.jsonl"]].concat());
    assert_eq!(json(&again.stdout)["models"]["base"]["scores"], found["scores"]);
    assert_eq!(place.read("log.jsonl"), log);
    let shown = place.succeed(&eval).stdout;
    assert!(shown.contains("choices_everyday_causes") && shown.contains("acc_norm"), "{shown}");
    assert!(shown.contains("rougeLsum"), "{shown}");
    let listed = place.succeed(&["eval", "--list-tasks"]).stdout;
    assert!(listed.contains("choices:FILE") && listed.contains("rouge:FILE"), "{listed}");
    let one = ["eval", "--model", &model, "--shots", "3", "--json", "--tasks"];
    let choices = tasks.split(',').next().unwrap();
    let ran = place.succeed(&[&one[..], &[choices]].concat());
    let found = &json(&ran.stdout)["models"]["base"];
    let prompt = found["configs"]["choices_everyday_facts"]["first_prompt"].as_str().unwrap();
    assert_eq!(prompt.matches("Question: ").count(), 4, "{prompt}");
}

#[test]
fn wrong_files_end_with_status_2_and_one_line() {
    let place = Place::new();
    let model = model().display().to_string();
    let fine = "{\"prompt\": \"a\", \"choices\": [\"x\", \"y\"], \"answer\": 0}";
    let long = "is 3; `choices_q` has 1 examples";
    for (task, text, more, expected) in [
        (
            "choices",
            "",
            None,
            "q.jsonl: is empty; expected records with a prompt, options and an answer",
        ),
        (
            "choices",
            "{\"prompt\": \"a\", \"choices\": [\"x\"], \"answer\": 0}",
            None,
            "line 2: `choices` has one option",
        ),
        (
            "choices",
            "{\"prompt\": \"a\", \"choices\": [\"x\", \"y\"], \"answer\": 2}",
            None,
            "line 2: `answer` is 2",
        ),
        (
            "choices",
            "{\"prompt\": \"a\", \"choices\": [\"x\", \"x\"], \"answer\": 0}",
            None,
            "line 2: `choices`: options 0 and 1",
        ),
        (
            "choices",
            "{\"prompt\": \"a\", \"choices\": [\"x\", \"y\"]}",
            None,
            "line 2: `answer` is missing",
        ),
        ("choices", "7", None, "line 2"),
        ("choices", fine, Some("3"), long),
        (
            "rouge",
            "{\"prompt\": \"a\", \"references\": []}",
            None,
            "line 2: `references`: expected a list of texts",
        ),
        ("rouge", "", None, "q.jsonl"),
    ] {
        let first = match task {
            "choices" => fine,
            _ => "{\"prompt\": \"a\", \"references\": [\"b\"]}",
        };
        let all = if text.is_empty() { String::new() } else { format!("{first}\n{text}\n") };
        place.write("q.jsonl", &all);
        let task = format!("{task}:q.jsonl");
        let mut arguments = vec!["eval", "--model", &model, "--tasks", &task];
        arguments.extend(more.iter().flat_map(|shots| ["--shots", *shots]));
        let ran = place.run(&arguments);
        assert_eq!(ran.code, Some(2), "{text}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{text}: {}", ran.stderr);
        let errors = ran.stderr.lines().filter(|line| line.starts_with("error")).count();
        assert_eq!(errors, 1, "{}", ran.stderr);
    }
    let ran = place.run(&["eval", "--model", &model, "--tasks", "choices"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    let expected = "expected `choices:FILE`, records with a prompt, options, an answer";
    assert!(ran.stderr.contains(expected), "{}", ran.stderr);
}

#[test]
fn studies_know_such_files_by_their_content() {
    let place = Place::new();
    place.write(
        "study.yaml",
        &format!(
            "name: small\nbase:\n  model: {{path: {}}}\n  data:\n    train: [{{path: animals.jsonl}}]\n    \
             template: plain\n    max_seq_len: 128\n    valid_fraction: 0.2\n  method: {{name: lora, rank: 2, targets: qv}}\n  \
             train: {{batch_size: 4, max_steps: 2, eval_every: 0}}\ngrid:\n  method.rank: [2]\nseeds: 1\n\
             eval: {{max_new_tokens: 4}}\ntasks: [\"choices:q.jsonl\", \"rouge:r.jsonl\"]\n",
            model().display()
        ),
    );
    fs::copy(sample("choices/everyday.jsonl"), place.path("q.jsonl")).unwrap();
    fs::copy(sample("rouge/summaries.jsonl"), place.path("r.jsonl")).unwrap();
    let plan = ["--json", "study", "plan", "study.yaml", "--out", "s"];
    assert_eq!(json(&place.succeed(&plan).stdout)["new"], 1);
    assert_eq!(json(&place.succeed(&plan).stdout)["new"], 0);
    let ran = json(&place.succeed(&["--json", "study", "run", "s"]).stdout);
    assert_eq!(ran["scored"], 1, "{ran}");
    let cell = fs::read_dir(place.path("s/cells")).unwrap().next().unwrap().unwrap().path();
    let result = json(&fs::read_to_string(cell.join("result.json")).unwrap());
    let tasks = &result["test"]["tasks"];
    for key in ["acc,none", "acc_norm,none", "acc_stderr,none"] {
        assert!(tasks["choices_q_causes"][key].is_f64(), "{result}");
    }
    assert!(tasks["rouge_r"]["rougeL,none"].is_f64(), "{result}");
    for name in ["q.jsonl", "r.jsonl"] {
        let before = place.read(name);
        let first = before.lines().next().unwrap();
        place.write(name, &format!("{before}{first}\n"));
        let planned = place.succeed(&plan);
        assert_eq!(json(&planned.stdout)["new"], 1, "{name}: other content makes another cell");
        place.write(name, &before);
        let ran = place.run(&["study", "run", "s"]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(&format!("{name}: has changed since")), "{}", ran.stderr);
        place.succeed(&plan);
    }
}

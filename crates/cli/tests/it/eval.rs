//! `eval` from the command line, on the bundled sample.

use crate::support::{Place, model};
use serde_json::{Value, json as value};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};

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
    refused(&["--tasks", "exact"], "expected `exact:FILE`");
    refused(&["--tasks", "loss:"], "`loss`: no file is named");
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

/// The files below `folder`, relative to it, with `/` between their parts.
fn files_below(folder: &Path, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
        match path.is_dir() {
            true => found.extend(files_below(&path, &format!("{name}/"))),
            false => found.push(name),
        }
    }
    found
}

/// A hub on this machine that has the sample's data sets; it notes the paths it was asked for.
fn hub(asked: std::sync::mpsc::Sender<String>) -> String {
    let sets = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../run/tests/fixtures/hub");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            reader.read_line(&mut line).unwrap();
            let path = line.split(' ').nth(1).unwrap_or("").to_owned();
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {}
            let set = |repository: &str| sets.join(repository.replace('/', "--"));
            let list = path.strip_prefix("/api/datasets/");
            let list = list.and_then(|rest| rest.strip_suffix("/revision/main"));
            let file = path.strip_prefix("/datasets/");
            let file = file.and_then(|rest| rest.split_once("/resolve/main/"));
            let body = match (list, file) {
                (Some(repository), _) if set(repository).exists() => {
                    let names = files_below(&set(repository), "");
                    let siblings: Vec<Value> =
                        names.into_iter().map(|name| value!({"rfilename": name})).collect();
                    Some(value!({"siblings": siblings}).to_string().into_bytes())
                }
                (_, Some((repository, name))) => fs::read(set(repository).join(name)).ok(),
                _ => None,
            };
            let (status, body) = body.map_or((404, Vec::new()), |body| (200, body));
            let length = body.len();
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
            );
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
            let _ = asked.send(path);
        }
    });
    address
}

/// `text.jsonl`: one record that needs no template.
fn write_text(place: &Place) {
    let text = "Once upon a time there was a little girl who had a red ball.";
    place.write("text.jsonl", &value!({ "text": text }).to_string());
}

#[test]
fn data_come_from_the_hub_once_and_score_as_the_same_files_do() {
    let place = Place::new();
    let model = model().display().to_string();
    let (sender, asked) = std::sync::mpsc::channel();
    let address = hub(sender);
    let online = [("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", address.as_str())];
    // The hub here holds two subjects and tasks, so they are asked for by name.
    let tasks = "mmlu_astronomy,mmlu_international_law,gsm8k,bbh_fewshot_navigate";
    let evaluate = |data: &str, tasks: &str, environment: &[(&str, &str)]| {
        let arguments = ["eval", "--model", &model, "--data", data, "--tasks", tasks];
        let few = ["--shots", "2", "--max-new-tokens", "4", "--json"];
        place.run_in(environment, &[&arguments[..], &few].concat())
    };

    let offline = evaluate("hub", tasks, &[]);
    assert_eq!(offline.code, Some(1), "{}", offline.stderr);
    assert!(offline.stderr.contains("task `mmlu_astronomy`: cannot fetch its data"));
    assert!(offline.stderr.contains("HF_HUB_OFFLINE is set"), "{}", offline.stderr);
    let ran = evaluate("hub", tasks, &online);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("fetching openai/gsm8k/main/test-00001-of-00002.parquet"));
    let requests = asked.try_iter().count();
    // Three lists; test and dev of two subjects, three files of GSM8K, one of a task.
    assert_eq!(requests, 3 + 4 + 3 + 1);
    let fetched = json(&ran.stdout)["models"]["base"].clone();
    let local = evaluate(&sample(), tasks, &[]);
    let local = json(&local.stdout)["models"]["base"].clone();
    assert_eq!(fetched["scores"], local["scores"]);
    for task in ["mmlu_astronomy", "gsm8k", "bbh_fewshot_navigate"] {
        let prompt = |of: &Value| of["configs"][task]["first_prompt"].clone();
        assert_eq!(prompt(&fetched), prompt(&local), "{task}");
    }
    let again = evaluate("hub", tasks, &[]);
    assert_eq!(json(&again.stdout)["models"]["base"]["scores"], local["scores"]);
    assert_eq!(asked.try_iter().count(), 0, "all was in the cache");

    // A user's own file is read where it lies, whatever `--data` says.
    write_text(&place);
    let own = ["eval", "--model", &model, "--tasks", "loss:text.jsonl", "--json", "--data"];
    let loss = |data: &str| {
        let ran = place.succeed(&[&own[..], &[data]].concat());
        json(&ran.stdout)["models"]["base"]["results"]["loss"].clone()
    };
    assert!(loss("hub")["loss,none"].is_number());
    assert_eq!(loss("hub"), loss(&sample()));

    let missing = evaluate("hub", "mmlu_law", &online);
    assert_eq!(missing.code, Some(1), "{}", missing.stderr);
    assert!(
        missing.stderr.contains("cais/mmlu has no file professional_law/test-*.parquet"),
        "{}",
        missing.stderr
    );
}

#[test]
fn weights_may_be_held_packed_and_the_results_say_so() {
    let place = Place::new();
    let data = sample();
    let (narrow, model) = (model(), place.widened_model("widened"));
    write_text(&place);
    let loss_of = |model: &Path, dtype: &str, name: &str| {
        let model = model.display().to_string();
        let task = ["eval", "--model", &model, "--tasks", "loss:text.jsonl", "--data", &data];
        let more = ["--dtype", dtype, "--samples", "samples.jsonl", "--out", name, "--json"];
        let ran = place.run(&[&task[..], &more].concat());
        if ran.code != Some(0) {
            return Err(ran.stderr);
        }
        let base = json(&ran.stdout)["models"]["base"].clone();
        assert_eq!(base["config"]["identity"]["weights"], dtype);
        fs::remove_file(place.path("samples.jsonl")).unwrap();
        Ok(base["results"]["loss"]["loss,none"].as_f64().unwrap())
    };
    let loss = |dtype: &str, name: &str| loss_of(&model, dtype, name);
    let exact = loss("f32", "a.json").unwrap();
    assert!((loss_of(&narrow, "f32", "n.json").unwrap() - exact).abs() < 1e-5, "only zeros more");
    assert!((loss("f64", "b.json").unwrap() - exact).abs() < 1e-4);
    for (dtype, tolerance) in [("bf16", 0.02), ("q8_0", 0.02), ("q4_0", 0.5)] {
        let packed = loss(dtype, "c.json").unwrap();
        assert!(packed != exact && (packed - exact).abs() < tolerance, "{dtype} {packed} {exact}");
    }
    let refusal = loss_of(&narrow, "q8_0", "d.json").unwrap_err();
    assert!(refusal.contains("rows of 172 numbers; Q8_0 packs 32 at a time"), "{refusal}");
    let model = model.display().to_string();
    // A log of weights held otherwise is not gone on from.
    let first = ["eval", "--model", &model, "--tasks", "mmlu", "--data", &data];
    let with = |dtype| [&first[..], &["--samples", "log.jsonl", "--dtype", dtype]].concat();
    place.succeed(&with("f32"));
    let ran = place.run(&with("bf16"));
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("belongs to a run with another model"), "{}", ran.stderr);
}

#[test]
fn an_interrupted_run_goes_on_from_its_log() {
    let place = Place::new();
    let (model, data) = (model().display().to_string(), sample());
    let whole = ["eval", "--model", &model, "--data", &data, "--tasks", "gsm8k,mmlu", "--shots"];
    let whole = [&whole[..], &["2", "--max-new-tokens", "100", "--json"]].concat();
    let expected = json(&place.succeed(&whole).stdout)["models"]["base"]["scores"].clone();
    let logged = [&whole[..], &["--samples", "log.jsonl"]].concat();
    let mut child = place.start(&logged);
    let lines = || fs::read_to_string(place.path("log.jsonl")).map_or(0, |t| t.lines().count());
    while lines() < 2 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let done = lines();
    assert!((2..17).contains(&done), "the run was stopped within: {done} lines");
    let before = place.read("log.jsonl");
    let again = json(&place.succeed(&logged).stdout);
    assert_eq!(again["models"]["base"]["scores"], expected);
    let log = place.read("log.jsonl");
    assert_eq!(log.lines().count(), 1 + 6 + 10, "no record twice");
    let kept = &before[..before.rfind('\n').unwrap()];
    assert!(log.starts_with(kept), "what was answered was not asked again");
}

#[test]
fn logs_are_shared_by_tasks_cut_at_bytes_and_foreign_ones_kept() {
    let place = Place::new();
    let (model, data) = (model().display().to_string(), sample());
    let japanese: String = (0..8)
        .map(|i| format!("{{\"prompt\": \"日本語 {i}\", \"completion\": \"文\"}}\n"))
        .collect();
    place.write("ja.jsonl", &japanese);
    let eval = |tasks: &'static str| {
        let first = ["eval", "--model", &model, "--data", &data, "--tasks", tasks];
        [&first[..], &["--max-new-tokens", "4", "--samples", "log.jsonl", "--json"]].concat()
    };
    place.succeed(&eval("mmlu"));
    let one = place.read("log.jsonl").lines().count();
    place.succeed(&eval("exact:ja.jsonl"));
    let both = fs::read(place.path("log.jsonl")).unwrap();
    assert_eq!(both.iter().filter(|byte| **byte == b'\n').count(), one + 8);
    // A disk that was full cut the last row inside a character.
    let at = both.iter().rposition(|byte| *byte >= 0x80).unwrap();
    fs::write(place.path("log.jsonl"), &both[..at]).unwrap();
    place.succeed(&eval("exact:ja.jsonl,mmlu"));
    assert_eq!(fs::read(place.path("log.jsonl")).unwrap(), both);
    // While another process scores, nobody else writes.
    let lock = hydralora_files::Lock::file(&place.path("log.jsonl")).unwrap();
    let ran = place.run(&eval("mmlu"));
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("process {}", std::process::id())), "{}", ran.stderr);
    drop(lock);
    // A header that a crash cut short is begun again, any other text is somebody's.
    fs::write(place.path("log.jsonl"), &both[..20]).unwrap();
    place.succeed(&eval("exact:ja.jsonl"));
    for foreign in ["my notes without a line's end", "my notes\n", "{\"a\": 1}\n"] {
        place.write("log.jsonl", foreign);
        let ran = place.run(&eval("mmlu"));
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains("is no log of samples"), "{}", ran.stderr);
        assert_eq!(place.read("log.jsonl"), foreign);
    }
}

//! Tasks over the bundled sample, from files to results.

use crate::support::{Model, model, sample};
use hydralora_model::adapter::NoAdapter;
use hydralora_run::eval::{
    self, Base, Error, Log, Reader, Results, Settings, Subject, Work, tasks,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn settings(data: impl Into<PathBuf>) -> Settings {
    Settings {
        data: data.into(),
        shots: None,
        limit: None,
        seed: 1234,
        repeats: None,
        temperature: None,
        max_new_tokens: Some(12),
        allow_code_execution: false,
        context: 512,
    }
}

fn reader(model: &Model) -> Reader<'_> {
    Reader { tokenizer: &model.source.tokenizer, template: None, record_template: None }
}

fn subject(name: &str) -> Subject<'static> {
    Subject {
        name: name.to_owned(),
        adapter: &NoAdapter,
        domains: Vec::new(),
        identity: json!({"name": name}),
    }
}

fn run(model: &Model, names: &[&str], settings: &Settings, log: Option<&Path>) -> Vec<Results> {
    let reader = reader(model);
    let opened: Vec<_> =
        names.iter().map(|name| tasks::open(name, settings, &reader).unwrap()).collect();
    let end_ids = model.source.tokenizer.end_ids();
    let base = Base { decoder: &model.decoder, reader, end_ids };
    let mut log = log.map(|path| Log::open(path, &json!("this run")).unwrap());
    let subjects = [subject("base"), subject("other")];
    eval::run(base, &subjects, &opened, settings, log.as_mut(), &mut |_| Ok(())).unwrap()
}

#[test]
fn prompts_are_the_harness_s() {
    let model = model();
    let reader = reader(&model);
    let first = |name: &str, shots: Option<usize>| {
        let settings = Settings { shots, ..settings(sample()) };
        let opened = tasks::open(name, &settings, &reader).unwrap();
        let item = &opened.tasks[0].items()[0];
        (reader.render(&item.prompt).unwrap(), item.work.clone())
    };
    let (text, work) = first("mmlu_astronomy", Some(2));
    assert_eq!(
        text,
        "The following are multiple choice questions (with answers) about astronomy.\n\n\
         Which body does the Moon orbit?\nA. The Sun\nB. The Earth\nC. Mars\nD. Jupiter\n\
         Answer: B\n\n\
         Which planet is closest to the Sun?\nA. Mercury\nB. Venus\nC. Earth\nD. Mars\n\
         Answer: A\n\n\
         Which planet is known for its large rings?\nA. Mars\nB. Venus\nC. Saturn\nD. Mercury\n\
         Answer:"
    );
    let four = |work: &Work| matches!(work, Work::Choices { delimiter, choices } if delimiter == " " && choices.len() == 4);
    assert!(four(&work));
    let (_, work) = first("mmlu_ppl_astronomy", None);
    let Work::Whole(texts) = work else { panic!("{work:?}") };
    assert!(texts[2].starts_with(
        "The following are multiple choice questions (with answers) about  astronomy.\n\nWhich"
    ));
    assert!(texts[2].ends_with("D. Mercury\nAnswer: C"), "{}", texts[2]);
    let (text, _) = first("gsm8k", Some(0));
    assert!(text.starts_with("Question: Janet") && text.ends_with("\nAnswer:"), "{text}");
    let (text, _) = first("gsm8k", None);
    assert_eq!(text.matches("Question: ").count(), 6);
    assert!(text.contains("\n#### ") && text.contains("\nAnswer: "));
    let (text, work) = first("bbh_cot_fewshot_navigate", None);
    assert!(text.starts_with("Given a series of navigation instructions, determine whether one would end up back at the starting point.\n\nQ: If you"));
    assert!(
        text.contains("So the answer is No.\n\nQ: ")
            && text.ends_with("A: Let's think step by step.\n")
    );
    assert!(matches!(work, Work::Write { ref stops, .. } if *stops == ["</s>", "Q", "\n\n"]));
    let (text, _) = first("bbh_fewshot_navigate", Some(1));
    assert!(text.contains("- No\nA: No\n\nQ: ") && text.ends_with("\nA:"), "{text}");
}

#[test]
fn results_have_the_harness_s_layout() {
    let model = model();
    let names = ["mmlu", "mmlu_law", "mmlu_ppl_medical"];
    let settings = Settings { shots: Some(1), ..settings(sample()) };
    assert!(matches!(
        tasks::open(names[2], &Settings { shots: None, ..settings.clone() }, &reader(&model)),
        Err(Error::MissingData { .. })
    ));
    let results = run(&model, &names[..2], &settings, None);
    assert_eq!(results.len(), 2);
    let json = results[0].to_json();
    let accuracy = |task: &str| json["results"][task]["acc,none"].as_f64().unwrap();
    let counts = |task: &str| json["n-samples"][task]["effective"].as_u64().unwrap() as f64;
    let (a, b) = ("mmlu_astronomy", "mmlu_international_law");
    assert_eq!((counts(a), counts(b)), (6.0, 4.0));
    let mean = (6.0 * accuracy(a) + 4.0 * accuracy(b)) / 10.0;
    assert!((accuracy("mmlu") - mean).abs() < 1e-12, "weighted by size");
    assert_eq!(accuracy("mmlu_law"), accuracy(b));
    assert_eq!(json["group_subtasks"]["mmlu"], json!([a, b]));
    assert_eq!(json["group_subtasks"]["mmlu_stem"], json!([a]));
    assert!(json["results"][a]["acc_stderr,none"].is_number());
    assert_eq!(json["versions"][a], 1.0);
    assert_eq!(json["n-shot"][a], 1);
    assert_eq!(json["config"]["seed"], 1234);
    assert!(json["config"]["add_bos_token"].is_boolean());
    let config = &json["configs"][a];
    assert!(config["first_prompt"].as_str().unwrap().ends_with("Answer:"));
    assert_eq!(config["data_sha256"]["astronomy_test.csv"].as_str().unwrap().len(), 64);
    // Two names for the same model get the same scores.
    assert_eq!(json["scores"], results[1].to_json()["scores"]);
}

#[test]
fn generation_tasks_run_and_are_scored() {
    let model = model();
    let settings = Settings { limit: Some(2), shots: Some(0), ..settings(sample()) };
    let results =
        run(&model, &["gsm8k", "bbh_cot_fewshot", "bbh_fewshot_navigate"], &settings, None);
    let json = results[0].to_json();
    for (task, metric) in [
        ("gsm8k", "exact_match,strict-match"),
        ("gsm8k", "exact_match,flexible-extract"),
        ("bbh_cot_fewshot", "exact_match,get-answer"),
        ("bbh_fewshot_navigate", "exact_match,none"),
    ] {
        let value = json["results"][task][metric].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&value), "{task}");
    }
    assert_eq!(json["group_subtasks"]["bbh_cot_fewshot"].as_array().unwrap().len(), 2);
    assert_eq!(json["configs"]["gsm8k"]["generation_kwargs"]["max_gen_toks"], 12);
}

#[test]
fn empty_texts_start_from_the_start_token() {
    let model = model();
    let reader = reader(&model);
    let bos = model.source.tokenizer.bos().unwrap().0;
    assert_eq!(reader.encode_prompt("").unwrap(), [bos]);
    let (context, continuation) = reader.encode_pair("", "Once").unwrap();
    assert_eq!(context, [bos]);
    assert!(!continuation.is_empty());
    // Spaces go to the continuation.
    let (context, continuation) = reader.encode_pair("Once upon ", "a").unwrap();
    let both = [context, continuation].concat();
    assert_eq!(both, reader.encode("Once upon a").unwrap());
}

#[test]
fn loss_and_exact_read_any_file_of_records() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let stories = write(
        "stories.jsonl",
        "{\"prompt\": \"Once upon a\", \"completion\": \" time\"}\n\
         {\"prompt\": \"She was very\", \"completion\": \" happy\"}\n",
    );
    let nonsense = write(
        "nonsense.jsonl",
        "{\"prompt\": \"Once upon a\", \"completion\": \" zqx\"}\n\
         {\"prompt\": \"She was very\", \"completion\": \" kjq\"}\n",
    );
    let settings = settings(sample());
    let names = [format!("loss:{stories}"), format!("loss:{nonsense}")];
    let results = run(&model, &[&names[0]], &settings, None);
    let json = results[0].to_json();
    let value = json["results"]["loss_stories"]["loss,none"].as_f64().unwrap();
    assert_eq!(json["results"]["loss"]["loss,none"].as_f64().unwrap(), value);
    let results = run(&model, &[&names[1]], &settings, None);
    let worse = results[0].to_json()["results"]["loss_nonsense"]["loss,none"].as_f64().unwrap();
    assert!(value > 0.0 && value < worse, "{value} {worse}");

    // What the model itself writes is right by definition.
    let wrote = {
        let tokenizer = &model.source.tokenizer;
        let ends = tokenizer.end_ids();
        let mut generator =
            hydralora_run::Generator::new(&model.decoder, tokenizer, &NoAdapter, ends, false);
        let prompt = reader(&model).encode("Once upon a time").unwrap();
        let request = hydralora_run::Request {
            prompt: &prompt,
            sampling: hydralora_run::Sampling::default(),
            max_new_tokens: 12,
            stops: &[],
            continues: false,
        };
        generator.generate(request, &mut |_| true).unwrap().text
    };
    let exact = write(
        "exact.jsonl",
        &format!(
            "{}\n{}\n",
            json!({"prompt": "Once upon a time", "completion": wrote}),
            json!({"prompt": "Once upon a time", "completion": "something else"})
        ),
    );
    let results = run(&model, &[&format!("exact:{exact}")], &settings, None);
    let json = results[0].to_json();
    assert_eq!(json["results"]["exact_exact"]["exact_match,none"], 0.5);
    let texts = write("texts.jsonl", "{\"text\": \"no answer\"}\n");
    let refused = tasks::open(&format!("exact:{texts}"), &settings, &reader(&model));
    assert!(refused.err().unwrap().to_string().contains("has no answer"));
}

#[test]
fn a_run_goes_on_from_its_log() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("samples.jsonl");
    let settings = settings(sample());
    let whole = run(&model, &["mmlu_astronomy"], &settings, None)[0].to_json();
    // A run that stops after three records, and half a line of a fourth.
    run(&model, &["mmlu_astronomy"], &Settings { limit: Some(3), ..settings.clone() }, Some(&path));
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 1 + 2 * 3);
    std::fs::write(&path, format!("{text}{{\"model\": \"ba")).unwrap();
    // The log is what is used: a changed score there shows.
    let resumed = run(&model, &["mmlu_astronomy"], &settings, Some(&path))[0].to_json();
    assert_eq!(resumed["scores"], whole["scores"]);
    let lines: Vec<Value> = std::fs::read_to_string(&path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 1 + 2 * 6, "each record once");
    assert_eq!(lines[1]["resps"].as_array().unwrap().len(), 4);
    assert!(lines[1]["scores"]["acc,none"]["filtered"].is_string());
    let refused = Log::open(&path, &json!("another run")).err().unwrap();
    assert!(refused.to_string().contains("another model"), "{refused}");
    // A question that is asked differently is asked again.
    run(&model, &["mmlu_astronomy"], &Settings { shots: Some(1), ..settings }, Some(&path));
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1 + 2 * 12);
}

#[test]
fn comparing_pairs_records() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(sample());
    let results = run(&model, &["mmlu"], &settings, None);
    let (a, b) = (folder.path().join("a.json"), folder.path().join("b.json"));
    results[0].save(&a).unwrap();
    let mut changed = results[0].to_json();
    let scores = &mut changed["scores"]["mmlu_astronomy"]["acc,none"];
    let before: Vec<f64> = scores.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    *scores = before.iter().map(|_| 1.0).collect();
    std::fs::write(&b, changed.to_string()).unwrap();
    let comparison = eval::compare(&a, &b).unwrap();
    let row = |task: &str| comparison.differences.iter().find(|row| row.task == task).unwrap();
    let wrong = before.iter().filter(|score| **score == 0.0).count();
    assert!((row("mmlu_astronomy").difference - wrong as f64 / 6.0).abs() < 1e-12);
    assert_eq!(row("mmlu").higher_lower, [wrong, 0]);
    assert_eq!(row("mmlu_international_law").difference, 0.0);
    assert!(comparison.warnings.is_empty());
    let refused = eval::compare(&a, &sample().join("bbh/tasks/navigate.json")).unwrap_err();
    assert!(refused.to_string().contains("has no `scores`"), "{refused}");
}

#[test]
fn wrong_input_is_named() {
    let model = model();
    let reader = reader(&model);
    let message = |name: &str, settings: &Settings| {
        tasks::open(name, settings, &reader).err().unwrap().to_string()
    };
    let fine = settings(sample());
    assert!(
        message("mmlu_profesional_law", &fine).contains("did you mean `mmlu_professional_law`")
    );
    assert!(message("gsm8k", &settings("/nowhere")).contains("/nowhere/gsm8k/test.jsonl"));
    assert!(message("humaneval", &fine).contains("--allow-code-execution: is not given"));
    assert!(message("gsm8k:x", &fine).contains("takes no file"));
    let many = Settings { shots: Some(9), ..fine.clone() };
    assert!(message("mmlu_astronomy", &many).contains("has 5 examples"));
    let long = Settings { max_new_tokens: None, ..fine.clone() };
    let refused = message("bbh_cot_fewshot_navigate", &long);
    assert!(refused.contains("is 1024; the model's context holds 512"), "{refused}");

    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("test/astronomy_test.csv", "Q,1,2,3,4,7\n");
    write("test.jsonl", "{\"question\": \"1 + 1?\"}\n");
    write("train.jsonl", "{\"question\": \"1 + 1?\", \"answer\": \"2\"}\n");
    write("tasks/navigate.json", "[1, 2]");
    write("cot-prompts/navigate.txt", "no example");
    let own = settings(folder.path());
    assert!(message("mmlu_astronomy", &own).contains("the answer is `7`; expected A, B, C or D"));
    let refused = message("gsm8k", &own);
    assert!(refused.contains("test.jsonl, line 1") && refused.contains("`answer`"), "{refused}");
    assert!(message("bbh_fewshot", &own).contains("expected an object with `examples`"));
}

#[test]
fn the_hub_s_layout_gives_the_same_records() {
    let model = model();
    let reader = reader(&model);
    let hub = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hub");
    let few =
        |data: PathBuf| Settings { shots: Some(2), max_new_tokens: Some(4), ..settings(data) };
    for (name, repository) in [
        ("mmlu", "cais--mmlu"),
        ("gsm8k", "openai--gsm8k"),
        ("bbh_cot_fewshot", "lukaemon--bbh"),
        ("bbh_fewshot", "lukaemon--bbh"),
    ] {
        let ours = tasks::open(name, &few(sample()), &reader).unwrap();
        let theirs = tasks::open(name, &few(hub.join(repository)), &reader).unwrap();
        assert_eq!(ours.groups, theirs.groups, "{name}");
        assert_eq!(ours.tasks.len(), theirs.tasks.len(), "{name}");
        for (ours, theirs) in ours.tasks.iter().zip(&theirs.tasks) {
            assert_eq!(ours.items().len(), theirs.items().len(), "{name}");
            assert!(!theirs.info().data.is_empty(), "{name}: hashes");
            for (ours, theirs) in ours.items().iter().zip(theirs.items()) {
                let text = |prompt| reader.render(prompt).unwrap();
                assert_eq!(text(&ours.prompt), text(&theirs.prompt), "{name}");
                assert_eq!(ours.target, theirs.target, "{name}");
            }
        }
    }

    let folder = tempfile::tempdir().unwrap();
    let astronomy = folder.path().join("astronomy");
    std::fs::create_dir_all(&astronomy).unwrap();
    let file = hub.join("openai--gsm8k/main/train-00000-of-00001.parquet");
    std::fs::copy(file, astronomy.join("test-00000-of-00001.parquet")).unwrap();
    let other = tasks::open("mmlu_astronomy", &settings(folder.path()), &reader);
    let message = other.err().unwrap().to_string();
    assert!(message.contains("test-00000-of-00001.parquet: row 1: invalid type"), "{message}");
    assert!(message.contains("expected the text `question`, four `choices`"), "{message}");
    std::fs::write(astronomy.join("test-00000-of-00001.parquet"), b"PAR1 and no more").unwrap();
    assert!(tasks::open("mmlu_astronomy", &settings(folder.path()), &reader).is_err());
}

#[test]
fn parts_without_files_are_named_and_groups_of_one_name_joined() {
    let model = model();
    let few = Settings { limit: Some(1), ..settings(sample()) };
    let found = &run(&model, &["bbh_fewshot", "mmlu"], &few, None)[0].to_json();
    assert_eq!(found["group_subtasks"]["bbh_fewshot"].as_array().unwrap().len(), 2);
    let absent = found["group_subtasks_absent"]["bbh_fewshot"].as_array().unwrap();
    assert_eq!(absent.len(), 25);
    assert!(absent.contains(&json!("bbh_fewshot_snarks")));
    assert_eq!(found["group_subtasks_absent"]["mmlu"].as_array().unwrap().len(), 55);
    assert_eq!(found["group_subtasks_absent"]["mmlu_stem"].as_array().unwrap().len(), 18);

    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("{{\"text\": \"{text}\"}}\n")).unwrap();
        format!("loss:{}", path.display())
    };
    let (one, two) = (write("a.jsonl", "Once upon a time."), write("b.jsonl", "The end."));
    let found = &run(&model, &[&one, &two], &few, None)[0].to_json();
    assert_eq!(found["group_subtasks"]["loss"], json!(["loss_a", "loss_b"]));
    // Under one name only one of two could be reported.
    let other = write("x/a.jsonl", "Another.");
    let reader = reader(&model);
    let opened: Vec<_> =
        [&one, &other].map(|name| tasks::open(name, &few, &reader).unwrap()).into();
    let base = Base { decoder: &model.decoder, reader, end_ids: &[] };
    let error = eval::run(base, &[subject("base")], &opened, &few, None, &mut |_| Ok(()));
    let error = error.err().unwrap().to_string();
    assert!(error.starts_with("--tasks: `loss_a` is the name for "), "{error}");
    assert!(error.contains("x/a.jsonl"), "{error}");
}

//! Tasks over files of one's own: options compared, and written texts compared with references.

use crate::support::{Model, model, plainly};
use hydralora_data::ChatTemplate;
use hydralora_model::adapter::NoAdapter;
use hydralora_run::eval::{
    self, Base, Opened, Reader, Results, Scoring, Settings, Subject, Work, tasks,
};
use serde_json::{Value, json};
use std::path::Path;

fn settings() -> Settings {
    Settings {
        data: "".into(),
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

fn write(folder: &Path, name: &str, records: &[Value]) -> String {
    let lines: Vec<String> = records.iter().map(|record| format!("{record}\n")).collect();
    let path = folder.join(name);
    std::fs::write(&path, lines.concat()).unwrap();
    path.display().to_string()
}

fn results(model: &Model, opened: Opened, settings: &Settings) -> Results {
    let base = Base {
        decoder: &model.decoder,
        reader: reader(model),
        end_ids: model.source.tokenizer.end_ids(),
    };
    let subject = Subject {
        name: "base".to_owned(),
        adapter: &NoAdapter,
        domains: Vec::new(),
        identity: json!({}),
    };
    eval::run(base, &[subject], &[opened], settings, None, &mut |_| Ok(())).unwrap().remove(0)
}

/// `Σ log p` of `option` behind `prompt` as lm-evaluation-harness defines it, by one pass over this
/// one sequence: both are encoded together, and what follows the prompt's own tokens counts.
fn alone(model: &Model, prompt: &str, delimiter: &str, option: &str) -> f64 {
    let tokenizer = &model.source.tokenizer;
    let bare = prompt.trim_end();
    let continuation = format!("{}{delimiter}{option}", &prompt[bare.len()..]);
    let ids = |text: &str| {
        let mut ids = tokenizer.encode(text).unwrap();
        let (bos, _) = tokenizer.bos().unwrap();
        if ids.first() != Some(&bos) && tokenizer.add_bos() {
            ids.insert(0, bos);
        }
        ids
    };
    let (tokens, from) = (ids(&format!("{bare}{continuation}")), ids(bare).len());
    plainly(model, &NoAdapter, &Scoring { tokens, from }).log_likelihood
}

/// The index of the largest, the first of equal ones.
fn first_largest(values: &[f64]) -> usize {
    (0..values.len()).rev().max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap()
}

#[test]
fn options_are_chosen_as_the_harness_defines() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let long = "Once upon a time there was a little girl named Lily. She loved to play outside in the park \
                with her red ball. One day she saw a big dog and";
    let records = [
        json!({"prompt": "Once upon a", "choices": ["time", "dog", "very big tree in the park"], "answer": "time"}),
        // The space goes to the options, and with the delimiter there are two.
        json!({"prompt": "Lily was ", "choices": ["happy", "sad", "so"], "answer": 1}),
        // What a tokenizer would join with the prompt's last letters.
        json!({"prompt": "The dog ran to the par", "choices": ["k.", "rot", "ty and they all had fun"], "answer": "A", "target_delimiter": ""}),
        json!({"prompt": "She said,\n", "choices": ["\"Thank you, mom!\"", "no", "été"], "answer": 0, "target_delimiter": ""}),
        json!({"prompt": long, "choices": ["ran", "said hello to the big dog", "x"], "answer": 2}),
        json!({"prompt": long, "choices": ["the", "was very scared and wanted to go home with her mom"], "answer": 1}),
        json!({"prompt": "", "choices": ["Once upon a time", "Zebra"], "answer": 0, "target_delimiter": ""}),
    ];
    let file = write(folder.path(), "stories.jsonl", &records);
    let opened = tasks::open(&format!("choices:{file}"), &settings(), &reader(&model)).unwrap();
    let found = results(&model, opened, &settings()).to_json();
    let scores = |metric: &str| -> Vec<f64> {
        let scores = found["scores"]["choices_stories"][metric].as_array().unwrap().iter();
        scores.map(|score| score.as_f64().unwrap()).collect()
    };
    let right = [0, 1, 0, 0, 2, 1, 0];
    let mut differ = 0;
    for (index, record) in records.iter().enumerate() {
        let prompt = record["prompt"].as_str().unwrap();
        let delimiter = record["target_delimiter"].as_str().unwrap_or(" ");
        let choices = record["choices"].as_array().unwrap().iter();
        let choices: Vec<&str> = choices.map(|choice| choice.as_str().unwrap()).collect();
        let sums: Vec<f64> = if prompt.is_empty() {
            let (bos, _) = model.source.tokenizer.bos().unwrap();
            let of = |choice: &&str| {
                let mut tokens = model.source.tokenizer.encode(choice).unwrap();
                tokens.retain(|token| *token != bos);
                tokens.insert(0, bos);
                plainly(&model, &NoAdapter, &Scoring { tokens, from: 1 }).log_likelihood
            };
            choices.iter().map(of).collect()
        } else {
            choices.iter().map(|choice| alone(&model, prompt, delimiter, choice)).collect()
        };
        let means: Vec<f64> = (sums.iter().zip(&choices))
            .map(|(sum, choice)| sum / choice.chars().count() as f64)
            .collect();
        let (sum, mean) = (first_largest(&sums), first_largest(&means));
        differ += usize::from(sum != mean);
        let is = |chosen: usize| f64::from(u8::from(chosen == right[index]));
        assert_eq!(scores("acc,none")[index], is(sum), "{record}: {sums:?}");
        assert_eq!(scores("acc_norm,none")[index], is(mean), "{record}: {means:?}");
    }
    assert!(differ >= 2, "length decides somewhere: {differ}");
    let mean = |metric: &str| scores(metric).iter().sum::<f64>() / records.len() as f64;
    let task = &found["results"]["choices_stories"];
    for metric in ["acc", "acc_norm"] {
        let key = format!("{metric},none");
        assert!((task[&key].as_f64().unwrap() - mean(&key)).abs() < 1e-12);
        assert!(task[format!("{metric}_stderr,none")].is_number());
        assert_eq!(found["higher_is_better"]["choices_stories"][metric], true);
    }
    let config = &found["configs"]["choices_stories"];
    assert_eq!(config["output_type"], "multiple_choice");
    assert_eq!(config["data_sha256"][&file].as_str().unwrap().len(), 64);
}

#[test]
fn examples_and_templates_are_those_of_other_tasks() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let records: Vec<Value> = (0..5)
        .map(|n| json!({"prompt": format!("Q{n}"), "choices": [format!("yes{n}"), format!("no{n}")], "answer": n % 2}))
        .collect();
    let file = write(folder.path(), "asked.jsonl", &records);
    let spec = format!("choices:{file}");
    let few = Settings { shots: Some(4), limit: Some(3), ..settings() };
    let plain = reader(&model);
    let opened = tasks::open(&spec, &few, &plain).unwrap();
    let items = opened.tasks[0].items();
    assert_eq!((items.len(), opened.tasks[0].info().original), (3, 5));
    for (index, item) in items.iter().enumerate() {
        let text = plain.render(&item.prompt).unwrap();
        for n in 0..5 {
            let example = format!("Q{n} {}{n}\n\n", if n % 2 == 0 { "yes" } else { "no" });
            assert_eq!(text.contains(&example), n != index, "{text}");
        }
        assert!(text.ends_with(&format!("\n\nQ{index}")), "{text}");
    }
    let template = ChatTemplate::builtin("chatml").unwrap();
    let chat = Reader { template: Some(&template), ..plain };
    let one = Settings { shots: Some(1), ..settings() };
    let opened = tasks::open(&spec, &one, &chat).unwrap();
    let item = &opened.tasks[0].items()[2];
    let text = chat.render(&item.prompt).unwrap();
    let (question, answer) = &item.prompt.shots[0];
    assert_eq!(
        text,
        format!(
            "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n\
             <|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
        )
    );
    let Work::Choices { delimiter, choices } = &item.work else { panic!("{:?}", item.work) };
    assert_eq!((chat.delimiter(delimiter), &choices[1][..]), ("", "no2"));
    let many = Settings { shots: Some(5), ..settings() };
    let refused = tasks::open(&spec, &many, &plain).err().unwrap().to_string();
    assert!(refused.contains("--shots: is 5; `choices_asked` has 4 examples"), "{refused}");
}

#[test]
fn domains_are_tasks_of_their_own() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let record = |prompt: &str, domain: Value| json!({"prompt": prompt, "choices": ["time", "zq"], "answer": "time", "domain": domain});
    let records = [
        record("Once upon a", json!("start")),
        record("All the", json!("other")),
        record("For some", json!("start")),
        record("One more", Value::Null),
    ];
    let file = write(folder.path(), "mixed.jsonl", &records);
    let opened = tasks::open(&format!("choices:{file}"), &settings(), &reader(&model)).unwrap();
    let found = results(&model, opened, &settings()).to_json();
    let counts = |task: &str| found["n-samples"][task]["effective"].as_u64();
    assert_eq!(counts("choices_mixed_start"), Some(2));
    assert_eq!(counts("choices_mixed_other"), Some(1));
    assert_eq!(counts("choices_mixed_mixed"), Some(1), "the file's own domain");
    let members = &found["group_subtasks"]["choices_mixed"];
    assert_eq!(members.as_array().unwrap().len(), 3);
    let value = |task: &str| found["results"][task]["acc,none"].as_f64().unwrap();
    let parts = ["start", "other", "mixed"].map(|part| value(&format!("choices_mixed_{part}")));
    let mean = (2.0 * parts[0] + parts[1] + parts[2]) / 4.0;
    assert!((value("choices_mixed") - mean).abs() < 1e-12);

    // A second file under the same name, without domains, could not be told from the mean.
    std::fs::create_dir(folder.path().join("x")).unwrap();
    let plain = json!({"prompt": "a", "choices": ["x", "y"], "answer": 0});
    let other = write(&folder.path().join("x"), "mixed.jsonl", &[plain]);
    let reader = reader(&model);
    let both = [&file, &other]
        .map(|file| tasks::open(&format!("choices:{file}"), &settings(), &reader).unwrap());
    let base = Base { decoder: &model.decoder, reader, end_ids: &[] };
    let subject = Subject {
        name: "base".to_owned(),
        adapter: &NoAdapter,
        domains: Vec::new(),
        identity: json!({}),
    };
    let error = eval::run(base, &[subject], &both, &settings(), None, &mut |_| Ok(()));
    let error = error.err().unwrap().to_string();
    assert!(
        error.starts_with("--tasks: `choices_mixed` is the name of a task and of a mean"),
        "{error}"
    );
}

#[test]
fn files_of_options_in_every_layout_name_their_faults() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let fine = json!({"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"});
    let wrong = json!({"question": "Sky?", "choices": ["red"], "answerKey": "B"});
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("lines.jsonl"), format!("{fine}\n\n{wrong}\n")).unwrap();
    std::fs::write(path("list.json"), format!("[{fine},\n{wrong}]")).unwrap();
    std::fs::write(path("fine.json"), format!("[{fine},\n{fine}]")).unwrap();
    std::fs::write(path("empty.jsonl"), "\n").unwrap();
    std::fs::write(path("broken.jsonl"), format!("{fine}\n{{\"question\": \n")).unwrap();
    let open = |name: &str| {
        let spec = format!("choices:{}", path(name).display());
        tasks::open(&spec, &settings(), &reader(&model))
    };
    assert_eq!(open("fine.json").unwrap().tasks[0].items().len(), 2);
    for (name, expected) in [
        ("lines.jsonl", "lines.jsonl, line 3: `choices` has one option; expected two or more"),
        ("list.json", "list.json, line 2: record 2: `choices` has one option"),
        ("empty.jsonl", "empty.jsonl: is empty; expected records with a prompt"),
        ("broken.jsonl", "line 2"),
    ] {
        let error = open(name).err().unwrap();
        assert!(error.to_string().contains(expected), "{name}: {error}");
        assert!(error.is_bad_input());
    }
}

#[test]
fn written_texts_are_compared_with_every_reference() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let opened = |records: &[Value]| {
        let file = write(folder.path(), "told.jsonl", records);
        tasks::open(&format!("rouge:{file}"), &settings(), &reader(&model)).unwrap()
    };
    let scores = |records: &[Value], metric: &str| -> Vec<f64> {
        let found = results(&model, opened(records), &settings()).to_json();
        let scores = found["scores"]["rouge_told"][metric].as_array().unwrap().iter();
        scores.map(|score| score.as_f64().unwrap()).collect()
    };
    let prompt = "Once upon a time";
    // Words that the model does not write behind this prompt.
    let strange = "zebra quartz xylophone jukebox wizard fjord";
    let ask = |references: Value| json!({"prompt": prompt, "references": references});
    let plain = Settings { max_new_tokens: Some(12), ..settings() };
    let one = opened(&[ask(json!([strange]))]);
    let Work::Write { stops, max_new_tokens, temperature, .. } = &one.tasks[0].items()[0].work
    else {
        panic!("{:?}", one.tasks[0].items()[0].work)
    };
    assert_eq!((&stops[..], *max_new_tokens, *temperature), (&["\n".to_owned()][..], 12, 0.0));
    let log = folder.path().join("log.jsonl");
    let base = Base {
        decoder: &model.decoder,
        reader: reader(&model),
        end_ids: model.source.tokenizer.end_ids(),
    };
    let subject = Subject {
        name: "base".to_owned(),
        adapter: &NoAdapter,
        domains: Vec::new(),
        identity: json!({}),
    };
    let mut kept = eval::Log::open(&log, &json!("run")).unwrap();
    eval::run(base, &[subject], &[one], &plain, Some(&mut kept), &mut |_| Ok(())).unwrap();
    let text = std::fs::read_to_string(&log).unwrap();
    let row: Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
    let wrote = row["resps"][0].as_str().unwrap().trim();
    let count = wrote.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).count();
    assert!(count >= 4, "{wrote}");

    let records = [
        ask(json!([strange])),
        ask(json!([wrote])),
        ask(json!([strange, wrote, "no"])),
        // All words written, and twice as many strange ones: half of all words are shared.
        ask(json!([format!("{wrote}{}", " zebra".repeat(count * 2))])),
        json!({"prompt": prompt, "references": [strange]}),
    ];
    assert_eq!(scores(&records, "rougeL,none"), [0.0, 1.0, 1.0, 0.5, 0.0]);
    assert_eq!(scores(&records, "rougeLsum,none"), [0.0, 1.0, 1.0, 0.5, 0.0]);
    let answers = [
        json!({"prompt": prompt, "completion": wrote}),
        json!({"prompt": prompt, "completion": strange}),
    ];
    assert_eq!(scores(&answers, "rougeL,none"), [1.0, 0.0]);
    let lines = opened(&[ask(json!(["a\nb"]))]);
    let Work::Write { stops, .. } = &lines.tasks[0].items()[0].work else { panic!() };
    assert!(stops.is_empty(), "an answer of two lines must be possible");
}

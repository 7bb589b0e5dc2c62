//! Named sources: small fixtures of their published forms, and copies where there are any.

use std::path::{Path, PathBuf};

use hydralora_data::{
    Body, DataConfig, Fetch, Message, Record, SourceConfig, locate, named_sources, read_source,
};

use crate::{config, folder, load};

/// Nothing is fetched.
struct Offline;

impl Fetch for Offline {
    fn list(&mut self, _: &str, _: &str) -> Result<Vec<String>, String> {
        Err("offline".to_owned())
    }

    fn file(&mut self, _: &str, _: &str, _: &str, _: Option<&str>) -> Result<PathBuf, String> {
        Err("offline".to_owned())
    }
}

fn records(name: &str, file: &str, content: &str) -> Vec<Record> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(file);
    fs_err::create_dir_all(path.parent().unwrap()).unwrap();
    fs_err::write(&path, content).unwrap();
    let mut config = DataConfig { train: vec![SourceConfig::of(name)], ..DataConfig::default() };
    locate(&mut config, Path::new(""), Some(folder.path()), &mut Offline).unwrap();
    read_source(&config.train[0], Path::new("")).unwrap().records
}

fn chat(user: &str, answer: &str) -> Body {
    Body::Chat(vec![Message::user(user), Message::assistant(answer)])
}

#[test]
fn every_published_form_becomes_the_same_kind_of_record() {
    let cases = [
        (
            "gsm8k",
            "gsm8k/train.jsonl",
            r#"{"question": "1+1?", "answer": "2 #### 2"}"#,
            chat("1+1?", "2 #### 2"),
            None,
        ),
        (
            "dolly-15k",
            "dolly/databricks-dolly-15k.jsonl",
            r#"{"instruction": "Who?", "context": "She.", "response": "She", "category": "closed_qa"}"#,
            chat("Who?\nShe.", "She"),
            Some("closed_qa"),
        ),
        (
            "chatdoctor",
            "chatdoctor/GenMedGPT-5k.json",
            r#"[{"instruction": "You are a doctor.", "input": "It hurts.", "output": "Rest."}]"#,
            chat("You are a doctor.\nIt hurts.", "Rest."),
            None,
        ),
        (
            "icliniq",
            "icliniq/data.json",
            r#"[{"input": "It hurts.", "answer_icliniq": "Rest.", "answer_chatgpt": "x"}]"#,
            chat("It hurts.", "Rest."),
            None,
        ),
        (
            "lawyer-instruct",
            "lawyer-instruct/lawyer.json",
            r#"[{"instruction": "May I?", "input": "", "output": "No."}]"#,
            chat("May I?", "No."),
            None,
        ),
        (
            "us-terms",
            "us-terms/us_terms.jsonl",
            r#"{"text": "a <mask> of trust", "label": "breach", "category": "torts"}"#,
            chat("Which words does <mask> stand for in this text?\na <mask> of trust", "breach"),
            None,
        ),
        (
            "code-alpaca",
            "code-alpaca/a.json",
            r#"[{"prompt": "Print 1.", "completion": "print(1)"}]"#,
            chat("Print 1.", "print(1)"),
            None,
        ),
        (
            "code-alpaca",
            "codealpaca/code_alpaca_2k.json",
            r#"[{"instruction": "Print 1.", "input": "", "output": "print(1)"}]"#,
            chat("Print 1.", "print(1)"),
            None,
        ),
        (
            "alpaca",
            "alpaca/alpaca.json",
            r#"[{"instruction": "Hi", "input": "", "output": "Ho"}]"#,
            chat("Hi", "Ho"),
            None,
        ),
        (
            "flan-v2",
            "flanv2/arc_easy.json",
            "{\"inputs\": \"a?\", \"targets\": \"b\", \"task\": \"arc_easy\"}\n{\"inputs\": \"c?\", \"targets\": \"d\", \"task\": \"arc_easy\"}\n",
            Body::Completion { prompt: "a?".into(), completion: "b".into() },
            Some("arc_easy"),
        ),
        (
            "flan-v2",
            "superni/task002_x/train.json",
            "{\n \"Definition\": [\"Answer.\"],\n \"Instances\": [{\"id\": \"1\", \"input\": \"a?\", \"output\": [\"b\", \"c\"]}]\n}",
            chat("Answer.\na?", "b"),
            Some("task002_x"),
        ),
        (
            "t0",
            "t0/ag_news.jsonl",
            r#"{"prompt": "a?", "completion": " b"}"#,
            Body::Completion { prompt: "a?".into(), completion: " b".into() },
            None,
        ),
    ];
    for (name, file, content, body, domain) in cases {
        let found = records(name, file, content);
        assert_eq!(found[0].body, body, "{name} {file}");
        assert_eq!(found[0].domain.as_deref(), domain, "{name} {file}");
    }
}

#[test]
fn a_path_stands_for_a_copy_and_the_report_names_the_licence() {
    let line = "{\"question\": \"1+1?\", \"answer\": \"2\"}\n";
    let folder = folder(&[("mine.jsonl", line.repeat(4).as_bytes())]);
    let mut config = config(&[]);
    config.train.push(SourceConfig { path: "mine.jsonl".into(), ..SourceConfig::of("gsm8k") });
    let dataset = load(&config, folder.path()).unwrap();
    assert_eq!(dataset.domains, ["math"]);
    let source = &dataset.report.sources[0];
    assert_eq!(source.licence, Some("MIT"));
    assert_eq!((source.files[0].known, source.files[0].sha256.len()), (Some(false), 64));
    let text = dataset.report.to_string();
    assert!(text.contains("note: mine.jsonl: licence: MIT"), "{text}");
    assert!(text.contains("no checksum is pinned for mine.jsonl (SHA-256 "), "{text}");
}

#[test]
fn names_that_are_not_known_or_not_there_are_explained() {
    let folder = folder(&[]);
    let mut config = config(&[]);
    config.train = vec![SourceConfig::of("gms8k"), SourceConfig::new("")];
    let error = load(&config, folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("data.train[0].source: unknown data source `gms8k`; did you mean `gsm8k`?"),
        "{error}"
    );
    assert!(
        error.contains("data.train[1].path: is missing; expected a file, a folder or a `source`"),
        "{error}"
    );
    config.train = vec![SourceConfig::of("gsm8k")];
    let error = locate(&mut config, Path::new(""), Some(folder.path()), &mut Offline)
        .unwrap_err()
        .to_string();
    assert!(error.contains("data source `gsm8k` cannot be had:\n  no file "), "{error}");
    assert!(error.ends_with("hub: offline"), "{error}");
    config.train = vec![SourceConfig::of("t0")];
    let error = locate(&mut config, Path::new(""), None, &mut Offline).unwrap_err().to_string();
    assert!(error.contains("HYDRALORA_DATA_DIR is not set"), "{error}");
    assert!(error.contains("it is not on the hub as a file"), "{error}");
}

#[test]
fn every_source_is_in_the_guide() {
    let guide =
        fs_err::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/data.md")).unwrap();
    for source in named_sources() {
        assert!(guide.contains(&format!("| `{}` |", source.name)), "{}", source.name);
        assert!(guide.contains(source.homepage), "{}", source.homepage);
    }
}

/// The real files, where `HYDRALORA_DATA_DIR` names a folder of copies.
#[test]
fn copies_load_whole() {
    let Some(copies) = std::env::var_os("HYDRALORA_DATA_DIR").map(PathBuf::from) else {
        hydralora_testing::skip("data", "HYDRALORA_DATA_DIR is not set");
        return;
    };
    let mut loaded = 0;
    for named in named_sources() {
        let mut config = config(&[]);
        config.train.push(SourceConfig { limit: Some(400), ..SourceConfig::of(named.name) });
        config.max_seq_len = 20_000;
        if let Err(error) = locate(&mut config, Path::new(""), Some(&copies), &mut Offline) {
            hydralora_testing::skip("data", error);
            continue;
        }
        let dataset =
            load(&config, &copies).unwrap_or_else(|error| panic!("{}: {error}", named.name));
        let source = &dataset.report.sources[0];
        assert!(source.train_examples * 10 >= source.records * 9, "{source:?}");
        eprintln!("{}: {} records, {}", named.name, source.records, source.format);
        loaded += 1;
    }
    assert!(loaded > 0, "{} holds no copy of a named source", copies.display());
}

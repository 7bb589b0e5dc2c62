//! Data sets from several files: split, domains, report, order.

use std::collections::HashSet;

use hydralora_data::{
    Batch, DataConfig, Dataset, Example, Examples, IGNORE_LABEL, Sampler, SourceConfig, Split,
};
use proptest::prelude::*;

use crate::{config, encoder, exchange, folder, load};

fn lines(tag: &str, count: usize) -> String {
    (0..count).map(|index| exchange(&format!("{tag}{index}"), &format!("{index}"))).collect()
}

fn all(examples: &Examples) -> Vec<Example> {
    examples.iter().map(|example| example.unwrap()).collect()
}

fn rows(examples: &Examples, source: u32) -> Vec<u32> {
    let examples = all(examples).into_iter();
    examples.filter(|example| example.source == source).map(|example| example.row).collect()
}

#[test]
fn the_split_of_a_file_does_not_depend_on_anything_else() {
    let folder =
        folder(&[("a.jsonl", lines("a", 60).as_bytes()), ("b.jsonl", lines("b", 40).as_bytes())]);
    let split = |files: &[&str], change: &dyn Fn(&mut DataConfig)| {
        let mut config = DataConfig { valid_fraction: 0.2, ..config(files) };
        change(&mut config);
        load(&config, folder.path()).unwrap()
    };
    let both = split(&["a.jsonl", "b.jsonl"], &|_| {});
    assert_eq!((both.train.len(), both.valid.len()), (80, 20));
    assert_eq!(both.domains, ["a", "b"]);
    for source in 0..2 {
        let train: HashSet<u32> = rows(&both.train, source).into_iter().collect();
        assert!(rows(&both.valid, source).iter().all(|row| !train.contains(row)));
    }
    let swapped = split(&["b.jsonl", "a.jsonl"], &|_| {});
    assert_eq!(rows(&both.valid, 0), rows(&swapped.valid, 1));
    assert_eq!(rows(&both.valid, 1), rows(&swapped.valid, 0));
    let changed = split(&["a.jsonl"], &|config| {
        config.template = Some("vicuna".to_owned());
        config.max_seq_len = 200;
        config.train[0].weight = 3.0;
    });
    assert_eq!(rows(&both.valid, 0), rows(&changed.valid, 0));
    let twice = split(&["a.jsonl", "a.jsonl"], &|_| {});
    assert_eq!(rows(&twice.valid, 0), rows(&twice.valid, 1));
    assert_eq!(twice.report.duplicates, 0);
    let config = DataConfig { valid_fraction: 0.2, ..config(&["a.jsonl"]) };
    let other_seed = Dataset::load(&config, folder.path(), &encoder(), None, 42).unwrap();
    assert_ne!(rows(&both.valid, 0), rows(&other_seed.valid, 0));
}

#[test]
fn validation_files_replace_the_split() {
    let folder =
        folder(&[("a.jsonl", lines("a", 20).as_bytes()), ("b.jsonl", lines("a", 3).as_bytes())]);
    let mut config = DataConfig { valid_fraction: 0.5, ..config(&["a.jsonl"]) };
    config.valid.push(SourceConfig {
        domain: Some("a".to_owned()),
        limit: Some(2),
        ..SourceConfig::new("b.jsonl")
    });
    let dataset = load(&config, folder.path()).unwrap();
    assert_eq!((dataset.train.len(), dataset.valid.len()), (20, 2));
    assert_eq!(dataset.domains, ["a"]);
    assert_eq!(dataset.report.duplicates, 2);
    assert!(all(&dataset.valid).iter().all(|example| example.source == 1 && example.domain == 0));
    assert_eq!(dataset.report.sources[1].split, Split::Valid);
}

#[test]
fn the_report_counts_and_the_table_shows_it() {
    let mut content = lines("question ", 8);
    content.push_str(&exchange("nothing", ""));
    content.push_str(&exchange(&"long ".repeat(30), "lost"));
    content.push_str(&exchange("short", &"cut ".repeat(40)));
    let folder =
        folder(&[("math.jsonl", content.as_bytes()), ("poems.txt", b"one\n\ntwo\nthree\n")]);
    let mut config = config(&["math.jsonl", "poems.txt"]);
    config.max_seq_len = 100;
    let dataset = load(&config, folder.path()).unwrap();
    let report = &dataset.report;
    let math = &report.sources[0];
    assert_eq!((math.records, math.train_examples, math.valid_examples), (11, 9, 0));
    assert_eq!((math.dropped.empty_answer, math.dropped.no_label), (1, 1));
    assert_eq!((math.truncated, math.longest), (2, 100));
    // Each token is a byte but for the special ones: `<|im_start|>user\n…<|im_end|>\n` and the
    // answer's `<|im_start|>assistant\n…<|im_end|>\n`.
    let full = |question: usize, answer: usize| 1 + 5 + question + 2 + 1 + 10 + answer + 2;
    assert_eq!(math.tokens, 8 * full(10, 1) + 100);
    assert_eq!(math.tokens_lost, full(150, 4) - 100 + full(5, 160) - 100);
    assert_eq!(math.label_tokens, 8 * 2 + 100 - (1 + 5 + 5 + 2 + 1 + 10));
    let labels: usize = all(&dataset.train).iter().map(Example::label_tokens).sum();
    assert_eq!(report.train_label_tokens, labels);
    insta::assert_snapshot!(report.to_string(), @r#"
    source      domain  format  records  train  valid  tokens  labels  cut  dropped   share
    math.jsonl  math    alpaca       11      9      0     356      92    2        2  75.0 %
    poems.txt   poems   text          3      3      0      14      11    0        0  25.0 %
    train: 12 examples, 370 tokens, 103 labels; valid: 0 examples, 0 tokens, 0 labels
    note: math.jsonl: left out 1 with an empty answer, 1 with nothing to train within max_seq_len
    note: math.jsonl: 2 record(s) cut to max_seq_len, 161 token(s) lost
    "#);
}

#[test]
fn the_report_is_written_as_json() {
    let folder = folder(&[("a.jsonl", lines("a", 4).as_bytes())]);
    let report = load(&config(&["a.jsonl"]), folder.path()).unwrap().report;
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["train_examples"], 4);
    assert_eq!(json["sources"][0]["split"], "train");
    assert_eq!(json["sources"][0]["dropped"]["empty_answer"], 0);
}

#[test]
fn records_may_bring_their_domain() {
    let content = "{\"text\": \"a\", \"topic\": \"law\"}\n{\"text\": \"b\", \"topic\": \"math\"}\n{\"text\": \"c\", \"topic\": \"law\"}\n";
    let folder = folder(&[("x.jsonl", content.as_bytes())]);
    let mut config = config(&["x.jsonl"]);
    config.train[0].fields.insert("domain".to_owned(), "topic".to_owned());
    let dataset = load(&config, folder.path()).unwrap();
    assert_eq!(dataset.domains, ["law", "math"]);
    let domains: Vec<u32> = all(&dataset.train).iter().map(|example| example.domain).collect();
    assert_eq!(domains, [0, 1, 0]);
}

#[test]
fn one_meaning_in_four_formats_gives_the_same_tokens() {
    let folder = folder(&[
        ("alpaca.json", br#"[{"instruction": "Add.", "input": "1 2", "output": "3"}]"#),
        ("messages.jsonl", br#"{"messages": [{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}]}"#),
        ("sharegpt.json", br#"[{"conversations": [{"from": "human", "value": "Add.\n1 2"}, {"from": "gpt", "value": "3"}]}]"#),
        ("completion.jsonl", br#"{"prompt": "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n", "completion": "3<|im_end|>\n"}"#),
    ]);
    let config = config(&["alpaca.json", "messages.jsonl", "sharegpt.json", "completion.jsonl"]);
    let dataset = load(&config, folder.path()).unwrap();
    let train = all(&dataset.train);
    let formats: Vec<&str> =
        dataset.report.sources.iter().map(|source| &source.format[..]).collect();
    assert_eq!(formats, ["alpaca", "messages", "sharegpt", "completion"]);
    for example in &train[1..3] {
        assert_eq!(example.tokens, train[0].tokens);
        assert_eq!(example.labels, train[0].labels);
    }
    // A completion has no template: the whole of it and the end of text are trained.
    let completion = &train[3];
    let (last, rest) = completion.tokens.split_last().unwrap();
    assert_eq!(rest, train[0].tokens);
    assert_eq!(encoder().decode(&[*last]), "</s>");
    assert_eq!(train[0].label_tokens(), 2);
    assert_eq!(completion.label_tokens(), 4);
}

#[test]
fn a_batch_predicts_the_answers() {
    let folder = folder(&[("a.jsonl", lines("a", 12).as_bytes())]);
    let config = config(&["a.jsonl"]);
    let dataset = load(&config, folder.path()).unwrap();
    let sampler =
        Sampler::new(&dataset.train, &dataset.report.weights(), 5, None, 3, true).unwrap();
    let mut answers = Vec::new();
    for indices in sampler.epoch(0).iter() {
        let examples: Vec<Example> = indices.map(|i| dataset.train.get(i).unwrap()).collect();
        let batch = Batch::pack(&examples.iter().collect::<Vec<_>>());
        for sequence in 0..batch.sequences() {
            let labels = &batch.labels[batch.sequence(sequence)];
            let predicted: Vec<u32> =
                labels.iter().copied().filter(|&label| label != IGNORE_LABEL).collect();
            answers.push(encoder().decode(&predicted));
        }
    }
    answers.sort();
    let mut expected: Vec<String> = (0..12).map(|index| format!("{index}<|im_end|>")).collect();
    expected.sort();
    assert_eq!(answers, expected);
}

fn any_text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 \\n\"\\\\<|>{}%é€🙂]{0,30}[a-z]"
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is written, the trained tokens are the answers and nothing but the answers.
    #[test]
    fn any_conversation_survives_every_format(
        turns in prop::collection::vec((any_text(), any_text()), 1..4),
        system in prop::option::of(any_text()),
        array in any::<bool>(),
        pretty in any::<bool>(),
    ) {
        let mut messages: Vec<serde_json::Value> = system
            .iter()
            .map(|text| serde_json::json!({"role": "system", "content": text}))
            .collect();
        for (user, assistant) in &turns {
            messages.push(serde_json::json!({"role": "user", "content": user}));
            messages.push(serde_json::json!({"role": "assistant", "content": assistant}));
        }
        let record = serde_json::json!({"messages": messages});
        let (name, content) = match (array, pretty) {
            (true, true) => ("x.json", serde_json::to_string_pretty(&[&record, &record])),
            (true, false) => ("x.json", serde_json::to_string(&[&record, &record])),
            (false, _) => ("x.jsonl", Ok(format!("{record}\n{record}\n"))),
        };
        let folder = folder(&[(name, content.unwrap().as_bytes())]);
        let mut config = config(&[name]);
        for template in ["chatml", "phi3", "plain"] {
            config.template = Some(template.to_owned());
            let dataset = load(&config, folder.path()).unwrap();
            prop_assert_eq!(dataset.train.len(), 2);
            let train = all(&dataset.train);
            prop_assert_eq!(&train[0].tokens, &train[1].tokens);
            let end = match template {
                "chatml" => "<|im_end|>",
                "phi3" => "<|end|>",
                _ => "</s>",
            };
            let expected: String =
                turns.iter().map(|(_, answer)| format!("{answer}{end}")).collect();
            let trained: Vec<u32> = train[0]
                .labels
                .iter()
                .copied()
                .filter(|&label| label != IGNORE_LABEL)
                .collect();
            prop_assert_eq!(encoder().decode(&trained), expected);
        }
    }

    /// Foreign bytes give records or a message, never a panic.
    #[test]
    fn foreign_bytes_are_refused_politely(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        json in "[\\[\\]{}\",:a-z0-9 \\n]{0,80}",
    ) {
        let folder = folder(&[("a.jsonl", &bytes), ("b.json", json.as_bytes()), ("c.txt", &bytes)]);
        for name in ["a.jsonl", "b.json", "c.txt"] {
            if let Err(error) = load(&config(&[name]), folder.path()) {
                prop_assert!(error.to_string().contains(name));
            }
        }
    }
}

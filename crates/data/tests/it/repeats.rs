//! Repeated records and benchmark questions, across sources.

use hydralora_data::{DataConfig, Dedup, SourceConfig};

use crate::{config, exchange, folder, load};

const LONG: &str = "Natalia sold clips to 48 of her friends in April, and then she sold half as many \
                    clips in May. How many clips did Natalia sell altogether in April and May?";

fn rows(
    config: &DataConfig,
    files: &[(&str, &[u8])],
) -> (Vec<(u32, u32)>, hydralora_data::DataReport) {
    let folder = folder(files);
    let dataset = load(config, folder.path()).unwrap();
    let places = (0..dataset.train.len()).map(|index| dataset.train.place(index).unwrap());
    (places.collect(), dataset.report)
}

#[test]
fn repeats_are_left_out_across_sources() {
    let a =
        exchange("What is 1 + 1?", "2") + &exchange(LONG, "72") + &exchange("what  IS 1 + 1?", "2");
    let b = exchange("What is 1 + 1?", "2")
        + &exchange("What is 1 - 1?", "0")
        + &exchange(&LONG.replace("altogether", "in total"), "72");
    let files = [("a.jsonl", a.as_bytes()), ("b.jsonl", b.as_bytes())];
    let mut config = config(&["a.jsonl", "b.jsonl"]);
    let (places, report) = rows(&config, &files);
    assert_eq!(places.len(), 6);
    assert_eq!(report.sources[0].dropped.total(), 0);
    config.dedup = Dedup::Exact;
    let (places, report) = rows(&config, &files);
    assert_eq!(places, [(0, 0), (0, 1), (1, 1), (1, 2)]);
    let repeats: Vec<usize> = report.sources.iter().map(|s| s.dropped.duplicate).collect();
    assert_eq!(repeats, [1, 1]);
    config.dedup = Dedup::Near;
    config.dedup_threshold = 0.6;
    let (places, report) = rows(&config, &files);
    assert_eq!(places, [(0, 0), (0, 1), (1, 1)]);
    assert_eq!(report.sources[1].dropped.near_duplicate, 1);
    assert!(report.notes.iter().any(|note| {
        note == "b.jsonl: left out 1 repeating an earlier record, 1 nearly repeating an earlier record"
    }));
    config.dedup_threshold = 1.0;
    assert_eq!(rows(&config, &files).0.len(), 4);
}

#[test]
fn held_out_records_win_over_training_records() {
    let train = exchange("one", "1") + &exchange("two", "2");
    let valid = exchange("Two", "2");
    let mut config = config(&["train.jsonl"]);
    config.valid.push(SourceConfig::new("valid.jsonl"));
    let files = [("train.jsonl", train.as_bytes()), ("valid.jsonl", valid.as_bytes())];
    let (places, report) = rows(&config, &files);
    assert_eq!((places.len(), report.valid_examples), (2, 1));
    config.dedup = Dedup::Exact;
    let (places, report) = rows(&config, &files);
    assert_eq!((places, report.valid_examples, report.duplicates), (vec![(0, 0)], 1, 0));
}

#[test]
fn a_source_of_nothing_but_repeats_is_counted_and_empty() {
    let files = [("a.jsonl", exchange("one", "1")), ("b.jsonl", exchange("ONE", "1").repeat(3))];
    let files = [(files[0].0, files[0].1.as_bytes()), (files[1].0, files[1].1.as_bytes())];
    let mut config = config(&["a.jsonl", "b.jsonl"]);
    config.dedup = Dedup::Exact;
    let (places, report) = rows(&config, &files);
    assert_eq!(places, [(0, 0)]);
    assert_eq!(report.sources[1].dropped.duplicate, 3);
    assert_eq!(report.sources[1].share, 0.0);
}

#[test]
fn benchmark_questions_in_training_records_are_shown() {
    let train = exchange(&format!("Solve this: {LONG}"), "72") + &exchange("What is 1 + 1?", "2");
    let questions = format!(
        "question,answer\n\"{}\",72\nWhat is 1 + 1?,2\n",
        LONG.to_uppercase().replace(',', "")
    );
    let files = [("a.jsonl", train.as_bytes()), ("test.csv", questions.as_bytes())];
    let mut config = config(&["a.jsonl"]);
    config.overlap_check = vec!["test.csv".into()];
    let report = rows(&config, &files).1;
    let overlap = report.overlap.clone().unwrap();
    assert_eq!((overlap.records, overlap.questions, overlap.too_short), (1, 1, 1));
    assert!(overlap.examples[0].record.ends_with("a.jsonl: line 1"), "{overlap:?}");
    assert!(overlap.examples[0].question.ends_with("test.csv: record 1 (line 2)"), "{overlap:?}");
    let table = report.to_string();
    assert!(
        table.contains(
            "1 training record(s) hold 1 of 1 benchmark question(s), by runs of 13 words"
        ),
        "{table}"
    );
    config.overlap_check.push("none.jsonl".into());
    config.overlap_words = 3;
    let folder = folder(&files);
    let error = load(&config, folder.path()).unwrap_err().to_string();
    assert!(error.contains("data.overlap_check[1]: there is no file"), "{error}");
    assert!(error.contains("data.overlap_words: must be at least 8, is 3"), "{error}");
}

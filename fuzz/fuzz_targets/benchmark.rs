//! The files of a benchmark; the first byte says of which one.
#![no_main]

use hydralora_fuzz::{STORIES, only_uncaught_panics_count, with_files};
use hydralora_model::Tokenizer;
use hydralora_run::eval::{Answer, Reader, Scored, Settings, Work, tasks};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

/// A task, and the files it is opened from.
const TASKS: &[(&str, &[&str])] = &[
    ("mmlu_astronomy", &["dev/astronomy_dev.csv", "test/astronomy_test.csv"]),
    ("mmlu_ppl_astronomy", &["dev/astronomy_dev.csv", "test/astronomy_test.csv"]),
    ("gsm8k", &["train.jsonl", "test.jsonl"]),
    ("bbh_navigate", &["cot-prompts/navigate.txt", "tasks/navigate.json"]),
    ("humaneval", &["HumanEval.jsonl"]),
    ("exact", &["data.jsonl"]),
    ("loss", &["data.jsonl"]),
    ("humaneval", &["HumanEval.jsonl.gz"]),
    ("gsm8k", &["main/train-00000.parquet", "main/test-00000.parquet"]),
    ("choices", &["data.jsonl"]),
    ("rouge", &["data.jsonl"]),
    ("humaneval_instruct", &["HumanEval.jsonl"]),
];

static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_folder(&STORIES, &[]).expect("the tokenizer of a fixture"));

fuzz_target!(|data: &[u8]| {
    only_uncaught_panics_count();
    let Some((&kind, bytes)) = data.split_first() else { return };
    let (task, files) = TASKS[usize::from(kind) % TASKS.len()];
    with_files(bytes, files, |folder| {
        let data = if files[0] == "data.jsonl" { folder.join(files[0]) } else { folder.into() };
        let settings = Settings {
            data,
            shots: None,
            limit: None,
            seed: 0,
            repeats: None,
            temperature: None,
            max_new_tokens: Some(16),
            allow_code_execution: true,
            context: 128,
        };
        let reader = Reader { tokenizer: &TOKENIZER, template: None, record_template: None };
        let Ok(opened) = tasks::open(task, &settings, &reader) else { return };
        for task in &opened.tasks {
            for item in task.items().iter().take(4) {
                let _ = reader.render(&item.prompt);
                // An answer to these is a program that would run.
                if task.info().name.starts_with("humaneval") {
                    continue;
                }
                let answer = match &item.work {
                    Work::Choices { choices, .. } => {
                        let scored = Scored { log_likelihood: -1.0, greedy: false, tokens: 1 };
                        Answer::Choices(vec![scored; choices.len()])
                    }
                    Work::Whole(texts) => Answer::Whole(vec![1.0; texts.len()]),
                    Work::Write { .. } => {
                        Answer::Texts(vec![String::from_utf8_lossy(bytes).into_owned()])
                    }
                    Work::Loss { .. } => Answer::Loss(1.0, 1),
                };
                let _ = task.score(item, &answer);
            }
        }
    });
});

//! A file of training data; the first byte says under which name it lies.
#![no_main]

use hydralora_data::{
    ByteEncoder, ChatTemplate, DataConfig, Dataset, SourceConfig, read_rows, read_source,
};
use hydralora_fuzz::{only_uncaught_panics_count, with_files};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

const NAMES: &[&str] = &[
    "data.json",
    "data.jsonl",
    "data.csv",
    "data.tsv",
    "data.parquet",
    "data.txt",
    "data.jsonl.gz",
    "data.jsonl.zst",
    "data",
];

static TEMPLATE: LazyLock<ChatTemplate> =
    LazyLock::new(|| ChatTemplate::builtin("chatml").expect("a built-in template"));

fuzz_target!(|data: &[u8]| {
    only_uncaught_panics_count();
    let Some((&kind, bytes)) = data.split_first() else { return };
    let name = NAMES[usize::from(kind) % NAMES.len()];
    with_files(bytes, &[name], |folder| {
        let source = SourceConfig::new(name);
        let _ = read_rows(&folder.join(name), &mut |_, _| Ok(true));
        if read_source(&source, folder).is_err() {
            return;
        }
        let config = DataConfig {
            train: vec![source],
            valid_fraction: 0.5,
            max_seq_len: 64,
            ..DataConfig::default()
        };
        let encoder = ByteEncoder::new(&["<|im_start|>", "<|im_end|>"]).with_eos("<|im_end|>");
        let _ = Dataset::load(&config, folder, &encoder, Some(&TEMPLATE), 0);
    });
});

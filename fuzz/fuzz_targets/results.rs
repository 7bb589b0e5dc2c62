//! Two results files to compare, the log of an interrupted evaluation, and a run's metrics.
#![no_main]

use hydralora_fuzz::with_files;
use hydralora_run::eval::{Log, compare};
use hydralora_train::read_metrics;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|data: &[u8]| {
    with_files(data, &["first.json", "second.json", "samples.jsonl"], |folder| {
        let (first, second) = (folder.join("first.json"), folder.join("second.json"));
        let _ = compare(&first, &second);
        let _ = compare(&second, &first);
        let _ = Log::open(&folder.join("samples.jsonl"), &json!({"model": "m"}));
        let _ = read_metrics(&first);
    });
});

//! A model in two GGUF files.
#![no_main]

use hydralora_fuzz::{only_uncaught_panics_count, read_all, with_files};
use hydralora_model::{ModelSource, Weights};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    only_uncaught_panics_count();
    let names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
    with_files(data, &names, |folder| {
        if let Ok(weights) = Weights::open(&folder.join(names[1])) {
            read_all(&weights);
        }
        let _ = ModelSource::open(folder);
    });
});

//! A GGUF file: its description, and the model, weights and tokenizer in it.
#![no_main]

use hydralora_fuzz::{only_uncaught_panics_count, read_all, with_files};
use hydralora_kernels::DType;
use hydralora_model::{Decoder, GgufFile, ModelConfig, ModelSource, Tokenizer, Weights};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    only_uncaught_panics_count();
    let Ok(file) = GgufFile::parse(data, Path::new("model.gguf")) else { return };
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file)
        && let Ok(ids) = tokenizer.encode(" Once upon a time,\n ünd 123")
    {
        let _ = tokenizer.decode(&ids, false);
    }
    let _ = ModelConfig::from_gguf(&file);
    with_files(data, &["model.gguf"], |folder| {
        let path = folder.join("model.gguf");
        if let Ok(weights) = Weights::open(&path) {
            read_all(&weights);
        }
        if let Ok(source) = ModelSource::open(&path) {
            let _ = Decoder::load(&source.config, &source.weights, DType::F32);
        }
    });
});

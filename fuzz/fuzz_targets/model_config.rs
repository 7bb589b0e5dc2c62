//! A model's `config.json`, alone and with weights and a tokenizer beside it.
#![no_main]

use hydralora_fuzz::{STORIES, with_files};
use hydralora_kernels::DType;
use hydralora_model::source::config_of_folder;
use hydralora_model::{Decoder, ModelSource};
use libfuzzer_sys::fuzz_target;
use std::fs;

const NAMES: &[&str] =
    &["config.json", "generation_config.json", "model.safetensors.index.json", "model.safetensors"];

fuzz_target!(|data: &[u8]| {
    with_files(data, NAMES, |folder| {
        if let Ok(config) = config_of_folder(folder) {
            config.to_json("float32");
            config.sites();
        }
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(STORIES.join(name), folder.join(name)).expect("a copy of a fixture");
        }
        if let Ok(source) = ModelSource::open(folder) {
            let _ = Decoder::load(&source.config, &source.weights, DType::F32);
        }
    });
});

//! A safetensors file, as the weights of a base model and as the tensors of an adapter.
#![no_main]

use hydralora_fuzz::{read_all, with_files};
use hydralora_kernels::DType;
use hydralora_model::Weights;
use hydralora_peft::{exchange, io};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    with_files(data, &["model.safetensors"], |folder| {
        let path = folder.join("model.safetensors");
        if let Ok(weights) = Weights::open(&path) {
            read_all(&weights);
        }
        for dtype in [DType::F32, DType::F64] {
            if let Ok(tensors) = io::decode(&path, dtype) {
                exchange::shapes_in(&tensors);
            }
        }
    });
});

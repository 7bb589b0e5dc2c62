//! A model's `config.json` and an adapter for it, as far as merging and exporting read them before any
//! weight.
#![no_main]

use hydralora_fuzz::with_files;
use hydralora_kernels::DType;
use hydralora_model::ModelConfig;
use hydralora_peft::exchange::Lora;
use hydralora_peft::io;
use hydralora_peft::merge::{Gates, MergePlan};
use libfuzzer_sys::fuzz_target;

const NAMES: &[&str] = &["config.json", io::CONFIG_FILE, io::METADATA_FILE, io::TENSOR_FILE];

fuzz_target!(|data: &[u8]| {
    with_files(data, NAMES, |folder| {
        let Ok(config) = ModelConfig::from_json_file(&folder.join(NAMES[0])) else { return };
        let sites = config.sites();
        let Ok(loaded) = io::load(folder, &config, DType::F32) else { return };
        for gates in [Gates::PerToken, Gates::Uniform] {
            if let Ok(plan) = MergePlan::new(loaded.tuned.as_ref(), &sites, &gates) {
                plan.unties();
            }
            let _ = Lora::from_tuned(loaded.tuned.as_ref(), &sites, &gates, true);
        }
    });
});

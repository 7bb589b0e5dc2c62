//! An adapter's folder: its configuration, its tensors, what it was trained with.
#![no_main]

use hydralora_fuzz::{sites, with_files};
use hydralora_kernels::DType;
use hydralora_peft::exchange::read_loras;
use hydralora_peft::io;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    with_files(data, &[io::CONFIG_FILE, io::METADATA_FILE, io::TENSOR_FILE], |folder| {
        let _ = io::read_config(folder);
        let _ = io::read_metadata(folder);
        if let Ok(options) = io::read_options(folder) {
            options.to_recipe();
        }
        if let Ok(loaded) = io::load_unbound(folder, &sites(), DType::F32) {
            loaded.tuned.file_tensors();
            loaded.tuned.peft_config(&sites());
        }
        if let Ok(loras) = read_loras(&[folder.to_path_buf()]) {
            for lora in loras {
                let _ = lora.attach(&sites(), DType::F32);
            }
        }
    });
});

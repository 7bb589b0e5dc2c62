//! The crate as its users see it: files in, data sets and messages out.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests tell people")]

mod bad_input;
mod dialects;
mod documentation;
mod heads;
mod hostile_templates;
#[cfg(target_os = "linux")]
mod large;
mod layouts;
mod loading;
mod named;
mod repeats;
mod sample;
mod streaming;

use std::path::Path;

use hydralora_data::{ByteEncoder, DataConfig, Dataset, Result, SourceConfig};
use tempfile::TempDir;

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        fs_err::write(folder.path().join(name), content).unwrap();
    }
    folder
}

/// Training on these files with the chatml template and no validation.
fn config(files: &[&str]) -> DataConfig {
    DataConfig {
        train: files.iter().map(|file| SourceConfig::new(*file)).collect(),
        valid_fraction: 0.0,
        template: Some("chatml".to_owned()),
        ..DataConfig::default()
    }
}

fn encoder() -> ByteEncoder {
    ByteEncoder::new(&["<|im_start|>", "<|im_end|>"]).with_eos("</s>")
}

fn load(config: &DataConfig, folder: &Path) -> Result<Dataset> {
    Dataset::load(config, folder, &encoder(), None, 41)
}

/// A JSON line of an exchange.
fn exchange(instruction: &str, output: &str) -> String {
    format!("{{\"instruction\": \"{instruction}\", \"output\": \"{output}\"}}\n")
}

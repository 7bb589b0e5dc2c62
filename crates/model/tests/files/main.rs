//! How a base model's files are read, and what bad ones give.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests tell people")]

mod config;
mod families;
mod foreign_tokenizers;
mod gguf;
mod gguf_keys;
mod kinds;
mod llama_cpp;
mod save;
mod smollm2;
mod source;
mod split;
mod tokenizer;
mod weights;

use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of the small model's folder that a test may damage.
fn copied_stories() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("stories260K")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

/// Replaces one text in a file; it must be there.
fn replace(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{} lacks {from}", path.display());
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

//! What the fuzz targets share: laying an input out as files, and small models to read it with.
//!
//! A target may return whatever error it likes; what counts as a find is a panic, an abort, an input
//! that takes [libFuzzer's] timeout, or memory that no file of that size can ask for.
//!
//! [libFuzzer's]: https://llvm.org/docs/LibFuzzer.html

use hydralora_model::adapter::SiteShape;
use hydralora_model::{ModelConfig, Weights};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Once};
use tempfile::TempDir;

/// What stands between two files of one input.
pub const SEPARATOR: &[u8] = b"\0--\0";

/// The parts of `input`, at most `count`: the last one keeps whatever separators it holds.
pub fn parts(input: &[u8], count: usize) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    let mut rest = input;
    while parts.len() + 1 < count {
        let Some(at) = rest.windows(SEPARATOR.len()).position(|window| window == SEPARATOR) else {
            break;
        };
        parts.push(&rest[..at]);
        rest = &rest[at + SEPARATOR.len()..];
    }
    parts.push(rest);
    parts
}

/// Writes the parts of `input` under `names` into a folder that lives as long as `read` runs. Where
/// there are fewer parts than names, the other files are missing. Names may hold folders.
///
/// # Panics
/// If the file system refuses: then nothing can be tested.
pub fn with_files<T>(input: &[u8], names: &[&str], read: impl FnOnce(&Path) -> T) -> T {
    let folder = TempDir::new().expect("a temporary folder");
    for (name, bytes) in names.iter().zip(parts(input, names.len())) {
        let path = folder.path().join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).expect("a folder within a temporary folder");
        }
        fs::write(&path, bytes).expect("a temporary file");
    }
    read(folder.path())
}

/// A folder of the repository.
pub fn repository(inside: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(inside)
}

/// The tiny model that the tests use too.
pub static STORIES: LazyLock<PathBuf> =
    LazyLock::new(|| repository("crates/model/tests/fixtures/stories260K"));

/// The layers of a model of two blocks, as narrow as the adapters of the seeds; `seeds.py` has the same.
///
/// # Panics
/// If the configuration is not one any more.
pub fn sites() -> Vec<SiteShape> {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 4, "intermediate_size": 6,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
        "vocab_size": 512, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
    });
    let read = ModelConfig::from_json(&config, Path::new("config.json"));
    read.expect("a configuration").sites()
}

/// Lets a target go on where the code itself catches a panic of a library; libFuzzer's hook would
/// end it there. A panic that nobody catches still ends it. With `RUST_BACKTRACE` every panic is
/// shown.
pub fn only_uncaught_panics_count() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // The first hook taken is libFuzzer's, which aborts; without one there is the standard one.
        drop(std::panic::take_hook());
        if std::env::var_os("RUST_BACKTRACE").is_none() {
            std::panic::set_hook(Box::new(|_| {}));
        }
    });
}

/// Reads every tensor in both ways there are.
pub fn read_all(weights: &Weights) {
    let names: Vec<String> = weights.names().map(str::to_owned).collect();
    for name in names {
        let Some((shape, _)) = weights.describe(&name) else { continue };
        let shape = shape.to_vec();
        let _ = weights.get(&name);
        let _ = weights.take_f32(&name, &shape);
    }
}

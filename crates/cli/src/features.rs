//! Mean hidden states of texts, kept in the cache.

use crate::args::Global;
use crate::plan::Base;
use crate::ui::say;
use hydralora_files::write_file;
use hydralora_model::hub::Hub;
use hydralora_run::probe::{self, MOST_TOKENS};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Seconds between lines that say how far the reading is.
const LINE_EVERY: u64 = 20;

/// [`probe::mean_hidden`], kept in the cache by model, layer and texts.
///
/// # Errors
/// If the model fails.
pub(crate) fn mean_hidden(
    global: &Global,
    base: &Base,
    texts: &[String],
    layer: usize,
) -> anyhow::Result<Vec<f32>> {
    let path = cache_path(base, texts, layer);
    if let Some(kept) = read_cache(&path, texts.len() * base.decoder.config().hidden_size) {
        say(global, format!("features from {}", path.display()));
        return Ok(kept);
    }
    let started = Instant::now();
    let mut shown = 0;
    let mut progress = |done: usize| {
        let passed = started.elapsed().as_secs() / LINE_EVERY;
        if passed > shown {
            shown = passed;
            say(global, format!("{done} of {} texts read by the model", texts.len()));
        }
    };
    let features =
        probe::mean_hidden(&base.decoder, base.tokenizer(), texts, layer, &mut progress)?;
    let bytes: Vec<u8> = features.iter().flat_map(|value| value.to_le_bytes()).collect();
    // What the model took long to find is not lost for a cache that cannot be written.
    let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
    if let Err(error) = folder.and_then(|()| write_file(&path, &bytes)) {
        say(global, format!("note: the features are not kept for the next time: {error}"));
    }
    Ok(features)
}

fn cache_path(base: &Base, texts: &[String], layer: usize) -> PathBuf {
    let mut hash = Sha256::new();
    hash.update(&base.source.identity.fingerprint);
    hash.update(format!(" {layer} {MOST_TOKENS} {:?}\n", base.decoder.dtype()));
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Hub::from_environment().cache.join("features").join(format!("{name}.f32"))
}

/// Features kept earlier; none if there are none or they are not whole.
fn read_cache(path: &Path, values: usize) -> Option<Vec<f32>> {
    let bytes = hydralora_files::bytes_of(path).ok()?;
    let (numbers, rest) = bytes.as_chunks::<4>();
    if numbers.len() != values || !rest.is_empty() {
        return None;
    }
    Some(numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

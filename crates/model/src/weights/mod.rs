//! Tensors by their Hugging Face names, whatever file they come from.

mod gguf;
mod map;
mod safetensors;

pub use gguf::{GgufFile, MetaValue};

use crate::error::{Error, Result};
use hydralora_kernels::block::{self, BlockFormat};
use map::Mapping;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Where one tensor's bytes lie.
#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    bytes: Range<usize>,
    format: BlockFormat,
    shape: Vec<usize>,
    /// Rows are interleaved for llama.cpp's rope, in heads of this many rows.
    interleaved_heads: Option<usize>,
}

/// The tensors of a model, mapped from disk.
pub struct Weights {
    path: PathBuf,
    files: Vec<Mapping>,
    entries: BTreeMap<String, Entry>,
    used: Mutex<BTreeSet<String>>,
}

impl Weights {
    /// Opens a folder with `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// If the files are missing, truncated or malformed.
    pub fn open_folder(folder: &Path) -> Result<Self> {
        safetensors::open_folder(folder)
    }

    /// Takes the tensors of an opened GGUF file, of a model with these head counts.
    ///
    /// # Errors
    /// If a tensor's name or type is not known.
    pub fn from_gguf(file: GgufFile, num_heads: usize, num_key_value_heads: usize) -> Result<Self> {
        file.into_weights(num_heads, num_key_value_heads)
    }

    /// The folder or file the tensors come from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Shape and format of a tensor.
    pub fn describe(&self, name: &str) -> Option<(&[usize], BlockFormat)> {
        self.entries.get(name).map(|entry| (entry.shape.as_slice(), entry.format))
    }

    /// Bytes of all tensors as stored.
    pub fn stored_bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.bytes.len()).sum()
    }

    /// The tensor `name` widened to `f32`, row-major; it then counts as used.
    ///
    /// # Errors
    /// If there is no such tensor or it has another shape.
    pub fn take_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let entry = self.entries.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        if entry.shape != shape {
            return Err(Error::WrongShape {
                path: self.path.clone(),
                name: name.to_owned(),
                found: entry.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        self.used.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(name.to_owned());
        let bytes = &self.files[entry.file][entry.bytes.clone()];
        let cols = *shape.last().unwrap_or(&1);
        let row_bytes = entry.format.bytes_for(cols);
        let mut out = vec![0.0; shape.iter().product()];
        if cols == 0 {
            return Ok(out);
        }
        out.par_chunks_mut(cols).enumerate().for_each(|(row, out)| {
            let source = entry.source_row(row);
            let bytes = &bytes[source * row_bytes..(source + 1) * row_bytes];
            block::dequantize(entry.format, bytes, out);
        });
        Ok(out)
    }

    /// Names nothing has asked for.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.entries.keys().filter(|name| !used.contains(*name)).cloned().collect()
    }

    /// A hash of every tensor's name, shape, format and a sample of its bytes: equal for equal
    /// weights in the same file format, computed without reading the whole file.
    pub fn fingerprint(&self) -> String {
        const SAMPLE: usize = 4096;
        let mut hash = Sha256::new();
        for (name, entry) in &self.entries {
            hash.update(format!("{name} {:?} {}\n", entry.shape, entry.format));
            let bytes = &self.files[entry.file][entry.bytes.clone()];
            hash.update(&bytes[..SAMPLE.min(bytes.len())]);
            hash.update(&bytes[bytes.len().saturating_sub(SAMPLE)..]);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Entry {
    /// The stored row that holds row `row` of the Hugging Face layout. llama.cpp stores each head's
    /// rows as pairs `(i, i + d/2)` side by side.
    fn source_row(&self, row: usize) -> usize {
        let Some(heads) = self.interleaved_heads else { return row };
        let head_rows = self.shape[0] / heads;
        let (head, within) = (row / head_rows, row % head_rows);
        let half = head_rows / 2;
        head * head_rows + within % half * 2 + within / half
    }
}

//! A base model's tensors, wherever they are stored.
//!
//! Opened from a folder (`model.safetensors`, or shards listed in
//! `model.safetensors.index.json`), a `.safetensors` file or a GGUF file, with the other files it was
//! split into; all are memory-mapped.
//! Names, shapes `[out, in]` and the order of rows are Hugging Face's, whatever the file has.

pub(crate) mod map;
mod reorder;
mod safetensors;
pub(crate) mod split;

use crate::error::{Error, Result};
use crate::family::{self, Layout};
use crate::gguf::GgufFile;
use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::buffer::Buffer;
use hydralora_kernels::ops::frozen_linear::PackedBytes;
use map::MappedFile;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Single weight file of a model folder.
const SINGLE: &str = "model.safetensors";
/// List of the weight files of a model folder.
const INDEX: &str = "model.safetensors.index.json";
/// How many similar names a missing tensor's error lists.
const NEAREST: usize = 3;

/// The tensors of a base model, read when asked for.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    files: Vec<Arc<MappedFile>>,
    entries: BTreeMap<String, Entry>,
    gguf: Option<GgufFile>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Entry {
    file: usize,
    format: BlockFormat,
    shape: Vec<usize>,
    /// Rows of `shape` that no file has: zeros behind the others.
    added_rows: usize,
    range: Range<usize>,
    /// How the file differs from what is given out.
    layout: Layout,
    used: AtomicBool,
}

impl Entry {
    /// The shape without the rows that no file has.
    fn shape_in_file(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if let Some(height) = shape.first_mut() {
            *height -= self.added_rows;
        }
        shape
    }
}

/// A tensor as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorView<'a> {
    /// Hugging Face name.
    pub name: String,
    /// Number format of `bytes`.
    pub format: BlockFormat,
    /// Extents, outermost first: `[out, in]`.
    pub shape: Vec<usize>,
    /// The encoded numbers, row by row; copied only where the file has another order or other numbers.
    pub bytes: Cow<'a, [u8]>,
}

impl Weights {
    /// Opens the weights at `path`: a model folder, a `.safetensors` file or a `.gguf` file.
    ///
    /// # Errors
    /// If there are none, a file is truncated or malformed, a listed file or tensor is missing, two
    /// tensors have the same name, or one has a number format that cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::open_folder(path);
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => Self::open_files(path, &[path.to_path_buf()]),
            // A file in a content-addressed cache has no extension.
            _ if path.is_file() => Self::open_gguf(path),
            _ => Err(Error::NoWeights {
                path: path.to_path_buf(),
                message: "there is no such file or folder".to_owned(),
            }),
        }
    }

    /// Opens the safetensors files of a model folder.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_folder(folder: &Path) -> Result<Self> {
        let single = folder.join(SINGLE);
        if single.exists() {
            return Self::open_files(folder, &[single]);
        }
        let index = folder.join(INDEX);
        if index.exists() {
            return Self::open_sharded(folder, &index);
        }
        let mut message = format!("expected {SINGLE} or {INDEX}");
        let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
        if pickled.iter().any(|name| folder.join(name).exists()) {
            message.push_str("; pickled weights (pytorch_model.bin) are not read");
        }
        Err(Error::NoWeights { path: folder.to_path_buf(), message })
    }

    fn open_files(path: &Path, files: &[PathBuf]) -> Result<Self> {
        let mut weights = Self {
            path: path.to_path_buf(),
            files: Vec::new(),
            entries: BTreeMap::new(),
            gguf: None,
        };
        for path in files {
            let file = MappedFile::open(path)?;
            let tensors = safetensors::read(file.bytes(), path)?;
            weights.files.push(Arc::new(file));
            for tensor in tensors {
                weights.insert(
                    without_composite(tensor.name),
                    Entry {
                        file: weights.files.len() - 1,
                        format: tensor.format,
                        shape: tensor.shape,
                        added_rows: 0,
                        range: tensor.range,
                        layout: Layout::default(),
                        used: AtomicBool::new(false),
                    },
                )?;
            }
        }
        Ok(weights)
    }

    fn open_sharded(folder: &Path, index: &Path) -> Result<Self> {
        let map = safetensors::read_index(index)?;
        let mut shards: Vec<&str> = map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        let mut paths = Vec::new();
        for shard in &shards {
            let path = folder.join(shard);
            if !path.is_file() {
                return Err(Error::MissingShard {
                    index: index.to_path_buf(),
                    shard: (*shard).to_owned(),
                });
            }
            paths.push(path);
        }
        let weights = Self::open_files(folder, &paths)?;
        for (name, shard) in &map {
            let entry = weights.entries.get(&without_composite(name.clone()));
            if entry.is_none_or(|entry| shards[entry.file] != shard) {
                return Err(Error::MissingFromShard {
                    index: index.to_path_buf(),
                    shard: shard.clone(),
                    name: name.clone(),
                });
            }
        }
        Ok(weights)
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let (files, gguf) = split::open(path)?;
        let mut weights = Self {
            path: path.to_path_buf(),
            files: files.into_iter().map(Arc::new).collect(),
            entries: BTreeMap::new(),
            gguf: None,
        };
        let known = family::from_gguf(&gguf);
        for tensor in gguf.tensors() {
            let (name, layout) = known(&tensor.name);
            if let Some(fault) = reorder::fault(&layout, tensor.format, &tensor.shape) {
                return Err(Error::malformed(path, format!("tensor `{}` {fault}", tensor.name)));
            }
            let mut shape = tensor.shape.clone();
            if layout.squeezed {
                shape.insert(1, 1);
            }
            weights.insert(
                name,
                Entry {
                    file: tensor.part,
                    format: tensor.format,
                    shape,
                    added_rows: 0,
                    range: tensor.range.clone(),
                    layout,
                    used: AtomicBool::new(false),
                },
            )?;
        }
        drop(known);
        weights.gguf = Some(gguf);
        Ok(weights)
    }

    fn insert(&mut self, name: String, entry: Entry) -> Result<()> {
        let second = self.files[entry.file].path().to_path_buf();
        match self.entries.entry(name) {
            std::collections::btree_map::Entry::Vacant(slot) => {
                slot.insert(entry);
                Ok(())
            }
            std::collections::btree_map::Entry::Occupied(slot) => Err(Error::DuplicateTensor {
                name: slot.key().clone(),
                first: self.files[slot.get().file].path().to_path_buf(),
                second,
            }),
        }
    }

    /// Makes the matrix `name`, if there is one, `rows` rows high, with zeros below.
    pub(crate) fn grow(&mut self, name: &str, rows: usize) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        if let Some(height) = entry.shape.first_mut().filter(|height| **height < rows) {
            entry.added_rows += rows - *height;
            *height = rows;
        }
    }

    /// Where the weights were opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses weights whose files were written to since they were opened.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.check_unchanged())
    }

    /// The description of the GGUF file, if that is where the weights are.
    pub fn gguf(&self) -> Option<&GgufFile> {
        self.gguf.as_ref()
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Shape and number format of a tensor.
    pub fn describe(&self, name: &str) -> Option<(&[usize], BlockFormat)> {
        self.entries.get(name).map(|entry| (entry.shape.as_slice(), entry.format))
    }

    /// Bytes of all tensors as stored.
    pub fn stored_bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.range.len()).sum()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The tensor `name` as stored, but in Hugging Face's order; widened to `F32` where the file keeps
    /// other numbers, or cuts blocks where they would have to be cut. This does not count as using it.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn get(&self, name: &str) -> Result<TensorView<'_>> {
        let entry = self.entry(name)?;
        let stored = self.stored(entry);
        let (format, mut bytes) =
            reorder::bytes(&entry.layout, entry.format, &entry.shape_in_file(), stored);
        if entry.added_rows > 0 {
            let width: usize = entry.shape[1..].iter().product();
            // In every format, bytes that are zero are numbers that are zero.
            let len = bytes.len() + format.bytes_for(entry.added_rows * width);
            bytes.to_mut().resize(len, 0);
        }
        Ok(TensorView { name: name.to_owned(), format, shape: entry.shape.clone(), bytes })
    }

    /// The tensor `name` as stored, which must have the shape `expected`; it then counts as used.
    ///
    /// # Errors
    /// As [`get`](Self::get), and if the shape is another.
    pub fn take(&self, name: &str, expected: &[usize]) -> Result<TensorView<'_>> {
        self.entry_of_shape(name, expected)?;
        let view = self.get(name)?;
        self.mark_used(name);
        Ok(view)
    }

    /// The tensor `name` as stored, kept where it is: in the mapped file, unless it has to be
    /// put in another order. It must have the shape `expected`, and then counts as used.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn take_packed(
        &self,
        name: &str,
        expected: &[usize],
    ) -> Result<(BlockFormat, PackedBytes)> {
        let view = self.take(name, expected)?;
        let bytes = match view.bytes {
            Cow::Owned(bytes) => bytes.into(),
            Cow::Borrowed(_) => {
                let entry = self.entry(name)?;
                PackedBytes::shared(self.files[entry.file].clone(), entry.range.clone())
            }
        };
        Ok((view.format, bytes))
    }

    /// The tensor `name` widened to `f32`, row by row; it must have the shape `expected`, and then
    /// counts as used.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn take_f32(&self, name: &str, expected: &[usize]) -> Result<Buffer<f32>> {
        let entry = self.entry_of_shape(name, expected)?;
        let stored = self.stored(entry);
        let found = reorder::numbers(&entry.layout, entry.format, &entry.shape_in_file(), stored);
        let out = if entry.added_rows == 0 {
            found
        } else {
            let mut out = Buffer::<f32>::zeros(entry.shape.iter().product());
            out[..found.len()].copy_from_slice(&found);
            out
        };
        // Nobody reads the tensor as stored again; its pages would count as this process's memory.
        self.files[entry.file].release(entry.range.clone());
        self.mark_used(name);
        Ok(out)
    }

    /// Names of the tensors that were not taken, except those that only repeat the configuration.
    pub fn unused(&self) -> Vec<String> {
        self.entries
            .iter()
            .filter(|(name, entry)| !entry.used.load(Ordering::Relaxed) && !is_derived(name))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// Every tensor's name, format, shape and bytes as they are in the file, sorted by name.
    pub(crate) fn stored_tensors(
        &self,
    ) -> impl Iterator<Item = (&str, BlockFormat, &[usize], &[u8])> {
        self.entries.iter().map(|(name, entry)| {
            (name.as_str(), entry.format, entry.shape.as_slice(), self.stored(entry))
        })
    }

    fn stored(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].bytes()[entry.range.clone()]
    }

    fn mark_used(&self, name: &str) {
        if let Some(entry) = self.entries.get(name) {
            entry.used.store(true, Ordering::Relaxed);
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            nearest: self.nearest(name),
        })
    }

    fn entry_of_shape(&self, name: &str, expected: &[usize]) -> Result<&Entry> {
        let entry = self.entry(name)?;
        if entry.shape != expected {
            return Err(Error::Shape {
                path: self.path.clone(),
                name: name.to_owned(),
                expected: expected.to_vec(),
                found: entry.shape.clone(),
            });
        }
        Ok(entry)
    }

    fn nearest(&self, name: &str) -> Vec<String> {
        let mut scored: Vec<(f64, &String)> = self
            .entries
            .keys()
            .map(|other| (strsim::normalized_levenshtein(name, other), other))
            .filter(|(score, _)| *score > 0.6)
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0));
        scored.into_iter().take(NEAREST).map(|(_, name)| name.clone()).collect()
    }
}

/// Whether a tensor only repeats what the configuration says.
pub(crate) fn is_derived(name: &str) -> bool {
    name.starts_with("rope_f") || name.ends_with("rotary_emb.inv_freq") || is_of_pictures(name)
}

/// Whether a tensor belongs to a part of a larger model that text does not go through: what sees, what
/// hears, what predicts several tokens ahead.
fn is_of_pictures(name: &str) -> bool {
    const PARTS: &[&str] = &[
        "vision_tower",
        "vision_model",
        "multi_modal_projector",
        "visual",
        "audio_tower",
        "embed_vision",
        "embed_audio",
        "mtp",
    ];
    let name = name.strip_prefix("model.").unwrap_or(name);
    name.split_once('.').is_some_and(|(part, _)| PARTS.contains(&part))
}

/// Gives the name that a tensor of the decoder of text has in a model of text alone.
fn without_composite(name: String) -> String {
    for (prefix, plain) in [
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    ] {
        if let Some(rest) = name.strip_prefix(prefix) {
            return format!("{plain}{rest}");
        }
    }
    name
}

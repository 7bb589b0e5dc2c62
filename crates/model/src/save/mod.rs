//! Writing a base model with some of its weights changed: as a Hugging Face folder, or as a GGUF
//! file.
//!
//! Tensors are read, changed, narrowed and written one at a time, so the memory needed is that of
//! the largest tensor.

mod folder;
mod gguf;
mod random;

pub use folder::FOLDER;
pub use random::random_gguf;

use crate::error::{Error, Result};
use crate::family::{Layout, Numbers};
use crate::source::ModelSource;
use hydralora_kernels::Tensor;
use hydralora_kernels::block::{BlockFormat, quantize};
use std::borrow::Cow;
use std::fmt;
use std::path::Path;

/// Largest magnitude that still rounds to a finite half-precision number.
const HALF_LIMIT: f32 = 65520.0;

/// A base model about to be written.
pub struct Saving<'a> {
    /// The model to start from.
    pub source: &'a ModelSource,
    /// Number format of matrices; vectors (and rows that are no whole number of blocks) stay wider.
    pub format: BlockFormat,
    /// Chat template to write instead of the model's own.
    pub chat_template: Option<&'a str>,
    /// Tokens at which answers end, the most important first; those that the model's files do not
    /// name are added to what they name.
    pub end_ids: &'a [u32],
    /// Name to write into the file's metadata.
    pub name: &'a str,
    /// Gives what to write for the tensor of a Hugging Face name, `f32` in its own shape.
    pub edit: &'a dyn Fn(&str, Tensor) -> Tensor,
    /// Whether a tied output layer gets a weight of its own, which is edited from the embedding's.
    pub untie: bool,
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

impl fmt::Debug for Saving<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Saving").field("format", &self.format).finish_non_exhaustive()
    }
}

impl Saving<'_> {
    /// Writes a Hugging Face folder: `config.json`, `model.safetensors`, the tokenizer's files;
    /// whole or not at all.
    ///
    /// # Errors
    /// If the format is not one of safetensors', a number does not fit it, or the file system
    /// refuses.
    pub fn folder(&self, out: &Path) -> Result<()> {
        folder::write(self, out)
    }

    /// Writes a GGUF file, whole or not at all. Query and key rows are in the order llama.cpp
    /// rotates them; the tokenizer comes along.
    ///
    /// # Errors
    /// If the model or its tokenizer has no form in GGUF, a number does not fit the format, or the
    /// file system refuses.
    pub fn gguf(&self, out: &Path) -> Result<()> {
        gguf::write(self, out)
    }

    /// Names of the tensors to write, those the decoder computes with, sorted.
    fn names(&self) -> impl Iterator<Item = &str> {
        let tied = self.source.config.tie_word_embeddings;
        let own = self.source.weights.names().filter(move |name| {
            let repeated = tied && *name == HEAD;
            !repeated && !crate::weights::is_derived(name)
        });
        self.unties().then_some(HEAD).into_iter().chain(own)
    }

    /// Whether the output layer was tied and no longer is.
    fn unties(&self) -> bool {
        self.untie && self.source.config.tie_word_embeddings
    }

    /// The tensor of the source that `name` is made of.
    fn origin<'b>(&self, name: &'b str) -> &'b str {
        if self.unties() && name == HEAD { EMBEDDING } else { name }
    }

    fn shape(&self, name: &str) -> &[usize] {
        self.source.weights.describe(self.origin(name)).map_or(&[], |(shape, _)| shape)
    }

    /// The changed tensor `name`, laid out as a file has it, as bytes of `format`.
    fn encode(&self, name: &str, format: BlockFormat, layout: &Layout) -> Result<Vec<u8>> {
        let shape = self.shape(name).to_vec();
        let values = self.source.weights.take_f32(self.origin(name), &shape)?;
        let mut tensor = (self.edit)(name, Tensor::new(values, &shape));
        let path = self.source.weights.path();
        if tensor.shape() != shape {
            let message =
                format!("`{name}` would change its shape from {shape:?} to {:?}", tensor.shape());
            return Err(Error::malformed(path, message));
        }
        let non_finite =
            || Err(Error::NonFinite { path: path.to_path_buf(), name: name.to_owned() });
        if !tensor.is_finite() {
            return non_finite();
        }
        if layout.numbers != Numbers::Same {
            let values = tensor.data_mut::<f32>();
            values.iter_mut().for_each(|value| *value = layout.numbers.write(*value));
            if !tensor.is_finite() {
                return non_finite();
            }
        }
        let values = tensor.data::<f32>();
        if format == BlockFormat::F16
            && let Some(value) = values.iter().find(|value| value.abs() >= HALF_LIMIT)
        {
            let message = format!(
                "tensor `{name}` holds {value}, beyond half precision's 65504; expected another \
                 number format (bf16 or f32)"
            );
            return Err(Error::malformed(path, message));
        }
        let rows = shape.first().copied().unwrap_or(1).max(1);
        let width = values.len() / rows;
        let mut ordered = Cow::Borrowed(values);
        if let Some(order) = layout.rows {
            order.apply(rows, width, values, ordered.to_mut());
        }
        if let Some(order) = layout.columns {
            let mut unordered = vec![0.0; width];
            for row in ordered.to_mut().chunks_exact_mut(width.max(1)) {
                unordered.copy_from_slice(row);
                order.apply(width, 1, &unordered, row);
            }
        }
        let mut bytes = Vec::new();
        quantize(format, &ordered, &mut bytes);
        Ok(bytes)
    }
}

//! The model families: one file each.
//!
//! A family reads what its configuration has beside the common fields, declares the linear layers and
//! norms of its decoder layers under their checkpoint names, and writes the order of a layer's
//! operations over the [`kit`].

pub mod kit;
mod names;

use crate::config::{Fields, ModelConfig};
use crate::error::Result;
use crate::gguf::GgufFile;
use crate::site::Linear;
use hydralora_kernels::Var;
use kit::{LayerContext, LayerPlan};

pub(crate) use names::from_gguf;
pub use names::{GgufNames, interleaved_row};

/// A model family.
pub trait Family: Sync {
    /// `model_type` in `config.json`.
    fn model_type(&self) -> &'static str;

    /// The class in transformers, `architectures` in `config.json`.
    fn class(&self) -> &'static str;

    /// Every linear layer that a decoder layer of the family may have, in order.
    fn linears(&self) -> &'static [&'static Linear] {
        kit::LLAMA_LINEARS
    }

    /// Reads what `config.json` has beside the common fields.
    ///
    /// # Errors
    /// If a field is malformed, or asks for arithmetic that the family's code does not do.
    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let _ = (fields, config);
        Ok(())
    }

    /// Reads what a GGUF file's metadata have beside the common ones.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_gguf(&self, file: &GgufFile, config: &mut ModelConfig) -> Result<()> {
        let _ = (file, config);
        Ok(())
    }

    /// How its tensors are named and ordered in a GGUF file.
    fn gguf(&self) -> &'static GgufNames;

    /// What layer `index` consists of.
    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan;

    /// Computes a layer: hidden states `[T, hidden_size]` to those of the next layer.
    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var;
}

macro_rules! families {
    ($($family:ident),* $(,)?) => {
        $(mod $family;)*
        /// Every supported family.
        pub static FAMILIES: &[&dyn Family] = &[$(&$family::FAMILY),*];
    };
}

families! { llama, mistral, qwen3 }

/// Finds the family of a `model_type`.
pub fn find(model_type: &str) -> Option<&'static dyn Family> {
    FAMILIES.iter().copied().find(|family| family.model_type() == model_type)
}

/// Finds the family that reads GGUF files of an architecture.
pub fn find_gguf(architecture: &str) -> Option<&'static dyn Family> {
    FAMILIES.iter().copied().find(|family| family.gguf().architecture == architecture)
}

/// Lists the names of all supported families.
pub fn supported() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.model_type()).collect()
}

/// Lists every linear layer that any family declares.
pub fn linears() -> impl Iterator<Item = &'static Linear> {
    FAMILIES.iter().flat_map(|family| family.linears()).copied()
}

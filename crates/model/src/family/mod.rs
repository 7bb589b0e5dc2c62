//! The model families: one file each, holding only what differs from the common decoder.

use crate::config::ModelConfig;

/// What a family decides about the common pre-norm, rotary, gated decoder layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerPlan {
    /// Bias on the query, key and value projections.
    pub query_key_value_bias: bool,
    /// Bias on the attention output projection.
    pub output_bias: bool,
    /// Bias on the feed-forward projections.
    pub feed_forward_bias: bool,
    /// How many positions back attention reaches; all if none.
    pub window: Option<usize>,
}

/// A model family.
pub trait Family: Sync {
    /// `model_type` in `config.json`, `general.architecture` in a GGUF file.
    fn model_type(&self) -> &'static str;
    /// The layer's particulars under `config`.
    fn plan(&self, config: &ModelConfig) -> LayerPlan;
}

macro_rules! families {
    ($($family:ident),* $(,)?) => {
        $(mod $family;)*
        /// Every supported family.
        pub static FAMILIES: &[&dyn Family] = &[$(&$family::FAMILY),*];
    };
}

families! { llama, mistral }

/// The family of a `model_type`.
pub fn find(model_type: &str) -> Option<&'static dyn Family> {
    FAMILIES.iter().copied().find(|family| family.model_type() == model_type)
}

/// The names of all supported families.
pub fn supported() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.model_type()).collect()
}

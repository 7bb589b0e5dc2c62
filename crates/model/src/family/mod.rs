//! The model families: one file each.
//!
//! A family reads what its configuration has beside the common fields, declares the linear layers and
//! norms of its decoder layers under their checkpoint names, and writes the order of a layer's
//! operations over the [`kit`].

pub mod kit;
mod layout;
mod names;

use crate::config::{Fields, Keys, ModelConfig, RopeConfig, rope};
use crate::error::Result;
use crate::gguf::Value as GgufValue;
use crate::site::Linear;
use hydralora_kernels::Var;
use kit::{LayerContext, LayerPlan, ModulesPlan, StartContext};
use serde_json::{Map, Value};

pub use layout::{Heads, Layout, Numbers, Order};
pub use names::{GgufNames, interleaved_row};
pub(crate) use names::{NEXT_LAYERS, SENTENCE_PIECE, from_gguf, shift_of};

/// What a family assumes where a `config.json` is silent.
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// The share of every head that turns, in families where it need not be the whole.
    pub partial_rotary_factor: Option<f64>,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the attention projections have biases.
    pub attention_bias: bool,
    /// Width of a head; the residual stream's by the number of heads if none.
    pub head_dim: Option<usize>,
    /// The constant added to the mean square in every norm.
    pub rms_norm_eps: f64,
}

impl Defaults {
    /// Those of Llama.
    pub const LLAMA: Defaults = Defaults {
        rope_theta: 10_000.0,
        partial_rotary_factor: None,
        tie_word_embeddings: false,
        attention_bias: false,
        head_dim: None,
        rms_norm_eps: 1e-6,
    };
}

/// Which layers of a family a `config.json` may window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// None.
    None,
    /// All, where it gives a window; a list of kinds may only say so again.
    All,
    /// Those that it lists, or that the family's pattern says.
    Listed,
}

/// What a list of families says of one.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// The published models.
    pub models: &'static str,
    /// What was compared with transformers, on a small random model of the family.
    pub checked: &'static str,
}

/// What is compared for every family that is in the tests.
pub(crate) const CHECKED: &str = "logits, greedy text, gradients and 10 steps of adapters";

/// A model family.
pub trait Family: Sync {
    /// `model_type` in `config.json`.
    fn model_type(&self) -> &'static str;

    /// Further names that configurations of the same arithmetic have there.
    fn also(&self) -> &'static [&'static str] {
        &[]
    }

    /// The class in transformers, `architectures` in `config.json`.
    fn class(&self) -> &'static str;

    /// What a list of families says of it.
    fn about(&self) -> About;

    /// Every linear layer that a decoder layer of the family may have, in order.
    fn linears(&self) -> &'static [&'static Linear] {
        kit::LLAMA_LINEARS
    }

    /// Tables that tokens are looked up in beside the embedding, as [`ModulesPlan`] names them.
    fn tables(&self) -> &'static [&'static str] {
        &[]
    }

    /// Numbers of a layer that belong to no weight: training leaves them as they are.
    fn constants(&self) -> &'static [&'static str] {
        &[]
    }

    /// What it assumes where a `config.json` is silent.
    fn defaults(&self) -> Defaults {
        Defaults::LLAMA
    }

    /// Which layers a `config.json` may window.
    fn windows(&self) -> Windows {
        Windows::None
    }

    /// Reads the rotation of the layers.
    ///
    /// # Errors
    /// If a field is malformed, or the rotation is of an unknown kind.
    fn rope(&self, fields: &Fields<'_>) -> Result<RopeConfig> {
        rope::from_json(fields, self.defaults().rope())
    }

    /// Reads what `config.json` has beside the common fields.
    ///
    /// # Errors
    /// If a field is malformed, or asks for arithmetic that the family's code does not do.
    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let _ = (fields, config);
        Ok(())
    }

    /// Writes what `config.json` has beside the common fields.
    fn write(&self, config: &ModelConfig, json: &mut Map<String, Value>) {
        let _ = (config, json);
    }

    /// Reads what a GGUF file's metadata have beside the common ones.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_gguf(&self, keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
        let _ = (keys, config);
        Ok(())
    }

    /// Gives what a GGUF file's metadata have beside the common ones, or in place of them, by key without
    /// the architecture.
    fn gguf_metadata(&self, config: &ModelConfig) -> Vec<(&'static str, GgufValue)> {
        let _ = config;
        Vec::new()
    }

    /// Names a field whose value a GGUF file of the architecture cannot say, and why, if there is one.
    fn gguf_fault(&self, config: &ModelConfig) -> Option<(&'static str, String)> {
        let _ = config;
        None
    }

    /// What is added to the weight of the norm `name` before it multiplies: some families keep its
    /// distance from 1.
    fn norm_shift(&self, name: &str) -> f64 {
        let _ = name;
        0.0
    }

    /// How its tensors are named and ordered in a GGUF file.
    fn gguf(&self) -> &'static GgufNames;

    /// Tells how the tensor `name` of a layer, `mlp.up_proj.weight`, differs in a GGUF file, beside what
    /// [`GgufNames`] and [`norm_shift`](Self::norm_shift) say.
    fn gguf_layout(&self, name: &str, heads: &Heads) -> Layout {
        let _ = (name, heads);
        Layout::default()
    }

    /// Gives the divisors of the rotary frequencies that a GGUF file holds, by the name of their tensor.
    fn gguf_factors(&self, config: &ModelConfig) -> Vec<(&'static str, Vec<f32>)> {
        config.rope.gguf_factors(config.head_dim)
    }

    /// What layer `index` consists of.
    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan;

    /// What a decoder has outside its layers, beside embedding, last norm and output layer.
    fn outside(&self, config: &ModelConfig) -> ModulesPlan {
        let _ = config;
        ModulesPlan::default()
    }

    /// Whether a checkpoint may hold a tensor of that name although nothing reads it.
    fn ignores(&self, config: &ModelConfig, name: &str) -> bool {
        let _ = (config, name);
        false
    }

    /// Computes what all layers share, before the first of them, from the tokens and the hidden states
    /// `[T, hidden_size]` they start with. Rows without a token have the token 0.
    fn start(&self, ctx: &StartContext<'_>, tokens: &[u32], h: &Var) -> Option<Var> {
        let _ = (ctx, tokens, h);
        None
    }

    /// Computes a layer: hidden states `[T, hidden_size]` to those of the next layer.
    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var;
}

impl Defaults {
    fn rope(self) -> rope::RopeDefaults {
        rope::RopeDefaults { theta: self.rope_theta, partial: self.partial_rotary_factor }
    }
}

macro_rules! families {
    ($($family:ident),* $(,)?) => {
        $(mod $family;)*
        /// Every supported family.
        pub static FAMILIES: &[&dyn Family] = &[$(&$family::FAMILY),*];
    };
}

families! {
    llama, mistral, ministral3, qwen2, qwen3, qwen3_5, gemma2, gemma3, gemma4, phi3, smollm3, granite, olmo2, glm4,
}

/// Finds the family of a `model_type`.
pub fn find(model_type: &str) -> Option<&'static dyn Family> {
    let named = |family: &&dyn Family| {
        family.model_type() == model_type || family.also().contains(&model_type)
    };
    FAMILIES.iter().copied().find(named)
}

/// Architectures that are known and not supported, what they would take, and the nearest one here.
const REFUSED: &[(&[&str], &str, &str)] = &[
    (&["gpt_oss", "gpt-oss"], "experts, attention sinks and MXFP4 weights", "llama"),
    (&["mixtral"], "experts", "mistral"),
    (&["qwen2_moe", "qwen2moe"], "experts", "qwen2"),
    (&["qwen3_moe", "qwen3moe"], "experts", "qwen3"),
    (&["qwen3_next", "qwen3next"], "experts", "qwen3_5_text"),
    (&["qwen3_5_moe", "qwen3_5_moe_text", "qwen35moe"], "experts", "qwen3_5_text"),
    (&["granitemoe", "granitemoeshared"], "experts", "granite"),
    (
        &["granitemoehybrid", "granitehybrid"],
        "experts or state-space layers, or where it has neither, a gate and an up-projection in one named \
         `shared_mlp`; GGUF files of dense ones are read, as `granite`",
        "granite",
    ),
    (&["olmoe"], "experts", "olmo2"),
    (&["olmo3"], "windows with a rotation of their own", "olmo2"),
    (
        &["deepseek_v2", "deepseek_v3", "deepseek2"],
        "experts and compressed keys and values",
        "llama",
    ),
    (&["llama4", "llama4_text"], "experts", "llama"),
    (&["gemma"], "Gemma 1's layers", "gemma2"),
    (&["gemma3n", "gemma3n_text"], "Gemma 3n's parallel residual streams", "gemma4_text"),
    (&["phi"], "layer norms with biases and a parallel feed-forward block", "phi3"),
    (&["glm"], "GLM's first layers", "glm4"),
    (&["gpt2"], "learned positions and layer norms with biases", "llama"),
    (
        &["gpt_neox", "gptneox", "falcon"],
        "a parallel feed-forward block and layer norms with biases",
        "llama",
    ),
    (&["mamba", "mamba2"], "state-space layers", "qwen3_5_text"),
    (&["lfm2"], "gated short convolutions", "qwen3"),
    (&["bert", "modernbert"], "attention in both directions", "llama"),
    (&["t5"], "an encoder and cross-attention", "llama"),
];

/// Says what an architecture that is not supported would take, and which one here is nearest to it.
pub(crate) fn hint(found: &str) -> String {
    if let Some((_, what, nearest)) = REFUSED.iter().find(|(names, ..)| names.contains(&found)) {
        return format!(" (it has {what}); the nearest supported one is `{nearest}`");
    }
    let alike = |name: &&str| strsim::normalized_levenshtein(name, found);
    let nearest = supported().into_iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
    format!(
        " (a dense decoder takes one file over the kit of families: see \"To add a model family\" in \
         CONTRIBUTING.md); the nearest supported one by name is `{}`",
        nearest.unwrap_or_default()
    )
}

/// Finds the family that reads GGUF files of an architecture.
pub fn find_gguf(architecture: &str) -> Option<&'static dyn Family> {
    FAMILIES.iter().copied().find(|family| family.gguf().architecture == architecture)
}

/// Lists the names of all supported families.
pub fn supported() -> Vec<&'static str> {
    FAMILIES.iter().map(|family| family.model_type()).collect()
}

/// Tells whether `name` is that of a table in the checkpoint of any family: the embedding, or one beside it.
pub fn is_table(name: &str) -> bool {
    let table = name.strip_prefix("model.").and_then(|rest| rest.strip_suffix(".weight"));
    table.is_some_and(|table| {
        table == "embed_tokens" || FAMILIES.iter().any(|family| family.tables().contains(&table))
    })
}

/// Tells whether `name` is that of a tensor in the checkpoint of any family that training leaves as it is.
pub fn is_constant(name: &str) -> bool {
    let inside = || Some(name.strip_prefix("model.layers.")?.split_once('.')?.1);
    inside().is_some_and(|name| FAMILIES.iter().any(|family| family.constants().contains(&name)))
}

/// Lists every linear layer that any family declares.
pub fn linears() -> impl Iterator<Item = &'static Linear> {
    FAMILIES.iter().flat_map(|family| family.linears()).copied()
}

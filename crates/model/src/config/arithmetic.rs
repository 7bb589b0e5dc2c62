//! Constants of the arithmetic that most families leave alone.

use hydralora_kernels::ops::activation::Activation;
use hydralora_kernels::ops::delta_net::DeltaConfig;

/// Factors, caps and the activation of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Arithmetic {
    /// Activation of the feed-forward block's gate.
    pub activation: Activation,
    /// Factor on the embeddings.
    pub embedding_scale: f64,
    /// Whether that factor is on what an adapter puts before the tokens too: whether the model scales
    /// what enters it, and not its embedding what leaves it.
    pub scales_prompt: bool,
    /// Factor on what a block adds to the residual stream.
    pub residual_scale: f64,
    /// Factor on the logits, before their cap.
    pub logit_scale: f64,
    /// Factor on the attention scores; `1/√head_dim` if none.
    pub attention_scale: Option<f64>,
    /// Soft cap `c · tanh(s/c)` of the attention scores.
    pub attention_softcap: Option<f64>,
    /// Soft cap of the logits.
    pub logit_softcap: Option<f64>,
}

/// Layers that keep a state by the gated delta rule in place of keys and values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearAttention {
    /// Which layers they are.
    pub layers: Vec<bool>,
    /// Heads of queries and keys.
    pub num_key_heads: usize,
    /// Heads of values, a multiple.
    pub num_value_heads: usize,
    /// Width of a query or key head.
    pub key_head_dim: usize,
    /// Width of a value head.
    pub value_head_dim: usize,
    /// Taps of the convolution.
    pub conv_kernel: usize,
}

impl LinearAttention {
    /// Gives head counts and widths as the kernels take them.
    pub(crate) fn delta(&self) -> DeltaConfig {
        DeltaConfig {
            num_key_heads: self.num_key_heads,
            num_value_heads: self.num_value_heads,
            key_head_dim: self.key_head_dim,
            value_head_dim: self.value_head_dim,
        }
    }
}

/// Embeddings that every decoder layer has of its own, and what else only Gemma 4 has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerEmbeddings {
    /// Width of a layer's embedding; 0 if layers have none.
    pub width: usize,
    /// Rows of the table.
    pub vocab_size: usize,
    /// Width of a head in layers that see everything.
    pub full_head_dim: usize,
    /// Heads of keys and values in those layers.
    pub full_key_value_heads: usize,
    /// Whether values are what the key projection gives there.
    pub values_of_keys: bool,
    /// How many of the last layers use the keys and values of earlier ones.
    pub shared_layers: usize,
    /// Whether the feed-forward blocks of those are twice as wide.
    pub wide_shared: bool,
}

impl Default for Arithmetic {
    fn default() -> Self {
        Self {
            activation: Activation::Silu,
            embedding_scale: 1.0,
            scales_prompt: false,
            residual_scale: 1.0,
            logit_scale: 1.0,
            attention_scale: None,
            attention_softcap: None,
            logit_softcap: None,
        }
    }
}

impl Arithmetic {
    /// A line that tells one from another, whatever its fields are named.
    pub(crate) fn identity(&self) -> String {
        let activation = match self.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_tanh",
        };
        format!(
            "{activation} {} {} {} {:?} {:?} {:?}\n",
            self.embedding_scale,
            self.residual_scale,
            self.logit_scale,
            self.attention_scale,
            self.attention_softcap,
            self.logit_softcap,
        )
    }
}

//! Gated DeltaNet (Yang, Kautz & Hatamizadeh, 2024, arXiv 2412.06464): a short causal convolution, a state
//! that the gated delta rule writes to and reads from, and a gated norm.
//!
//! Every value head has a state `S: [dk, dv]`. With `k` of length one, `q` of length `1/√dk`, the decay
//! `g ≤ 0` and the rate `β`, each token does
//!
//! ```text
//! S ← eᵍ S        u = β (v − Sᵀ k)        S ← S + k uᵀ        o = Sᵀ q
//! ```
//!
//! Heads of queries and keys may serve several neighbouring value heads. Training takes a chunk of tokens
//! at a time (`chunk.rs` has the formulas); generation goes token by token from a [`DeltaState`].

use crate::element::DType;
use crate::tensor::Tensor;
use std::ops::Range;

mod chunk;
mod conv;
mod gates;
mod norm;
mod rule;
mod step;
#[cfg(test)]
mod tests;

pub use conv::{causal_conv, conv_step};
pub use gates::decay_and_beta;
pub use norm::gated_rms_norm;
pub use rule::{gated_delta_rule, gated_delta_rule_joined};
pub use step::delta_step;

/// Head counts and widths of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaConfig {
    /// Heads of queries and of keys; divides `num_value_heads`.
    pub num_key_heads: usize,
    /// Heads of values, each with a decay, a rate and a state of its own.
    pub num_value_heads: usize,
    /// Width of a query or key head, `dk`.
    pub key_head_dim: usize,
    /// Width of a value head, `dv`.
    pub value_head_dim: usize,
}

impl DeltaConfig {
    /// Returns the width of all queries, and of all keys.
    pub fn key_width(&self) -> usize {
        self.num_key_heads * self.key_head_dim
    }

    /// Returns the width of all values.
    pub fn value_width(&self) -> usize {
        self.num_value_heads * self.value_head_dim
    }

    /// Returns the width of queries, keys and values side by side.
    pub fn joined_width(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Value heads that share queries and keys.
    fn group(&self) -> usize {
        self.num_value_heads / self.num_key_heads
    }

    /// Numbers in the state of a value head.
    fn state_len(&self) -> usize {
        self.key_head_dim * self.value_head_dim
    }

    /// Extents of the states of one sequence.
    fn state_shape(&self) -> [usize; 3] {
        [self.num_value_heads, self.key_head_dim, self.value_head_dim]
    }

    /// The value heads that key head `head` serves.
    fn served(&self, head: usize) -> Range<usize> {
        head * self.group()..(head + 1) * self.group()
    }
}

/// What one sequence carries from token to token in one layer.
#[derive(Clone, Debug)]
pub struct DeltaState {
    /// The last inputs of the convolution, the newest last: `[K − 1, C]`; zeros before the first token.
    pub conv: Tensor,
    /// The state of every value head: `[value_heads, dk, dv]`.
    pub recurrent: Tensor,
}

impl DeltaState {
    /// Makes the state before the first token: zeros, for a convolution of `kernel` taps over queries, keys
    /// and values side by side.
    pub fn new(dtype: DType, config: DeltaConfig, kernel: usize) -> Self {
        let conv = Tensor::zeros(dtype, [kernel.saturating_sub(1), config.joined_width()]);
        Self { conv, recurrent: Tensor::zeros(dtype, config.state_shape()) }
    }

    /// Counts the bytes it occupies.
    pub fn bytes(&self) -> usize {
        [&self.conv, &self.recurrent].map(|part| part.len() * part.dtype().size()).iter().sum()
    }
}

/// Checks that `offsets` mark sequences one after the other in `rows` rows.
fn check_offsets(offsets: &[usize], rows: usize) {
    assert_eq!(offsets.first(), Some(&0), "offsets begin at the first row");
    assert!(offsets.is_sorted(), "offsets are in order");
    assert_eq!(offsets.last(), Some(&rows), "offsets end at the rows");
}

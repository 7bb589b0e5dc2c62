//! What decides the shape and the computation of a [`LowRankAdapter`](super::LowRankAdapter).

use super::start::Start;
use crate::options::{self, LoraConfigKeys};
use serde::{Deserialize, Serialize};

/// What the router reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RouteOn {
    /// The layer's input `x` (the paper's text and the official code).
    #[default]
    X,
    /// The low-rank activation `A x` (the shape in the paper's equation 4).
    A,
}

/// How many dropout masks the input of `A` gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DropoutMask {
    /// One for all experts.
    #[default]
    Shared,
    /// One for each expert, as the official code draws them.
    PerExpert,
}

/// What one router serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RouterScope {
    /// One linear layer.
    #[default]
    Linear,
    /// All layers of an attention or feed-forward block, reading the block's input.
    Block,
}

/// A router's kind. By default one for each layer, reading its input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Router {
    pub(crate) route_on: RouteOn,
    pub(crate) scope: RouterScope,
    pub(crate) bias: bool,
    /// How many experts a token goes to; all if not given.
    pub(crate) top_k: Option<usize>,
}

/// How the heads of a site are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mixing {
    /// Each counts whole.
    Sum,
    /// Each counts `1/N`.
    Mean,
    /// A router weighs them per token.
    Routed(Router),
}

impl Mixing {
    pub(super) fn router(self, scope: RouterScope) -> Option<Router> {
        match self {
            Mixing::Routed(router) if router.scope == scope => Some(router),
            _ => None,
        }
    }

    pub(super) fn top_k(self) -> Option<usize> {
        match self {
            Mixing::Routed(router) => router.top_k,
            _ => None,
        }
    }
}

/// How the heads of a site are named in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadNames {
    /// `lora_B`: one head, as PEFT names it.
    Single,
    /// `lora_B0`, `lora_B1`, …, as HydraLoRA's code names them.
    Numbered,
}

/// Everything that decides the shape and the computation of a [`LowRankAdapter`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowRankSpec {
    pub(crate) rank: usize,
    pub(crate) num_experts: usize,
    /// Whether every expert has an `A` of its own.
    pub(crate) own_a: bool,
    pub(crate) scale: f64,
    pub(crate) dropout: f64,
    pub(crate) dropout_mask: DropoutMask,
    pub(crate) mixing: Mixing,
    pub(crate) names: HeadNames,
    pub(crate) start: Start,
    /// Whether magnitude and direction are learned apart (DoRA).
    pub(crate) decomposed: bool,
}

impl LowRankSpec {
    /// Plain LoRA with these options.
    pub(crate) fn of(keys: &LoraConfigKeys) -> Self {
        Self {
            rank: keys.rank,
            num_experts: 1,
            own_a: false,
            scale: options::scale(keys.alpha, keys.rank, keys.use_rslora),
            dropout: keys.dropout,
            dropout_mask: DropoutMask::Shared,
            mixing: Mixing::Sum,
            names: HeadNames::Single,
            start: Start::Kaiming,
            decomposed: false,
        }
    }

    /// How many `A` a site has.
    pub(super) fn num_a(&self) -> usize {
        if self.own_a { self.num_experts } else { 1 }
    }
}

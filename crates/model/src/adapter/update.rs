//! What an adapter adds to a linear layer, as data.

use super::{Aside, Pass, Site};
use hydralora_kernels::Var;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::low_rank::{
    Gate, LowRank, Mask, gates_of, router_gates, router_scores,
};
use hydralora_kernels::ops::top_k::{keep_largest, keep_largest_straight_through};

/// What an adapter does to a linear layer `y = W₀ x + b₀`.
// Made and used up in one call; an allocation for each layer of each token would cost more.
#[allow(clippy::large_enum_variant)]
pub enum Update<'a> {
    /// Nothing.
    None,
    /// Adds a low-rank product.
    LowRank(LowRankUpdate),
    /// Multiplies the columns of the input or of the output by learned factors.
    Scale(Side, &'a Var),
    /// Computes with another weight `[out, in]` and bias `[out]`.
    Replace(&'a Var, Option<&'a Var>),
    /// Computes something else altogether; the base's weight is then read for these rows alone.
    Custom(&'a dyn CustomLinear),
}

/// The base's output layer.
#[derive(Clone, Copy)]
pub struct OutputLayer<'a> {
    /// Its weight `[vocab_size, hidden_size]`.
    pub frozen: &'a FrozenLinear,
    /// Whether that is the embedding's too.
    pub is_tied: bool,
}

/// What an adapter does to the output layer `l = W₀ h`.
pub enum Output<'a> {
    /// Nothing.
    Frozen,
    /// Computes with another weight `[vocab_size, hidden_size]`.
    Replace(&'a Var),
    /// Adds `z Bᵀ` to the logits.
    Add {
        /// What to compute with instead of `W₀`.
        layer: Option<&'a FrozenLinear>,
        /// `[T, k]`, computed from the hidden states.
        z: Var,
        /// `[vocab_size, k]`.
        b: Var,
    },
}

/// A side of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `x`.
    Input,
    /// `y`, the bias included.
    Output,
}

/// A layer that is more than an update of the frozen one.
pub trait CustomLinear: Sync {
    /// Computes the layer at `site` for rows `x: [T, in]`, giving `[T, out]`. `block_gates` are those of
    /// the block's router, if it has one, or what else the adapter
    /// [computes for the block](super::Adapter::of_block).
    fn forward(
        &self,
        site: Site,
        x: &Var,
        frozen: &FrozenLinear,
        block_gates: Option<&Var>,
        pass: &Pass<'_>,
    ) -> Var;
}

/// `s · [B_1 … B_N] (w_1 z, …, w_N z)` with `z = A x'`; see
/// [`low_rank`](hydralora_kernels::ops::low_rank).
pub struct LowRankUpdate {
    /// `[r, in]`, or `[N·r, in]` when every expert has its own.
    pub a: Var,
    /// `[out, N·r]`: the heads side by side.
    pub b: Var,
    /// Number of experts `N`.
    pub num_experts: usize,
    /// How the heads are weighed.
    pub gates: HeadGates,
    /// The factor `s`.
    pub scale: f64,
    /// Dropout on the input of `A`.
    pub mask: Mask,
}

/// How the heads of an update are weighed.
pub enum HeadGates {
    /// Each counts whole.
    Sum,
    /// Each counts `1/N`.
    Mean,
    /// A router of the layer's own weighs them, for every token.
    Router(Router),
    /// The router of the layer's block does, which has read the block's input; see
    /// [`Adapter::block_router`](super::Adapter::block_router).
    Block(Choice),
    /// `[T, N]`, known beforehand.
    Given(Var),
}

/// A router, and what becomes of its gates.
pub struct Router {
    /// `[N, in]`, or `[N, r]`.
    pub weight: Var,
    /// `[N]`.
    pub bias: Option<Var>,
    /// What it reads.
    pub reads: Reads,
    /// What becomes of its gates.
    pub choice: Choice,
}

/// What a router reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// The layer's input.
    Input,
    /// The low-rank activation `z`.
    LowRank,
    /// The mean of the layer's inputs over the tokens of the sequence so far.
    Sequence,
}

/// What becomes of a router's gates before they weigh the heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// How many experts a token goes to; all if none.
    pub top_k: Option<usize>,
    /// Whether the gates of all experts get the gradients of those that a token goes to.
    pub straight_through: bool,
    /// Whether they are kept for a loss term of the adapter's; see [`Pass::set_aside`].
    pub counted: bool,
    /// Whether the scores that they come from are.
    pub scored: bool,
}

impl Choice {
    /// Cuts `gates` down to the largest.
    fn of(self, gates: &Var) -> Var {
        match self.top_k {
            None => gates.clone(),
            Some(k) if self.straight_through => keep_largest_straight_through(gates, k),
            Some(k) => keep_largest(gates, k),
        }
    }
}

impl Router {
    /// Whether its gates are computed with the update.
    fn is_fused(&self) -> bool {
        self.choice == Choice::default() && self.reads != Reads::Sequence
    }

    /// Computes the gates `[T, N]` of the rows of `x: [T, in]`, the input at `site`.
    pub fn gates(&self, site: Site, x: &Var, pass: &Pass<'_>) -> Var {
        if !self.choice.scored && self.reads != Reads::Sequence {
            return router_gates(x, &self.weight, self.bias.as_ref());
        }
        let scores = router_scores(x, &self.weight, self.bias.as_ref());
        let scores = match self.reads {
            // Scores are linear, so those of a mean are the mean of those.
            Reads::Sequence => pass.running_mean(site, &scores),
            Reads::Input | Reads::LowRank => scores,
        };
        if self.choice.scored {
            pass.set_aside(site, Aside::Scores, scores.clone());
        }
        gates_of(&scores)
    }
}

impl LowRankUpdate {
    /// Computes the gates that have to be known before the update is: those of a block, those of a
    /// sequence, and those that are counted or cut down to the largest. `of_block` are the block's, if it
    /// has a router.
    pub fn gates_beforehand(
        &self,
        site: Site,
        x: &Var,
        of_block: Option<&Var>,
        pass: &Pass<'_>,
    ) -> Option<Var> {
        let (gates, choice) = match &self.gates {
            HeadGates::Sum | HeadGates::Mean => return None,
            HeadGates::Given(gates) => return Some(gates.clone()),
            HeadGates::Router(router) if router.is_fused() => return None,
            HeadGates::Router(router) => (router.gates(site, x, pass), router.choice),
            HeadGates::Block(choice) => (of_block?.clone(), *choice),
        };
        if choice.counted {
            pass.set_aside(site, Aside::Gates, gates.clone());
        }
        Some(choice.of(&gates))
    }

    /// Describes the update to the kernels, under `gates` if they are known.
    pub fn under<'a>(&'a self, gates: Option<&'a Var>) -> LowRank<'a> {
        let gate = match (gates, &self.gates) {
            (Some(gates), _) => Gate::Given(gates),
            (None, HeadGates::Router(router)) => {
                let (weight, bias) = (&router.weight, router.bias.as_ref());
                match router.reads {
                    // A sequence's are given.
                    Reads::Input | Reads::Sequence => Gate::Input { weight, bias },
                    Reads::LowRank => Gate::LowRank { weight, bias },
                }
            }
            (None, HeadGates::Mean) => Gate::Uniform,
            (None, _) => Gate::One,
        };
        LowRank {
            a: &self.a,
            b: &self.b,
            num_experts: self.num_experts,
            gate,
            scale: self.scale,
            mask: self.mask,
        }
    }
}

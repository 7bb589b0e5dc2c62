//! The description of one update that all its implementations work from.

use super::{Gate, LowRank, Mask};
use crate::graph::Var;
use crate::ops::dropout::Dropout;
use crate::tensor::Tensor;
use std::ops::Range;

/// A router's tensors.
#[derive(Clone)]
pub(crate) struct Router {
    /// `[N, in]` or `[N, z_cols]`.
    pub(crate) weight: Tensor,
    /// `[N]`.
    pub(crate) bias: Option<Tensor>,
}

/// Where the gates come from, without the tensors' places in a graph.
#[derive(Clone)]
pub(crate) enum Route {
    /// The same gate for every expert and token.
    Constant(f64),
    /// A router that reads the input.
    Input(Router),
    /// A router that reads `z`.
    LowRank(Router),
    /// Gates `[T, N]` computed elsewhere.
    Given(Tensor),
}

/// Extents, tensors and constants of one update in one call.
#[derive(Clone)]
pub(crate) struct Plan {
    /// Rows of the input that get the update, `T`.
    pub(crate) tokens: usize,
    /// Width of the input.
    pub(crate) inputs: usize,
    /// Width of the output.
    pub(crate) outputs: usize,
    /// Number of experts, `N`.
    pub(crate) experts: usize,
    /// Columns of `z` per expert, `r`.
    pub(crate) rank: usize,
    /// Columns of `z`: `r`, or `N·r` when `z` differs by expert.
    pub(crate) z_cols: usize,
    /// `[r, in]` or `[N·r, in]`.
    pub(crate) a: Tensor,
    /// `[out, N·r]`.
    pub(crate) b: Tensor,
    /// Where the gates come from.
    pub(crate) route: Route,
    /// The factor `s`.
    pub(crate) scale: f64,
    /// Never a shared mask that drops nothing, nor one per expert for one expert.
    pub(crate) mask: Mask,
}

/// Columns of `z` that are computed from one dropped input.
pub(crate) struct ZPart {
    /// The columns.
    pub(crate) columns: Range<usize>,
    /// The first row of `A` that they are computed with.
    pub(crate) a_first: usize,
    /// What drops the input.
    pub(crate) dropout: Option<Dropout>,
}

impl Plan {
    /// Plans `update` for `tokens` rows of a layer with so many inputs and outputs.
    ///
    /// # Panics
    /// If the shapes of the tensors disagree.
    pub(crate) fn new(tokens: usize, inputs: usize, outputs: usize, update: &LowRank<'_>) -> Self {
        let (a, b) = (update.a.value().clone(), update.b.value().clone());
        let experts = update.num_experts;
        assert!(experts > 0, "at least one expert");
        assert_eq!(a.cols(), inputs, "A has another input width");
        assert_eq!(b.rows(), outputs, "B has another output width");
        assert_eq!(b.cols() % experts, 0, "B is a whole number of heads");
        let rank = b.cols() / experts;
        let own_a = experts > 1 && a.rows() == experts * rank;
        assert!(own_a || a.rows() == rank, "A has {} rows for rank {rank}", a.rows());
        let mask = match update.mask {
            Mask::PerExpert(dropout) if experts == 1 => Mask::Shared(dropout),
            mask => mask,
        };
        let mask = match mask {
            Mask::Shared(dropout) if dropout.probability <= 0.0 => Mask::None,
            mask => mask,
        };
        let own_z = own_a || matches!(mask, Mask::PerExpert(_));
        let z_cols = if own_z { experts * rank } else { rank };
        let router = |weight: &Var, bias: Option<&Var>, reads: usize| {
            assert_eq!(weight.value().shape(), [experts, reads], "the router's shape");
            let bias = bias.map(|bias| bias.value().clone());
            assert!(bias.as_ref().is_none_or(|bias| bias.len() == experts), "the router's bias");
            Router { weight: weight.value().clone(), bias }
        };
        let route = match update.gate {
            Gate::One => Route::Constant(1.0),
            Gate::Uniform => Route::Constant(1.0 / experts as f64),
            Gate::Input { weight, bias } => Route::Input(router(weight, bias, inputs)),
            Gate::LowRank { weight, bias } => Route::LowRank(router(weight, bias, z_cols)),
            Gate::Given(gates) => {
                assert_eq!(gates.value().shape(), [tokens, experts], "the gates' shape");
                Route::Given(gates.value().clone())
            }
        };
        let scale = update.scale;
        Self { tokens, inputs, outputs, experts, rank, z_cols, a, b, route, scale, mask }
    }

    /// Columns of `h`, the gated copies of `z` side by side.
    pub(crate) fn h_cols(&self) -> usize {
        self.experts * self.rank
    }

    /// Columns of the gates that a call computes or is given: `N`, or none.
    pub(crate) fn gate_cols(&self) -> usize {
        if self.routed() { self.experts } else { 0 }
    }

    /// The first column of `z` that `expert` reads.
    pub(crate) fn z_start(&self, expert: usize) -> usize {
        if self.z_cols == self.rank { 0 } else { expert * self.rank }
    }

    /// Whether gates differ by token.
    pub(crate) fn routed(&self) -> bool {
        !matches!(self.route, Route::Constant(_))
    }

    /// The gate of every expert where gates do not differ by token.
    pub(crate) fn constant_gate(&self) -> f64 {
        match self.route {
            Route::Constant(gate) => gate,
            _ => 1.0,
        }
    }

    /// The router, if this update has one of its own.
    pub(crate) fn router(&self) -> Option<&Router> {
        match &self.route {
            Route::Input(router) | Route::LowRank(router) => Some(router),
            Route::Constant(_) | Route::Given(_) => None,
        }
    }

    /// Whether every expert drops inputs of its own.
    pub(crate) fn has_own_masks(&self) -> bool {
        matches!(self.mask, Mask::PerExpert(_))
    }

    /// The mask that all experts share, if there is one.
    pub(crate) fn shared_mask(&self) -> Option<Dropout> {
        match self.mask {
            Mask::Shared(dropout) => Some(dropout),
            Mask::None | Mask::PerExpert(_) => None,
        }
    }

    /// Splits the columns of `z` by the mask that drops their input.
    pub(crate) fn z_parts(&self) -> Vec<ZPart> {
        let Mask::PerExpert(dropout) = self.mask else {
            let dropout = self.shared_mask();
            return vec![ZPart { columns: 0..self.z_cols, a_first: 0, dropout }];
        };
        let part = |expert: usize| {
            let columns = expert * self.rank..(expert + 1) * self.rank;
            let a_first = if self.a.rows() == self.rank { 0 } else { columns.start };
            ZPart { columns, a_first, dropout: Some(dropout.stream(expert as u64)) }
        };
        (0..self.experts).map(part).collect()
    }
}

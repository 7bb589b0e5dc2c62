//! The low-rank update of LoRA, HydraLoRA and their relatives, added to a frozen linear layer:
//!
//! ```text
//! z = A x'                      [r]        (or r per expert when every expert has its own A)
//! w = softmax(W_g x + b_g)      [N]        one gate per token, or 1 without a router
//! y = W₀ x + b₀ + s · [B_1 … B_N] (w_1 z, …, w_N z)
//! ```
//!
//! `x'` is `x` after dropout. HydraLoRA, arXiv 2404.19245, equations 3 and 4. The heads `B_1 … B_N`
//! stand side by side, so that the update is two skinny products and never `N` of them.
//!
//! Every call makes one `Plan` for each update, and one of these computes it:
//!
//! | kernel | for |
//! | --- | --- |
//! | `reference` | `f64`, a mask for every expert, fewer rows than packing pays for; products on `gemm` |
//! | `tiled`, `backward` | `f32` and many rows, as in training and prefill; one pass over the rows |
//! | `decode` | `f32` and few rows without gradients; GEMVs over the weights as they are stored |
//! | `gpu::low_rank` | tensors on a device |
//!
//! The updates of a `AdaptedLayer` each have a range of rows, so that a batch can hold rows of several
//! adapters while the base weight is read once.

mod backward;
mod decode;
mod mix;
mod plan;
mod reference;
mod softmax;
#[cfg(test)]
mod tests;
mod tiled;

#[cfg(feature = "gpu")]
pub(crate) use plan::Router;
pub(crate) use plan::{Plan, Route};
pub use softmax::{gates_of, router_gates, router_scores};

use crate::element::DType;
use crate::graph::{ParentGradients, Var};
use crate::matmul::Mat;
use crate::ops::dropout::Dropout;
use crate::ops::frozen_linear::FrozenLinear;
use crate::ops::product;
use crate::ops::rows::{join_rows, take_rows};
use crate::tensor::{Tensor, TensorElement};
use std::ops::Range;

/// Where the gates come from.
#[derive(Clone, Copy)]
pub enum Gate<'a> {
    /// No router: every expert has weight 1 (plain LoRA, or an ungated sum of heads).
    One,
    /// The same weight `1/N` for every expert.
    Uniform,
    /// `softmax(W x + b)` of this layer's own input, `W: [N, in]`, `b: [N]`.
    Input {
        /// `[N, in]`.
        weight: &'a Var,
        /// `[N]`.
        bias: Option<&'a Var>,
    },
    /// `softmax(W z + b)` of the low-rank activation, `W: [N, r]`, `b: [N]`.
    LowRank {
        /// `[N, r]` (`[N, N·r]` when every expert has its own A).
        weight: &'a Var,
        /// `[N]`.
        bias: Option<&'a Var>,
    },
    /// Gates `[T, N]` computed elsewhere, as by one router for a whole block.
    Given(&'a Var),
}

/// Which dropout mask the input of `A` gets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Mask {
    /// None.
    #[default]
    None,
    /// One mask for all experts.
    Shared(Dropout),
    /// A mask of its own for every expert, as the official code draws them.
    PerExpert(Dropout),
}

/// The trainable tensors and constants of one update.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// `[r, in]`, or `[N·r, in]` when every expert has its own.
    pub a: &'a Var,
    /// `[out, N·r]`: the heads side by side.
    pub b: &'a Var,
    /// Number of experts `N`.
    pub num_experts: usize,
    /// Where the gates come from.
    pub gate: Gate<'a>,
    /// The factor `s`, `alpha / r` for LoRA.
    pub scale: f64,
    /// Dropout on the input of `A`; the router sees the input as it is.
    pub mask: Mask,
}

impl<'a> LowRank<'a> {
    /// The router's weight and bias, if this update has a router of its own.
    fn router(&self) -> (Option<&'a Var>, Option<&'a Var>) {
        match self.gate {
            Gate::Input { weight, bias } | Gate::LowRank { weight, bias } => (Some(weight), bias),
            Gate::One | Gate::Uniform | Gate::Given(_) => (None, None),
        }
    }

    /// The gates that were computed elsewhere, if they were.
    fn given(&self) -> Option<&'a Var> {
        match self.gate {
            Gate::Given(gates) => Some(gates),
            _ => None,
        }
    }

    /// Whether a gradient flows into one of the tensors.
    fn needs_grad(&self) -> bool {
        let (weight, bias) = self.router();
        let optional = [weight, bias, self.given()].into_iter().flatten();
        [self.a, self.b].into_iter().chain(optional).any(Var::needs_grad)
    }
}

/// The result of one update.
pub struct Output {
    /// `[T, out]`.
    pub y: Var,
    /// The gates `[T, N]` that were used, for routing statistics; none without a router.
    pub gates: Option<Tensor>,
}

/// A frozen layer, and the updates of some rows of its input.
pub struct AdaptedLayer<'a> {
    /// The layer.
    pub frozen: &'a FrozenLinear,
    /// Which rows get which update: ranges in ascending order, none overlapping another. Rows in no
    /// range get the frozen layer alone. Given gates and dropout masks count rows from the start of
    /// the range.
    pub updates: Vec<(Range<usize>, LowRank<'a>)>,
}

impl<'a> AdaptedLayer<'a> {
    /// Describes the frozen layer with one update of all `rows`, or none.
    pub fn new(frozen: &'a FrozenLinear, rows: usize, update: Option<LowRank<'a>>) -> Self {
        Self { frozen, updates: update.into_iter().map(|update| (0..rows, update)).collect() }
    }

    /// Makes the plan of each update, and checks shapes and ranges.
    fn plans(&self, x: &Var) -> Vec<Plan> {
        let (rows, inputs) = (x.value().rows(), self.frozen.in_features());
        assert_eq!(x.value().cols(), inputs, "input has another width than the layer");
        let mut free = 0;
        let plan = |(range, update): &(Range<usize>, LowRank<'_>)| {
            assert!(
                free <= range.start && range.start <= range.end && range.end <= rows,
                "rows {range:?} of an update: out of order, or past the {rows} rows of the input"
            );
            free = range.end;
            Plan::new(range.len(), inputs, self.frozen.out_features(), update)
        };
        self.updates.iter().map(plan).collect()
    }

    /// Whether a gradient flows into the input or one of the updates.
    fn needs_grad(&self, x: &Var) -> bool {
        x.needs_grad() || self.updates.iter().any(|(_, update)| update.needs_grad())
    }

    /// Whether the layer has to be computed on a device.
    #[cfg(feature = "gpu")]
    fn on_device(&self, x: &Var) -> bool {
        self.frozen.placed().is_some() || x.value().device().is_some()
    }

    /// Whether the layer has to be computed on a device.
    #[cfg(not(feature = "gpu"))]
    fn on_device(&self, _: &Var) -> bool {
        false
    }
}

/// The result of a layer with its updates.
pub struct AdaptedOutput {
    /// `[T, out]`.
    pub y: Var,
    /// The gates `[rows, N]` that each update used; none without a router.
    pub gates: Vec<Option<Tensor>>,
}

impl From<Output> for AdaptedOutput {
    fn from(output: Output) -> Self {
        Self { y: output.y, gates: vec![output.gates] }
    }
}

/// Adds the update to `y0: [T, out]`, in its storage when nobody else holds it.
///
/// # Panics
/// If the shapes of the tensors disagree.
pub fn gated_low_rank(x: &Var, y0: Var, update: &LowRank<'_>) -> Output {
    let [tokens, inputs] = [x.value().rows(), x.value().cols()];
    assert_eq!(tokens, y0.value().rows(), "input and base product differ in tokens");
    let plan = Plan::new(tokens, inputs, y0.value().cols(), update);
    add_update(x, y0, update, plan)
}

/// [`gated_low_rank`] by `plan`.
fn add_update(x: &Var, y0: Var, update: &LowRank<'_>, plan: Plan) -> Output {
    let _part = crate::profile::part("gated_low_rank");
    on_device!(low_rank::update(x, &y0, update, &plan));
    reference::update(x, y0, update, plan)
}

/// Applies the layer `frozen` with one update to `x: [T, in]`.
///
/// # Panics
/// If the shapes of the tensors disagree.
pub fn adapted_linear(x: &Var, frozen: &FrozenLinear, update: &LowRank<'_>) -> Output {
    let layer = AdaptedLayer::new(frozen, x.value().rows(), Some(*update));
    let mut output = adapted_linears(x, &[layer]).remove(0);
    Output { y: output.y, gates: output.gates.pop().flatten() }
}

/// Applies several layers, each with the updates of its rows, to one input `x: [T, in]`.
///
/// Every row's result is that of its update alone: the same bits, where the same kernel computes it.
///
/// # Panics
/// If the shapes of the tensors disagree, or if the updates' rows are out of order.
pub fn adapted_linears(x: &Var, layers: &[AdaptedLayer<'_>]) -> Vec<AdaptedOutput> {
    let plans: Vec<Vec<Plan>> = layers.iter().map(|layer| layer.plans(x)).collect();
    if layers.iter().zip(&plans).all(|(layer, plans)| decode::can(x, layer, plans)) {
        return decode::forward(x, layers, &plans);
    }
    layers.iter().zip(plans).map(|(layer, plans)| adapted(x, layer, plans)).collect()
}

/// [`adapted_linears`] of one layer with many rows or gradients.
fn adapted(x: &Var, layer: &AdaptedLayer<'_>, mut plans: Vec<Plan>) -> AdaptedOutput {
    let (rows, frozen) = (x.value().rows(), layer.frozen);
    let tiled = tiled::can(x, layer, &plans);
    match &layer.updates[..] {
        [] => AdaptedOutput { y: frozen.forward(x), gates: Vec::new() },
        [(range, update)] if *range == (0..rows) => {
            let plan = plans.remove(0);
            match tiled {
                true => tiled::adapted(x, frozen, update, plan).into(),
                false => add_update(x, frozen.forward(x), update, plan).into(),
            }
        }
        _ if tiled && !layer.needs_grad(x) => tiled::by_rows(x, layer, &plans),
        _ => piece_by_piece(x, layer),
    }
}

/// A layer with updates of ranges of rows, from operations that know their gradients.
fn piece_by_piece(x: &Var, layer: &AdaptedLayer<'_>) -> AdaptedOutput {
    let base = layer.frozen.forward(x);
    let taken =
        |from: &Var, range: &Range<usize>| take_rows(from, &range.clone().collect::<Vec<_>>());
    let (mut pieces, mut gates, mut free) = (Vec::new(), Vec::new(), 0);
    for (range, update) in &layer.updates {
        pieces.push(taken(&base, &(free..range.start)));
        let output = gated_low_rank(&taken(x, range), taken(&base, range), update);
        pieces.push(output.y);
        gates.push(output.gates);
        free = range.end;
    }
    pieces.push(taken(&base, &(free..x.value().rows())));
    AdaptedOutput { y: join_rows(&pieces), gates }
}

/// The values an update is computed from, in the order the graph knows them in.
#[derive(Clone, Copy)]
pub(crate) enum Parent {
    /// The input `[T, in]`.
    X,
    /// The base product `[T, out]`, where the update is added to one.
    Base,
    /// `A`.
    A,
    /// The heads `B`.
    B,
    /// The weight of the router.
    RouterWeight,
    /// The bias of the router.
    RouterBias,
    /// Gates that were computed elsewhere.
    Gates,
}

impl Parent {
    /// All parents of an update; `none` stands in for those it does not have.
    pub(crate) fn all<'a>(
        x: &'a Var,
        base: Option<&'a Var>,
        update: &LowRank<'a>,
        none: &'a Var,
    ) -> [&'a Var; 7] {
        let (weight, bias) = update.router();
        let optional = [weight, bias, update.given()].map(|parent| parent.unwrap_or(none));
        let [weight, bias, gates] = optional;
        [x, base.unwrap_or(none), update.a, update.b, weight, bias, gates]
    }
}

/// The gradients of an update's parents, by name.
pub(crate) struct Parents<'a, 'g>(pub(crate) &'a mut ParentGradients<'g>);

impl Parents<'_, '_> {
    /// Whether `parent` wants a gradient.
    pub(crate) fn needs(&self, parent: Parent) -> bool {
        self.0.needs(parent as usize)
    }

    /// Whether a parent other than the base product and the heads wants a gradient.
    pub(crate) fn need_below_heads(&self) -> bool {
        use Parent::{A, Gates, RouterBias, RouterWeight, X};
        [X, A, RouterWeight, RouterBias, Gates].into_iter().any(|parent| self.needs(parent))
    }

    /// Adds to the gradient of `parent`; ignored if it wants none.
    pub(crate) fn add(&mut self, parent: Parent, gradient: Tensor) {
        self.0.add(parent as usize, gradient);
    }

    /// Takes out the sum gathered for `parent` so far, to be given back with [`add`](Self::add).
    pub(crate) fn take(&mut self, parent: Parent) -> Option<Tensor> {
        self.0.take(parent as usize)
    }

    /// Adds `lhs · rhs`, of shape `extent`, to the gradient of `parent`, in place if it has one.
    fn add_product<E: TensorElement>(
        &mut self,
        parent: Parent,
        extent: [usize; 2],
        lhs: Mat<'_, E>,
        rhs: Mat<'_, E>,
    ) {
        product::add_product(self.0, parent as usize, extent, lhs, rhs);
    }
}

/// Whether `x` is in the type that [`tiled`] and [`decode`] compute with, and nothing asks for another
/// kernel.
fn is_plain(x: &Var, layer: &AdaptedLayer<'_>, plans: &[Plan]) -> bool {
    x.value().dtype() == DType::F32 && !layer.on_device(x) && !plans.iter().any(Plan::has_own_masks)
}

//! What `A` and `B` start from. Some starts are not zero together; what they would add to the weight is
//! taken out of it, so that the adapted model begins as the base, and what was taken out lives here,
//! beside the trainables.
//!
//! ```text
//! y = W0 x + s (Σ_i g_i B_i A − B₀ A₀) x
//! ```

mod parted;
mod pissa;
mod rlora;
mod segments;

use super::layout::{a_name, head_name, set_head_columns, set_rows, start_names};
use super::{Layer, LowRankSpec};
use crate::error::Result;
use crate::random::{kaiming_bound, uniform};
use crate::trainable::{TensorMap, take_tensor};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::low_rank::adapted_linear;
use hydralora_kernels::ops::low_rank::{Gate, LowRank, Mask, Output, gated_low_rank};
use hydralora_kernels::ops::rows::{join_columns, prepend_rows};
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_model::adapter::{Site, SiteShape};
use parted::{Directions, Parted};
use schemars::JsonSchema;
use segments::Segments;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What `A` and `B` start from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Start {
    /// `A` Kaiming-uniform, `B` zero.
    #[default]
    Kaiming,
    /// The principal part of the weight, which is taken out of the weight.
    Pissa,
    /// `A` and every head at random, so that heads differ from the first step on; what they add
    /// together on average is taken out of the weight (R-LoRA).
    Rlora,
    /// Heads at random, less their mean: even gates add nothing.
    ZeroSum,
    /// Heads of orthonormal directions; what they add on average is taken out of the weight.
    Orthogonal,
    /// Heads in the directions of disjoint parts of the weight's left singular vectors; likewise.
    SingularSlices,
    /// Every expert with an `A` and `B` of its own at the head of one of `N` equal segments of the weight's
    /// singular values; what they add together on average is taken out of the weight (GOAT).
    SingularSegments,
}

impl Start {
    /// Its name in a recipe, where it makes several heads differ.
    pub(crate) fn of_several_heads(self) -> Option<&'static str> {
        match self {
            Start::Kaiming | Start::Pissa => None,
            Start::Rlora => Some("rlora"),
            Start::ZeroSum => Some("zero_sum"),
            Start::Orthogonal => Some("orthogonal"),
            Start::SingularSlices => Some("singular_slices"),
            Start::SingularSegments => Some("singular_segments"),
        }
    }

    /// How layers start, and what follows from it for their output and their files.
    pub(super) fn strategy(self, draw: Draw) -> Box<dyn StartStrategy> {
        match self {
            Start::Kaiming => Box::new(Kaiming(draw)),
            Start::Pissa => Box::new(pissa::Pissa::new(draw)),
            Start::Rlora => Box::new(rlora::Rlora::new(draw)),
            Start::ZeroSum => Box::new(parted::ZeroSum(draw)),
            Start::Orthogonal => Box::new(Parted::new(draw, Directions::Random)),
            Start::SingularSlices => Box::new(Parted::new(draw, Directions::Singular)),
            Start::SingularSegments => Box::new(Segments::new(draw)),
        }
    }
}

/// A start, with what it has to remember for as long as the adapter lives.
pub(super) trait StartStrategy: Send + Sync {
    /// Draws `A: [r, in]` (or `[N·r, in]`) and `B: [out, N·r]` of a fresh layer.
    fn draw(&mut self, shape: SiteShape) -> [Tensor; 2];
    /// Gives the layer's `A` and `B` where they follow from the base's weight.
    ///
    /// # Errors
    /// If the weight has no such values.
    fn start_from(&mut self, site: Site, frozen: &FrozenLinear) -> Result<Option<[Tensor; 2]>> {
        let _ = (site, frozen);
        Ok(None)
    }
    /// Whether values that follow from the base's weights are still to come.
    fn waits(&self) -> bool {
        false
    }
    /// What is taken out of the weights; none for starts that leave them alone.
    fn taken_out(&self) -> Option<&TakenOut> {
        None
    }
    /// Computes a layer with `update`, `less` taken out of its weight.
    fn layer(&self, x: &Var, frozen: &FrozenLinear, update: &LowRank<'_>, less: &Pair) -> Output {
        less.beside(x, frozen, update)
    }
    /// Changes `map`, the trainables of `layers`, into what a file holds.
    fn to_file(&self, map: &mut TensorMap, layers: &BTreeMap<Site, Layer>) {
        let _ = (map, layers);
    }
    /// Changes a file's configuration likewise.
    fn to_config(&self, config: &mut Map<String, Value>) {
        let _ = config;
    }
    /// Takes what a file holds beside the trainables out of `tensors`; gives every fault.
    fn load_file(&mut self, tensors: &mut TensorMap, shapes: &[SiteShape]) -> Vec<String> {
        let _ = (tensors, shapes);
        Vec::new()
    }
    /// Takes what [`taken_out`](Self::taken_out) exported to a checkpoint out of `tensors`; gives every
    /// fault.
    fn load_state(&mut self, tensors: &mut TensorMap, shapes: &[SiteShape]) -> Vec<String> {
        let _ = (tensors, shapes);
        Vec::new()
    }
}

/// `A` Kaiming-uniform, `B` zero: nothing to remember.
struct Kaiming(Draw);

impl StartStrategy for Kaiming {
    fn draw(&mut self, shape: SiteShape) -> [Tensor; 2] {
        self.0.kaiming(shape)
    }
}

/// What the tensors of fresh layers are drawn by.
#[derive(Clone)]
pub(super) struct Draw {
    pub(super) spec: LowRankSpec,
    pub(super) dtype: DType,
    pub(super) seed: u64,
}

impl Draw {
    /// Draws `A` Kaiming-uniform and leaves `B` zero.
    fn kaiming(&self, shape: SiteShape) -> [Tensor; 2] {
        let &Self { ref spec, dtype, seed } = self;
        let rank = spec.sizes.at(shape.site).rank;
        let inputs = shape.in_features;
        let a = self.each_a(shape, &|name| {
            uniform(seed, name, kaiming_bound(inputs), dtype, [rank, inputs])
        });
        [a, Tensor::zeros(dtype, [shape.out_features, spec.num_b() * rank])]
    }

    /// Draws every `A: [r, in]` of a layer by its name in a file and puts them one below the other.
    fn each_a(&self, shape: SiteShape, draw: &dyn Fn(&str) -> Tensor) -> Tensor {
        let (spec, rank) = (&self.spec, self.spec.sizes.at(shape.site).rank);
        let mut all = Tensor::zeros(self.dtype, [spec.num_a() * rank, shape.in_features]);
        for expert in 0..spec.num_a() {
            set_rows(&mut all, expert * rank, &draw(&a_name(spec, shape.site, expert)));
        }
        all
    }

    /// Draws every head `[out, r]` of a layer by its name in a file and puts them side by side.
    fn each_head(&self, shape: SiteShape, draw: &dyn Fn(&str) -> Tensor) -> Tensor {
        let (spec, rank) = (&self.spec, self.spec.sizes.at(shape.site).rank);
        let mut all = Tensor::zeros(self.dtype, [shape.out_features, spec.num_experts * rank]);
        for head in 0..spec.num_experts {
            let drawn = draw(&head_name(spec, shape.site, head));
            set_head_columns(&mut all, head, rank, &drawn);
        }
        all
    }
}

/// What was taken out of a layer's weight, as constants: `A₀: [r, in]` and `−B₀: [out, r]`.
pub(super) struct Pair {
    a: Var,
    b: Var,
}

impl Pair {
    /// `s B A`, taken out of the weight.
    fn less(a: &Tensor, b: &Tensor, dtype: DType) -> Self {
        let mut b = b.to_dtype(dtype);
        b.scale(-1.0);
        Self { a: Var::constant(a.to_dtype(dtype)), b: Var::constant(b) }
    }

    /// `A₀` and `−B₀`.
    pub(super) fn values(&self) -> [Tensor; 2] {
        [self.a.value().clone(), self.b.value().clone()]
    }

    /// Computes the layer without the pair's part of the weight, and `update` on top.
    fn beside(&self, x: &Var, frozen: &FrozenLinear, update: &LowRank<'_>) -> Output {
        let (a, b) = (&self.a, &self.b);
        let start = LowRank { a, b, num_experts: 1, gate: Gate::One, mask: Mask::None, ..*update };
        gated_low_rank(x, adapted_linear(x, frozen, &start).y, update)
    }

    /// `a` and `b` of one head with the pair behind them: one update of twice the rank.
    fn joined(&self, a: &Var, b: &Var) -> [Var; 2] {
        let rows = self.a.value().rows();
        [prepend_rows(a, &self.a, &[0, rows], &[true]), join_columns(b, &self.b)]
    }
}

/// What was taken out of the weights, by layer.
#[derive(Default)]
pub(super) struct TakenOut(BTreeMap<Site, Pair>);

impl TakenOut {
    pub(super) fn get(&self, site: Site) -> Option<&Pair> {
        self.0.get(&site)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn iter(&self) -> impl Iterator<Item = (&Site, &Pair)> {
        self.0.iter()
    }

    fn insert(&mut self, site: Site, pair: Pair) {
        self.0.insert(site, pair);
    }

    /// `A₀` and `B₀` of every layer, by name.
    pub(super) fn export(&self) -> TensorMap {
        let mut map = TensorMap::new();
        for (&site, pair) in &self.0 {
            let [a, mut b] = pair.values();
            b.scale(-1.0);
            map.extend(start_names(site).into_iter().zip([a, b]));
        }
        map
    }

    /// Takes what [`export`](Self::export) gave for the layers `shapes` out of `tensors`, pairs of `pairs`
    /// times the layer's rank; gives every fault.
    fn load(
        &mut self,
        tensors: &mut TensorMap,
        shapes: &[SiteShape],
        draw: &Draw,
        pairs: usize,
    ) -> Vec<String> {
        let mut faults = Vec::new();
        for shape in shapes {
            let rank = pairs * draw.spec.sizes.at(shape.site).rank;
            let [a, b] = start_names(shape.site);
            let a = take_tensor(tensors, &a, &[rank, shape.in_features], &mut faults);
            let b = take_tensor(tensors, &b, &[shape.out_features, rank], &mut faults);
            if let (Some(a), Some(b)) = (a, b) {
                self.insert(shape.site, Pair::less(&a, &b, draw.dtype));
            }
        }
        faults
    }
}

#[cfg(test)]
pub(super) mod tests {
    use hydralora_kernels::Tensor;

    /// `B A`, row by row.
    pub(in crate::low_rank) fn product(b: &Tensor, a: &Tensor) -> Vec<f64> {
        let (rank, inputs) = (a.rows(), a.cols());
        let (a, b) = (a.to_f64(), b.to_f64());
        (0..b.len() / rank * inputs)
            .map(|at| {
                let (i, j) = (at / inputs, at % inputs);
                (0..rank).map(|k| b[i * rank + k] * a[k * inputs + j]).sum()
            })
            .collect()
    }
}

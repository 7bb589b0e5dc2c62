//! Layers for a few rows, as in decoding: weights are read once, as they are stored, those of layers
//! with one input in one loop. What an update needs first, `h`, is computed in the same loop by whoever
//! comes to that layer first, while the others read the weight.

use super::{Plan, Rows, adapted_linear, own_masks};
use crate::buffer::Buffer;
use crate::dense;
use crate::element::DType;
use crate::graph::Var;
use crate::ops::frozen_linear::FrozenLinear;
use crate::ops::frozen_linear::few::{self, Part, Update, float};
use crate::ops::gated_low_rank::{LowRank, Output};
use crate::team::Early;
use crate::tensor::Tensor;

/// [`adapted_linear`] of several layers, some perhaps without an update, on one input `x: [T, in]`.
///
/// # Panics
/// If the shapes of the tensors disagree.
pub fn adapted_linears(x: &Var, layers: &[(&FrozenLinear, Option<LowRank<'_>>)]) -> Vec<Output> {
    if layers.iter().all(|(frozen, update)| is_few(x, frozen, update.as_ref())) {
        return few(x, layers);
    }
    let one = |(frozen, update): &(&FrozenLinear, Option<LowRank<'_>>)| match update {
        Some(update) => adapted_linear(x, frozen, update),
        None => Output { y: frozen.forward(x), gates: None },
    };
    layers.iter().map(one).collect()
}

/// Whether [`few`] can compute it.
pub(super) fn is_few(x: &Var, frozen: &FrozenLinear, update: Option<&LowRank<'_>>) -> bool {
    let recorded = x.needs_grad() || update.is_some_and(|p| p.a.needs_grad() || p.b.needs_grad());
    #[cfg(feature = "gpu")]
    let elsewhere = frozen.placed().is_some() || x.value().device().is_some();
    #[cfg(not(feature = "gpu"))]
    let elsewhere = false;
    assert_eq!(x.value().cols(), frozen.in_features(), "input has another width than the layer");
    x.value().dtype() == DType::F32
        && x.value().rows() < dense::FEWEST_ROWS
        && !recorded
        && !elsewhere
        && !update.is_some_and(own_masks)
}

/// What an update computes before its product with the heads.
struct Mixed {
    /// `[T, N·r]`.
    h: Buffer<f32>,
    /// `[T, N]`, or nothing without a router.
    gates: Buffer<f32>,
}

/// Layers for a few rows in `f32`, without a graph.
pub(super) fn few(x: &Var, layers: &[(&FrozenLinear, Option<LowRank<'_>>)]) -> Vec<Output> {
    let _part = crate::profile::part("adapted_linear");
    let rows = x.value().rows();
    let plans: Vec<Option<Plan>> = (layers.iter())
        .map(|(frozen, update)| update.as_ref().map(|update| Plan::new(x, frozen, update)))
        .collect();
    let early: Vec<Early<Mixed>> = plans.iter().map(|_| Early::default()).collect();
    let x = x.value().data::<f32>();
    let asked: Vec<_> = (plans.iter().zip(&early))
        .map(|(plan, early)| {
            plan.as_ref().map(|plan| move || &early.get(|| plan.mixed_few(x, rows)).h[..])
        })
        .collect();
    let parts: Vec<Part<'_>> = (layers.iter().zip(&plans).zip(&asked))
        .map(|(((layer, _), plan), asked)| {
            let update = plan.as_ref().zip(asked.as_ref());
            let update = update.map(|(plan, h)| Update { up: plan.b.data::<f32>(), h });
            Part { layer, update }
        })
        .collect();
    let products = few::products(x, rows, &parts);
    (products.into_iter().zip(layers).zip(&plans).zip(early))
        .map(|(((y, (layer, _)), plan), early)| {
            let gates = plan.as_ref().filter(|plan| plan.routed()).map(|plan| {
                let gates = early.into_inner(|| plan.mixed_few(x, rows)).gates;
                Tensor::new(gates, [rows, plan.experts])
            });
            Output { y: Var::constant(Tensor::new(y, [rows, layer.out_features()])), gates }
        })
        .collect()
}

impl Plan {
    fn mixed_few(&self, x: &[f32], rows: usize) -> Mixed {
        let everything = 0..rows;
        let zs_cols = self.zs_cols();
        let dropped = self.dropped(&Rows { range: &everything, x });
        // `[zs_cols, T]`.
        let mut turned = Buffer::<f32>::zeros(zs_cols * rows);
        let (z, scores) = turned.split_at_mut(self.z_cols * rows);
        let down = |weight: &Tensor, x: &[f32], out: &mut [f32]| {
            let weight_rows = few::Rows::whole(weight.data::<f32>(), self.inputs);
            weight_rows.fetch_first();
            float::add_products(weight_rows, x, 0..weight.rows(), rows, out);
        };
        down(&self.a, dropped.as_deref().unwrap_or(x), z);
        if let super::Route::Input { weight, .. } = &self.route {
            down(weight, x, scores);
        }
        let zs = few::transposed(turned, rows);
        let mut z = Buffer::<f32>::scratch(rows * self.z_cols);
        let mut gates = Buffer::<f32>::scratch(if self.routed() { rows * self.experts } else { 0 });
        self.gate(&everything, &zs, &mut z, &mut gates);
        let h = self.mixed(&z, &gates);
        Mixed { h, gates }
    }
}

//! The decode path: all layers that share an input of few rows run as one parallel GEMV over their
//! stored weights. The threads that begin first also compute the updates' low-rank activations `h`,
//! while the others read weights.

use super::{AdaptedLayer, AdaptedOutput, Plan, Route, is_plain};
use crate::buffer::Buffer;
use crate::dense;
use crate::graph::Var;
use crate::ops::frozen_linear::few::{self, Part, Update, float};
use crate::tensor::Tensor;
use hydralora_runtime::Early;
use std::ops::Range;

/// Whether this kernel can compute `layer`.
pub(super) fn can(x: &Var, layer: &AdaptedLayer<'_>, plans: &[Plan]) -> bool {
    dense::are_few(x.value().rows()) && is_plain(x, layer, plans) && !layer.needs_grad(x)
}

/// What an update computes before its product with the heads.
struct Mixed {
    /// `[T, N·r]`.
    h: Buffer<f32>,
    /// `[T, N]`, or nothing without a router.
    gates: Buffer<f32>,
}

/// An update, and what is computed for it once.
struct Asked<'a> {
    rows: &'a Range<usize>,
    plan: &'a Plan,
    /// `[T, in]`.
    x: &'a [f32],
    mixed: Early<Mixed>,
}

impl Asked<'_> {
    fn h(&self) -> &[f32] {
        &self.mixed.get(|| self.plan.mixed_few(self.x)).h
    }

    fn into_gates(self) -> Option<Tensor> {
        let Self { plan, x, mixed, .. } = self;
        plan.routed().then(|| {
            let gates = mixed.into_inner(|| plan.mixed_few(x)).gates;
            Tensor::new(gates, [plan.tokens, plan.experts])
        })
    }
}

/// Applies layers, each with the updates of its rows, to few rows without a graph.
pub(super) fn forward(
    x: &Var,
    layers: &[AdaptedLayer<'_>],
    plans: &[Vec<Plan>],
) -> Vec<AdaptedOutput> {
    let _part = crate::profile::part("adapted_linear");
    let rows = x.value().rows();
    let x = x.value().data::<f32>();
    let asked: Vec<Vec<Asked<'_>>> = (layers.iter().zip(plans))
        .map(|(layer, plans)| {
            (layer.updates.iter().zip(plans))
                .map(|((rows, _), plan)| {
                    let x = &x[rows.start * plan.inputs..rows.end * plan.inputs];
                    Asked { rows, plan, x, mixed: Early::default() }
                })
                .collect()
        })
        .collect();
    let h: Vec<Vec<_>> =
        asked.iter().map(|asked| asked.iter().map(|asked| || asked.h()).collect()).collect();
    let updates: Vec<Vec<Update<'_>>> = (asked.iter().zip(&h))
        .map(|(asked, h)| {
            (asked.iter().zip(h))
                .map(|(Asked { rows, plan, .. }, h)| Update {
                    rows: (*rows).clone(),
                    up: plan.b.data::<f32>(),
                    h,
                })
                .collect()
        })
        .collect();
    let parts: Vec<Part<'_>> = (layers.iter().zip(&updates))
        .map(|(layer, updates)| Part { layer: layer.frozen, updates })
        .collect();
    let products = few::products(x, rows, &parts);
    (products.into_iter().zip(layers).zip(asked))
        .map(|((y, layer), asked)| AdaptedOutput {
            y: Var::constant(Tensor::new(y, [rows, layer.frozen.out_features()])),
            gates: asked.into_iter().map(Asked::into_gates).collect(),
        })
        .collect()
}

impl Plan {
    fn mixed_few(&self, x: &[f32]) -> Mixed {
        let rows = self.tokens;
        let dropped = self.dropped(0, x);
        // `[zs_cols, T]`.
        let mut turned = Buffer::<f32>::zeros(self.zs_cols() * rows);
        let (z, scores) = turned.split_at_mut(self.z_cols * rows);
        let down = |weight: &Tensor, x: &[f32], out: &mut [f32]| {
            let weight_rows = few::Rows::whole(weight.data::<f32>(), self.inputs);
            weight_rows.fetch_first();
            float::add_products(weight_rows, x, 0..weight.rows(), rows, out);
        };
        down(&self.a, dropped.as_deref().unwrap_or(x), z);
        if let Route::Input(router) = &self.route {
            down(&router.weight, x, scores);
        }
        let zs = few::transposed(turned, rows);
        let mut z = Buffer::<f32>::scratch(rows * self.z_cols);
        let mut gates = Buffer::<f32>::scratch(rows * self.gate_cols());
        self.gate(0, &zs, &mut z, &mut gates);
        let mut h = Buffer::scratch(rows * self.h_cols());
        self.mix(self.scale as f32, &z, &gates, &mut h);
        Mixed { h, gates }
    }
}

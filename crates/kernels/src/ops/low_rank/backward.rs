//! The gradients of a layer with one update of all rows, in `f32`.
//!
//! `dx = [dy | dz | ds] · [W₀; A; W_g]` is formed block by block of rows, while the block of `dy` that
//! gives `dh = dy B` is still in cache. The sums over rows, `dB = dyᵀ h` and
//! `[dA; dW_g] = [dz | ds]ᵀ x`, follow by columns of the result, so that no thread holds a part of
//! another's sum.

use super::softmax::softmax_backward;
use super::{Parent, Parents, Plan, Route};
use crate::buffer::Buffer;
use crate::dense;
use crate::graph::Saved;
use crate::matmul::Write;
use crate::ops::frozen_linear::FrozenLinear;
use crate::simd::{add_scaled, axpy};
use crate::tensor::Tensor;
use crate::tile::{Left, Right, Segment, multiply, panel_width};
use hydralora_runtime::{chunks_mut, each_mut, for_each, map};
use std::ops::Range;

/// Rows whose products are added up in one go: what a task reads of them stays in its core's cache.
const PIECE: usize = 192;

/// All of `rows` in pieces.
fn pieces(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(PIECE).map(move |first| first..(first + PIECE).min(rows))
}

/// Everything the backward needs.
pub(super) struct Kept {
    pub(super) frozen: FrozenLinear,
    pub(super) plan: Plan,
    pub(super) x: Saved,
    /// `[T, z_cols]`.
    pub(super) z: Tensor,
    /// `[T, N]`, if gates differ by token.
    pub(super) gates: Option<Tensor>,
}

/// What the pass over rows leaves for the sums over them.
struct ByRow {
    /// `s · (w_1 z, …, w_N z)`: `[T, N·r]`.
    h: Buffer<f32>,
    /// The gradients of `z` and, where the router reads the input, of its scores: `[T, zs_cols]`.
    dzs: Buffer<f32>,
    /// The gradient of given gates or of the router's scores: `[T, N]`, or nothing without gates.
    dgates: Buffer<f32>,
}

/// A block of rows in that pass: what it reads, and what it writes.
struct Block<'a> {
    range: &'a Range<usize>,
    dy: &'a [f32],
    z: &'a [f32],
    gates: &'a [f32],
    h: &'a mut [f32],
    dzs: &'a mut [f32],
    dgates: &'a mut [f32],
}

/// `W₀` and `[A; W_g]` for the gradient of the input.
struct Down {
    weight: Buffer<f32>,
    stacked: Buffer<f32>,
}

impl Kept {
    /// Adds what `dy: [T, out]` gives to the gradients of `parents`.
    pub(super) fn backward(&self, dy: &Tensor, mut parents: Parents<'_, '_>) {
        let by_row = self.by_row(dy.data::<f32>(), &mut parents);
        self.sums_over_rows(dy.data::<f32>(), &by_row, &mut parents);
        self.router_gradients(by_row, &mut parents);
    }

    /// The pass over rows, which gives the gradient of the input.
    fn by_row(&self, dy: &[f32], parents: &mut Parents<'_, '_>) -> ByRow {
        let plan = &self.plan;
        let (tokens, inputs, outputs) = (plan.tokens, plan.inputs, plan.outputs);
        let (h_cols, zs_cols, gate_cols) = (plan.h_cols(), plan.zs_cols(), plan.gate_cols());
        let wants_x = parents.needs(Parent::X);
        let carried = parents.take(Parent::X);
        let write = if carried.is_some() { Write::Add } else { Write::Set };
        let mut dx = carried.unwrap_or_else(|| {
            let rows = if wants_x { tokens } else { 0 };
            Tensor::new(Buffer::<f32>::scratch(rows * inputs), [rows, inputs])
        });
        let down = wants_x.then(|| self.down());
        crate::profile::product(tokens, outputs, h_cols);

        let mut h = Buffer::<f32>::scratch(tokens * h_cols);
        let mut dzs = Buffer::<f32>::zeros(tokens * zs_cols);
        let mut dgates = Buffer::<f32>::scratch(tokens * gate_cols);
        let dx_cols = if wants_x { inputs } else { 0 };
        let z = self.z.data::<f32>();
        let gates = self.gates.as_ref().map_or(&[][..], |gates| gates.data::<f32>());
        let blocks = dense::blocks(tokens);
        let mut parts = (
            dense::cut(dx.data_mut::<f32>(), dx_cols, &blocks),
            dense::cut(&mut h, h_cols, &blocks),
            dense::cut(&mut dzs, zs_cols, &blocks),
            dense::cut(&mut dgates, gate_cols, &blocks),
        );
        let of_blocks = (
            each_mut(&mut parts.0),
            each_mut(&mut parts.1),
            each_mut(&mut parts.2),
            each_mut(&mut parts.3),
            &blocks[..],
        );
        for_each(of_blocks, |_, (dx, h, dzs, dgates, range)| {
            let of = |cols: usize| range.start * cols..range.end * cols;
            let (dy, z, gates) = (&dy[of(outputs)], &z[of(plan.z_cols)], &gates[of(gate_cols)]);
            let mut block = Block { range, dy, z, gates, h, dzs, dgates };
            plan.through_heads(&mut block);
            if let Some(down) = &down {
                plan.input_gradient(&block, down, dx, write);
            }
        });
        drop(parts);
        if wants_x {
            parents.add(Parent::X, dx);
        }
        ByRow { h, dzs, dgates }
    }

    fn down(&self) -> Down {
        let plan = &self.plan;
        crate::profile::product(plan.tokens, plan.outputs + plan.zs_cols(), plan.inputs);
        let weight = self.frozen.dense_f32();
        Down {
            weight: dense::packed_rows(&weight, plan.inputs),
            stacked: dense::packed_rows(&plan.stacked(), plan.inputs),
        }
    }

    /// The gradients of the heads, of `A`, and of the weight of a router that reads the input.
    fn sums_over_rows(&self, dy: &[f32], by_row: &ByRow, parents: &mut Parents<'_, '_>) {
        let plan = &self.plan;
        let wants_b = parents.needs(Parent::B);
        if wants_b {
            crate::profile::product(plan.outputs, plan.tokens, plan.h_cols());
        }
        let wants_router = plan.s_cols() > 0 && parents.needs(Parent::RouterWeight);
        let x = (parents.needs(Parent::A) || wants_router).then(|| {
            crate::profile::product(plan.zs_cols(), plan.tokens, plan.inputs);
            self.x.get()
        });
        let db = wants_b.then(|| plan.b_gradient(&by_row.h, dy));
        let down = x.map(|x| plan.down_gradient(&by_row.dzs, x.data::<f32>()));
        if let Some(db) = db {
            parents.add(Parent::B, Tensor::new(db, plan.b.shape()));
        }
        if let Some(down) = down {
            let (da, drouter) = down.split_at(plan.a.len());
            parents.add(Parent::A, Tensor::new(da.to_vec(), plan.a.shape()));
            if let Route::Input(router) = &plan.route {
                let gradient = Tensor::new(drouter.to_vec(), router.weight.shape());
                parents.add(Parent::RouterWeight, gradient);
            }
        }
    }

    /// The gradients of the router's bias, of the weight of a router that reads `z`, and of given
    /// gates.
    fn router_gradients(&self, by_row: ByRow, parents: &mut Parents<'_, '_>) {
        let (plan, dgates) = (&self.plan, by_row.dgates);
        if let Route::LowRank(router) = &plan.route
            && parents.needs(Parent::RouterWeight)
        {
            let mut out = Buffer::<f32>::zeros(router.weight.len());
            let z = self.z.data::<f32>().chunks_exact(plan.z_cols);
            for (ds, z) in dgates.chunks_exact(plan.experts).zip(z) {
                for (out, &ds) in out.chunks_exact_mut(plan.z_cols).zip(ds) {
                    axpy(ds, z, out);
                }
            }
            parents.add(Parent::RouterWeight, Tensor::new(out, router.weight.shape()));
        }
        if parents.needs(Parent::RouterBias) {
            let mut sums = vec![0.0; plan.experts];
            for ds in dgates.chunks_exact(plan.experts) {
                axpy(1.0, ds, &mut sums);
            }
            parents.add(Parent::RouterBias, Tensor::new(sums, [plan.experts]));
        }
        if let Route::Given(gates) = &plan.route {
            parents.add(Parent::Gates, Tensor::new(dgates, gates.shape()));
        }
    }
}

impl Plan {
    /// From `dy` through the heads, the gates and the router: fills `h`, `dzs` and `dgates`.
    fn through_heads(&self, block: &mut Block<'_>) {
        let (count, h_cols, zs_cols) = (block.range.len(), self.h_cols(), self.zs_cols());
        let mut dh = Buffer::<f32>::scratch(count * h_cols);
        let segment = Segment {
            left: Left::rows(block.dy, self.outputs),
            right: Right::rows(self.b.data::<f32>(), h_cols),
            depth: self.outputs,
        };
        multiply(&[segment], count, h_cols, &mut dh, h_cols, Write::Set);
        let (scale, rows) = (self.scale as f32, (block.z, block.gates));
        self.unmix(scale, &dh, rows, (&mut *block.dzs, zs_cols), block.dgates);
        self.mix(scale, block.z, block.gates, block.h);
        if self.router().is_some() {
            softmax_backward(block.dgates, block.gates, self.experts);
        }
        let rows = block.dzs.chunks_exact_mut(zs_cols).zip(block.dgates.chunks_exact(self.experts));
        match &self.route {
            Route::Constant(_) | Route::Given(_) => {}
            Route::Input(_) => rows.for_each(|(dzs, ds)| dzs[self.z_cols..].copy_from_slice(ds)),
            Route::LowRank(router) => {
                let weight = router.weight.data::<f32>();
                for (dzs, ds) in rows {
                    for (&ds, row) in ds.iter().zip(weight.chunks_exact(self.z_cols)) {
                        axpy(ds, row, &mut dzs[..self.z_cols]);
                    }
                }
            }
        }
    }

    /// `dx (+)= [dy | dz | ds] · [W₀; A; W_g]`, `z`'s part under the mask.
    fn input_gradient(&self, block: &Block<'_>, down: &Down, dx: &mut [f32], write: Write) {
        let Block { range, dy, dzs, .. } = block;
        let (count, inputs, outputs) = (range.len(), self.inputs, self.outputs);
        let (zs_cols, z_cols) = (self.zs_cols(), self.z_cols);
        let weight = Right::packed(&down.weight, outputs);
        let base = Segment { left: Left::rows(dy, outputs), right: weight, depth: outputs };
        let stacked = &down.stacked;
        let left = |first: usize| Left {
            data: &dzs[first.min(dzs.len())..],
            row_stride: zs_cols,
            col_stride: 1,
        };
        let Some(dropout) = self.shared_mask() else {
            let right = Right::packed(stacked, zs_cols);
            let low = Segment { left: left(0), right, depth: zs_cols };
            multiply(&[base, low], count, inputs, dx, inputs, write);
            return;
        };
        let width = panel_width();
        let right = |first: usize| Right {
            data: &stacked[(first * width).min(stacked.len())..],
            row_stride: width,
            panel_stride: zs_cols * width,
        };
        let router = Segment { left: left(z_cols), right: right(z_cols), depth: self.s_cols() };
        multiply(&[base, router], count, inputs, dx, inputs, write);
        let low = Segment { left: left(0), right: right(0), depth: z_cols };
        let mut masked = Buffer::<f32>::scratch(count * inputs);
        multiply(&[low], count, inputs, &mut masked, inputs, Write::Set);
        dropout.apply_at(&mut masked, range.start * inputs);
        add_scaled(1.0, &masked, dx);
    }

    /// `dyᵀ h`: `[out, N·r]`.
    fn b_gradient(&self, h: &[f32], dy: &[f32]) -> Buffer<f32> {
        let (h_cols, outputs) = (self.h_cols(), self.outputs);
        let width = panel_width();
        let mut db = Buffer::<f32>::scratch(outputs * h_cols);
        for_each(chunks_mut(&mut db, width * h_cols), |strip, db| {
            let count = db.len() / h_cols;
            let mut sum = Buffer::<f32>::zeros(h_cols * count);
            for rows in pieces(self.tokens) {
                let right = Right::rows(&dy[rows.start * outputs + strip * width..], outputs);
                let segment = Segment {
                    left: Left::columns(&h[rows.start * h_cols..], h_cols),
                    right,
                    depth: rows.len(),
                };
                multiply(&[segment], h_cols, count, &mut sum, count, Write::Add);
            }
            for (column, row) in sum.chunks_exact(count).enumerate() {
                for (db, &value) in db.chunks_exact_mut(h_cols).zip(row) {
                    db[column] = value;
                }
            }
        });
        db
    }

    /// The gradient of [`stacked`](Self::stacked): `[dz | ds]ᵀ x`, `z`'s part over what dropout leaves
    /// of `x`.
    fn down_gradient(&self, dzs: &[f32], x: &[f32]) -> Buffer<f32> {
        let (inputs, zs_cols) = (self.inputs, self.zs_cols());
        let width = panel_width();
        let strips: Vec<Buffer<f32>> = map(0..inputs.div_ceil(width), |_, strip| {
            let columns = strip * width..inputs.min((strip + 1) * width);
            self.down_gradient_of(columns, dzs, x)
        });
        let mut out = Buffer::<f32>::scratch(zs_cols * inputs);
        for (row, out) in out.chunks_exact_mut(inputs).enumerate() {
            for (out, strip) in out.chunks_mut(width).zip(&strips) {
                let count = out.len();
                out.copy_from_slice(&strip[row * count..(row + 1) * count]);
            }
        }
        out
    }

    /// Some columns of it: `[zs_cols, columns]`.
    fn down_gradient_of(&self, columns: Range<usize>, dzs: &[f32], x: &[f32]) -> Buffer<f32> {
        let (inputs, zs_cols, count) = (self.inputs, self.zs_cols(), columns.len());
        let mut sum = Buffer::<f32>::zeros(zs_cols * count);
        for rows in pieces(self.tokens) {
            let mut add = |first: usize, cols: usize, right: Right<'_>| {
                let left = Left::columns(&dzs[rows.start * zs_cols + first..], zs_cols);
                let segment = Segment { left, right, depth: rows.len() };
                let sum = &mut sum[first * count..];
                multiply(&[segment], cols, count, sum, count, Write::Add);
            };
            let as_it_is = Right::rows(&x[rows.start * inputs + columns.start..], inputs);
            let Some(dropout) = self.shared_mask() else {
                add(0, zs_cols, as_it_is);
                continue;
            };
            let mut left_over = Buffer::<f32>::scratch(rows.len() * count);
            for (row, left_over) in rows.clone().zip(left_over.chunks_exact_mut(count)) {
                let from = row * inputs + columns.start;
                left_over.copy_from_slice(&x[from..from + count]);
                dropout.apply_at(left_over, from);
            }
            add(0, self.z_cols, Right::rows(&left_over, count));
            if self.s_cols() > 0 {
                add(self.z_cols, self.s_cols(), as_it_is);
            }
        }
        sum
    }
}

//! The gradients of an adapted layer, block by block of rows.

use super::{Plan, Route};
use crate::buffer::Buffer;
use crate::dense;
use crate::graph::{ParentGradients, Saved};
use crate::matmul::Write;
use crate::tensor::Tensor;
use crate::tile::{Left, Right, Segment, multiply, panel_width};
use rayon::prelude::*;
use std::ops::Range;

/// Rows whose products are added up in one go: what a task reads of them stays in its core's cache.
const PIECE: usize = 192;

/// All of `rows` in pieces.
fn pieces(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(PIECE).map(move |first| first..(first + PIECE).min(rows))
}

impl Plan {
    /// Adds what `dy: [T, out]` gives to the gradients of `parents`: input, `A`, `B`, router weight
    /// and bias, given gates.
    pub(super) fn backward(
        &self,
        x: &Saved,
        z: &Tensor,
        gates: Option<&Tensor>,
        dy: &Tensor,
        parents: &mut ParentGradients<'_>,
    ) {
        let tokens = dy.rows();
        let (inputs, outputs, h_cols, zs_cols) =
            (self.inputs, self.outputs, self.h_cols(), self.zs_cols());
        let dy = dy.data::<f32>();
        let stacked = self.stacked();
        let wants_x = parents.needs(0);
        let carried = if wants_x { parents.take(0) } else { None };
        let write = if carried.is_some() { Write::Add } else { Write::Set };
        let mut dx = match carried {
            Some(carried) => carried,
            None => {
                let rows = if wants_x { tokens } else { 0 };
                Tensor::new(Buffer::<f32>::scratch(rows * inputs), [rows, inputs])
            }
        };
        let packed = wants_x.then(|| {
            crate::profile::product(tokens, outputs + zs_cols, inputs);
            let weight = self.frozen.dense_f32();
            (dense::packed_rows(&weight, inputs), dense::packed_rows(&stacked, inputs))
        });
        crate::profile::product(tokens, outputs, h_cols);

        let gate_cols = if self.routed() { self.experts } else { 0 };
        let mut h = Buffer::<f32>::scratch(tokens * h_cols);
        let mut dzs = Buffer::<f32>::zeros(tokens * zs_cols);
        let mut dgates = Buffer::<f32>::scratch(tokens * gate_cols);
        let dx_cols = if wants_x { inputs } else { 0 };
        let z = z.data::<f32>();
        let gates = gates.map_or(&[][..], |gates| gates.data::<f32>());
        let blocks = dense::blocks(tokens);
        dense::cut(dx.data_mut::<f32>(), dx_cols, &blocks)
            .into_par_iter()
            .zip(dense::cut(&mut h, h_cols, &blocks))
            .zip(dense::cut(&mut dzs, zs_cols, &blocks))
            .zip(dense::cut(&mut dgates, gate_cols, &blocks))
            .zip(&blocks)
            .for_each(|((((dx, h), dzs), dgates), block)| {
                let count = block.len();
                let of = |cols: usize| block.start * cols..block.end * cols;
                let dy = &dy[of(outputs)];
                let (z, gates) = (&z[of(self.z_cols)], &gates[of(gate_cols)]);

                let mut dh = Buffer::<f32>::scratch(count * h_cols);
                let segment = Segment {
                    left: Left::rows(dy, outputs),
                    right: Right::rows(self.b.data::<f32>(), h_cols),
                    depth: outputs,
                };
                multiply(&[segment], count, h_cols, &mut dh, h_cols, Write::Set);
                self.unmix(&dh, z, gates, dzs, dgates);
                self.mix(z, gates, h);
                let Some((weight, down)) = &packed else { return };
                let base = Segment {
                    left: Left::rows(dy, outputs),
                    right: Right::packed(weight, outputs),
                    depth: outputs,
                };
                let left = |first: usize| Left {
                    data: &dzs[first.min(dzs.len())..],
                    row_stride: zs_cols,
                    col_stride: 1,
                };
                match self.mask {
                    None => {
                        let right = Right::packed(down, zs_cols);
                        let low = Segment { left: left(0), right, depth: zs_cols };
                        multiply(&[base, low], count, inputs, dx, inputs, write);
                    }
                    Some(dropout) => {
                        let width = panel_width();
                        let panels = |first: usize| Right {
                            data: &down[(first * width).min(down.len())..],
                            row_stride: width,
                            panel_stride: zs_cols * width,
                        };
                        let router = Segment {
                            left: left(self.z_cols),
                            right: panels(self.z_cols),
                            depth: self.s_cols,
                        };
                        multiply(&[base, router], count, inputs, dx, inputs, write);
                        let low = Segment { left: left(0), right: panels(0), depth: self.z_cols };
                        let mut masked = Buffer::<f32>::scratch(count * inputs);
                        multiply(&[low], count, inputs, &mut masked, inputs, Write::Set);
                        dropout.apply_at(&mut masked, block.start * inputs);
                        crate::simd::add_scaled(1.0, &masked, dx);
                    }
                }
            });
        if wants_x {
            parents.add(0, dx);
        }

        let wants_b = parents.needs(2);
        if wants_b {
            crate::profile::product(outputs, tokens, h_cols);
        }
        let wants_down = parents.needs(1) || (self.s_cols > 0 && parents.needs(3));
        let x = wants_down.then(|| {
            crate::profile::product(zs_cols, tokens, inputs);
            x.get()
        });
        let (db, down) = rayon::join(
            || wants_b.then(|| self.b_gradient(&h, dy)),
            || x.map(|x| self.down_gradient(&dzs, x.data::<f32>())),
        );
        if let Some(db) = db {
            parents.add(2, Tensor::new(db, self.b.shape()));
        }
        if let Some(down) = down {
            let (da, drouter) = down.split_at(self.a.len());
            parents.add(1, Tensor::new(da.to_vec(), self.a.shape()));
            if let Route::Input { weight, .. } = &self.route {
                parents.add(3, Tensor::new(drouter.to_vec(), weight.shape()));
            }
        }
        if let Route::LowRank { weight, .. } = &self.route
            && parents.needs(3)
        {
            let mut out = Buffer::<f32>::zeros(weight.len());
            let rows = dgates.chunks_exact(self.experts).zip(z.chunks_exact(self.z_cols));
            for (ds, z) in rows {
                for (out, &ds) in out.chunks_exact_mut(self.z_cols).zip(ds) {
                    crate::simd::axpy(ds, z, out);
                }
            }
            parents.add(3, Tensor::new(out, weight.shape()));
        }
        if parents.needs(4) {
            let mut sums = vec![0.0; self.experts];
            for ds in dgates.chunks_exact(self.experts) {
                crate::simd::axpy(1.0, ds, &mut sums);
            }
            parents.add(4, Tensor::new(sums, [self.experts]));
        }
        if matches!(self.route, Route::Given(_)) {
            parents.add(5, Tensor::new(dgates, [tokens, self.experts]));
        }
    }

    /// `dyᵀ h`: `[out, N·r]`.
    fn b_gradient(&self, h: &[f32], dy: &[f32]) -> Buffer<f32> {
        let (h_cols, outputs) = (self.h_cols(), self.outputs);
        let width = panel_width();
        let mut db = Buffer::<f32>::scratch(outputs * h_cols);
        db.par_chunks_mut(width * h_cols).enumerate().for_each(|(strip, db)| {
            let count = db.len() / h_cols;
            let mut sum = Buffer::<f32>::zeros(h_cols * count);
            for rows in pieces(dy.len() / outputs) {
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
        let strips: Vec<Buffer<f32>> = (0..inputs.div_ceil(width))
            .into_par_iter()
            .map(|strip| {
                let columns = strip * width..inputs.min((strip + 1) * width);
                let count = columns.len();
                let mut sum = Buffer::<f32>::zeros(zs_cols * count);
                for rows in pieces(x.len() / inputs) {
                    let mut add = |first: usize, cols: usize, right: Right<'_>| {
                        let left = Left::columns(&dzs[rows.start * zs_cols + first..], zs_cols);
                        let segment = Segment { left, right, depth: rows.len() };
                        let sum = &mut sum[first * count..];
                        multiply(&[segment], cols, count, sum, count, Write::Add);
                    };
                    let as_it_is = Right::rows(&x[rows.start * inputs + columns.start..], inputs);
                    let Some(dropout) = self.mask else {
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
                    if self.s_cols > 0 {
                        add(self.z_cols, self.s_cols, as_it_is);
                    }
                }
                sum
            })
            .collect();
        let mut out = Buffer::<f32>::scratch(zs_cols * inputs);
        for (row, out) in out.chunks_exact_mut(inputs).enumerate() {
            for (out, strip) in out.chunks_mut(width).zip(&strips) {
                let count = out.len();
                out.copy_from_slice(&strip[row * count..(row + 1) * count]);
            }
        }
        out
    }

    /// From the gradient of `h` (without the factor `s`) to those of `z`, of the scores and, in
    /// `dgates`, of given gates or of the scores again.
    fn unmix(&self, dh: &[f32], z: &[f32], gates: &[f32], dzs: &mut [f32], dgates: &mut [f32]) {
        let (h_cols, rank, zs_cols) = (self.h_cols(), self.rank, self.zs_cols());
        let constant = self.constant_gate();
        let rows = dh.chunks_exact(h_cols).zip(z.chunks_exact(self.z_cols));
        for (row, ((dh, z), dzs)) in rows.zip(dzs.chunks_exact_mut(zs_cols)).enumerate() {
            let of_row = row * self.experts..(row + 1) * self.experts;
            for (expert, dh) in dh.chunks_exact(rank).enumerate() {
                let gate = gates.get(of_row.start + expert).copied().unwrap_or(constant);
                let start = self.z_start(expert);
                let mut along = 0.0;
                for i in 0..rank {
                    let dh = self.scale * dh[i];
                    along += dh * z[start + i];
                    dzs[start + i] += gate * dh;
                }
                if self.routed() {
                    dgates[of_row.start + expert] = along;
                }
            }
            if matches!(self.route, Route::Constant(_) | Route::Given(_)) {
                continue;
            }
            let (dw, w) = (&mut dgates[of_row.clone()], &gates[of_row]);
            let mean: f32 = dw.iter().zip(w).map(|(d, w)| d * w).sum();
            for (d, &w) in dw.iter_mut().zip(w) {
                *d = w * (*d - mean);
            }
            match &self.route {
                Route::Input { .. } => dzs[self.z_cols..].copy_from_slice(dw),
                Route::LowRank { weight, .. } => {
                    let weight = weight.data::<f32>().chunks_exact(self.z_cols);
                    for (&ds, row) in dw.iter().zip(weight) {
                        crate::simd::axpy(ds, row, &mut dzs[..self.z_cols]);
                    }
                }
                _ => {}
            }
        }
    }
}

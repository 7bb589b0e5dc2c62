//! The gradients of an adapted layer, block by block of rows.

use super::{Plan, Route, Rows};
use crate::buffer::Buffer;
use crate::dense;
use crate::graph::{ParentGradients, Saved};
use crate::matmul::Write;
use crate::simd::vectorize;
use crate::tensor::Tensor;
use crate::tile::{Left, Right, Segment, multiply};
use rayon::prelude::*;
use std::ops::Range;

impl Plan {
    /// Adds what `dy: [T, out]` gives to the gradients of `parents`: input, `A`, `B`, router weight
    /// and bias, given gates.
    pub(super) fn backward(
        &self,
        saved_x: &Saved,
        z: &Tensor,
        gates: Option<&Tensor>,
        dy: &Tensor,
        parents: &mut ParentGradients<'_>,
    ) {
        let tokens = dy.rows();
        let (inputs, outputs, h_cols, zs_cols) =
            (self.inputs, self.outputs, self.h_cols(), self.zs_cols());
        let x = saved_x.get();
        let x = x.data::<f32>();
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
        crate::profile::product(tokens, outputs, 2 * h_cols);
        crate::profile::product(tokens, inputs, zs_cols);

        let unit = dense::unit_rows(tokens);
        let blocks = dense::blocks(tokens);
        let units: Vec<Range<usize>> =
            blocks.iter().map(|b| b.start / unit..b.end.div_ceil(unit)).collect();
        let unit_count = tokens.div_ceil(unit);
        // Per unit: dB transposed `[N·r, out]`, then `[dA; dW_g]`: `[zs_cols, in]`.
        let (up_len, down_len) = (h_cols * outputs, zs_cols * inputs);
        let mut sums = Buffer::<f32>::scratch(unit_count * (up_len + down_len));
        let gate_cols = if self.routed() { self.experts } else { 0 };
        let mut dgates = Buffer::<f32>::scratch(tokens * gate_cols);
        let dx_cols = if wants_x { inputs } else { 0 };
        let z = z.data::<f32>();
        let gates = gates.map_or(&[][..], |gates| gates.data::<f32>());

        dense::cut(dx.data_mut::<f32>(), dx_cols, &blocks)
            .into_par_iter()
            .zip(dense::cut(&mut sums, up_len + down_len, &units))
            .zip(dense::cut(&mut dgates, gate_cols, &blocks))
            .zip(&blocks)
            .for_each(|(((dx, sums), dgates), block)| {
                let count = block.len();
                let of = |cols: usize| block.start * cols..block.end * cols;
                let rows = Rows { range: block, x: &x[of(inputs)] };
                let dy = &dy[of(outputs)];
                let (z, gates) = (&z[of(self.z_cols)], &gates[of(gate_cols)]);

                let mut dh = Buffer::<f32>::scratch(count * h_cols);
                let segment = Segment {
                    left: Left::rows(dy, outputs),
                    right: Right::rows(self.b.data::<f32>(), h_cols),
                    depth: outputs,
                };
                multiply(&[segment], count, h_cols, &mut dh, h_cols, Write::Set);
                let mut dzs = Buffer::<f32>::zeros(count * zs_cols);
                self.unmix(&dh, z, gates, &mut dzs, dgates);

                let h = self.mixed(z, gates);
                let dropped = self.dropped(&rows);
                let read_by_a: &[f32] = dropped.as_deref().unwrap_or(rows.x);
                let of_units = sums.chunks_exact_mut(up_len + down_len);
                for (index, sums) in of_units.enumerate() {
                    let at = index * unit..((index + 1) * unit).min(count);
                    let (up, down) = sums.split_at_mut(up_len);
                    let part = |data: &'_ [f32], cols: usize| {
                        at.start * cols..(at.end * cols).min(data.len())
                    };
                    let segment = Segment {
                        left: Left::columns(&h[part(&h, h_cols)], h_cols),
                        right: Right::rows(&dy[part(dy, outputs)], outputs),
                        depth: at.len(),
                    };
                    multiply(&[segment], h_cols, outputs, up, outputs, Write::Set);
                    let dzs = &dzs[part(&dzs, zs_cols)];
                    let below = |from: &[f32], first: usize, cols: usize, out: &mut [f32]| {
                        let segment = Segment {
                            left: Left::columns(&dzs[first..], zs_cols),
                            right: Right::rows(&from[part(from, inputs)], inputs),
                            depth: at.len(),
                        };
                        multiply(&[segment], cols, inputs, out, inputs, Write::Set);
                    };
                    if dropped.is_some() && self.s_cols > 0 {
                        let (a, router) = down.split_at_mut(self.z_cols * inputs);
                        below(read_by_a, 0, self.z_cols, a);
                        below(rows.x, self.z_cols, self.s_cols, router);
                    } else {
                        below(read_by_a, 0, zs_cols, down);
                    }
                }
                if let Some((weight, down)) = &packed {
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
                            let width = crate::tile::panel_width();
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
                            let low =
                                Segment { left: left(0), right: panels(0), depth: self.z_cols };
                            let mut masked = Buffer::<f32>::scratch(count * inputs);
                            multiply(&[low], count, inputs, &mut masked, inputs, Write::Set);
                            dropout.apply_at(&mut masked, block.start * inputs);
                            vectorize(
                                #[inline(always)]
                                || {
                                    for (sum, &part) in dx.iter_mut().zip(masked.iter()) {
                                        *sum += part;
                                    }
                                },
                            );
                        }
                    }
                }
            });
        if wants_x {
            parents.add(0, dx);
        }

        let mut total = Buffer::<f32>::zeros(up_len + down_len);
        const CHUNK: usize = 1 << 12;
        total.par_chunks_mut(CHUNK).enumerate().for_each(|(index, total)| {
            vectorize(
                #[inline(always)]
                || {
                    for unit in sums.chunks_exact(up_len + down_len) {
                        let part = &unit[index * CHUNK..index * CHUNK + total.len()];
                        for (total, &part) in total.iter_mut().zip(part) {
                            *total += part;
                        }
                    }
                },
            );
        });
        let (up, down) = total.split_at(up_len);
        if parents.needs(2) {
            let mut db = Buffer::<f32>::scratch(up_len);
            for (column, row) in up.chunks_exact(outputs).enumerate() {
                for (o, &value) in row.iter().enumerate() {
                    db[o * h_cols + column] = value;
                }
            }
            parents.add(2, Tensor::new(db, self.b.shape()));
        }
        let (da, drouter) = down.split_at(self.a.len());
        if parents.needs(1) {
            parents.add(1, Tensor::new(da.to_vec(), self.a.shape()));
        }
        match &self.route {
            Route::Input { weight, .. } if parents.needs(3) => {
                parents.add(3, Tensor::new(drouter.to_vec(), weight.shape()));
            }
            Route::LowRank { weight, .. } if parents.needs(3) => {
                let mut out = Buffer::<f32>::zeros(weight.len());
                let rows = dgates.chunks_exact(self.experts).zip(z.chunks_exact(self.z_cols));
                for (ds, z) in rows {
                    for (out, &ds) in out.chunks_exact_mut(self.z_cols).zip(ds) {
                        crate::simd::axpy(ds, z, out);
                    }
                }
                parents.add(3, Tensor::new(out, weight.shape()));
            }
            _ => {}
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

//! One chunk of rows through a trained output layer in `f32`, its logits transposed.

use super::{Labelled, columns};
use crate::buffer::Buffer;
use crate::dense;
use crate::matmul::Write;
use crate::ops::frozen_linear::FrozenLinear;
use crate::simd::vectorize;
use crate::tensor::Tensor;
use crate::tile::{Left, Right, Segment, multiply, packed_len};
use hydralora_runtime::{chunks_mut, map};

/// Rows of the output layer that are multiplied at a time, to stay in a core's cache.
const BLOCK: usize = 256;

/// Blocks whose contributions to the gradient are added up apart; fixed, so that results do not
/// depend on the number of threads.
const BLOCKS_PER_PART: usize = 16;

/// Appends the loss of each row of `h: [n, d]` and, if it is `wanted`, gives the gradient of
/// `factor` times their sum with respect to `h`; the gradient with respect to the output layer is
/// added to `weight_gradient: [V, d]`. It needs the finished softmax, hence two ways through the
/// vocabulary.
pub(super) fn chunk(
    labelled: &Labelled<'_>,
    head: &FrozenLinear,
    losses: &mut Vec<f64>,
    wanted: bool,
    weight_gradient: &mut Tensor,
) -> Option<Tensor> {
    let Labelled { h, targets, factor, cap } = *labelled;
    let (rows, inner, vocabulary) = (h.rows(), h.cols(), head.out_features());
    let _part = crate::profile::part("cross_entropy products");
    let panels = columns::panels(h, head, if wanted { 2 } else { 1 });
    let block_count = vocabulary.div_ceil(BLOCK);

    // First way through the vocabulary: `exp(logit − peak)` with a peak for every block and row, and
    // the sums of it. Logits that are capped stay: the slope of the cap is taken from them later.
    let mut logits = Buffer::<f32>::scratch(vocabulary * rows);
    let mut peaks = Buffer::<f32>::scratch(block_count * rows);
    let mut sums = Buffer::<f32>::zeros(block_count * rows);
    let blocks = chunks_mut(&mut logits, BLOCK * rows);
    let blocks = (blocks, chunks_mut(&mut peaks, rows), chunks_mut(&mut sums, rows));
    let found: Vec<Vec<(usize, f32)>> = map(blocks, |block, (logits, peaks, sums)| {
        let first = block * BLOCK;
        let count = logits.len() / rows;
        let weight = head.dense_rows(first, count);
        let segment = Segment {
            left: Left::rows(&weight, inner),
            right: Right::packed(&panels, inner),
            depth: inner,
        };
        multiply(&[segment], count, rows, logits, rows, Write::Set);
        if let Some(cap) = cap {
            cap.apply(logits);
        }
        let found = columns::within(targets, first, count);
        let found = found.map(|(row, at)| (row, logits[at])).collect();
        peaks.fill(f32::NEG_INFINITY);
        match cap {
            None => columns::exponentials(logits, peaks, sums),
            Some(_) => columns::add_exponentials(logits, peaks, sums),
        }
        found
    });
    let log_sums: Vec<f64> = (0..rows)
        .map(|row| {
            let of_row = (row..block_count * rows).step_by(rows);
            columns::log_sum(of_row.map(|at| (peaks[at], f64::from(sums[at]))))
        })
        .collect();
    columns::add_losses(&log_sums, found.into_iter().flatten(), losses);
    let part_rows = BLOCKS_PER_PART * BLOCK;
    let h = h.data::<f32>();

    // Second way: `factor · (softmax − onehot)`, and the slope of the cap, times the output layer.
    let stretches = (
        chunks_mut(&mut logits, part_rows * rows),
        chunks_mut(weight_gradient.data_mut::<f32>(), part_rows * inner),
    );
    let parts: Vec<Buffer<f32>> = map(stretches, |part, (logits, of_weight)| {
        let mut out = Buffer::<f32>::zeros(if wanted { rows * inner } else { 0 });
        let mut panels = Buffer::<f32>::scratch(packed_len(inner, BLOCK));
        let mut factors = vec![0.0_f32; rows];
        for (index, logits) in logits.chunks_mut(BLOCK * rows).enumerate() {
            let block = part * BLOCKS_PER_PART + index;
            let (first, count) = (block * BLOCK, logits.len() / rows);
            for (row, scale) in factors.iter_mut().enumerate() {
                let peak = f64::from(peaks[block * rows + row]);
                *scale = factor * (peak - log_sums[row]).exp() as f32;
            }
            match cap {
                None => {
                    vectorize(
                        #[inline(always)]
                        || {
                            for logits in logits.chunks_exact_mut(rows) {
                                for (logit, &scale) in logits.iter_mut().zip(&factors) {
                                    *logit *= scale;
                                }
                            }
                        },
                    );
                    for (_, at) in columns::within(targets, first, count) {
                        logits[at] -= factor;
                    }
                }
                Some(cap) => {
                    let of_targets: Vec<(usize, f32)> = columns::within(targets, first, count)
                        .map(|(_, at)| (at, factor * cap.slope(logits[at])))
                        .collect();
                    let peaks = &peaks[block * rows..(block + 1) * rows];
                    columns::sloped_probabilities(logits, peaks, &factors, cap);
                    for (at, of_target) in of_targets {
                        logits[at] -= of_target;
                    }
                }
            }
            let of_block = index * BLOCK * inner..(index * BLOCK + count) * inner;
            let segment = Segment {
                left: Left::rows(logits, rows),
                right: Right::rows(h, inner),
                depth: rows,
            };
            multiply(&[segment], count, inner, &mut of_weight[of_block], inner, Write::Add);
            if !wanted {
                continue;
            }
            dense::pack_rows(&head.dense_rows(first, count), inner, &mut panels);
            let segment = Segment {
                left: Left::columns(logits, rows),
                right: Right::packed(&panels, count),
                depth: count,
            };
            multiply(&[segment], rows, inner, &mut out, inner, Write::Add);
        }
        out
    });
    if !wanted {
        return None;
    }
    let mut total = Buffer::<f32>::zeros(rows * inner);
    for part in &parts {
        crate::simd::add_scaled(1.0, part, &mut total);
    }
    Some(Tensor::new(total, [rows, inner]))
}

//! Rows of labels through a frozen output layer in `f32`, in one pass over the vocabulary.
//!
//! What the gradient needs of the output layer, `Σ_v softmax(h W)_v W_v`, has the shape of attention
//! with the rows of `W` as keys and as values at once, and is formed the same way: block by block,
//! against the highest logit so far, what was summed before being scaled down whenever a higher one
//! turns up. So a block of the output layer is read (or widened) once for both products, and no
//! more logits exist at a time than those of one block.

use super::{Labelled, columns};
use crate::buffer::Buffer;
use crate::dense;
use crate::matmul::Write;
use crate::ops::frozen_linear::FrozenLinear;
use crate::simd::vectorize;
use crate::tensor::Tensor;
use crate::tile::{Left, Right, Segment, multiply, packed_len};
use hydralora_runtime::{chunks_mut, for_each, map};

/// Rows of labels that go through the vocabulary together.
pub(super) const ROWS: usize = 384;

/// Rows of the output layer that are multiplied at a time, to stay in a core's cache.
const BLOCK: usize = 128;

/// Stretches of the vocabulary that are summed apart, at most; fixed, so that results do not depend on the
/// number of threads.
pub(super) const PARTS: usize = 16;

/// Sums over one stretch of the vocabulary, relative to its highest logit of each row.
struct Part {
    /// The highest logit of each row.
    peaks: Vec<f32>,
    /// `Σ_v exp(logit_v − peak)` of each row.
    sums: Vec<f64>,
    /// `Σ_v exp(logit_v − peak) W_v`, each logit's part times the slope of its cap if there is one:
    /// `[rows, d]`, empty if no gradient is wanted.
    weighted: Buffer<f32>,
    /// Rows whose target lies in this stretch, and its logit.
    found: Vec<(usize, f32)>,
}

/// Appends the loss of each row of `h: [n, d]` and, if it is `wanted`, gives the gradient of
/// `factor` times their sum with respect to `h`.
pub(super) fn chunk(
    labelled: &Labelled<'_>,
    head: &FrozenLinear,
    losses: &mut Vec<f64>,
    wanted: bool,
) -> Option<Tensor> {
    let Labelled { h, targets, factor, cap } = *labelled;
    let (rows, inner, vocabulary) = (h.rows(), h.cols(), head.out_features());
    let _part = crate::profile::part("cross_entropy products");
    let panels = columns::panels(h, head, if wanted { 2 } else { 1 });
    let part_len = vocabulary.div_ceil(PARTS).next_multiple_of(BLOCK);
    let parts: Vec<Part> = map(0..vocabulary.div_ceil(part_len), |_, part| {
        let first = part * part_len;
        let last = (first + part_len).min(vocabulary);
        stretch(&panels, head, first..last, labelled, wanted)
    });

    let log_sums: Vec<f64> = (0..rows)
        .map(|row| columns::log_sum(parts.iter().map(|part| (part.peaks[row], part.sums[row]))))
        .collect();
    let found = parts.iter().flat_map(|part| part.found.iter().copied());
    columns::add_losses(&log_sums, found, losses);
    if !wanted {
        return None;
    }
    // How much of a change of its logit the target passes on through the cap.
    let mut slopes = vec![1.0_f32; rows];
    if let Some(cap) = cap {
        for &(row, logit) in parts.iter().flat_map(|part| &part.found) {
            slopes[row] = cap.slope(logit);
        }
    }
    let mut total = Buffer::<f32>::scratch(rows * inner);
    for_each((chunks_mut(&mut total, inner.max(1)), targets), |row, (total, &target)| {
        total.fill(0.0);
        for part in &parts {
            let scale = (f64::from(part.peaks[row]) - log_sums[row]).exp();
            let weighted = &part.weighted[row * inner..(row + 1) * inner];
            crate::simd::add_scaled(factor * scale as f32, weighted, total);
        }
        let factor = factor * slopes[row];
        crate::simd::add_scaled(-factor, &head.dense_rows(target as usize, 1), total);
    });
    Some(Tensor::new(total, [rows, inner]))
}

/// Rows `range` of the output layer against all rows of the hidden state, which come as `panels`.
fn stretch(
    panels: &[f32],
    head: &FrozenLinear,
    range: std::ops::Range<usize>,
    labelled: &Labelled<'_>,
    wanted: bool,
) -> Part {
    let Labelled { targets, cap, .. } = *labelled;
    let (rows, inner) = (targets.len(), head.in_features());
    let bias = head.bias().map(|bias| bias.data::<f32>());
    let mut part = Part {
        peaks: vec![f32::NEG_INFINITY; rows],
        sums: vec![0.0; rows],
        weighted: Buffer::zeros(if wanted { rows * inner } else { 0 }),
        found: Vec::new(),
    };
    let mut logits = Buffer::<f32>::scratch(BLOCK * rows);
    let mut values = Buffer::<f32>::scratch(packed_len(inner, BLOCK));
    let (mut peaks, mut sums) = (vec![0.0_f32; rows], vec![0.0_f32; rows]);
    for first in range.clone().step_by(BLOCK) {
        let count = BLOCK.min(range.end - first);
        let weight = head.dense_rows(first, count);
        let logits = &mut logits[..count * rows];
        let segment = Segment {
            left: Left::rows(&weight, inner),
            right: Right::packed(panels, inner),
            depth: inner,
        };
        multiply(&[segment], count, rows, logits, rows, Write::Set);
        if let Some(bias) = bias {
            for (logits, &bias) in logits.chunks_exact_mut(rows).zip(&bias[first..]) {
                logits.iter_mut().for_each(|logit| *logit += bias);
            }
        }
        if let Some(cap) = cap {
            cap.apply(logits);
        }
        let found = columns::within(targets, first, count).map(|(row, at)| (row, logits[at]));
        part.found.extend(found);
        peaks.copy_from_slice(&part.peaks);
        sums.fill(0.0);
        match cap {
            None => columns::exponentials(logits, &mut peaks, &mut sums),
            Some(cap) => columns::sloped_exponentials(logits, &mut peaks, &mut sums, cap),
        }
        for row in 0..rows {
            let (old, new) = (part.peaks[row], peaks[row]);
            if new > old {
                let scale = (f64::from(old) - f64::from(new)).exp();
                part.sums[row] *= scale;
                if wanted && old > f32::NEG_INFINITY {
                    let weighted = &mut part.weighted[row * inner..(row + 1) * inner];
                    let scale = scale as f32;
                    vectorize(
                        #[inline(always)]
                        || weighted.iter_mut().for_each(|x| *x *= scale),
                    );
                }
                part.peaks[row] = new;
            }
            part.sums[row] += f64::from(sums[row]);
        }
        if wanted {
            dense::pack_rows(&weight, inner, &mut values);
            let segment = Segment {
                left: Left::columns(logits, rows),
                right: Right::packed(&values, count),
                depth: count,
            };
            multiply(&[segment], rows, inner, &mut part.weighted, inner, Write::Add);
        }
    }
    part
}

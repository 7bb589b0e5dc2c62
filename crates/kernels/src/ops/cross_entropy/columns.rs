//! What both ways through the vocabulary share: blocks of logits `[count, rows]`, whose columns are
//! the rows of labels.

use crate::buffer::Buffer;
use crate::dense;
use crate::element::Element;
use crate::ops::frozen_linear::FrozenLinear;
use crate::ops::softcap::Softcap;
use crate::simd::vectorize;
use crate::tensor::Tensor;

/// Panels of `h: [rows, d]` for products with rows of the output layer, `passes` of them each.
pub(super) fn panels(h: &Tensor, head: &FrozenLinear, passes: usize) -> Buffer<f32> {
    assert_eq!(h.cols(), head.in_features(), "the hidden state has another width");
    crate::profile::product(h.rows(), h.cols(), head.out_features() * passes);
    dense::packed_transpose(h.data::<f32>(), h.cols())
}

/// Rows whose target is one of `count` from `first` on, and where in the block its logit stands.
pub(super) fn within(
    targets: &[u32],
    first: usize,
    count: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let rows = targets.len();
    targets.iter().enumerate().filter_map(move |(row, &target)| {
        let at = (target as usize).checked_sub(first).filter(|&at| at < count)?;
        Some((row, at * rows + row))
    })
}

/// Raises `peaks: [rows]` to the highest of `logits: [count, rows]`.
#[inline(always)]
fn raise(peaks: &mut [f32], logits: &[f32]) {
    for logits in logits.chunks_exact(peaks.len()) {
        for (peak, &logit) in peaks.iter_mut().zip(logits) {
            *peak = if logit > *peak { logit } else { *peak };
        }
    }
}

/// Raises `peaks: [rows]` to the highest of `logits: [count, rows]`, turns those into
/// `exp(logit − peak)` and adds them to `sums: [rows]`.
pub(super) fn exponentials(logits: &mut [f32], peaks: &mut [f32], sums: &mut [f32]) {
    turned_exponentials(
        logits,
        peaks,
        sums,
        #[inline(always)]
        |_, exponential| exponential,
    );
}

/// [`exponentials`] of logits that are capped, which are turned into `exp(logit − peak)` times the slope
/// of the cap: what their gradient is made of.
pub(super) fn sloped_exponentials(
    logits: &mut [f32],
    peaks: &mut [f32],
    sums: &mut [f32],
    cap: Softcap<f32>,
) {
    turned_exponentials(
        logits,
        peaks,
        sums,
        #[inline(always)]
        |logit, exponential| exponential * cap.slope(logit),
    );
}

/// Raises the peaks, adds `exp(logit − peak)` to the sums and turns logits into `of(logit, exp(logit − peak))`.
#[inline(always)]
fn turned_exponentials(
    logits: &mut [f32],
    peaks: &mut [f32],
    sums: &mut [f32],
    of: impl Fn(f32, f32) -> f32,
) {
    let rows = peaks.len();
    vectorize(
        #[inline(always)]
        || {
            raise(peaks, logits);
            for logits in logits.chunks_exact_mut(rows) {
                for ((logit, &peak), sum) in
                    logits.iter_mut().zip(peaks.iter()).zip(sums.iter_mut())
                {
                    let exponential = Element::exp(*logit - peak);
                    *sum += exponential;
                    *logit = of(*logit, exponential);
                }
            }
        },
    );
}

/// [`exponentials`] that leaves the logits as they are.
pub(super) fn add_exponentials(logits: &[f32], peaks: &mut [f32], sums: &mut [f32]) {
    let rows = peaks.len();
    vectorize(
        #[inline(always)]
        || {
            raise(peaks, logits);
            for logits in logits.chunks_exact(rows) {
                for ((&logit, &peak), sum) in logits.iter().zip(peaks.iter()).zip(sums.iter_mut()) {
                    *sum += Element::exp(logit - peak);
                }
            }
        },
    );
}

/// Turns capped `logits: [count, rows]` into `scale · exp(logit − peak)` times the slope of the cap, with
/// `peaks` and `scales` of each row.
pub(super) fn sloped_probabilities(
    logits: &mut [f32],
    peaks: &[f32],
    scales: &[f32],
    cap: Softcap<f32>,
) {
    let rows = peaks.len();
    vectorize(
        #[inline(always)]
        || {
            for logits in logits.chunks_exact_mut(rows) {
                for ((logit, &peak), &scale) in logits.iter_mut().zip(peaks).zip(scales) {
                    *logit = Element::exp(*logit - peak) * scale * cap.slope(*logit);
                }
            }
        },
    );
}

/// `log Σ exp(logit)` from stretches of the vocabulary: their peaks, and their sums relative to them.
pub(super) fn log_sum(stretches: impl Iterator<Item = (f32, f64)> + Clone) -> f64 {
    let peak = stretches.clone().fold(f64::NEG_INFINITY, |peak, (own, _)| peak.max(f64::from(own)));
    let sum: f64 = stretches.map(|(own, sum)| sum * (f64::from(own) - peak).exp()).sum();
    peak + sum.ln()
}

/// Appends the loss of each row, from the logit of its target.
pub(super) fn add_losses(
    log_sums: &[f64],
    found: impl IntoIterator<Item = (usize, f32)>,
    losses: &mut Vec<f64>,
) {
    let first = losses.len();
    losses.extend(log_sums);
    for (row, logit) in found {
        losses[first + row] -= f64::from(logit);
    }
}

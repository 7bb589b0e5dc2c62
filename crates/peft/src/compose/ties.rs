//! TIES: of each factor keep the largest numbers, take for each place the sign that the sum has, and
//! average what agrees with it.
//!
//! Yadav et al., arXiv 2306.01708, in PEFT's reading: factors in place of updates, the sign elected
//! before weighing.

use super::{ComposeOptions, Composition, Pair, Part, factorwise};
use hydralora_kernels::Tensor;
use hydralora_model::adapter::Site;

pub(super) struct Ties;

impl Composition for Ties {
    fn name(&self) -> &'static str {
        "ties"
    }

    fn summary(&self) -> &'static str {
        "trim to the largest numbers, elect signs, average what agrees"
    }

    fn same_rank(&self) -> bool {
        true
    }

    fn pair(&self, _site: Site, parts: &[Part<'_>], options: &ComposeOptions) -> Pair {
        factorwise(parts, |tensors, weights, _| {
            let kept: Vec<Vec<f64>> =
                tensors.iter().map(|tensor| trim(tensor.to_f64(), options.density)).collect();
            elect(&kept, weights, tensors[0])
        })
    }
}

/// All but the `density` share of largest magnitude set to zero.
fn trim(mut values: Vec<f64>, density: f64) -> Vec<f64> {
    if density >= 1.0 {
        return values;
    }
    let kept = (density * values.len() as f64) as usize;
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].abs().total_cmp(&values[a].abs()).then(a.cmp(&b)));
    for &at in &order[kept..] {
        values[at] = 0.0;
    }
    values
}

/// For each place the weighted mean of the numbers whose sign is that of the sum of all (plus for a
/// sum of zero).
pub(super) fn elect(parts: &[Vec<f64>], weights: &[f64], like: &Tensor) -> Tensor {
    let merged: Vec<f64> = (0..like.len())
        .map(|at| {
            let total: f64 = parts.iter().map(|part| part[at]).sum();
            let majority = if total >= 0.0 { 1.0 } else { -1.0 };
            let agreeing = parts.iter().zip(weights).filter(|(part, _)| part[at] * majority > 0.0);
            let (sum, count) = agreeing
                .fold((0.0, 0_usize), |(sum, count), (part, w)| (sum + w * part[at], count + 1));
            sum / count.max(1) as f64
        })
        .collect();
    Tensor::from_f64(like.dtype(), &merged, like.shape())
}

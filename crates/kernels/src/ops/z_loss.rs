//! How large a router's scores are, as a differentiable number:
//!
//! ```text
//! L = mean over rows t of (ln Σ_i exp s_ti)²
//! ```
//!
//! the router z-loss of Zoph et al., ST-MoE, arXiv 2202.08906, equation 5. It is zero where the sum of the
//! exponentials is 1, whatever the gates are, and keeps scores from growing to where a softmax is all
//! rounding.

use crate::graph::Var;
use crate::tensor::Tensor;

/// The mean over the rows of `scores: [T, N]` of the squared logarithm of the sum of their exponentials,
/// shape `[1]`.
pub fn squared_log_sum(scores: &Var) -> Var {
    let (rows, experts, dtype) =
        (scores.value().rows(), scores.value().cols(), scores.value().dtype());
    let values = scores.value().to_f64();
    let count = rows.max(1) as f64;
    let mut total = 0.0;
    let mut slopes = vec![0.0; values.len()];
    let of_rows = values.chunks_exact(experts).zip(slopes.chunks_exact_mut(experts));
    for (row, slopes) in of_rows {
        let peak = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|score| (score - peak).exp()).sum();
        let log_sum = peak + sum.ln();
        total += log_sum * log_sum;
        for (slope, score) in slopes.iter_mut().zip(row) {
            *slope = 2.0 * log_sum * (score - log_sum).exp() / count;
        }
    }
    Var::computed(Tensor::scalar(dtype, total / count), &[scores], move |gradient, parents| {
        let upstream = gradient.item();
        let all: Vec<f64> = slopes.iter().map(|slope| upstream * slope).collect();
        parents.add(0, Tensor::from_f64(dtype, &all, [rows, experts]));
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[5, 3]], |v| squared_log_sum(&v[0]));
        check::gradients(&[&[2, 1]], |v| squared_log_sum(&v[0]));
    }

    #[test]
    fn it_counts_how_far_the_sum_of_exponentials_is_from_one() {
        let of = |scores: &[f64], shape: [usize; 2]| {
            squared_log_sum(&Var::constant(Tensor::from_f64(DType::F64, scores, shape)))
                .value()
                .item()
        };
        // Gates of a half each, whose exponentials sum to 1, to 2 and to 2e.
        let half = 0.5_f64.ln();
        assert!(of(&[half, half], [1, 2]).abs() < 1e-15);
        let twice = 2.0_f64.ln();
        let expected = (twice.powi(2) + (twice + 1.0).powi(2)) / 2.0;
        assert!((of(&[0.0, 0.0, 1.0, 1.0], [2, 2]) - expected).abs() < 1e-15);
        // Far beyond what an exponential can hold.
        assert!((of(&[1000.0, -1000.0], [1, 2]) - 1e6).abs() < 1e-6);
    }
}

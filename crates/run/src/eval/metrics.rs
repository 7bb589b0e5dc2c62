//! Means, their standard errors, and pass@k.

/// A record's score and how much it counts (1, or the tokens a loss is the mean over).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighted {
    /// The score.
    pub value: f64,
    /// Its weight.
    pub weight: f64,
}

/// `Σ w v / Σ w`; 0 of nothing.
pub fn mean(scores: &[Weighted]) -> f64 {
    let total: f64 = scores.iter().map(|score| score.weight).sum();
    if total == 0.0 {
        return 0.0;
    }
    scores.iter().map(|score| score.weight * score.value).sum::<f64>() / total
}

/// Standard error of [`mean`]: `√(Σ w²(v − m)² · n/(n−1)) / Σ w`, which with equal weights is the
/// sample's standard deviation by √n. None for fewer than two records.
pub fn stderr(scores: &[Weighted]) -> Option<f64> {
    let (n, total) = (scores.len() as f64, scores.iter().map(|score| score.weight).sum::<f64>());
    if scores.len() < 2 || total == 0.0 {
        return None;
    }
    let mean = mean(scores);
    let squares: f64 =
        scores.iter().map(|score| (score.weight * (score.value - mean)).powi(2)).sum();
    Some((squares * n / (n - 1.0)).sqrt() / total)
}

/// A group's standard error from those of its parts, `(stderr, size)`, as lm-evaluation-harness
/// pools them: `√(Σ (n−1) s² n / (Σ n − parts) / Σ n)`.
pub fn pooled_stderr(parts: &[(f64, usize)]) -> Option<f64> {
    let total: usize = parts.iter().map(|(_, size)| size).sum();
    if total <= parts.len() {
        return None;
    }
    let variance: f64 = parts
        .iter()
        .map(|&(stderr, size)| (size as f64 - 1.0) * stderr * stderr * size as f64)
        .sum::<f64>()
        / (total - parts.len()) as f64;
    Some((variance / total as f64).sqrt())
}

/// The unbiased estimate of the chance that one of `k` drawn programs is right when `right` of
/// `drawn` were: `1 − C(drawn − right, k) / C(drawn, k)` (arXiv 2107.03374).
///
/// # Panics
/// If `k` is 0 or more than `drawn`.
pub fn pass_at_k(drawn: usize, right: usize, k: usize) -> f64 {
    assert!(k >= 1 && k <= drawn, "pass@{k} of {drawn} programs");
    if drawn - right < k {
        return 1.0;
    }
    1.0 - (drawn - right + 1..=drawn).map(|i| 1.0 - k as f64 / i as f64).product::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(values: &[f64]) -> Vec<Weighted> {
        values.iter().map(|&value| Weighted { value, weight: 1.0 }).collect()
    }

    #[test]
    fn means_and_errors_follow_their_definitions() {
        let scores = plain(&[1.0, 0.0, 1.0, 1.0]);
        assert_eq!(mean(&scores), 0.75);
        // statistics.stdev([1, 0, 1, 1]) / 2
        assert!((stderr(&scores).unwrap() - 0.25).abs() < 1e-12);
        assert_eq!(stderr(&scores[..1]), None);
        assert_eq!(mean(&[]), 0.0);
        let loss = [Weighted { value: 2.0, weight: 30.0 }, Weighted { value: 5.0, weight: 10.0 }];
        assert_eq!(mean(&loss), 2.75);
        // Both terms are (30·0.75)² and (10·2.25)².
        assert!(
            (stderr(&loss).unwrap() - (2.0 * 2.0 * 22.5_f64.powi(2)).sqrt() / 40.0).abs() < 1e-12
        );
    }

    #[test]
    fn pooled_errors_are_those_of_the_harness() {
        // lm_eval.api.metrics.pooled_sample_stderr([0.1, 0.2], [10, 20])
        let expected = 0.13844373104863458;
        assert!((pooled_stderr(&[(0.1, 10), (0.2, 20)]).unwrap() - expected).abs() < 1e-12);
        assert_eq!(pooled_stderr(&[(0.0, 1)]), None);
    }

    #[test]
    fn pass_at_k_counts_subsets() {
        assert_eq!(pass_at_k(10, 0, 10), 0.0);
        assert_eq!(pass_at_k(10, 1, 10), 1.0);
        assert!((pass_at_k(10, 3, 1) - 0.3).abs() < 1e-12);
        // 1 − C(7, 2)/C(10, 2) = 1 − 21/45
        assert!((pass_at_k(10, 3, 2) - (1.0 - 21.0 / 45.0)).abs() < 1e-12);
        assert_eq!(pass_at_k(1, 1, 1), 1.0);
    }
}

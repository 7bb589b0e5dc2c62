//! Choosing the next token.

use hydralora_kernels::Tensor;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the likeliest this many; all if 0.
    pub top_k: usize,
    /// Only the likeliest that together reach this probability.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Every value that makes no sense, as `(option, what is wrong)`.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let mut faults = Vec::new();
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            faults.push(("temperature", format!("is {}; expected 0 or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            faults.push(("top-p", format!("is {}; expected 0 < top-p ≤ 1", self.top_p)));
        }
        faults
    }
}

/// Draws tokens one after the other from one random stream.
pub(crate) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Self {
        Self { sampling, random: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// The next token for `logits: [1, vocab_size]`. Ties go to the lower id.
    pub(crate) fn next(&mut self, logits: &Tensor) -> u32 {
        let logits = logits.to_f64();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        let likelier = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
        if self.sampling.temperature == 0.0 {
            return order.into_iter().min_by(likelier).unwrap_or(0) as u32;
        }
        order.sort_unstable_by(likelier);
        if self.sampling.top_k > 0 {
            order.truncate(self.sampling.top_k);
        }
        let peak = logits[order[0]];
        let mut weights: Vec<f64> = order
            .iter()
            .map(|&id| ((logits[id] - peak) / self.sampling.temperature).exp())
            .collect();
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let kept = weights
            .iter()
            .position(|weight| {
                reached += weight / total;
                reached >= self.sampling.top_p
            })
            .map_or(weights.len(), |last| last + 1);
        weights.truncate(kept);
        let unit = self.random.next_u64() as f64 / u64::MAX as f64;
        let mut left = unit * weights.iter().sum::<f64>();
        for (&id, weight) in order.iter().zip(&weights) {
            left -= weight;
            if left <= 0.0 {
                return id as u32;
            }
        }
        order[kept - 1] as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: Sampling, logits: &[f64], count: usize) -> Vec<usize> {
        let logits = Tensor::new(logits.to_vec(), [1, logits.len()]);
        let mut sampler = Sampler::new(sampling);
        let mut counts = vec![0; logits.len()];
        for _ in 0..count {
            counts[sampler.next(&logits) as usize] += 1;
        }
        counts
    }

    #[test]
    fn zero_temperature_takes_the_likeliest() {
        assert_eq!(draws(Sampling::default(), &[0.0, 2.0, 2.0, 1.0], 5), [0, 5, 0, 0]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        let logits = [1.0_f64.ln(), 2.0_f64.ln(), 5.0_f64.ln()];
        let counts = draws(sampling, &logits, 8000);
        for (count, share) in counts.iter().zip([0.125, 0.25, 0.625]) {
            assert!((*count as f64 / 8000.0 - share).abs() < 0.02, "{counts:?}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [3.0, 2.0, 1.0, 0.0];
        let all = Sampling { temperature: 5.0, ..Sampling::default() };
        assert!(draws(all, &logits, 2000).iter().all(|&count| count > 0));
        assert_eq!(draws(Sampling { top_k: 2, ..all }, &logits, 2000)[2..], [0, 0]);
        let top_p = Sampling { temperature: 1.0, top_p: 0.8, ..Sampling::default() };
        let counts = draws(top_p, &logits, 2000);
        assert!(counts[1] > 0 && counts[2] == 0, "{counts:?}");
    }

    #[test]
    fn the_seed_decides() {
        let of = |seed| {
            let mut sampler =
                Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::default() });
            let logits = Tensor::new(vec![0.0_f64; 100], [1, 100]);
            (0..20).map(|_| sampler.next(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }
}

//! Choosing the next token.

use hydralora_kernels::{Tensor, dispatch, simd};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the likeliest this many; all if 0.
    pub top_k: usize,
    /// Only the likeliest that together reach this probability.
    pub top_p: f64,
    /// Only those at least this many times as probable as the likeliest; all if 0.
    pub min_p: f64,
    /// Divides the positive logits of tokens that the prompt or the text holds already and multiplies
    /// their negative ones (CTRL, arXiv 1909.05858, as transformers applies it); 1 changes nothing.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
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
        if !(0.0..=1.0).contains(&self.min_p) {
            faults.push(("min-p", format!("is {}; expected 0 to 1", self.min_p)));
        }
        let penalty = self.repetition_penalty;
        if !(penalty.is_finite() && penalty > 0.0) {
            let message = format!("is {penalty}; expected more than 0, 1 for none");
            faults.push(("repetition-penalty", message));
        }
        faults
    }
}

/// Draws tokens one after the other from one random stream.
pub(crate) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens read or drawn, where a penalty asks for them.
    seen: HashSet<u32>,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling) -> Self {
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        Self { sampling, random, seen: HashSet::new() }
    }

    /// Notes tokens of the prompt.
    pub(crate) fn read(&mut self, tokens: &[u32]) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }

    /// Draws the next token for `logits: [1, vocab_size]`. Ties go to the lower id.
    pub(crate) fn next(&mut self, logits: &Tensor) -> u32 {
        self.next_of(logits, None)
    }

    /// The same among the tokens whose bits are set in `allowed`, one at least.
    pub(crate) fn next_of(&mut self, logits: &Tensor, allowed: Option<&[u64]>) -> u32 {
        let Sampling { temperature, repetition_penalty, .. } = self.sampling;
        if temperature == 0.0 && repetition_penalty == 1.0 && allowed.is_none() {
            return likeliest(logits);
        }
        let mut logits = logits.to_f64();
        if let Some(allowed) = allowed {
            for (token, logit) in logits.iter_mut().enumerate() {
                let bits = allowed.get(token / 64).copied().unwrap_or(0);
                if bits >> (token % 64) & 1 == 0 {
                    *logit = f64::NEG_INFINITY;
                }
            }
        }
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit *=
                    if *logit < 0.0 { repetition_penalty } else { repetition_penalty.recip() };
            }
        }
        let next = if temperature == 0.0 { peak(&logits) as u32 } else { self.draw(&logits) };
        self.read(&[next]);
        next
    }

    /// Draws from what `top_k`, `top_p` and `min_p` leave of the softmax, applied in that order.
    fn draw(&mut self, logits: &[f64]) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let peak = logits[peak(logits)];
        let mut order = Order::new(logits);
        if top_k > 0 {
            order.truncate(top_k);
        }
        let weight = |id: usize| ((logits[id] - peak) / temperature).exp();
        let mut total: f64 = order.ids.iter().map(|&id| weight(id)).sum();
        if top_p < 1.0 {
            total = order.keep_while(&weight, |sum| sum < top_p * total);
        }
        if min_p > 0.0 {
            // The likeliest weighs 1.
            let kept = order.ids.iter().filter(|&&id| weight(id) >= min_p).count();
            order.truncate(kept);
            total = order.ids.iter().map(|&id| weight(id)).sum();
        }
        let mut left = self.random.next_u64() as f64 / u64::MAX as f64 * total;
        let last = order.ids.len() - 1;
        for at in 0..last {
            let id = order.id(at);
            left -= weight(id);
            if left <= 0.0 {
                return id as u32;
            }
        }
        order.id(last) as u32
    }
}

/// Position of the largest number, the first of several.
fn peak(logits: &[f64]) -> usize {
    let larger = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
    (1..logits.len()).fold(0, larger)
}

/// The token with the largest of `logits: [1, vocab_size]`, the lowest id of several.
pub fn likeliest(logits: &Tensor) -> u32 {
    let position = dispatch!(logits.dtype(), |E| {
        let logits = logits.data::<E>();
        let peak = simd::vectorize(
            #[inline(always)]
            || simd::max(logits),
        );
        logits.iter().position(|&logit| logit == peak)
    });
    position.unwrap_or(0) as u32
}

/// Token ids by falling logits, sorted as far as they are asked for: a draw rarely gets beyond the
/// first few of tens of thousands.
struct Order<'a> {
    logits: &'a [f64],
    ids: Vec<usize>,
    /// How many of `ids` are in their places.
    sorted: usize,
}

impl<'a> Order<'a> {
    fn new(logits: &'a [f64]) -> Self {
        Self { logits, ids: (0..logits.len()).collect(), sorted: 0 }
    }

    /// The id at position `at`.
    fn id(&mut self, at: usize) -> usize {
        const FIRST: usize = 64;
        if at >= self.sorted {
            self.sort((8 * at).max(FIRST));
        }
        self.ids[at]
    }

    /// Puts the first `count` ids in their places.
    fn sort(&mut self, count: usize) {
        let count = count.min(self.ids.len());
        let Some(last) = count.checked_sub(self.sorted + 1) else { return };
        let logits = self.logits;
        let likelier = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
        let rest = &mut self.ids[self.sorted..];
        rest.select_nth_unstable_by(last, likelier);
        rest[..=last].sort_unstable_by(likelier);
        self.sorted = count;
    }

    /// Leaves the first ids, up to the one with which the sum of weights no longer is `short`, and
    /// returns that sum.
    fn keep_while(&mut self, weight: &impl Fn(usize) -> f64, short: impl Fn(f64) -> bool) -> f64 {
        let (mut kept, mut sum) = (0, 0.0);
        while short(sum) && kept < self.ids.len() {
            sum += weight(self.id(kept));
            kept += 1;
        }
        self.truncate(kept);
        sum
    }

    /// Leaves the first `count` ids.
    fn truncate(&mut self, count: usize) {
        self.sort(count);
        self.ids.truncate(count);
        self.sorted = self.sorted.min(count);
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
    fn min_p_measures_by_the_likeliest() {
        let logits = [0.0, 0.5_f64.ln(), 0.2_f64.ln(), 0.1_f64.ln()];
        let sampling = Sampling { temperature: 1.0, min_p: 0.3, ..Sampling::default() };
        let counts = draws(sampling, &logits, 3000);
        assert!((counts[0] as f64 / 3000.0 - 2.0 / 3.0).abs() < 0.03, "{counts:?}");
        assert_eq!(counts[2..], [0, 0]);
        assert_eq!(draws(Sampling { min_p: 1.0, ..sampling }, &logits, 20), [20, 0, 0, 0]);
    }

    #[test]
    fn a_penalty_falls_on_what_was_read_or_drawn() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling);
        sampler.read(&[3]);
        // 4 / 2 is less than 3, drawn once 3 / 2 is less than 2; -1 * 2 is less than -1.5.
        let logits = Tensor::new(vec![-1.0_f64, 2.0, 3.0, 4.0], [1, 4]);
        let drawn: Vec<u32> = (0..3).map(|_| sampler.next(&logits)).collect();
        assert_eq!(drawn, [2, 1, 3]);
        let negative = Tensor::new(vec![-1.5_f64, -1.0, -1.1], [1, 3]);
        let mut sampler = Sampler::new(sampling);
        let drawn: Vec<u32> = (0..4).map(|_| sampler.next(&negative)).collect();
        assert_eq!(drawn, [1, 2, 0, 1]);
    }

    #[test]
    fn an_order_sorted_bit_by_bit_is_the_whole_order() {
        let logits: Vec<f64> = (0..5000).map(|i| f64::from(i * 7919 % 1009)).collect();
        let mut expected: Vec<usize> = (0..logits.len()).collect();
        expected.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let mut order = Order::new(&logits);
        for at in [0, 3, 63, 64, 700, 65, 4999] {
            assert_eq!(order.id(at), expected[at], "{at}");
        }
        for count in [1, 64, 65, 4999, 5000, 6000] {
            let mut order = Order::new(&logits);
            order.truncate(count);
            assert_eq!(order.ids, expected[..count.min(5000)]);
        }
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

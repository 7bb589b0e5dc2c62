//! Choosing the next token.

use hydralora_kernels::{Tensor, dispatch, simd};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;
use std::sync::Arc;

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
    /// Taken off a token's logit for every time that the text holds it already, as OpenAI has it; the
    /// prompt does not count.
    pub frequency_penalty: f64,
    /// Taken off a token's logit once if the text holds it already, likewise.
    pub presence_penalty: f64,
    /// As long as the text has fewer tokens it does not end: not at a token, nor at a text to stop at.
    /// Where a constraint leaves nothing but the end, it ends all the same.
    pub min_new_tokens: usize,
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
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            min_new_tokens: 0,
            seed: 0,
        }
    }
}

/// Tokens with what is added to their logits before all else, as OpenAI's `logit_bias` has it.
pub type Bias = Arc<[(u32, f64)]>;

impl Sampling {
    /// Changes the logit of a token that the prompt or the text holds already, the text `count` times.
    fn penalize(&self, logit: &mut f64, count: u32) {
        let penalty = self.repetition_penalty;
        *logit *= if *logit < 0.0 { penalty } else { penalty.recip() };
        if count > 0 {
            *logit -= self.frequency_penalty * f64::from(count) + self.presence_penalty;
        }
    }

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
        let penalties = [
            ("frequency-penalty", self.frequency_penalty),
            ("presence-penalty", self.presence_penalty),
        ];
        for (name, penalty) in penalties {
            if !(-2.0..=2.0).contains(&penalty) {
                faults.push((name, format!("is {penalty}; expected -2 to 2, 0 for none")));
            }
        }
        faults
    }
}

/// Draws tokens one after the other from one random stream.
pub(crate) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    bias: Bias,
    /// Tokens at which the text ends.
    end_ids: Arc<[u32]>,
    /// Tokens read or drawn, where a penalty asks for them, and how often each was drawn.
    seen: HashMap<u32, u32>,
    drawn: usize,
}

impl Sampler {
    /// Makes one that adds `bias` to the logits, for a text that ends at `end_ids`.
    pub(crate) fn new(sampling: Sampling, bias: &Bias, end_ids: &Arc<[u32]>) -> Self {
        let random = ChaCha8Rng::seed_from_u64(sampling.seed);
        let (bias, end_ids) = (Arc::clone(bias), Arc::clone(end_ids));
        Self { sampling, random, bias, end_ids, seen: HashMap::new(), drawn: 0 }
    }

    /// Notes tokens of the prompt.
    pub(crate) fn read(&mut self, tokens: &[u32]) {
        if self.sampling.repetition_penalty != 1.0 {
            for &token in tokens {
                self.seen.entry(token).or_default();
            }
        }
    }

    /// Whether what was read or drawn changes the logits.
    fn penalizes(&self) -> bool {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } =
            self.sampling;
        repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0
    }

    /// Whether it is too early for the end.
    fn goes_on(&self) -> bool {
        self.drawn < self.sampling.min_new_tokens
    }

    /// Draws the next token for `logits: [1, vocab_size]`. Ties go to the lower id.
    pub(crate) fn next(&mut self, logits: &Tensor) -> u32 {
        self.next_of(logits, None)
    }

    /// The same among the tokens whose bits are set in `allowed`, one at least.
    pub(crate) fn next_of(&mut self, logits: &Tensor, allowed: Option<&[u64]>) -> u32 {
        let Sampling { temperature, .. } = self.sampling;
        let (penalizes, goes_on) = (self.penalizes(), self.goes_on());
        self.drawn += 1;
        let changed = penalizes || goes_on || !self.bias.is_empty() || allowed.is_some();
        if temperature == 0.0 && !changed {
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
        if goes_on {
            self.bar_ends(&mut logits);
        }
        for &(token, bias) in self.bias.iter() {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for (&token, &count) in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                self.sampling.penalize(logit, count);
            }
        }
        let next = if temperature == 0.0 { peak(&logits) as u32 } else { self.draw(&logits) };
        if penalizes {
            *self.seen.entry(next).or_default() += 1;
        }
        next
    }

    /// Leaves out the tokens at which the text ends, if that leaves any.
    fn bar_ends(&self, logits: &mut [f64]) {
        let is_end = |token: usize| self.end_ids.iter().any(|&end| end as usize == token);
        let mut others = (0..logits.len()).filter(|&token| !is_end(token));
        if others.any(|token| logits[token] > f64::NEG_INFINITY) {
            for &end in self.end_ids.iter() {
                if let Some(logit) = logits.get_mut(end as usize) {
                    *logit = f64::NEG_INFINITY;
                }
            }
        }
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

    /// One without a bias, for a text that does not end.
    fn sampler(sampling: Sampling) -> Sampler {
        Sampler::new(sampling, &Bias::default(), &Arc::default())
    }

    fn draws(sampling: Sampling, logits: &[f64], count: usize) -> Vec<usize> {
        let logits = Tensor::new(logits.to_vec(), [1, logits.len()]);
        let mut sampler = sampler(sampling);
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
        let mut sampler = self::sampler(sampling);
        sampler.read(&[3]);
        // 4 / 2 is less than 3, drawn once 3 / 2 is less than 2; -1 * 2 is less than -1.5.
        let logits = Tensor::new(vec![-1.0_f64, 2.0, 3.0, 4.0], [1, 4]);
        let drawn: Vec<u32> = (0..3).map(|_| sampler.next(&logits)).collect();
        assert_eq!(drawn, [2, 1, 3]);
        let negative = Tensor::new(vec![-1.5_f64, -1.0, -1.1], [1, 3]);
        let mut sampler = self::sampler(sampling);
        let drawn: Vec<u32> = (0..4).map(|_| sampler.next(&negative)).collect();
        assert_eq!(drawn, [1, 2, 0, 1]);
    }

    #[test]
    fn penalties_count_what_was_drawn_and_not_what_was_read() {
        // 4, then 4 - 1.5 against 3, then 2.5 against 3 - 1.5, then 4 - 3 against 1.5, and so on.
        let logits = Tensor::new(vec![1.2_f64, 3.0, 4.0], [1, 3]);
        let drawn = |sampling: Sampling| -> Vec<u32> {
            let mut sampler = sampler(sampling);
            sampler.read(&[1, 2, 2, 2]);
            (0..5).map(|_| sampler.next(&logits)).collect()
        };
        let frequency = Sampling { frequency_penalty: 1.5, ..Sampling::default() };
        assert_eq!(drawn(frequency), [2, 1, 2, 1, 0]);
        // Once only: 4 - 2 = 2 and 3 - 2 = 1 stay as they are.
        let presence = Sampling { presence_penalty: 2.0, ..Sampling::default() };
        assert_eq!(drawn(presence), [2, 1, 2, 2, 2]);
        let rewarded = Sampling { frequency_penalty: -2.0, ..Sampling::default() };
        assert_eq!(drawn(rewarded), [2; 5]);
        // All of them: 4 / 2 - 1 = 1 against 3 / 2, then 0.5 against 1.2, then 1 against 1.2 / 2 - 1.
        let all = Sampling {
            repetition_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.5,
            ..frequency
        };
        assert_eq!(drawn(all), [2, 1, 0, 2, 1]);
    }

    #[test]
    fn a_bias_comes_before_all_else() {
        let logits = Tensor::new(vec![-1.0_f64, 2.0, 3.0, 4.0], [1, 4]);
        let drawn = |bias: &[(u32, f64)], sampling| {
            let mut sampler = Sampler::new(sampling, &Bias::from(bias), &Arc::default());
            (0..3).map(|_| sampler.next(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(drawn(&[(0, 100.0), (9, 100.0)], Sampling::default()), [0, 0, 0]);
        assert_eq!(drawn(&[(3, -100.0)], Sampling::default()), [2, 2, 2]);
        // -1 + 6 is 5, then 5 / 2; a bias behind the penalty would leave 4, as likely as the next.
        let penalty = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(drawn(&[(0, 6.0)], penalty), [0, 3, 2]);
        let drawn_at_random = Sampling { temperature: 1.0, ..Sampling::default() };
        assert_eq!(drawn(&[(1, 100.0)], drawn_at_random), [1, 1, 1]);
        // It does not bring back what is not allowed.
        let mut sampler = Sampler::new(penalty, &Bias::from([(0, 100.0)]), &Arc::default());
        assert_eq!(sampler.next_of(&logits, Some(&[0b0110])), 2);
    }

    #[test]
    fn a_text_ends_when_it_is_long_enough_or_can_do_nothing_else() {
        let logits = Tensor::new(vec![1.0_f64, 2.0, 4.0, 3.0], [1, 4]);
        let sampling = Sampling { min_new_tokens: 2, ..Sampling::default() };
        let ends: Arc<[u32]> = Arc::from([2, 3]);
        let mut sampler = Sampler::new(sampling, &Bias::from([(2, 100.0)]), &ends);
        assert_eq!((0..4).map(|_| sampler.next(&logits)).collect::<Vec<_>>(), [1, 1, 2, 2]);
        let mut sampler = Sampler::new(sampling, &Bias::default(), &ends);
        assert_eq!(sampler.next_of(&logits, Some(&[0b1000])), 3);
        assert_eq!(sampler.next_of(&logits, Some(&[0b1001])), 0);
        assert_eq!(sampler.next_of(&logits, Some(&[0b1001])), 3);
    }

    #[test]
    fn what_changes_nothing_draws_as_ever() {
        let logits: Vec<f64> = (0..300).map(|i| f64::from(i * 7919 % 101) / 20.0).collect();
        let logits = Tensor::new(logits, [1, 300]);
        let drawn = |sampling: Sampling, bias: &[(u32, f64)]| {
            let mut sampler = Sampler::new(sampling, &Bias::from(bias), &Arc::from([7]));
            (0..200).map(|_| sampler.next(&logits)).collect::<Vec<_>>()
        };
        let plain = Sampling { temperature: 0.9, top_p: 0.95, seed: 3, ..Sampling::default() };
        assert_eq!(drawn(plain, &[(5, 0.0)]), drawn(plain, &[]));
        // So small that no sum of weights feels it, but on the way of what does.
        let tiny = Sampling { frequency_penalty: 1e-300, ..plain };
        assert_eq!(drawn(tiny, &[]), drawn(plain, &[]));
    }

    #[test]
    fn penalties_have_a_range() {
        for penalty in [-2.5, 2.1, f64::NAN, f64::INFINITY] {
            let frequency = Sampling { frequency_penalty: penalty, ..Sampling::default() };
            let presence = Sampling { presence_penalty: penalty, ..Sampling::default() };
            for (sampling, name) in
                [(frequency, "frequency-penalty"), (presence, "presence-penalty")]
            {
                let faults = sampling.faults();
                assert!(faults.len() == 1 && faults[0].0 == name, "{faults:?}");
                assert!(faults[0].1.contains("expected -2 to 2"), "{faults:?}");
            }
        }
        let most =
            Sampling { frequency_penalty: 2.0, presence_penalty: -2.0, ..Sampling::default() };
        assert_eq!(most.faults(), []);
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
            let mut sampler = sampler(Sampling { temperature: 1.0, seed, ..Sampling::default() });
            let logits = Tensor::new(vec![0.0_f64; 100], [1, 100]);
            (0..20).map(|_| sampler.next(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }
}

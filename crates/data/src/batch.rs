//! Packed batches, and which examples stand in which batch.
//!
//! A batch of sequences of lengths `n_1 … n_S` holds `T = n_1 + … + n_S` tokens one after the
//! other, without padding: `offsets = [0, n_1, n_1 + n_2, …, T]`, positions restart at 0 in each
//! sequence, and `labels[t]` is the token to be predicted **at** `t`, which is the next token of
//! the same sequence where that one is trained and [`IGNORE_LABEL`] elsewhere.

use std::ops::Range;

use rand::SeedableRng;
use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;

use crate::encode::{Example, IGNORE_LABEL};
use crate::error::{Error, Result};
use crate::store::Examples;

/// Sequences packed one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// `[T]` token ids.
    pub tokens: Vec<u32>,
    /// `[T]` places within the sequence, from 0.
    pub positions: Vec<u32>,
    /// `[S + 1]` where each sequence begins, and the end.
    pub offsets: Vec<usize>,
    /// `[T]` the token to predict at each place, or [`IGNORE_LABEL`].
    pub labels: Vec<u32>,
    /// `[S]` each sequence's domain.
    pub domains: Vec<u32>,
    /// How many labels are not [`IGNORE_LABEL`].
    pub label_tokens: usize,
}

impl Batch {
    /// Packs examples in the order given.
    pub fn pack(examples: &[&Example]) -> Self {
        let total = examples.iter().map(|example| example.tokens.len()).sum();
        let mut batch = Self {
            tokens: Vec::with_capacity(total),
            positions: Vec::with_capacity(total),
            offsets: Vec::with_capacity(examples.len() + 1),
            labels: Vec::with_capacity(total),
            domains: Vec::with_capacity(examples.len()),
            label_tokens: 0,
        };
        batch.offsets.push(0);
        for example in examples {
            batch.tokens.extend_from_slice(&example.tokens);
            batch.positions.extend(0..example.tokens.len() as u32);
            batch.labels.extend(example.labels.iter().skip(1));
            if !example.tokens.is_empty() {
                batch.labels.push(IGNORE_LABEL);
            }
            batch.offsets.push(batch.tokens.len());
            batch.domains.push(example.domain);
            batch.label_tokens += example.label_tokens();
        }
        batch
    }

    /// `S`, how many sequences there are.
    pub fn sequences(&self) -> usize {
        self.domains.len()
    }

    /// The places of one sequence; panics when there is no such sequence.
    pub fn sequence(&self, index: usize) -> Range<usize> {
        self.offsets[index]..self.offsets[index + 1]
    }
}

/// Decides which examples stand in which batch of which epoch.
#[derive(Debug, Clone)]
pub struct Sampler {
    lengths: Vec<u32>,
    /// For each source, its weight and its examples.
    sources: Vec<(f64, Vec<u32>)>,
    batch_size: usize,
    max_tokens_per_batch: Option<usize>,
    seed: u64,
    shuffle: bool,
}

impl Sampler {
    /// A sampler over `examples`; `weights[s]` is how often each example with `source == s` is
    /// expected in an epoch. A batch holds at most `batch_size` sequences and, if given, at most
    /// `max_tokens_per_batch` tokens; a longer sequence gets a batch of its own.
    ///
    /// # Errors
    /// [`Error::Batching`] when there are no examples, when a size is 0, or when a weight is
    /// missing or not a finite number above 0.
    pub fn new(
        examples: &Examples,
        weights: &[f64],
        batch_size: usize,
        max_tokens_per_batch: Option<usize>,
        seed: u64,
        shuffle: bool,
    ) -> Result<Self> {
        let wrong = |message: String| Err(Error::Batching(message));
        if examples.is_empty() {
            return wrong("there are no examples to form batches of".to_owned());
        }
        if batch_size == 0 || max_tokens_per_batch == Some(0) {
            return wrong("a batch needs room for at least 1 sequence and 1 token".to_owned());
        }
        if let Some(weight) = weights.iter().find(|w| !(w.is_finite() && **w > 0.0)) {
            return wrong(format!("a weight must be a finite number above 0, is {weight}"));
        }
        let mut sources: Vec<(f64, Vec<u32>)> =
            weights.iter().map(|&weight| (weight, Vec::new())).collect();
        for index in 0..examples.len() {
            let source = examples.source(index);
            match sources.get_mut(source as usize) {
                Some((_, members)) => members.push(index as u32),
                None => {
                    return wrong(format!(
                        "an example comes from source {source}, but there are {} weights",
                        weights.len()
                    ));
                }
            }
        }
        Ok(Self {
            lengths: examples.lengths().to_vec(),
            sources,
            batch_size,
            max_tokens_per_batch,
            seed,
            shuffle,
        })
    }

    /// The batches of epoch `epoch` (from 0), each a list of example indices. They follow from the
    /// seed and the epoch alone.
    ///
    /// An example of weight 2.5 stands in it twice, and a random half of its source a third time.
    /// With shuffling, all sources are mixed; without, examples come in file order, repetitions
    /// after all first appearances. The last batch may be short.
    pub fn epoch(&self, epoch: u64) -> Batches {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8..16].copy_from_slice(&epoch.to_le_bytes());
        key[16..24].copy_from_slice(b"sampling");
        let mut random = ChaCha8Rng::from_seed(key);
        // Pairs of repetition and example, so that sorting gives the unshuffled order.
        let mut order: Vec<(u32, u32)> = Vec::new();
        for (weight, members) in &self.sources {
            let whole = weight.floor() as u32;
            for repetition in 0..whole {
                order.extend(members.iter().map(|&member| (repetition, member)));
            }
            // The share of this epoch is rounded so that over epochs the sum is exact.
            let share = weight.fract() * members.len() as f64;
            let until = |epochs: f64| (epochs * share + 0.5).floor();
            let extra = (until(epoch as f64 + 1.0) - until(epoch as f64)) as usize;
            let picked = index::sample(&mut random, members.len(), extra.min(members.len()));
            order.extend(picked.into_iter().map(|place| (whole, members[place])));
        }
        if self.shuffle {
            order.shuffle(&mut random);
        } else {
            order.sort_unstable();
        }
        let order = order.into_iter().map(|(_, example)| example);
        form_batches(order, &self.lengths, self.batch_size, self.max_tokens_per_batch)
    }
}

/// Batches of every validation example once, shortest first, at most `max_sequences` sequences and
/// `max_tokens` tokens each (a longer sequence gets a batch of its own). Both are at least 1.
pub fn valid_batches(
    examples: &Examples,
    max_sequences: usize,
    max_tokens: Option<usize>,
) -> Batches {
    let lengths = examples.lengths();
    let mut order: Vec<u32> = (0..examples.len() as u32).collect();
    order.sort_by_key(|&index| (lengths[index as usize], index));
    form_batches(order.into_iter(), lengths, max_sequences.max(1), max_tokens)
}

/// Which examples stand in which batch: four bytes an example, however many batches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batches {
    order: Vec<u32>,
    /// For each batch, where it ends in `order`.
    ends: Vec<u32>,
}

impl Batches {
    /// How many batches there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The indices of a batch's examples; panics when there is no such batch.
    pub fn get(&self, batch: usize) -> impl ExactSizeIterator<Item = usize> + Clone + '_ {
        let start = if batch == 0 { 0 } else { self.ends[batch - 1] };
        self.order[start as usize..self.ends[batch] as usize].iter().map(|&index| index as usize)
    }

    /// Each batch in turn.
    pub fn iter(
        &self,
    ) -> impl ExactSizeIterator<Item = impl ExactSizeIterator<Item = usize> + Clone + '_> + '_ {
        (0..self.len()).map(|batch| self.get(batch))
    }
}

fn form_batches(
    order: impl Iterator<Item = u32>,
    lengths: &[u32],
    max_sequences: usize,
    max_tokens: Option<usize>,
) -> Batches {
    let mut batches = Batches::default();
    let (mut sequences, mut tokens) = (0, 0);
    for index in order {
        let length = lengths[index as usize] as usize;
        let full =
            sequences == max_sequences || max_tokens.is_some_and(|most| tokens + length > most);
        if full && sequences > 0 {
            batches.ends.push(batches.order.len() as u32);
            (sequences, tokens) = (0, 0);
        }
        batches.order.push(index);
        sequences += 1;
        tokens += length;
    }
    if sequences > 0 {
        batches.ends.push(batches.order.len() as u32);
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example(tokens: Vec<u32>, trained: &[bool], source: u32) -> Example {
        let labels = tokens
            .iter()
            .zip(trained)
            .map(|(&token, &trained)| if trained { token } else { IGNORE_LABEL })
            .collect();
        Example { tokens, labels, domain: source, source, row: 0 }
    }

    fn lists(batches: &Batches) -> Vec<Vec<usize>> {
        batches.iter().map(Iterator::collect).collect()
    }

    fn examples_of_lengths(lengths: &[usize], source: u32) -> Vec<Example> {
        let one = |&length: &usize| example(vec![1; length], &vec![true; length], source);
        lengths.iter().map(one).collect()
    }

    fn any_example() -> impl Strategy<Value = Example> {
        prop::collection::vec((0u32..50_000, any::<bool>()), 2..40).prop_map(|pairs| {
            let (tokens, trained): (Vec<u32>, Vec<bool>) = pairs.into_iter().unzip();
            let domain = tokens[0] % 5;
            Example { domain, ..example(tokens, &trained, 0) }
        })
    }

    proptest! {
        #[test]
        fn packing_keeps_every_sequence(examples in prop::collection::vec(any_example(), 0..12)) {
            let references: Vec<&Example> = examples.iter().collect();
            let batch = Batch::pack(&references);
            prop_assert_eq!(batch.sequences(), examples.len());
            prop_assert_eq!(batch.offsets.len(), examples.len() + 1);
            prop_assert_eq!(batch.offsets.last(), Some(&batch.tokens.len()));
            prop_assert_eq!(batch.positions.len(), batch.tokens.len());
            prop_assert_eq!(batch.labels.len(), batch.tokens.len());
            let mut labels = 0;
            for (index, example) in examples.iter().enumerate() {
                let place = batch.sequence(index);
                prop_assert_eq!(&batch.tokens[place.clone()], &example.tokens[..]);
                prop_assert_eq!(batch.domains[index], example.domain);
                let length = example.tokens.len();
                let positions: Vec<u32> = (0..length as u32).collect();
                prop_assert_eq!(&batch.positions[place.clone()], &positions[..]);
                let shifted = &batch.labels[place];
                for at in 0..length {
                    let expected =
                        if at + 1 < length { example.labels[at + 1] } else { IGNORE_LABEL };
                    prop_assert_eq!(shifted[at], expected);
                }
                labels += example.label_tokens();
            }
            let counted = batch.labels.iter().filter(|&&label| label != IGNORE_LABEL).count();
            prop_assert_eq!(batch.label_tokens, counted);
            prop_assert_eq!(batch.label_tokens, labels);
        }

        #[test]
        fn batches_respect_both_limits_and_lose_nothing(
            lengths in prop::collection::vec(2usize..50, 1..60),
            batch_size in 1usize..9,
            max_tokens in prop::option::of(1usize..120),
            shuffle in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let examples: Examples = examples_of_lengths(&lengths, 0).into();
            let sampler =
                Sampler::new(&examples, &[1.0], batch_size, max_tokens, seed, shuffle).unwrap();
            for batches in [sampler.epoch(3), valid_batches(&examples, batch_size, max_tokens)] {
                let batches = lists(&batches);
                for batch in &batches {
                    prop_assert!(!batch.is_empty() && batch.len() <= batch_size);
                    let tokens: usize = batch.iter().map(|&index| lengths[index]).sum();
                    prop_assert!(batch.len() == 1 || max_tokens.is_none_or(|most| tokens <= most));
                }
                let mut all: Vec<usize> = batches.concat();
                if !shuffle && max_tokens.is_none() {
                    prop_assert_eq!(batches.len(), lengths.len().div_ceil(batch_size));
                }
                all.sort_unstable();
                prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn weights_repeat_records() {
        let mut examples = examples_of_lengths(&[3; 10], 0);
        examples.extend(examples_of_lengths(&[3; 8], 1));
        examples.extend(examples_of_lengths(&[3; 7], 2));
        let sampler =
            Sampler::new(&examples.clone().into(), &[2.5, 0.5, 1.0], 4, None, 5, true).unwrap();
        let mut halves = std::collections::HashSet::new();
        for epoch in 0..20 {
            let mut count = vec![0; examples.len()];
            for index in lists(&sampler.epoch(epoch)).concat() {
                count[index] += 1;
            }
            assert!(count[..10].iter().all(|&times| times == 2 || times == 3));
            assert_eq!(count[..10].iter().sum::<usize>(), 25);
            assert!(count[10..18].iter().all(|&times| times <= 1));
            assert_eq!(count[10..18].iter().sum::<usize>(), 4);
            assert_eq!(count[18..], [1; 7]);
            halves.insert(count[10..18].to_vec());
        }
        assert!(halves.len() > 5, "the half is drawn anew each epoch");
    }

    #[test]
    fn fractions_are_exact_over_epochs() {
        let examples = examples_of_lengths(&[3; 3], 0);
        let sampler = Sampler::new(&examples.clone().into(), &[0.1], 4, None, 5, true).unwrap();
        let total: usize = (0..100).map(|epoch| lists(&sampler.epoch(epoch)).concat().len()).sum();
        assert_eq!(total, 30);
    }

    #[test]
    fn the_order_follows_from_seed_and_epoch_alone() {
        let examples = examples_of_lengths(&[3; 50], 0);
        let sampler =
            |seed| Sampler::new(&examples.clone().into(), &[1.5], 8, Some(20), seed, true).unwrap();
        assert_eq!(sampler(1).epoch(4), sampler(1).epoch(4));
        assert_ne!(sampler(1).epoch(4), sampler(1).epoch(5));
        assert_ne!(sampler(1).epoch(4), sampler(2).epoch(4));
    }

    #[test]
    fn shuffling_mixes_sources_and_its_absence_keeps_order() {
        let mut examples = examples_of_lengths(&[3; 40], 0);
        examples.extend(examples_of_lengths(&[3; 40], 1));
        let shuffled =
            Sampler::new(&examples.clone().into(), &[1.0, 1.0], 8, None, 5, true).unwrap();
        let shuffled = lists(&shuffled.epoch(0));
        let mixed = shuffled.iter().filter(|batch| {
            let first = batch.iter().filter(|&&index| index < 40).count();
            first > 0 && first < batch.len()
        });
        assert!(mixed.count() >= 8, "{shuffled:?}");
        let ordered =
            Sampler::new(&examples.clone().into(), &[1.0, 2.0], 7, None, 5, false).unwrap();
        let ordered = lists(&ordered.epoch(0));
        assert_eq!(ordered.concat(), (0..80).chain(40..80).collect::<Vec<_>>());
        assert_eq!(ordered.last().map(Vec::len), Some(120 % 7));
    }

    #[test]
    fn validation_batches_go_from_short_to_long() {
        let examples: Examples = examples_of_lengths(&[9, 2, 5, 2], 0).into();
        assert_eq!(lists(&valid_batches(&examples, 2, None)), [vec![1, 3], vec![2, 0]]);
        assert_eq!(lists(&valid_batches(&examples, 9, Some(8))), [vec![1, 3], vec![2], vec![0]]);
        assert!(valid_batches(&Examples::default(), 2, None).is_empty());
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let examples = examples_of_lengths(&[3], 1);
        let fault = |weights: &[f64], size, tokens| {
            Sampler::new(&examples.clone().into(), weights, size, tokens, 0, true)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            fault(&[1.0], 1, None),
            "an example comes from source 1, but there are 1 weights"
        );
        assert_eq!(fault(&[1.0, 0.0], 1, None), "a weight must be a finite number above 0, is 0");
        assert!(fault(&[1.0, f64::NAN], 1, None).ends_with("is NaN"));
        assert!(fault(&[1.0, 1.0], 0, None).starts_with("a batch needs room"));
        assert!(fault(&[1.0, 1.0], 1, Some(0)).starts_with("a batch needs room"));
        assert!(Sampler::new(&Examples::default(), &[1.0], 1, None, 0, true).is_err());
    }
}

//! Dealing: which of a step's records each rank takes.
//!
//! The step is the recipe's however many ranks there are, and no two of them read the same record. Where a
//! record's part in the loss is its own affair, single records are dealt, the longest first, each to the
//! rank that has the fewest tokens yet; every rank packs its own. Where a method looks at a micro-batch as a
//! whole, as dropout masks and penalties on loads do, ranks take whole micro-batches, neighbours each, and
//! there have to be as many for each.

use super::load::Part;
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::ranks::Team;
use hydralora_peft::Tuned;
use std::cmp::Reverse;

/// What a rank takes of every step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    rank: usize,
    size: usize,
    unit: Unit,
    /// The limits of a micro-batch.
    batch_size: usize,
    max_tokens: Option<usize>,
}

/// What is dealt in one piece.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Unit {
    Record,
    MicroBatch,
}

impl Share {
    /// That of a run of one process.
    #[cfg(test)]
    pub(super) const ALL: Self =
        Self { rank: 0, size: 1, unit: Unit::Record, batch_size: 1, max_tokens: None };

    /// That of a rank of `team` in a run of `tuned`.
    ///
    /// # Errors
    /// If ranks have to take whole micro-batches, and these cannot be dealt evenly.
    pub(super) fn of(team: &Team<'_>, tuned: &dyn Tuned, config: &TrainConfig) -> Result<Self> {
        let (rank, size) = (team.rank(), team.size());
        let whole = tuned.needs_whole_batches();
        let unit = if whole.is_empty() { Unit::Record } else { Unit::MicroBatch };
        let of_step = config.grad_accumulation;
        if unit == Unit::MicroBatch && !of_step.is_multiple_of(size) {
            let message = format!(
                "train.grad_accumulation: is {of_step}; expected a multiple of {size}, the number of ranks, \
                 since {} look{} at a micro-batch as a whole, which one rank has to take: with a \
                 train.batch_size as many times smaller the step stays what it is",
                whole.join(" and "),
                if whole.len() == 1 { "s" } else { "" },
            );
            return Err(Error::Config { faults: vec![message] });
        }
        let (batch_size, max_tokens) = (config.batch_size, config.max_tokens_per_batch);
        Ok(Self { rank, size, unit, batch_size, max_tokens })
    }

    /// The part of this rank in a step's micro-batches, of examples of these lengths.
    pub(super) fn deal(&self, batches: Vec<Vec<usize>>, lengths: &[u32]) -> Vec<Part> {
        if self.size == 1 {
            let parts = batches.into_iter().enumerate();
            return parts.map(|(at, examples)| Part { at, examples, seen: at == 0 }).collect();
        }
        match self.unit {
            Unit::MicroBatch => {
                let each = batches.len().div_ceil(self.size);
                let parts = batches.into_iter().enumerate().skip(self.rank * each).take(each);
                parts.map(|(at, examples)| Part { at, examples, seen: at == 0 }).collect()
            }
            Unit::Record => self.pack(self.records(&batches, lengths), lengths),
        }
    }

    /// The records of this rank, each with its micro-batch, in the order of the step.
    fn records(&self, batches: &[Vec<usize>], lengths: &[u32]) -> Vec<(usize, usize)> {
        let each = batches.iter().enumerate();
        let all: Vec<(usize, usize)> =
            each.flat_map(|(at, batch)| batch.iter().map(move |&example| (at, example))).collect();
        let tokens = |place: usize| lengths[all[place].1] as usize;
        let mut order: Vec<usize> = (0..all.len()).collect();
        order.sort_by_key(|&place| (Reverse(tokens(place)), place));
        let mut loads = vec![0_usize; self.size];
        let mut own = Vec::new();
        for place in order {
            // The first of those with the fewest.
            let least = (0..self.size).min_by_key(|&rank| loads[rank]).unwrap_or(0);
            loads[least] += tokens(place);
            if least == self.rank {
                own.push(place);
            }
        }
        own.sort_unstable();
        own.into_iter().map(|place| all[place]).collect()
    }

    /// Micro-batches of these records that keep the recipe's limits.
    fn pack(&self, records: Vec<(usize, usize)>, lengths: &[u32]) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut tokens = 0;
        for (at, example) in records {
            let length = lengths[example] as usize;
            let fits = |part: &&mut Part| {
                let room = self.max_tokens.is_none_or(|most| tokens + length <= most);
                part.examples.len() < self.batch_size && room
            };
            match parts.last_mut().filter(fits) {
                Some(part) => part.examples.push(example),
                None => {
                    parts.push(Part { at, examples: vec![example], seen: parts.is_empty() });
                    tokens = 0;
                }
            }
            tokens += length;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(rank: usize, size: usize, unit: Unit) -> Share {
        Share { rank, size, unit, batch_size: 4, max_tokens: Some(40) }
    }

    fn lengths() -> Vec<u32> {
        (0..64).map(|at| 2 + (at * 7 % 23)).collect()
    }

    fn batches(sizes: &[usize]) -> Vec<Vec<usize>> {
        let mut next = 0..64;
        sizes.iter().map(|&size| next.by_ref().take(size).map(|at| 63 - at).collect()).collect()
    }

    #[test]
    fn every_record_of_a_step_is_dealt_once_whatever_the_number_of_ranks() {
        let lengths = lengths();
        for sizes in [&[4, 4, 4, 4][..], &[4, 3], &[1], &[4, 4, 2, 1]] {
            for size in [1, 2, 3, 4, 8, 17] {
                for unit in [Unit::Record, Unit::MicroBatch] {
                    let deal = |rank| share(rank, size, unit).deal(batches(sizes), &lengths);
                    let dealt: Vec<Vec<Part>> = (0..size).map(deal).collect();
                    let all = dealt.iter().flatten().flat_map(|part| part.examples.clone());
                    let mut all: Vec<usize> = all.collect();
                    let mut expected = batches(sizes).concat();
                    all.sort_unstable();
                    expected.sort_unstable();
                    assert_eq!(all, expected, "{sizes:?} to {size}");
                    // Whoever watches the routers of a step sees some of it.
                    assert!(dealt[0][0].seen);
                    let seen = dealt.iter().map(|parts| parts.iter().filter(|p| p.seen).count());
                    assert!(seen.clone().all(|count| count <= 1));
                    if unit == Unit::MicroBatch {
                        assert_eq!(seen.sum::<usize>(), 1);
                        let whole = dealt.into_iter().flatten().map(|p| (p.at, p.examples));
                        assert!(whole.eq(batches(sizes).into_iter().enumerate()));
                    }
                }
            }
        }
    }

    #[test]
    fn ranks_get_as_many_tokens_and_keep_the_limits_of_a_micro_batch() {
        let lengths = lengths();
        let deal = |rank| share(rank, 4, Unit::Record).deal(batches(&[8, 8, 8, 8]), &lengths);
        let mut loads = Vec::new();
        for rank in 0..4 {
            let parts = deal(rank);
            let tokens = |part: &Part| part.examples.iter().map(|&e| lengths[e]).sum::<u32>();
            assert!(parts.iter().all(|part| part.examples.len() <= 4 && tokens(part) <= 40));
            loads.push(parts.iter().map(tokens).sum::<u32>());
        }
        let (most, least) = (loads.iter().max().unwrap(), loads.iter().min().unwrap());
        assert!(most - least <= 3, "{loads:?}");
    }
}

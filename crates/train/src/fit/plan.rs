//! Which micro-batches every optimizer step of a run consists of.

use super::Run;
use crate::error::{Error, Result};
use hydralora_data::{Batches, Sampler};

/// How many optimizer steps a run has, epoch by epoch.
pub(super) struct Plan {
    /// Steps in each epoch.
    steps: Vec<usize>,
    /// Steps of the run.
    pub(super) total: usize,
}

/// A micro-batch's place: the examples of one step, with its epoch and the number of its first batch
/// in that.
pub(super) struct Place {
    pub(super) epoch: usize,
    pub(super) first_batch: usize,
    /// Example indices of every micro-batch.
    pub(super) batches: Vec<Vec<usize>>,
}

impl Plan {
    /// Counts a run's steps; gives the order of its examples too.
    ///
    /// # Errors
    /// If the data give no batch.
    pub(super) fn new(run: &Run<'_>) -> Result<(Self, Order)> {
        let config = run.config;
        let sampler = Sampler::new(
            &run.dataset.train,
            run.weights,
            config.batch_size,
            config.max_tokens_per_batch,
            config.seed,
            run.shuffle,
        )?;
        let limit = config.max_steps.unwrap_or(usize::MAX);
        let (mut steps, mut wanted) = (Vec::new(), 0_usize);
        // No further than it goes: every epoch is drawn to count its steps.
        for epoch in 0..config.epochs.ceil() as usize {
            let here = sampler.epoch(epoch as u64).len().div_ceil(config.grad_accumulation);
            steps.push(here);
            let part = (config.epochs - epoch as f64).min(1.0);
            wanted += (part * here as f64).ceil() as usize;
            if wanted >= limit {
                break;
            }
        }
        let total = wanted.min(limit);
        if total == 0 {
            return Err(Error::Nothing { message: "the data give no training batch".to_owned() });
        }
        let order = Order::new(sampler, config.grad_accumulation, steps.clone());
        Ok((Self { steps, total }, order))
    }

    /// Passes over the data after `step` steps.
    pub(super) fn epochs_done(&self, step: usize) -> f64 {
        let mut left = step;
        for (epoch, &steps) in self.steps.iter().enumerate() {
            if left <= steps {
                return epoch as f64 + left as f64 / steps as f64;
            }
            left -= steps;
        }
        self.steps.len() as f64
    }
}

/// The order of a run's examples, which follows from the seed and the step alone.
pub(super) struct Order {
    sampler: Sampler,
    accumulation: usize,
    steps: Vec<usize>,
    /// The batches of the epoch that was looked at last.
    current: Option<(usize, Batches)>,
}

impl Order {
    /// That of `accumulation` micro-batches a step, and as many steps in each epoch as `steps` says.
    pub(super) fn new(sampler: Sampler, accumulation: usize, steps: Vec<usize>) -> Self {
        Self { sampler, accumulation, steps, current: None }
    }

    /// The micro-batches of step `step` (from 0).
    pub(super) fn step(&mut self, step: usize) -> Place {
        let (mut epoch, mut within) = (0, step);
        while within >= self.steps[epoch] {
            within -= self.steps[epoch];
            epoch += 1;
        }
        if self.current.as_ref().is_none_or(|(loaded, _)| *loaded != epoch) {
            self.current = Some((epoch, self.sampler.epoch(epoch as u64)));
        }
        let first_batch = within * self.accumulation;
        let batches = self.current.as_ref().map_or(Vec::new(), |(_, batches)| {
            let last = (first_batch + self.accumulation).min(batches.len());
            (first_batch..last).map(|batch| batches.get(batch).collect()).collect()
        });
        Place { epoch, first_batch, batches }
    }
}

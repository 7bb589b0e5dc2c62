//! The training loop.

use crate::checkpoint::{self, Progress};
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, evaluate};
use crate::event::{Event, Sink, StepMetrics, peak_rss_mb};
use crate::optimizer::AdamW;
use hydralora_data::{Batch, Batches, Dataset, Example, Sampler};
use hydralora_kernels::Gradients;
use hydralora_kernels::buffer::release_kept;
use hydralora_kernels::ops::dropout::mix;
use hydralora_kernels::ops::elementwise::scale;
use hydralora_model::adapter::Pass;
use hydralora_model::{Decoder, Packed};
use hydralora_peft::io::{self, Metadata};
use hydralora_peft::{TrainingPlan, Tuned};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What a run is made of.
pub struct Run<'a> {
    /// The frozen base.
    pub decoder: &'a Decoder,
    /// Training and held-out records.
    pub dataset: &'a Dataset,
    /// How often a record of each source is drawn per epoch.
    pub weights: &'a [f64],
    /// Whether records are drawn in random order.
    pub shuffle: bool,
    /// How to train.
    pub config: &'a TrainConfig,
    /// What the adapter's folder says about its origin.
    pub metadata: &'a Metadata,
    /// Hash of everything that decides how the run goes.
    pub fingerprint: &'a str,
    /// The run's folder; without one nothing is written.
    pub folder: Option<&'a Path>,
    /// Set from outside to stop after the step in flight.
    pub stop: &'a AtomicBool,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// All steps were taken.
    Finished,
    /// Held-out loss stopped falling.
    EarlyStopped,
    /// It was told to stop, and saved first.
    Interrupted,
}

/// What a run left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// Steps taken.
    pub steps: usize,
    /// The last held-out evaluation, if there are held-out records.
    pub evaluation: Option<Evaluation>,
    /// Best held-out loss.
    pub best_loss: Option<f64>,
}

/// The micro-batches of every optimizer step of a run: example indices, with the epoch and the
/// batch's number in it.
struct Plan {
    sampler: Sampler,
    accumulation: usize,
    /// Steps in each epoch.
    steps: Vec<usize>,
    total: usize,
    current: Option<(usize, Batches)>,
}

impl Plan {
    fn new(run: &Run<'_>) -> Result<Self> {
        let config = run.config;
        let sampler = Sampler::new(
            &run.dataset.train,
            run.weights,
            config.batch_size,
            config.max_tokens_per_batch,
            config.seed,
            run.shuffle,
        )?;
        let steps: Vec<usize> = (0..config.epochs.ceil() as usize)
            .map(|epoch| sampler.epoch(epoch as u64).len().div_ceil(config.grad_accumulation))
            .collect();
        let whole: usize = steps[..config.epochs.floor() as usize].iter().sum();
        let part = config.epochs.fract() * steps.last().copied().unwrap_or(0) as f64;
        let wanted = whole + part.ceil() as usize;
        let total = config.max_steps.map_or(wanted, |limit| limit.min(wanted));
        if total == 0 {
            return Err(Error::Nothing { message: "the data give no training batch".to_owned() });
        }
        Ok(Self { sampler, accumulation: config.grad_accumulation, steps, total, current: None })
    }

    /// Epoch, number of the first batch in it, and the batches of step `step` (from 0).
    fn step(&mut self, step: usize) -> (usize, usize, Vec<Vec<usize>>) {
        let (mut epoch, mut within) = (0, step);
        while within >= self.steps[epoch] {
            within -= self.steps[epoch];
            epoch += 1;
        }
        if self.current.as_ref().is_none_or(|(loaded, _)| *loaded != epoch) {
            self.current = Some((epoch, self.sampler.epoch(epoch as u64)));
        }
        let first = within * self.accumulation;
        let found = self.current.as_ref().map_or(Vec::new(), |(_, batches)| {
            let last = (first + self.accumulation).min(batches.len());
            (first..last).map(|batch| batches.get(batch).collect()).collect()
        });
        (epoch, first, found)
    }

    fn epochs_done(&self, step: usize) -> f64 {
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

/// How many optimizer steps a run has.
///
/// # Errors
/// If the data give no batch, or all of the steps would warm up.
pub fn total_steps(run: &Run<'_>) -> Result<usize> {
    let total = Plan::new(run)?.total;
    run.config.warmup(total).map(|_| total)
}

/// Trains `tuned` as `run` says, from the newest checkpoint if `resume`.
///
/// # Errors
/// If the loss or a gradient stops being finite (the last checkpoint is kept), a file cannot be
/// written, or a checkpoint does not belong to this run.
pub fn fit(
    run: &Run<'_>,
    tuned: &mut dyn Tuned,
    resume: bool,
    sink: &mut dyn Sink,
) -> Result<Outcome> {
    let config = run.config;
    let sites = run.decoder.sites();
    let mut plan = Plan::new(run)?;
    let warmup = config.warmup(plan.total)?;
    let mut optimizer = AdamW::new(config.adamw(), tuned);
    let mut progress = Progress {
        step: 0,
        optimizer_steps: 0,
        best_loss: None,
        evaluations_since_best: 0,
        elapsed_s: 0.0,
        run_fingerprint: run.fingerprint.to_owned(),
    };
    if resume && let Some(folder) = run.folder {
        let newest = checkpoint::list(folder)?.pop();
        if let Some((_, path)) = newest {
            let dtype = run.decoder.dtype();
            progress =
                checkpoint::load(&path, tuned, &mut optimizer, run.fingerprint, &sites, dtype)?;
        }
    }
    tuned.begin(&TrainingPlan { total_steps: plan.total, domains: &run.dataset.domains })?;
    // What reading the data and finding the method's start took.
    release_kept();
    let before = progress.elapsed_s;
    let started = Instant::now();
    let total_steps = plan.total;
    sink.record(&Event::Started { step: progress.step, total_steps })?;

    let mut ending = Ending::Finished;
    let mut evaluation = None;
    while progress.step < plan.total {
        let step_started = Instant::now();
        let (epoch, first_batch, batches) = plan.step(progress.step);
        let read = |indices: &Vec<usize>| -> Result<(Vec<Example>, Batch)> {
            let examples = indices.iter().map(|&index| run.dataset.train.get(index));
            let examples: Vec<Example> = examples.collect::<hydralora_data::Result<_>>()?;
            let batch = Batch::pack(&examples.iter().collect::<Vec<_>>());
            Ok((examples, batch))
        };
        let batches: Vec<(Vec<Example>, Batch)> =
            batches.iter().map(read).collect::<Result<_>>()?;
        let label_tokens: usize = batches.iter().map(|(_, batch)| batch.label_tokens).sum();
        let tokens: usize = batches.iter().map(|(_, batch)| batch.tokens.len()).sum();
        let mut gradients = Gradients::default();
        let (mut loss, mut aux_loss) = (0.0, 0.0);
        for (index, (examples, batch)) in batches.iter().enumerate() {
            let seed = mix(mix(config.seed) ^ mix(progress.step as u64)) ^ index as u64;
            let pass = Pass::training(mix(seed))
                .of_sequences(&batch.offsets, &batch.domains)
                .checkpointing(config.gradient_checkpointing);
            let packed = Packed { tokens: &batch.tokens, offsets: &batch.offsets };
            // The cross-entropy is a sum over the step's micro-batches, the added term their mean.
            let share = 1.0 / batches.len() as f64;
            let added = |pass: &Pass<'_>| tuned.aux_loss(pass).map(|term| scale(&term, share));
            let factor = 1.0 / label_tokens.max(1) as f64;
            let adapter = tuned.as_adapter();
            let found =
                run.decoder.gradients(packed, &batch.labels, factor, adapter, &pass, &added);
            let found = match found {
                Err(hydralora_model::Error::NonFiniteActivations) => None,
                other => Some(other?),
            };
            loss += found.as_ref().map_or(f64::NAN, |found| found.loss);
            aux_loss += found.as_ref().map_or(f64::NAN, |found| found.added);
            let Some(found) = found.filter(|_| (loss + aux_loss).is_finite()) else {
                return Err(Error::NonFiniteLoss {
                    step: progress.step + 1,
                    loss: loss + aux_loss,
                    epoch,
                    batch: first_batch + index,
                    records: name_records(run.dataset, examples),
                    kept: kept(run.folder),
                });
            };
            gradients.accumulate(found.gradients);
        }
        let norm = gradients.norm();
        if !norm.is_finite() {
            let trainables = tuned.trainables();
            let bad = trainables.iter().find(|trainable| {
                gradients.get(trainable.var()).is_some_and(|gradient| !gradient.is_finite())
            });
            return Err(Error::NonFiniteGradient {
                step: progress.step + 1,
                name: bad.map_or("all together", |t| t.parameter.name()).to_owned(),
                kept: kept(run.folder),
            });
        }
        if config.max_grad_norm > 0.0 && norm > config.max_grad_norm {
            gradients.scale(config.max_grad_norm / norm);
        }
        let factor = config.schedule.factor(progress.step, plan.total, warmup);
        let learning_rate = config.learning_rate * factor;
        optimizer.step(tuned, &gradients, learning_rate);
        progress.step += 1;
        tuned.after_step(progress.step, &gradients);
        progress.optimizer_steps = optimizer.steps();
        progress.elapsed_s = before + started.elapsed().as_secs_f64();
        sink.record(&Event::Step(StepMetrics {
            step: progress.step,
            epoch: plan.epochs_done(progress.step),
            loss,
            aux_loss,
            learning_rate,
            grad_norm: norm,
            tokens,
            label_tokens,
            tokens_per_s: tokens as f64 / step_started.elapsed().as_secs_f64(),
            peak_rss_mb: peak_rss_mb(),
            energy_j: None,
            elapsed_s: progress.elapsed_s,
        }))?;

        let last = progress.step == plan.total;
        let due = |every: usize| every > 0 && progress.step.is_multiple_of(every);
        if !run.dataset.valid.is_empty() && (last || due(config.eval_every)) {
            let found = evaluate(
                run.decoder,
                tuned.as_adapter(),
                &run.dataset.valid,
                &run.dataset.domains,
            )?;
            let best = progress.best_loss.is_none_or(|best| found.loss < best);
            if best {
                progress.best_loss = Some(found.loss);
                progress.evaluations_since_best = 0;
                if let Some(folder) = run.folder {
                    io::save(&folder.join("best"), tuned, run.metadata, &sites)?;
                }
            } else {
                progress.evaluations_since_best += 1;
            }
            let step = progress.step;
            sink.record(&Event::Evaluated { step, evaluation: found.clone(), best })?;
            evaluation = Some(found);
        }
        let patience = config.early_stopping_patience;
        if patience > 0 && progress.evaluations_since_best >= patience {
            ending = Ending::EarlyStopped;
        }
        let interrupted = run.stop.load(Ordering::Relaxed) && !last;
        if interrupted {
            ending = Ending::Interrupted;
        }
        let over = last || ending != Ending::Finished;
        if (over || due(config.save_every))
            && let Some(folder) = run.folder
        {
            let path = checkpoint::folder_of(folder, progress.step);
            checkpoint::save(&path, tuned, &optimizer, &progress, run.metadata, &sites)?;
            checkpoint::prune(folder, config.keep_checkpoints)?;
            sink.record(&Event::Saved { step: progress.step, path })?;
        }
        if over {
            break;
        }
    }
    if ending != Ending::Interrupted
        && let Some(folder) = run.folder
    {
        io::save(&folder.join("adapter"), tuned, run.metadata, &sites)?;
    }
    Ok(Outcome { ending, steps: progress.step, evaluation, best_loss: progress.best_loss })
}

/// File and record of each example of a batch.
fn name_records(dataset: &Dataset, examples: &[Example]) -> String {
    let name = |example: &Example| {
        let source = dataset.report.sources.get(example.source as usize);
        let file = source.map_or_else(String::new, |source| source.path.display().to_string());
        format!("{file} record {}", example.row + 1)
    };
    examples.iter().take(8).map(name).collect::<Vec<_>>().join(", ")
}

fn kept(folder: Option<&Path>) -> String {
    match folder.and_then(|folder| checkpoint::list(folder).ok()).and_then(|mut all| all.pop()) {
        Some((_, path)) => format!("the last checkpoint is {}", path.display()),
        None => "no checkpoint had been written yet".to_owned(),
    }
}

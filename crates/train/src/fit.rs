//! The training loop.

use crate::checkpoint::{self, Progress};
use crate::config::TrainConfig;
use crate::energy::Used;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, evaluate_until, token_domains};
use crate::event::{Event, Sink, StepMetrics, peak_rss_mb};
use crate::heads::{HeadSummary, RouterMetrics, looks_at};
use crate::movement::RouterStart;
use crate::optimizer::AdamW;
use crate::routing::RoutingLog;
use hydralora_data::{Batch, Batches, Dataset, Example, Sampler};
use hydralora_energy::{ESTIMATE, Meter, Reading};
use hydralora_files::{set_aside, sweep_within};
use hydralora_kernels::Gradients;
use hydralora_kernels::buffer::release_kept;
use hydralora_kernels::ops::dropout::mix;
use hydralora_kernels::ops::elementwise::scale;
use hydralora_model::adapter::{NO_CLUSTER, Pass};
use hydralora_model::{Decoder, IGNORE_LABEL, Packed};
use hydralora_peft::io::{self, Metadata};
use hydralora_peft::{TrainingPlan, Tuned};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
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
    /// That of the checkpoint to go on from, where the run is another one in what may change.
    pub continues: Option<&'a str>,
    /// What a checkpoint says of the run for whoever goes on from it; nothing where it is null.
    pub settings: &'a Value,
    /// The run's folder; without one nothing is written.
    pub folder: Option<&'a Path>,
    /// What the run's energy is read from.
    pub meter: Option<&'a Meter>,
    /// The cluster of the training data that a record, by its source and row, is of; needed where a
    /// method's routers are guided by clusters.
    pub clusters: Option<&'a ClusterOf<'a>>,
    /// Set from outside to stop after the step in flight.
    pub stop: &'a AtomicBool,
}

/// The cluster of a training record by its source and row; none where it is of none.
pub type ClusterOf<'a> = dyn Fn(u32, u32) -> Option<u32> + 'a;

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
    /// The energy of training with its evaluations and files, over pauses.
    pub energy: Reading,
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
pub fn planned_steps(run: &Run<'_>) -> Result<usize> {
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
    if run.clusters.is_none() && tuned.options().guide_clusters().is_some() {
        let message =
            "the routers are guided by clusters of the training data, which the run lacks";
        return Err(Error::Config { faults: vec![message.to_owned()] });
    }
    let mut optimizer = AdamW::new(config.adamw(), tuned);
    let mut progress = Progress {
        step: 0,
        optimizer_steps: 0,
        best_loss: None,
        evaluations_since_best: 0,
        evaluation_due: false,
        elapsed_s: 0.0,
        energy_j: None,
        energy_source: None,
        run_fingerprint: run.fingerprint.to_owned(),
    };
    if resume && let Some(folder) = run.folder {
        let newest = checkpoint::list(folder)?.pop();
        if let Some((_, path)) = newest {
            let dtype = run.decoder.dtype();
            let of_run = run.continues.unwrap_or(run.fingerprint);
            progress = checkpoint::load(&path, tuned, &mut optimizer, of_run, &sites, dtype)?;
            run.fingerprint.clone_into(&mut progress.run_fingerprint);
            if progress.step > plan.total {
                let (step, total) = (progress.step, plan.total);
                let message = format!("is of step {step}, and the run is to have {total} steps");
                return Err(Error::Checkpoint { path, message });
            }
        }
    }
    tuned.begin(&TrainingPlan { total_steps: plan.total, domains: &run.dataset.domains })?;
    // What reading the data and finding the method's start took.
    release_kept();
    let before = progress.elapsed_s;
    let started = Instant::now();
    let used = Used::from(run.meter, &progress);
    let total_steps = plan.total;
    // Known before anything is written: then nothing is left to do but what a crash kept from being done.
    let mut ending = over(&progress, &plan, config);
    if ending.is_none() {
        sink.record(&Event::Started { step: progress.step, total_steps })?;
        if let Some(folder) = run.folder {
            sweep_within(&folder.join("checkpoints"));
        }
    }
    let mut notes = Notes::default();
    let router_start = match run.folder {
        Some(folder) if progress.step > 0 => RouterStart::recall(folder, run.decoder.dtype())?,
        folder => RouterStart::note(&*tuned, folder)?,
    };
    let evaluated = |tuned: &dyn Tuned| -> Result<Option<Evaluation>> {
        let (valid, domains) = (&run.dataset.valid, &run.dataset.domains);
        let found = evaluate_until(run.stop, run.decoder, tuned.as_adapter(), valid, domains)?;
        let router_movement = router_start.as_ref().and_then(|start| start.distance(tuned));
        Ok(found.map(|found| {
            let heads = HeadSummary::of_live(tuned, found.routing.as_ref());
            Evaluation { router_movement, heads, ..found }
        }))
    };
    let mut evaluation = None;
    // Whether something happened since the last checkpoint.
    let mut unsaved = false;
    let ending = loop {
        if progress.evaluation_due
            && let Some(found) = evaluated(tuned)?
        {
            let best = progress.best_loss.is_none_or(|best| found.loss < best);
            if best {
                progress.best_loss = Some(found.loss);
                progress.evaluations_since_best = 0;
                if let Some(folder) = run.folder {
                    save_adapter(&folder.join("best"), tuned, run, &mut notes, sink)
                        .map_err(|error| of_step(error, progress.step, run))?;
                }
            } else {
                progress.evaluations_since_best += 1;
            }
            progress.evaluation_due = false;
            unsaved = true;
            let step = progress.step;
            sink.record(&Event::Evaluated { step, evaluation: found.clone(), best })?;
            evaluation = Some(found);
        }
        ending = ending.or_else(|| over(&progress, &plan, config));
        if ending.is_none() && run.stop.load(Ordering::Relaxed) {
            ending = Some(Ending::Interrupted);
        }
        let due = |every: usize| every > 0 && progress.step.is_multiple_of(every);
        if unsaved
            && (ending.is_some() || due(config.save_every))
            && let Some(folder) = run.folder
        {
            let path = checkpoint::folder_of(folder, progress.step);
            used.note(&mut progress);
            let saved = checkpoint::save(&path, tuned, &optimizer, &progress, run, &sites);
            let kept = saved.map_err(|error| of_step(error, progress.step, run))?;
            notes.set_aside(kept, sink)?;
            for note in checkpoint::prune(folder, config.keep_checkpoints)? {
                notes.add(note, sink)?;
            }
            sink.record(&Event::Saved { step: progress.step, path })?;
        }
        if let Some(ending) = ending {
            break ending;
        }
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
        tuned.before_step(progress.step);
        let log = looks_at(progress.step + 1, plan.total)
            .then(|| RoutingLog::new(run.dataset.domains.len()));
        let mut gradients = Gradients::default();
        let (mut loss, mut aux_loss) = (0.0, 0.0);
        for (index, (examples, batch)) in batches.iter().enumerate() {
            let seed = mix(mix(config.seed) ^ mix(progress.step as u64)) ^ index as u64;
            let of_record = |of: &ClusterOf<'_>| -> Vec<u32> {
                let found = examples.iter().map(|example| of(example.source, example.row));
                found.map(|cluster| cluster.unwrap_or(NO_CLUSTER)).collect()
            };
            let clusters = run.clusters.map(of_record).unwrap_or_default();
            let pass = Pass::training(mix(seed))
                .of_sequences(&batch.offsets, &batch.domains)
                .in_clusters(&clusters)
                .checkpointing(config.gradient_checkpointing);
            let pass = match log.as_ref().filter(|_| index == 0) {
                Some(log) => {
                    let labelled = batch.labels.iter().enumerate();
                    let labelled = labelled.filter(|(_, label)| **label != IGNORE_LABEL);
                    log.next_training_batch(token_domains(batch), labelled.map(|(at, _)| at));
                    pass.observed_by(log)
                }
                None => pass,
            };
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
        let factor = config.curve().factor(progress.step, plan.total, warmup);
        let learning_rate = config.learning_rate * factor;
        optimizer.step(tuned, &gradients, learning_rate);
        progress.step += 1;
        tuned.after_step(progress.step, &gradients);
        progress.optimizer_steps = optimizer.steps();
        progress.elapsed_s = before + started.elapsed().as_secs_f64();
        used.note(&mut progress);
        let seen = log.and_then(|log| log.summary(&run.dataset.domains));
        let routers = seen.map(|seen| RouterMetrics::of(&*tuned, &seen, router_start.as_ref()));
        let told = routers.as_ref().and_then(|found| found.warning(progress.step, plan.total));
        if let Some(warning) = told {
            notes.add(warning, sink)?;
        }
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
            energy_j: progress.energy_j,
            energy_source: progress.energy_source.clone(),
            elapsed_s: progress.elapsed_s,
            routers,
        }))?;

        unsaved = true;
        let last = progress.step == plan.total;
        let due = config.eval_every > 0 && progress.step.is_multiple_of(config.eval_every);
        progress.evaluation_due = !run.dataset.valid.is_empty() && (last || due);
    };
    if ending == Ending::Interrupted {
        return Ok(outcome(ending, &progress, evaluation, used.now()));
    }
    if let Some(folder) = run.folder {
        save_adapter(&folder.join("adapter"), tuned, run, &mut notes, sink)
            .map_err(|error| of_step(error, progress.step, run))?;
    }
    // Of a run that lacked its adapter alone.
    if evaluation.is_none() && !run.dataset.valid.is_empty() {
        evaluation = evaluated(tuned)?;
        if evaluation.is_none() {
            return Ok(outcome(Ending::Interrupted, &progress, None, used.now()));
        }
    }
    Ok(outcome(ending, &progress, evaluation, used.now()))
}

fn outcome(
    ending: Ending,
    progress: &Progress,
    evaluation: Option<Evaluation>,
    energy: Reading,
) -> Outcome {
    Outcome { ending, steps: progress.step, evaluation, best_loss: progress.best_loss, energy }
}

/// How a run that stands at `progress` has ended; none while there is something left to do.
fn over(progress: &Progress, plan: &Plan, config: &TrainConfig) -> Option<Ending> {
    let patience = config.early_stopping_patience;
    if progress.evaluation_due {
        None
    } else if patience > 0 && progress.evaluations_since_best >= patience {
        Some(Ending::EarlyStopped)
    } else {
        (progress.step >= plan.total).then_some(Ending::Finished)
    }
}

/// What came of a run that [`fit`] would find finished; none if there is something left to do, or
/// no checkpoint. Nothing is written.
///
/// # Errors
/// If the newest checkpoint is malformed, or belongs to a run with other settings or data.
pub fn finished(run: &Run<'_>) -> Result<Option<Outcome>> {
    let Some(folder) = run.folder else { return Ok(None) };
    let Some((_, path)) = checkpoint::list(folder)?.pop() else { return Ok(None) };
    let of_run = run.continues.unwrap_or(run.fingerprint);
    let progress = checkpoint::read_state(&path, of_run)?;
    let ending = over(&progress, &Plan::new(run)?, run.config);
    let energy = Reading {
        joules: progress.energy_j,
        source: progress.energy_source.clone(),
        reason: progress.energy_j.is_none().then(|| "the run was not measured".to_owned()),
        estimated: progress.energy_source.as_ref().is_some_and(|of| of.contains(ESTIMATE)),
        seconds: progress.elapsed_s,
    };
    Ok(ending.map(|ending| outcome(ending, &progress, None, energy)))
}

/// What is told once of what did not work out.
#[derive(Default)]
struct Notes(BTreeSet<String>);

impl Notes {
    fn add(&mut self, note: String, sink: &mut dyn Sink) -> Result<()> {
        match self.0.insert(note.clone()) {
            true => sink.record(&Event::Note(note)),
            false => Ok(()),
        }
    }

    fn set_aside(&mut self, kept: Option<PathBuf>, sink: &mut dyn Sink) -> Result<()> {
        let Some(kept) = kept else { return Ok(()) };
        let kept = kept.display();
        self.add(
            format!("files that hydralora did not write were in the way; they are in {kept}"),
            sink,
        )
    }
}

/// Writes an adapter of the run; what somebody put there is kept under another name, since a run of
/// hours does not end for it.
fn save_adapter(
    folder: &Path,
    tuned: &dyn Tuned,
    run: &Run<'_>,
    notes: &mut Notes,
    sink: &mut dyn Sink,
) -> Result<()> {
    notes.set_aside(set_aside(folder, &io::TRAINED)?, sink)?;
    Ok(io::save(folder, tuned, run.metadata, &run.decoder.sites())?)
}

/// Weights that a step spoilt are what became of that step, rather than of a file.
fn of_step(error: Error, step: usize, run: &Run<'_>) -> Error {
    match error {
        Error::Adapter(hydralora_peft::Error::NonFinite { name, .. }) => {
            Error::NonFiniteWeights { step, name, kept: kept(run.folder) }
        }
        other => other,
    }
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

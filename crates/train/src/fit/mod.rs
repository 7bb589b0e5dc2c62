//! The training loop in its parts: load the data of a step, go backward through its
//! micro-batches, reduce what ranks found to one gradient, clip it, let the
//! optimizer take its step, and tell whoever watches. `trainer` has them in this order.

mod backward;
mod clip;
mod deal;
mod files;
mod load;
mod plan;
mod reduce;
mod trainer;

use crate::checkpoint::{self, Progress};
use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::evaluate::Evaluation;
use crate::event::Sink;
use crate::ranks::Team;
use hydralora_data::Dataset;
use hydralora_energy::{ESTIMATE, Meter, Reading};
use hydralora_model::Decoder;
use hydralora_peft::Tuned;
use hydralora_peft::io::Metadata;
use load::Loader;
use plan::Plan;
pub use reduce::RankMetrics;
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use trainer::Trainer;

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
    /// The ranks that train it together; each has a run that says the same.
    pub team: &'a Team<'a>,
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

/// How many optimizer steps a run has.
///
/// # Errors
/// If the data give no batch, all of the steps would warm up, or the set that decides which adapter is the
/// best has no records.
pub fn planned_steps(run: &Run<'_>) -> Result<usize> {
    let total = Plan::new(run)?.0.total;
    check_best_set(run)?;
    run.config.warmup(total).map(|_| total)
}

/// Makes sure that a run of `tuned` can be dealt to the ranks of `team`, before anything is done for it.
///
/// # Errors
/// If ranks have to take whole micro-batches, and these cannot be dealt evenly.
pub fn check_ranks(team: &Team<'_>, tuned: &dyn Tuned, config: &TrainConfig) -> Result<()> {
    deal::Share::of(team, tuned, config).map(|_| ())
}

/// Makes sure that there is something to decide by which adapter is the best.
fn check_best_set(run: &Run<'_>) -> Result<()> {
    let Some(set) = &run.config.best_set else { return Ok(()) };
    let sources = run.dataset.report.sources.iter();
    let of_set = sources.filter(|source| source.set.as_ref() == Some(set));
    if of_set.map(|source| source.valid_examples).sum::<usize>() > 0 {
        return Ok(());
    }
    let message = format!("train.best_set: the evaluation set `{set}` has no records");
    Err(Error::Config { faults: vec![message] })
}

/// Trains `tuned` as `run` says, from the newest checkpoint if `resume`.
///
/// # Errors
/// If the loss or a gradient stops being finite (the last checkpoint is kept), a record cannot be read, a
/// file cannot be written, or a checkpoint does not belong to this run; also if that is so on another rank
/// of the team, or one is gone. All ranks then know.
pub fn fit(
    run: &Run<'_>,
    tuned: &mut dyn Tuned,
    resume: bool,
    sink: &mut dyn Sink,
) -> Result<Outcome> {
    run.team.together(|| {
        let (trainer, order, share) = Trainer::open(run, tuned, resume, sink)?;
        std::thread::scope(|scope| {
            let (examples, steps) = (&run.dataset.train, trainer.steps_left());
            let mut loader = Loader::start(scope, examples, order, share, steps)?;
            let outcome = trainer.train(&mut loader);
            loader.end();
            outcome
        })
    })
}

fn outcome(
    ending: Ending,
    progress: &Progress,
    evaluation: Option<Evaluation>,
    energy: Reading,
) -> Outcome {
    Outcome { ending, steps: progress.step, evaluation, best_loss: progress.best_loss, energy }
}

/// How a run of `total` steps that stands at `progress` has ended; none while there is something left to
/// do.
fn over(progress: &Progress, total: usize, config: &TrainConfig) -> Option<Ending> {
    let patience = config.early_stopping_patience;
    if progress.evaluation_due {
        None
    } else if patience > 0 && progress.evaluations_since_best >= patience {
        Some(Ending::EarlyStopped)
    } else {
        (progress.step >= total).then_some(Ending::Finished)
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
    let ending = over(&progress, Plan::new(run)?.0.total, run.config);
    let energy = Reading {
        joules: progress.energy_j,
        source: progress.energy_source.clone(),
        reason: progress.energy_j.is_none().then(|| "the run was not measured".to_owned()),
        estimated: progress.energy_source.as_ref().is_some_and(|of| of.contains(ESTIMATE)),
        seconds: progress.elapsed_s,
    };
    Ok(ending.map(|ending| outcome(ending, &progress, None, energy)))
}

//! A run while it is trained: what it consists of, and the loop over its steps.

use super::backward::{Backward, Summed};
use super::clip::clip;
use super::deal::Share;
use super::files::{Notes, of_step, save_adapter};
use super::load::Loader;
use super::plan::{Order, Plan};
use super::reduce::{self, RankMetrics, Totals};
use super::{Ending, Outcome, Run, check_best_set, outcome, over};
use crate::checkpoint::{self, Progress};
use crate::energy::Used;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, evaluate_until};
use crate::event::{Event, Sink, StepMetrics, peak_rss_mb};
use crate::heads::{HeadSummary, RouterMetrics, looks_at};
use crate::movement::RouterStart;
use crate::optimizer::Stepper;
use crate::routing::RoutingLog;
use hydralora_data::Sets;
use hydralora_files::sweep_within;
use hydralora_kernels::Gradients;
use hydralora_kernels::buffer::release_kept;
use hydralora_peft::{TrainingPlan, Tuned};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A run and where it stands.
pub(super) struct Trainer<'a, 'r> {
    run: &'a Run<'r>,
    tuned: &'a mut dyn Tuned,
    sink: &'a mut dyn Sink,
    plan: Plan,
    /// Steps that warm up.
    warmup: usize,
    optimizer: Stepper,
    progress: Progress,
    used: Used<'r>,
    /// Seconds of training before this part of the run, and when this one started.
    before: f64,
    started: Instant,
    notes: Notes,
    router_start: Option<RouterStart>,
    /// The evaluation sets.
    sets: Sets,
    evaluation: Option<Evaluation>,
    /// Whether something happened since the last checkpoint.
    unsaved: bool,
}

impl<'a, 'r> Trainer<'a, 'r> {
    /// Makes a run ready for its next step, from the newest checkpoint if `resume`; gives the order of its
    /// examples and the share of this rank too. Nothing is written but by the sink and, of a fresh run, where
    /// its routers start.
    pub(super) fn open(
        run: &'a Run<'r>,
        tuned: &'a mut dyn Tuned,
        resume: bool,
        sink: &'a mut dyn Sink,
    ) -> Result<(Self, Order, Share)> {
        let config = run.config;
        let (plan, order) = Plan::new(run)?;
        let warmup = config.warmup(plan.total)?;
        check_best_set(run)?;
        if run.clusters.is_none() && tuned.options().guide_clusters().is_some() {
            let message =
                "the routers are guided by clusters of the training data, which the run lacks";
            return Err(Error::Config { faults: vec![message.to_owned()] });
        }
        let share = Share::of(run.team, &*tuned, config)?;
        let mut optimizer = Stepper::new(&config.optimizer, config.rates(), tuned);
        let mut progress =
            Progress { optimizer: optimizer.name().to_owned(), ..Progress::start(run.fingerprint) };
        if resume && let Some(found) = last_checkpoint(run, tuned, &mut optimizer, plan.total)? {
            progress = found;
        }
        tuned.begin(&TrainingPlan { total_steps: plan.total, domains: &run.dataset.domains })?;
        // What reading the data and finding the method's start took.
        release_kept();
        let (before, started) = (progress.elapsed_s, Instant::now());
        let used = Used::from(run.meter, &progress);
        // Before anything is written: ranks that begin from other values would never come together again.
        if run.team.size() > 1 {
            let stand = format!("step {} with {}", progress.step, reduce::digest(&*tuned));
            run.team.same("the adapter to begin from", stand)?;
        }
        // Known before anything is written: then nothing is left to do but what a crash kept from being
        // done.
        if over(&progress, plan.total, config).is_none() {
            sink.record(&Event::Started { step: progress.step, total_steps: plan.total })?;
            if let Some(folder) = run.folder.filter(|_| run.team.writes()) {
                sweep_within(&folder.join("checkpoints"));
            }
        }
        let router_start = match run.folder {
            Some(folder) if progress.step > 0 => RouterStart::recall(folder, run.decoder.dtype())?,
            folder => RouterStart::note(&*tuned, folder.filter(|_| run.team.writes()))?,
        };
        let notes = Notes::default();
        let (evaluation, unsaved) = (None, false);
        let trainer = Self {
            run,
            tuned,
            sink,
            plan,
            warmup,
            optimizer,
            progress,
            used,
            before,
            started,
            notes,
            router_start,
            sets: run.dataset.report.sets(),
            evaluation,
            unsaved,
        };
        Ok((trainer, order, share))
    }

    /// The steps that are left, numbered from 0.
    pub(super) fn steps_left(&self) -> std::ops::Range<usize> {
        match over(&self.progress, self.plan.total, self.run.config) {
            Some(_) => 0..0,
            None => self.progress.step..self.plan.total,
        }
    }

    /// Trains to the run's end.
    pub(super) fn train(mut self, loader: &mut Loader<'_>) -> Result<Outcome> {
        let ending = loop {
            if self.progress.evaluation_due {
                self.evaluate()?;
            }
            // One rank that is told to stop stops all, at the same step.
            let stopped = self.run.team.any("stop", self.run.stop.load(Ordering::Relaxed))?;
            let over = over(&self.progress, self.plan.total, self.run.config);
            let ending = over.or(stopped.then_some(Ending::Interrupted));
            self.save_if_due(ending.is_some())?;
            if let Some(ending) = ending {
                break ending;
            }
            self.step(loader)?;
        };
        self.finish(ending)
    }

    /// Takes one step: load, backward, reduce, clip, step, events.
    fn step(&mut self, loader: &mut Loader<'_>) -> Result<()> {
        let started = Instant::now();
        let team = self.run.team;
        let traffic = team.traffic();
        let data = loader.next()?;
        self.tuned.before_step(self.progress.step);
        let step = self.progress.step;
        let log = looks_at(step + 1, self.plan.total)
            .then(|| RoutingLog::new(self.run.dataset.domains.len()));
        let totals = reduce::totals(team, &data)?;
        let (run, tuned) = (self.run, &*self.tuned);
        let found = Backward { run, tuned, step, totals, log: log.as_ref() }.all(&data)?;
        let mut summed = reduce::sums(team, &mut *self.tuned, found)?;
        if let Some(log) = &log {
            log.add_up(team)?;
        }
        let ranks = RankMetrics::since(traffic, team);
        let (most, tuned) = (run.config.max_grad_norm, &*self.tuned);
        let grad_norm = clip(&mut summed.gradients, most, tuned, step + 1, run.folder)?;
        let learning_rate = self.follow(&summed.gradients);
        let told = Told { totals, summed: &summed, grad_norm, learning_rate, ranks };
        self.tell(told, started, log.as_ref())?;
        self.unsaved = true;
        let (step, every) = (self.progress.step, self.run.config.eval_every);
        let due = step == self.plan.total || every > 0 && step.is_multiple_of(every);
        self.progress.evaluation_due = !self.run.dataset.valid.is_empty() && due;
        Ok(())
    }

    /// Moves the parameters along the gradients; gives the learning rate.
    fn follow(&mut self, gradients: &Gradients) -> f64 {
        let config = self.run.config;
        let factor = config.curve().factor(self.progress.step, self.plan.total, self.warmup);
        let learning_rate = config.learning_rate * factor;
        self.optimizer.step(self.tuned, gradients, learning_rate);
        self.progress.step += 1;
        self.tuned.after_step(self.progress.step, gradients);
        self.progress.optimizer_steps = self.optimizer.steps();
        self.progress.elapsed_s = self.before + self.started.elapsed().as_secs_f64();
        self.used.note(&mut self.progress);
        learning_rate
    }

    /// Tells whoever watches of the step that was taken.
    fn tell(&mut self, told: Told<'_>, started: Instant, log: Option<&RoutingLog>) -> Result<()> {
        let step = self.progress.step;
        let seen = log.and_then(|log| log.summary(&self.run.dataset.domains));
        let start = self.router_start.as_ref();
        let routers = seen.map(|seen| RouterMetrics::of(&*self.tuned, &seen, start));
        let warning = routers.as_ref().and_then(|found| found.warning(step, self.plan.total));
        if let Some(warning) = warning {
            self.notes.add(warning, self.sink)?;
        }
        let Totals { tokens, label_tokens, .. } = told.totals;
        self.sink.record(&Event::Step(StepMetrics {
            step,
            epoch: self.plan.epochs_done(step),
            loss: told.summed.loss,
            aux_loss: told.summed.aux_loss,
            learning_rate: told.learning_rate,
            grad_norm: told.grad_norm,
            tokens,
            label_tokens,
            tokens_per_s: tokens as f64 / started.elapsed().as_secs_f64(),
            peak_rss_mb: peak_rss_mb(),
            energy_j: self.progress.energy_j,
            energy_source: self.progress.energy_source.clone(),
            elapsed_s: self.progress.elapsed_s,
            routers,
            ranks: told.ranks,
        }))
    }

    /// The held-out loss as things stand; none when told to stop.
    fn measure(&self) -> Result<Option<Evaluation>> {
        let (run, tuned) = (self.run, &*self.tuned);
        let (valid, domains) = (&run.dataset.valid, &run.dataset.domains);
        let (adapter, sets) = (tuned.as_adapter(), &self.sets);
        let found = evaluate_until(run.team, run.stop, run.decoder, adapter, valid, domains, sets)?;
        let router_movement = self.router_start.as_ref().and_then(|start| start.distance(tuned));
        Ok(found.map(|found| {
            let heads = HeadSummary::of_live(tuned, found.routing.as_ref());
            Evaluation { router_movement, heads, ..found }
        }))
    }

    /// Evaluates, keeping the adapter if it is the best so far.
    fn evaluate(&mut self) -> Result<()> {
        let Some(found) = self.measure()? else { return Ok(()) };
        let step = self.progress.step;
        // That the set has records was made sure of before the first step.
        let loss = found.loss_of(self.run.config.best_set.as_deref()).unwrap_or(found.loss);
        let best = self.progress.best_loss.is_none_or(|best| loss < best);
        if best {
            self.progress.best_loss = Some(loss);
            self.progress.evaluations_since_best = 0;
            self.save_adapter("best")?;
        } else {
            self.progress.evaluations_since_best += 1;
        }
        self.progress.evaluation_due = false;
        self.unsaved = true;
        self.sink.record(&Event::Evaluated { step, evaluation: found.clone(), best })?;
        self.evaluation = Some(found);
        Ok(())
    }

    fn save_adapter(&mut self, name: &str) -> Result<()> {
        let Some(folder) = self.run.folder.filter(|_| self.run.team.writes()) else {
            return Ok(());
        };
        save_adapter(&folder.join(name), &*self.tuned, self.run, &mut self.notes, self.sink)
            .map_err(|error| of_step(error, self.progress.step, self.run))
    }

    /// Writes a checkpoint where one is due and something happened since the last.
    fn save_if_due(&mut self, over: bool) -> Result<()> {
        let (step, every) = (self.progress.step, self.run.config.save_every);
        let due = over || every > 0 && step.is_multiple_of(every);
        let Some(folder) = self.run.folder.filter(|_| due && self.unsaved) else { return Ok(()) };
        let team = self.run.team;
        if team.size() > 1 {
            team.same("the adapter to save", reduce::digest(&*self.tuned))?;
        }
        if !team.writes() {
            return Ok(());
        }
        let path = checkpoint::folder_of(folder, step);
        self.used.note(&mut self.progress);
        let (tuned, run) = (&*self.tuned, self.run);
        let sites = run.decoder.sites();
        let saved = checkpoint::save(&path, tuned, &self.optimizer, &self.progress, run, &sites);
        let kept = saved.map_err(|error| of_step(error, step, run))?;
        self.notes.set_aside(kept, self.sink)?;
        for note in checkpoint::prune(folder, run.config.keep_checkpoints)? {
            self.notes.add(note, self.sink)?;
        }
        self.sink.record(&Event::Saved { step, path })
    }

    /// Writes the adapter a run ends with; of one that was told to stop nothing.
    fn finish(mut self, ending: Ending) -> Result<Outcome> {
        if ending != Ending::Interrupted {
            self.save_adapter("adapter")?;
            // Of a run that lacked its adapter alone.
            if self.evaluation.is_none() && !self.run.dataset.valid.is_empty() {
                self.evaluation = self.measure()?;
                if self.evaluation.is_none() {
                    return Ok(outcome(Ending::Interrupted, &self.progress, None, self.used.now()));
                }
            }
        }
        Ok(outcome(ending, &self.progress, self.evaluation, self.used.now()))
    }
}

/// What a step is told of.
struct Told<'a> {
    totals: Totals,
    summed: &'a Summed,
    grad_norm: f64,
    learning_rate: f64,
    ranks: Option<RankMetrics>,
}

/// Takes over the newest checkpoint of a run of `total` steps; none if there is none.
fn last_checkpoint(
    run: &Run<'_>,
    tuned: &mut dyn Tuned,
    optimizer: &mut Stepper,
    total: usize,
) -> Result<Option<Progress>> {
    let Some(folder) = run.folder else { return Ok(None) };
    let Some((_, path)) = checkpoint::list(folder)?.pop() else { return Ok(None) };
    let of_run = run.continues.unwrap_or(run.fingerprint);
    let (sites, dtype) = (run.decoder.sites(), run.decoder.dtype());
    let mut progress = checkpoint::load(&path, tuned, optimizer, of_run, &sites, dtype)?;
    run.fingerprint.clone_into(&mut progress.run_fingerprint);
    if progress.step > total {
        let step = progress.step;
        let message = format!("is of step {step}, and the run is to have {total} steps");
        return Err(Error::Checkpoint { path, message });
    }
    Ok(Some(progress))
}

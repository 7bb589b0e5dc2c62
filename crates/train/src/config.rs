//! The `train:` section of a recipe.

use crate::error::{Error, Result};
use crate::optimizer::{Chosen, Rates};
use crate::schedule::{Curve, Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The most passes over the data.
const MOST_EPOCHS: f64 = 1e5;

/// How to train. Reading it leaves the optimizer at its default: [`Chosen::take`] reads that.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Passes over the data.
    pub epochs: f64,
    /// Stop after this many optimizer steps, whatever `epochs` says.
    pub max_steps: Option<usize>,
    /// Sequences per micro-batch.
    pub batch_size: usize,
    /// At most this many tokens per micro-batch; larger batches are split.
    pub max_tokens_per_batch: Option<usize>,
    /// Micro-batches per optimizer step.
    pub grad_accumulation: usize,
    /// Whether layers keep only their inputs for the way back and compute the rest again: less
    /// memory for about a third more time.
    pub gradient_checkpointing: bool,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// The learning rate after warm-up.
    pub schedule: Schedule,
    /// Where the learning rate ends, as a share of its peak.
    pub min_learning_rate_ratio: f64,
    /// The power of the schedule `polynomial`.
    pub schedule_power: f64,
    /// Share of all steps in which the schedule `wsd` falls.
    pub decay_ratio: f64,
    /// Share of all steps that warm up.
    pub warmup_ratio: f64,
    /// Steps that warm up; takes precedence over `warmup_ratio`.
    pub warmup_steps: Option<usize>,
    /// The optimizer with its options: its name in a recipe is `optimizer`, and they stand beside it.
    #[serde(flatten, skip_deserializing)]
    #[schemars(skip)]
    pub optimizer: Chosen,
    /// How many times faster B learns than the rest (LoRA+).
    pub b_learning_rate_ratio: f64,
    /// How many times faster routers learn than the rest.
    pub router_learning_rate_ratio: f64,
    /// Largest Euclidean norm of the whole gradient; no limit if 0.
    pub max_grad_norm: f64,
    /// Seed of initial values, order and dropout.
    pub seed: u64,
    /// Optimizer steps between evaluations; only at the end if 0.
    pub eval_every: usize,
    /// The evaluation set whose loss decides which adapter is the best, and when training stops early;
    /// all held-out records together if none is named.
    pub best_set: Option<String>,
    /// Optimizer steps between checkpoints; only at the end if 0.
    pub save_every: usize,
    /// Checkpoints kept.
    pub keep_checkpoints: usize,
    /// Stop after this many evaluations without improvement; never if 0.
    pub early_stopping_patience: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 1.0,
            max_steps: None,
            batch_size: 8,
            max_tokens_per_batch: None,
            grad_accumulation: 1,
            gradient_checkpointing: false,
            learning_rate: 2e-4,
            schedule: Schedule::Cosine,
            min_learning_rate_ratio: 0.0,
            schedule_power: 1.0,
            decay_ratio: 0.1,
            warmup_ratio: 0.03,
            warmup_steps: None,
            optimizer: Chosen::default(),
            b_learning_rate_ratio: 1.0,
            router_learning_rate_ratio: 1.0,
            max_grad_norm: 1.0,
            seed: 41,
            eval_every: 50,
            best_set: None,
            save_every: 50,
            keep_checkpoints: 2,
            early_stopping_patience: 0,
        }
    }
}

impl TrainConfig {
    /// How much faster some parameters learn than the rest.
    pub fn rates(&self) -> Rates {
        Rates { b: self.b_learning_rate_ratio, router: self.router_learning_rate_ratio }
    }

    /// The schedule with its constants.
    pub fn curve(&self) -> Curve {
        Curve {
            schedule: self.schedule,
            floor: self.min_learning_rate_ratio,
            power: self.schedule_power,
            decay_ratio: self.decay_ratio,
        }
    }

    /// How many of a run's `total` steps warm up. A share is rounded up, but leaves the last step.
    ///
    /// # Errors
    /// If `warmup_steps` leaves no step at the full learning rate.
    pub fn warmup(&self, total: usize) -> Result<usize> {
        match self.warmup_steps {
            Some(steps) if steps >= total => {
                let message = format!(
                    "train.warmup_steps: is {steps}, and the run has {total} step(s) in all; expected fewer, \
                     or `warmup_ratio`"
                );
                Err(Error::Config { faults: vec![message] })
            }
            Some(steps) => Ok(steps),
            None => {
                let share = (self.warmup_ratio * total as f64).ceil() as usize;
                Ok(share.min(total.saturating_sub(1)))
            }
        }
    }

    /// Every value that makes no sense, as `(field, what is wrong)`.
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        let mut check = |right: bool, field: &str, found: String, expected: &str| {
            if !right {
                faults.push((format!("train.{field}"), format!("is {found}; expected {expected}")));
            }
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let share = |value: f64| (0.0..1.0).contains(&value);
        check(
            positive(self.epochs) && self.epochs <= MOST_EPOCHS,
            "epochs",
            self.epochs.to_string(),
            "a positive number up to 100000",
        );
        check(self.max_steps != Some(0), "max_steps", "0".into(), "at least 1");
        check(self.batch_size > 0, "batch_size", "0".into(), "at least 1");
        check(
            self.max_tokens_per_batch != Some(0),
            "max_tokens_per_batch",
            "0".into(),
            "at least 1",
        );
        check(self.grad_accumulation > 0, "grad_accumulation", "0".into(), "at least 1");
        let rate = self.learning_rate;
        check(positive(rate), "learning_rate", rate.to_string(), "a positive number");
        let warmup = self.warmup_ratio;
        check(share(warmup), "warmup_ratio", warmup.to_string(), "0 or more, and less than 1");
        let of = |schedule: Schedule| self.schedule == schedule;
        let floor = self.min_learning_rate_ratio;
        let falls = !(of(Schedule::Constant) || of(Schedule::InverseSqrt));
        check(
            share(floor),
            "min_learning_rate_ratio",
            floor.to_string(),
            "0 or more, and less than 1",
        );
        check(
            floor == 0.0 || falls,
            "min_learning_rate_ratio",
            floor.to_string(),
            "0 with schedules that fall to no end, constant and inverse_sqrt",
        );
        let power = self.schedule_power;
        check(positive(power), "schedule_power", power.to_string(), "a positive number");
        check(
            power == 1.0 || of(Schedule::Polynomial),
            "schedule_power",
            power.to_string(),
            "1 unless `schedule` is polynomial",
        );
        let last = self.decay_ratio;
        check(last > 0.0 && last <= 1.0, "decay_ratio", last.to_string(), "0 < decay_ratio ≤ 1");
        check(
            last == Self::default().decay_ratio || of(Schedule::Wsd),
            "decay_ratio",
            last.to_string(),
            "the default, 0.1, unless `schedule` is wsd",
        );
        let ratio = self.b_learning_rate_ratio;
        check(positive(ratio), "b_learning_rate_ratio", ratio.to_string(), "a positive number");
        let ratio = self.router_learning_rate_ratio;
        check(
            positive(ratio),
            "router_learning_rate_ratio",
            ratio.to_string(),
            "a positive number",
        );
        let norm = self.max_grad_norm;
        check(norm.is_finite() && norm >= 0.0, "max_grad_norm", norm.to_string(), "0 or more");
        check(self.keep_checkpoints > 0, "keep_checkpoints", "0".into(), "at least 1");
        faults
    }
}

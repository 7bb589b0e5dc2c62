//! How many steps a run takes and about how long.

use crate::plan::Plan;
use hydralora_train::ranks::Team;
use hydralora_train::{Run, planned_steps, time_tokens};
use serde::Serialize;
use std::sync::atomic::AtomicBool;

/// Multiplications and additions that the timed piece is to take at most, so that a large model is
/// timed on fewer tokens.
const TIMED_OPERATIONS: usize = 100_000_000_000;
/// Fewest and most tokens to time.
const TIMED_TOKENS: [usize; 2] = [16, 1024];
/// How much faster held-out records go than training ones: there is no way back.
const FORWARD_ALONE: f64 = 2.5;

/// What a run is expected to take.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Estimate {
    /// Optimizer steps.
    pub(crate) steps: usize,
    /// Tokens that are trained in all of them, about.
    pub(crate) tokens: usize,
    /// Tokens a second, if they could be timed.
    pub(crate) tokens_per_s: Option<f64>,
    /// Seconds, evaluations among them.
    pub(crate) seconds: Option<f64>,
}

impl Estimate {
    /// Counts a plan's steps and times a few of its tokens, for so many ranks that are as fast as this one.
    pub(crate) fn of(plan: &mut Plan, ranks: usize) -> anyhow::Result<Self> {
        let (train, weights) = (&plan.recipe.train, plan.dataset.report.weights());
        let run = Run {
            decoder: &plan.base.decoder,
            dataset: &plan.dataset,
            weights: &weights,
            shuffle: plan.recipe.data.shuffle,
            config: train,
            metadata: &plan.metadata,
            fingerprint: "",
            continues: None,
            settings: &serde_json::Value::Null,
            folder: None,
            meter: None,
            clusters: None,
            stop: &AtomicBool::new(false),
            team: &Team::alone(),
        };
        let steps = planned_steps(&run)?;
        let lengths = plan.dataset.train.lengths();
        let mean = lengths.iter().map(|&length| f64::from(length)).sum::<f64>()
            / lengths.len().max(1) as f64;
        let sequences = (train.batch_size * train.grad_accumulation).min(lengths.len());
        let of_step = sequences as f64 * mean;
        let of_step = match train.max_tokens_per_batch {
            Some(most) => of_step.min((most * train.grad_accumulation) as f64),
            None => of_step,
        };
        let tokens = of_step * steps as f64;
        let operations = 4 * plan.base.decoder.num_parameters().max(1);
        let most = (TIMED_OPERATIONS / operations).clamp(TIMED_TOKENS[0], TIMED_TOKENS[1]);
        // A run that cannot be timed says itself what is wrong with it.
        let timed = time_tokens(&run, plan.tuned.as_mut(), most).ok();
        let rate = timed.map(|timed| (ranks * timed.tokens) as f64 / timed.seconds.max(1e-9));
        let held_out: f64 = plan.dataset.valid.lengths().iter().map(|&n| f64::from(n)).sum();
        let evaluations = 1 + steps.checked_div(train.eval_every).unwrap_or(0);
        let work = tokens + held_out * evaluations as f64 / FORWARD_ALONE;
        Ok(Self {
            steps,
            tokens: tokens as usize,
            tokens_per_s: rate,
            seconds: rate.map(|rate| work / rate),
        })
    }
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}",
            if self.steps == 1 { "1 step".to_owned() } else { format!("{} steps", self.steps) }
        )?;
        if let (Some(seconds), Some(rate)) = (self.seconds, self.tokens_per_s) {
            write!(f, ", about {} at {rate:.0} tokens/s", duration(seconds))?;
        }
        Ok(())
    }
}

/// A time of which the first digits count.
fn duration(seconds: f64) -> String {
    let of = |number: f64, unit: &str| match number.round() as u64 {
        1 => format!("1 {unit}"),
        number => format!("{number} {unit}s"),
    };
    match seconds {
        s if s < 90.0 => of(s.max(1.0), "second"),
        s if s < 90.0 * 60.0 => of(s / 60.0, "minute"),
        s if s < 48.0 * 3600.0 => of(s / 3600.0, "hour"),
        s => of(s / 86400.0, "day"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rounded_to_what_is_known() {
        for (seconds, expected) in [
            (0.2, "1 second"),
            (59.4, "59 seconds"),
            (600.0, "10 minutes"),
            (7200.0, "2 hours"),
            (200_000.0, "2 days"),
        ] {
            assert_eq!(duration(seconds), expected);
        }
    }
}

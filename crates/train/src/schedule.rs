//! The learning rate over a run.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate moves after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls in a straight line to zero.
    Linear,
    /// Falls along half a cosine to zero.
    #[default]
    Cosine,
}

impl Schedule {
    /// The factor on the peak learning rate at `step` (from 0) of `total`, the first `warmup` of
    /// which rise linearly. They are counted from 1, as a step at a rate of zero trains nothing; from
    /// then on the rate is that of `transformers`.
    pub fn factor(self, step: usize, total: usize, warmup: usize) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => (1.0 - progress).max(0.0),
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_and_falls_as_transformers_does() {
        let cosine = |step| Schedule::Cosine.factor(step, 110, 10);
        assert_eq!(cosine(0), 0.1);
        assert_eq!(cosine(4), 0.5);
        assert_eq!(cosine(9), 1.0);
        assert_eq!(cosine(10), 1.0);
        assert!((cosine(60) - 0.5).abs() < 1e-12);
        assert!(cosine(110) < 1e-12);
        assert_eq!(Schedule::Linear.factor(60, 110, 10), 0.5);
        assert_eq!(Schedule::Constant.factor(109, 110, 10), 1.0);
        assert_eq!(Schedule::Cosine.factor(0, 10, 0), 1.0);
    }

    #[test]
    fn no_step_of_any_run_is_at_a_rate_of_zero() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            for total in 1..40 {
                for warmup in 0..total {
                    let mut rates = (0..total).map(|step| schedule.factor(step, total, warmup));
                    assert!(
                        rates.all(|rate| rate > 0.0 && rate <= 1.0),
                        "{schedule:?} {total} {warmup}"
                    );
                }
            }
        }
    }
}

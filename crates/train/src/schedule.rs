//! The learning rate over a run.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate moves after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls in a straight line.
    Linear,
    /// Falls along half a cosine.
    #[default]
    Cosine,
    /// Falls as a power of what is left.
    Polynomial,
    /// Falls as one over the root of the step, whatever the length of the run.
    InverseSqrt,
    /// Stays, and falls along half a cosine at the end: warm-up, stable, decay.
    Wsd,
}

/// Steps after which [`Schedule::InverseSqrt`] without warm-up has fallen to `1/√2`.
const TIMESCALE: usize = 10_000;

/// A schedule with its constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    /// How it moves.
    pub schedule: Schedule,
    /// Where it ends, as a share of the peak.
    pub floor: f64,
    /// The power of [`Schedule::Polynomial`].
    pub power: f64,
    /// Share of all steps in which [`Schedule::Wsd`] falls.
    pub decay_ratio: f64,
}

impl Curve {
    /// Gives the factor on the peak learning rate at `step` (from 0) of `total`, the first `warmup` of
    /// which rise linearly. They are counted from 1, as a step at a rate of zero trains nothing; from
    /// then on the rate is that of `transformers`.
    pub fn factor(&self, step: usize, total: usize, warmup: usize) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let past = |first: usize, steps: usize| (step - first) as f64 / steps.max(1) as f64;
        let progress = past(warmup, total.saturating_sub(warmup)).min(1.0);
        let half_cosine = |progress: f64| 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        let fall = match self.schedule {
            Schedule::Constant => return 1.0,
            Schedule::InverseSqrt => {
                let scale = if warmup == 0 { TIMESCALE } else { warmup };
                return (scale as f64 / (step - warmup + scale) as f64).sqrt();
            }
            Schedule::Linear => 1.0 - progress,
            Schedule::Cosine => half_cosine(progress),
            Schedule::Polynomial => (1.0 - progress).powf(self.power),
            Schedule::Wsd => {
                let decay = (self.decay_ratio * total as f64).ceil() as usize;
                let first = total.saturating_sub(decay).max(warmup);
                if step < first {
                    return 1.0;
                }
                half_cosine(past(first, total.saturating_sub(first)).min(1.0))
            }
        };
        fall * (1.0 - self.floor) + self.floor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Schedule; 6] = [
        Schedule::Constant,
        Schedule::Linear,
        Schedule::Cosine,
        Schedule::Polynomial,
        Schedule::InverseSqrt,
        Schedule::Wsd,
    ];

    fn plain(schedule: Schedule) -> Curve {
        Curve { schedule, floor: 0.0, power: 1.0, decay_ratio: 0.1 }
    }

    #[test]
    fn rises_and_falls_as_transformers_does() {
        let cosine = |step| plain(Schedule::Cosine).factor(step, 110, 10);
        assert_eq!(cosine(0), 0.1);
        assert_eq!(cosine(4), 0.5);
        assert_eq!(cosine(9), 1.0);
        assert_eq!(cosine(10), 1.0);
        assert!((cosine(60) - 0.5).abs() < 1e-12);
        assert!(cosine(110) < 1e-12);
        assert_eq!(plain(Schedule::Linear).factor(60, 110, 10), 0.5);
        assert_eq!(plain(Schedule::Constant).factor(109, 110, 10), 1.0);
        assert_eq!(plain(Schedule::Cosine).factor(0, 10, 0), 1.0);
    }

    /// The rates of transformers 5.24 at some of 20 steps, the first 4 of which warm up.
    #[test]
    fn every_curve_is_transformers() {
        const STEPS: [usize; 7] = [4, 7, 11, 15, 17, 18, 19];
        let of =
            |schedule, floor, power, decay_ratio| Curve { schedule, floor, power, decay_ratio };
        let cases = [
            (
                of(Schedule::Cosine, 0.1, 1.0, 0.1),
                [
                    1.0,
                    0.924161325536,
                    0.637790644907,
                    0.299993395141,
                    0.175838674464,
                    0.13425421037,
                    0.108646623819,
                ],
            ),
            (
                of(Schedule::Polynomial, 0.05, 2.0, 0.1),
                [
                    1.0,
                    0.6771484375,
                    0.3505859375,
                    0.1427734375,
                    0.0833984375,
                    0.06484375,
                    0.0537109375,
                ],
            ),
            (
                of(Schedule::InverseSqrt, 0.0, 1.0, 0.1),
                [
                    1.0,
                    0.755928946018,
                    0.603022689156,
                    0.516397779494,
                    0.485071250073,
                    0.471404520791,
                    0.458831467741,
                ],
            ),
            (
                of(Schedule::Wsd, 0.2, 1.0, 0.25),
                [1.0, 1.0, 1.0, 1.0, 0.72360679775, 0.47639320225, 0.27639320225],
            ),
        ];
        for (curve, wanted) in cases {
            for (step, wanted) in STEPS.into_iter().zip(wanted) {
                let found = curve.factor(step, 20, 4);
                assert!((found - wanted).abs() < 1e-9, "{curve:?} {step}: {found} {wanted}");
            }
        }
        let found = of(Schedule::InverseSqrt, 0.0, 1.0, 0.1).factor(19, 20, 0);
        assert!((found - 0.99905135161).abs() < 1e-9);
    }

    #[test]
    fn no_step_of_any_run_is_at_a_rate_of_zero() {
        for schedule in ALL {
            for total in 1..40 {
                for warmup in 0..total {
                    for floor in [0.0, 0.3] {
                        let curve = Curve { floor, decay_ratio: 0.4, ..plain(schedule) };
                        let mut rates = (0..total).map(|step| curve.factor(step, total, warmup));
                        assert!(
                            rates.all(|rate| rate > 0.0 && rate <= 1.0),
                            "{curve:?} {total} {warmup}"
                        );
                    }
                }
            }
        }
    }
}

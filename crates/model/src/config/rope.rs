//! Rotary position embedding as configurations describe it.

mod from_gguf;
mod from_json;

use crate::gguf::Value as GgufValue;
use serde_json::{Map, Value, json};
use std::f64::consts::PI;
use std::sync::Arc;

pub(crate) use from_gguf::{ATTENTION_FACTOR, from_gguf};
pub(crate) use from_json::{RopeDefaults, agreeing, from_json, older_scaling, one_from_json};

/// GGUF's tensor of divisors of the rotary frequencies.
pub(crate) const FREQUENCY_FACTORS: &str = "rope_freqs.weight";
/// The divisor that GGUF files give frequencies that do not turn.
const STANDING: f32 = 1e30;
/// From which divisor on a frequency counts as one of them.
const STANDS: f32 = 1e20;
/// GGUF's tensor of LongRoPE's divisors for short sequences.
pub(crate) const SHORT_FACTORS: &str = "rope_factors_short.weight";
/// GGUF's tensor of LongRoPE's divisors for long sequences.
pub(crate) const LONG_FACTORS: &str = "rope_factors_long.weight";

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies `θ^(−2i/d)`.
    pub theta: f64,
    /// The share of every head that turns: `partial_rotary_factor`.
    pub partial: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
    /// How queries grow with their position; not at all if none.
    pub query_scaling: Option<QueryScaling>,
}

/// Queries at position `p` are multiplied by `1 + beta · ln(1 + ⌊p / original⌋)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScaling {
    /// The factor on the logarithm: `llama_4_scaling_beta`.
    pub beta: f64,
    /// Length of the original context.
    pub original_max_position_embeddings: usize,
}

/// How rotary frequencies are stretched for contexts longer than those of the first training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// A base that grows with the sequence once that is longer than the original context.
    Dynamic {
        /// How much the context may grow.
        factor: f64,
        /// Length of the original context.
        original_max_position_embeddings: usize,
    },
    /// Llama 3's: low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Below this many turns in the original context a frequency counts as low.
        low_freq_factor: f64,
        /// Above this many turns in the original context a frequency counts as high.
        high_freq_factor: f64,
        /// Length of the original context.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071): as Llama 3's, blended along the index of the frequency.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Turns in the original context from which on a frequency is kept.
        beta_fast: f64,
        /// Turns in the original context below which a frequency is divided.
        beta_slow: f64,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Whether the ends of the blend are rounded to whole indices.
        truncate: bool,
        /// Length of the original context.
        original_max_position_embeddings: usize,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor of its own for every frequency, others for sequences
    /// longer than the original context.
    LongRope {
        /// Divisors for sequences within the original context.
        short: Arc<[f64]>,
        /// Divisors for longer ones.
        long: Arc<[f64]>,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Length of the original context.
        original_max_position_embeddings: usize,
    },
    /// Frequencies of whole heads, of which only the fastest turn: Gemma 4's.
    Proportional {
        /// The divisor of all frequencies.
        factor: f64,
    },
}

impl RopeConfig {
    /// Describes the rotation of whole heads with frequencies that are not stretched.
    pub fn plain(theta: f64) -> Self {
        Self { theta, partial: 1.0, scaling: RopeScaling::None, query_scaling: None }
    }

    /// Counts the numbers of a head that turn.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        match self.scaling {
            RopeScaling::Proportional { .. } => head_dim,
            _ => (head_dim as f64 * self.partial) as usize,
        }
    }

    /// Counts the pairs of a head that turn where frequencies are proportional.
    fn turning(&self, head_dim: usize) -> usize {
        (self.partial * head_dim as f64 / 2.0) as usize
    }

    /// Reads the divisors, one for every pair of a head, that a GGUF file gives its frequencies beside what
    /// its metadata do to them: proportional ones where the last of them stand still, else as
    /// [`RopeScaling::from_factors`].
    pub(crate) fn stretched(mut self, head_dim: usize, factors: &[f32]) -> Self {
        if factors.iter().all(|&factor| factor == 1.0) {
            return self;
        }
        let attention_factor = self.factor();
        let plain = Self { scaling: RopeScaling::None, ..self.clone() };
        let plain = plain.inverse_frequencies(head_dim, 0);
        let metadata = self.inverse_frequencies(head_dim, 0);
        let beside = plain.iter().zip(&metadata).map(|(plain, stretched)| plain / stretched);
        let divisors =
            factors.iter().zip(beside).map(|(&factor, beside)| f64::from(factor) * beside);
        if attention_factor != 1.0 {
            self.scaling = RopeScaling::same_for_all_lengths(divisors.collect(), attention_factor);
            return self;
        }
        let factors: Vec<f32> = divisors.map(|divisor| divisor as f32).collect();
        let turning = factors.iter().take_while(|&&factor| factor < STANDS).count();
        let (first, standing) = factors.split_at(turning);
        let uniform = first.first().filter(|&one| first.iter().all(|other| other == one));
        match uniform {
            Some(&factor) if !standing.is_empty() && standing.iter().all(|&f| f >= STANDS) => {
                let pairs = factors.len() as f64;
                self.partial = turning as f64 / pairs;
                if self.partial * pairs < turning as f64 {
                    self.partial *= 1.0 + f64::EPSILON;
                }
                self.scaling = RopeScaling::Proportional { factor: factor.into() };
            }
            _ => self.scaling = RopeScaling::from_factors(&factors, self.theta),
        }
        self
    }

    /// The factor on cosines and sines.
    pub(crate) fn factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. }
            | RopeScaling::LongRope { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// The length of a sequence after which other frequencies hold, if there is one such length.
    pub(crate) fn changes_after(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                Some(original_max_position_embeddings)
            }
            _ => None,
        }
    }

    /// Tells whether a sequence's frequencies depend on how long it is.
    pub(crate) fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. })
    }

    /// `θ^(−2i/d)` for `i` in `0..d/2`, `d` being the numbers that turn, rescaled as the configuration
    /// says for a sequence of `length` tokens.
    pub(crate) fn inverse_frequencies(&self, head_dim: usize, length: usize) -> Vec<f64> {
        let dim = self.rotary_dim(head_dim);
        let count = dim / 2;
        let plain = |theta: f64, i: usize| theta.powf(-2.0 * i as f64 / dim as f64);
        let each = |of: &dyn Fn(usize, f64) -> f64| {
            (0..count).map(|i| of(i, plain(self.theta, i))).collect::<Vec<f64>>()
        };
        match &self.scaling {
            RopeScaling::None => each(&|_, frequency| frequency),
            &RopeScaling::Linear { factor } => each(&|_, frequency| frequency / factor),
            &RopeScaling::Dynamic { factor, original_max_position_embeddings } => {
                let stretch = length.max(original_max_position_embeddings) as f64
                    / original_max_position_embeddings as f64;
                let power = dim as f64 / (dim as f64 - 2.0);
                let theta = self.theta * (factor * stretch - (factor - 1.0)).powf(power);
                (0..count).map(|i| plain(theta, i)).collect()
            }
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => each(&|_, frequency| {
                let turns = original_max_position_embeddings as f64 * frequency / (2.0 * PI);
                frequency * llama3_slowing(turns, (low_freq_factor, high_freq_factor), factor)
            }),
            &RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings,
                ..
            } => {
                // The index, not whole, of the frequency that makes so many turns.
                let index = |turns: f64| {
                    let original = original_max_position_embeddings as f64;
                    dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (index(beta_fast), index(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(dim as f64 - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                each(&|i, frequency| {
                    let slow = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    frequency * ((1.0 - slow) + slow / factor)
                })
            }
            RopeScaling::LongRope { short, long, original_max_position_embeddings, .. } => {
                let divisors =
                    if length > *original_max_position_embeddings { long } else { short };
                each(&|i, frequency| frequency / divisors.get(i).copied().unwrap_or(1.0))
            }
            &RopeScaling::Proportional { factor } => {
                let turning = self.turning(head_dim);
                each(&|i, frequency| if i < turning { frequency / factor } else { 0.0 })
            }
        }
    }

    /// Checks the numbers against each other and against heads of `head_dim` numbers, as those of
    /// `field`; the error says what was expected.
    pub(super) fn fault(&self, head_dim: usize) -> Option<(&'static str, String)> {
        if !(self.theta > 1.0 && self.theta.is_finite()) {
            return Some((
                "rope_theta",
                format!("expected a number above 1, found {}", self.theta),
            ));
        }
        let turning = self.rotary_dim(head_dim);
        if !(self.partial > 0.0 && self.partial <= 1.0) || turning == 0 || turning % 2 == 1 {
            let message = format!(
                "expected a share of {head_dim} numbers that is even and not 0, found {}",
                self.partial
            );
            return Some(("partial_rotary_factor", message));
        }
        if let RopeScaling::LongRope { short, long, .. } = &self.scaling {
            for (name, divisors) in [("short_factor", short), ("long_factor", long)] {
                if divisors.len() != turning / 2 {
                    let message =
                        format!("expected {} numbers, found {}", turning / 2, divisors.len());
                    return Some((name, message));
                }
                if !divisors.iter().all(|&divisor| divisor > 0.0 && divisor.is_finite()) {
                    return Some((name, "expected positive numbers".to_owned()));
                }
            }
        }
        None
    }

    /// The content of `rope_parameters` that says the same.
    pub(crate) fn to_json(&self) -> Map<String, Value> {
        let mut json = match &self.scaling {
            RopeScaling::None => json!({"rope_type": "default"}),
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Dynamic { factor, .. } => {
                json!({"rope_type": "dynamic", "factor": factor})
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "yarn", "factor": factor, "beta_fast": beta_fast,
                "beta_slow": beta_slow, "attention_factor": attention_factor,
                "truncate": truncate,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            RopeScaling::LongRope {
                short,
                long,
                attention_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "longrope", "short_factor": short[..], "long_factor": long[..],
                "attention_factor": attention_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            RopeScaling::Proportional { factor } => {
                json!({"rope_type": "proportional", "factor": factor})
            }
        };
        if self.partial != 1.0 {
            json["partial_rotary_factor"] = json!(self.partial);
        }
        if let Some(scaling) = self.query_scaling {
            json["llama_4_scaling_beta"] = json!(scaling.beta);
            json["original_max_position_embeddings"] =
                json!(scaling.original_max_position_embeddings);
        }
        let Value::Object(object) = json else { return Map::new() };
        object
    }

    /// The tensors of divisors that a GGUF file has for these frequencies.
    pub(crate) fn gguf_factors(&self, head_dim: usize) -> Vec<(&'static str, Vec<f32>)> {
        let narrow = |numbers: &[f64]| numbers.iter().map(|&x| x as f32).collect();
        match &self.scaling {
            RopeScaling::Llama3 { .. } => {
                let stretched = self.inverse_frequencies(head_dim, 0);
                let plain = Self { scaling: RopeScaling::None, ..self.clone() };
                let plain = plain.inverse_frequencies(head_dim, 0);
                let divisors = plain.iter().zip(&stretched).map(|(a, b)| (a / b) as f32);
                vec![(FREQUENCY_FACTORS, divisors.collect())]
            }
            RopeScaling::LongRope { short, long, .. } => {
                vec![(SHORT_FACTORS, narrow(short)), (LONG_FACTORS, narrow(long))]
            }
            &RopeScaling::Proportional { factor } => {
                let turning = self.turning(head_dim);
                let divisor = |i: usize| if i < turning { factor as f32 } else { STANDING };
                vec![(FREQUENCY_FACTORS, (0..head_dim / 2).map(divisor).collect())]
            }
            _ => Vec::new(),
        }
    }

    /// The metadata below `rope.scaling` of a GGUF file that say the same, if any do.
    pub(crate) fn gguf_metadata(&self) -> Option<Vec<(&'static str, GgufValue)>> {
        let kind = |name: &str| ("type", GgufValue::String(name.to_owned()));
        let number = |value: f64| GgufValue::F32(value as f32);
        let size = |value: usize| GgufValue::U32(u32::try_from(value).unwrap_or(u32::MAX));
        Some(match &self.scaling {
            // The divisors are a tensor.
            RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Proportional { .. } => {
                Vec::new()
            }
            RopeScaling::Linear { factor } => vec![kind("linear"), ("factor", number(*factor))],
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate: true,
                original_max_position_embeddings,
            } => {
                let mut all = vec![
                    kind("yarn"),
                    ("factor", number(*factor)),
                    ("original_context_length", size(*original_max_position_embeddings)),
                    ("yarn_beta_fast", number(*beta_fast)),
                    ("yarn_beta_slow", number(*beta_slow)),
                ];
                if (attention_factor - 1.0).abs() < 1e-9 {
                    all.push(("yarn_log_multiplier", number(1.0)));
                } else if (attention_factor - yarn_factor(*factor, 1.0)).abs() > 1e-9 {
                    all.push(("attn_factor", number(attention_factor / yarn_factor(*factor, 1.0))));
                }
                all
            }
            RopeScaling::LongRope {
                attention_factor, original_max_position_embeddings, ..
            } => {
                vec![
                    kind("longrope"),
                    ("attn_factor", number(*attention_factor)),
                    ("original_context_length", size(*original_max_position_embeddings)),
                ]
            }
            RopeScaling::Dynamic { .. } | RopeScaling::Yarn { .. } => return None,
        })
    }

    /// A line that tells one rotation from another; those of older releases stay as they were.
    pub(crate) fn identity(&self) -> String {
        let mut line = match &self.scaling {
            RopeScaling::None => "none".to_owned(),
            RopeScaling::Linear { factor } => format!("linear {factor}"),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => format!(
                "llama3 {factor} {low_freq_factor} {high_freq_factor} \
                 {original_max_position_embeddings}"
            ),
            _ => Value::Object(self.to_json()).to_string(),
        };
        if self.partial != 1.0 {
            line.push_str(&format!(" partial {}", self.partial));
        }
        line
    }
}

impl RopeScaling {
    /// The scaling whose frequencies a GGUF file divides by `factors`, one per pair of a head, when
    /// `theta` is the base: Llama 3's where some original context explains them, else divisors that are
    /// the same for every length.
    pub fn from_factors(factors: &[f32], theta: f64) -> Self {
        if factors.iter().all(|&factor| factor == 1.0) {
            return Self::None;
        }
        let factor = factors.iter().copied().fold(1.0f32, f32::max);
        if factors.iter().all(|&found| found == factor) {
            return Self::Linear { factor: factor.into() };
        }
        let (low, high) = (1.0, 4.0);
        let pairs = factors.len() as f64;
        let explains = |original: usize| {
            factors.iter().enumerate().all(|(i, &found)| {
                let frequency = theta.powf(-(i as f64) / pairs);
                let turns = original as f64 * frequency / (2.0 * PI);
                let expected = 1.0 / llama3_slowing(turns, (low, high), f64::from(factor));
                (f64::from(found) - expected).abs() <= 1e-3 * expected
            })
        };
        // The published models' first, then other powers of two.
        let originals = [8192].into_iter().chain((4..20).map(|power| 1 << power));
        match originals.into_iter().find(|&original| explains(original)) {
            Some(original_max_position_embeddings) => Self::Llama3 {
                factor: factor.into(),
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings,
            },
            None => {
                Self::same_for_all_lengths(factors.iter().map(|&f| f64::from(f)).collect(), 1.0)
            }
        }
    }

    /// Any divisors, for sequences of whatever length.
    fn same_for_all_lengths(divisors: Arc<[f64]>, attention_factor: f64) -> Self {
        Self::LongRope {
            short: divisors.clone(),
            long: divisors,
            attention_factor,
            original_max_position_embeddings: usize::MAX,
        }
    }
}

/// Llama 3's factor on a frequency that makes so many turns in the original context: 1 where they are
/// more than the higher bound, `1 / factor` below the lower.
fn llama3_slowing(turns: f64, (low, high): (f64, f64), factor: f64) -> f64 {
    let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    smooth + (1.0 - smooth) / factor
}

/// LongRoPE's usual factor on cosines and sines when the context is `stretch` times the original.
pub(crate) fn long_rope_factor(stretch: f64, original: usize) -> f64 {
    if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / (original as f64).ln()).sqrt() }
}

/// YaRN's factor on cosines and sines, with its logarithm multiplied by `mscale`.
fn yarn_factor(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

//! Rotary position embedding as configurations describe it.

use super::Fields;
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, Value as GgufValue};
use serde_json::{Map, Value, json};
use std::f64::consts::PI;
use std::sync::Arc;

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

    /// Reads the divisors, one for every pair of a head, that a GGUF file gives its frequencies:
    /// proportional ones where the last of them stand still, else as
    /// [`RopeScaling::from_factors`].
    pub(crate) fn stretched(mut self, factors: &[f32]) -> Self {
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
            _ => self.scaling = RopeScaling::from_factors(factors, self.theta),
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
                    return None;
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
                let divisors: Arc<[f64]> = factors.iter().map(|&f| f64::from(f)).collect();
                Self::LongRope {
                    short: divisors.clone(),
                    long: divisors,
                    attention_factor: 1.0,
                    original_max_position_embeddings: usize::MAX,
                }
            }
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

/// What a family assumes where a configuration is silent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RopeDefaults {
    pub(crate) theta: f64,
    /// The share of a head that turns; always the whole if none.
    pub(crate) partial: Option<f64>,
}

/// Reads the rotation of all layers, in the older layout (`rope_theta`, `rope_scaling`) or the newer one
/// (`rope_parameters`).
pub(crate) fn from_json(fields: &Fields<'_>, defaults: RopeDefaults) -> Result<RopeConfig> {
    // A file may have both, which say the same.
    let older = fields.nested("rope_scaling")?;
    let nested = fields.nested("rope_parameters")?.or(older);
    one_from_json(fields, nested.as_ref(), "rope_theta", defaults)
}

/// Reads one rotation from its object, with the base from `theta_field` outside it where it has none.
pub(crate) fn one_from_json(
    fields: &Fields<'_>,
    nested: Option<&Fields<'_>>,
    theta_field: &str,
    defaults: RopeDefaults,
) -> Result<RopeConfig> {
    let inside = |name: &str| nested.map(|nested| nested.number(name)).transpose();
    let theta = fields.number(theta_field)?;
    let theta = inside("rope_theta")?.flatten().or(theta).unwrap_or(defaults.theta);
    let partial = fields.number("partial_rotary_factor")?;
    let partial = inside("partial_rotary_factor")?.flatten().or(partial);
    if let (None, Some(found)) = (defaults.partial, partial.filter(|&partial| partial != 1.0)) {
        let message =
            format!("expected 1.0, since heads of this model_type turn whole; found {found}");
        return Err(fields.error("partial_rotary_factor", message));
    }
    let partial = partial.or(defaults.partial).unwrap_or(1.0);
    let mut rope = RopeConfig { partial, ..RopeConfig::plain(theta) };
    // Phi-3 keeps it outside.
    let outer_original = fields.optional_size("original_max_position_embeddings")?;
    let Some(nested) = nested else { return Ok(rope) };
    let max_position_embeddings = fields.size("max_position_embeddings")?;
    let original = || -> Result<usize> {
        let own = nested.optional_size("original_max_position_embeddings")?;
        Ok(outer_original.or(own).unwrap_or(max_position_embeddings))
    };
    let positive = |name: &str, value: f64| match value > 0.0 && value.is_finite() {
        true => Ok(value),
        false => Err(nested.error(name, format!("expected a positive number, found {value}"))),
    };
    let optional = |name: &str| match nested.number(name)? {
        Some(value) => positive(name, value).map(Some),
        None => Ok(None),
    };
    let required = |name: &str| {
        optional(name)?.ok_or_else(|| nested.error(name, "missing; expected a number"))
    };
    let string = |name: &str| nested.optional(name, "a string", |v| v.as_str());
    let rope_type = string("rope_type")?.or(string("type")?).unwrap_or("default");
    // Phi-3's first releases wrote `su` or `yarn`.
    let long_factors = nested.value("long_factor").is_some();
    rope.scaling = match rope_type {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: required("factor")? },
        "dynamic" => RopeScaling::Dynamic {
            factor: required("factor")?,
            original_max_position_embeddings: max_position_embeddings,
        },
        "llama3" => {
            let low_freq_factor = required("low_freq_factor")?;
            let high_freq_factor = required("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let message = format!(
                    "expected more than low_freq_factor {low_freq_factor}, found {high_freq_factor}"
                );
                return Err(nested.error("high_freq_factor", message));
            }
            RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: nested
                    .size("original_max_position_embeddings")?,
            }
        }
        "longrope" | "su" | "yarn" if long_factors => {
            let list = |name: &str| -> Result<Arc<[f64]>> {
                let numbers = nested.required(name, "a list of numbers", |value| {
                    value.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>()
                })?;
                Ok(numbers.into())
            };
            let original = original()?;
            let factor = max_position_embeddings as f64 / original as f64;
            let factor = optional("factor")?.unwrap_or(factor);
            let attention_factor =
                optional("attention_factor")?.unwrap_or_else(|| long_rope_factor(factor, original));
            RopeScaling::LongRope {
                short: list("short_factor")?,
                long: list("long_factor")?,
                attention_factor,
                original_max_position_embeddings: original,
            }
        }
        "longrope" | "su" => {
            return Err(nested.error("long_factor", "missing; expected a list of numbers"));
        }
        "yarn" => {
            let original = original()?;
            let factor = match optional("factor")? {
                Some(factor) => factor,
                None => max_position_embeddings as f64 / original as f64,
            };
            let scale = |mscale: f64| yarn_factor(factor, mscale);
            let (mscale, all) = (nested.number("mscale")?, nested.number("mscale_all_dim")?);
            let attention_factor = match (optional("attention_factor")?, mscale, all) {
                (Some(given), ..) => given,
                (None, Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => {
                    scale(mscale) / scale(all)
                }
                _ => scale(1.0),
            };
            RopeScaling::Yarn {
                factor,
                beta_fast: nested.number("beta_fast")?.filter(|&x| x != 0.0).unwrap_or(32.0),
                beta_slow: nested.number("beta_slow")?.filter(|&x| x != 0.0).unwrap_or(1.0),
                attention_factor,
                truncate: nested.flag("truncate")?.unwrap_or(true),
                original_max_position_embeddings: original,
            }
        }
        "proportional" => RopeScaling::Proportional { factor: optional("factor")?.unwrap_or(1.0) },
        other => {
            let message = format!(
                "the rotary embedding `{other}` is not supported; expected `default`, `linear`, \
                 `dynamic`, `llama3`, `yarn`, `longrope` or `proportional`"
            );
            return Err(nested.error("rope_type", message));
        }
    };
    if let Some(beta) = nested.number("llama_4_scaling_beta")? {
        let original_max_position_embeddings = original()?;
        rope.query_scaling = Some(QueryScaling { beta, original_max_position_embeddings });
    }
    // What only other kinds of rotation read; for text alone M-RoPE is the plain one.
    for known in ["mrope_section", "mrope_interleaved", "max_position_embeddings", "factor"] {
        let _ = nested.value(known);
    }
    nested.refuse_unread()?;
    Ok(rope)
}

/// Reads the rotation that a GGUF file's metadata describe.
pub(super) fn from_gguf(
    file: &GgufFile,
    architecture: &str,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<RopeConfig> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let theta = file.f64(&key("freq_base"))?.unwrap_or(10_000.0);
    let turning = file.u64(&key("dimension_count"))?.unwrap_or(head_dim as u64);
    let partial = turning as f64 / head_dim.max(1) as f64;
    let factor = file.f64(&key("scaling.factor"))?.or(file.f64(&key("scale_linear"))?);
    let positive = |factor: Option<f64>| match factor {
        Some(factor) if factor > 0.0 && factor.is_finite() => Ok(factor),
        found => {
            let message = format!("expected a positive number, found {found:?}");
            Err(Error::config(file.path(), key("scaling.factor"), message))
        }
    };
    let original = || -> Result<usize> {
        let given = file.u64(&key("scaling.original_context_length"))?;
        Ok(given.and_then(|n| usize::try_from(n).ok()).unwrap_or(max_position_embeddings))
    };
    let scaling = match (file.str(&key("scaling.type"))?, factor) {
        (None | Some("none"), None) | (Some("none"), _) => RopeScaling::None,
        (None | Some("linear"), factor) => RopeScaling::Linear { factor: positive(factor)? },
        (Some("yarn"), factor) => {
            let factor = positive(factor)?;
            let beta = |name: &str| file.f64(&key(&format!("scaling.{name}")));
            // llama.cpp divides by the factor of a multiplier, where the file has one.
            let multiplier = beta("yarn_log_multiplier")?.unwrap_or(0.0);
            let attention_factor = yarn_factor(factor, 1.0) / yarn_factor(factor, multiplier);
            RopeScaling::Yarn {
                factor,
                beta_fast: beta("yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: beta("yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor,
                truncate: true,
                original_max_position_embeddings: original()?,
            }
        }
        // The divisors are tensors of the file: see the model's source.
        (Some("longrope"), _) => RopeScaling::None,
        (Some(other), _) => {
            let message = format!(
                "the rotary embedding `{other}` is not supported; expected `none`, `linear`, \
                 `yarn` or `longrope`"
            );
            return Err(Error::config(file.path(), key("scaling.type"), message));
        }
    };
    Ok(RopeConfig { partial, scaling, ..RopeConfig::plain(theta) })
}

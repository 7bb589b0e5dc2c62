//! Rotary position embedding in a `config.json`, in the older layout and the newer one.

use super::{QueryScaling, RopeConfig, RopeScaling, long_rope_factor, yarn_factor};
use crate::config::Fields;
use crate::error::Result;
use serde_json::Value;
use std::sync::Arc;

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
    let newer = fields.nested("rope_parameters")?;
    let older = older_scaling(fields)?;
    match (&newer, &older) {
        (Some(_), Some(_)) => agreeing(fields, newer.as_ref(), older.as_ref(), defaults),
        _ => one_from_json(fields, newer.or(older).as_ref(), "rope_theta", defaults),
    }
}

/// The older layout's object, of which an empty one says nothing.
pub(crate) fn older_scaling<'a>(fields: &Fields<'a>) -> Result<Option<Fields<'a>>> {
    Ok(fields.nested("rope_scaling")?.filter(|older| !older.object.is_empty()))
}

/// Reads a rotation that a configuration describes in both layouts.
///
/// # Errors
/// If they say different things, of which transformers takes the older.
pub(crate) fn agreeing(
    fields: &Fields<'_>,
    newer: Option<&Fields<'_>>,
    older: Option<&Fields<'_>>,
    defaults: RopeDefaults,
) -> Result<RopeConfig> {
    let rope = one_from_json(fields, newer, "rope_theta", defaults)?;
    if rope != one_from_json(fields, older, "rope_theta", defaults)? {
        let message = "says something else than rope_parameters (with rope_theta outside both); expected \
                       the same, or only one of the two";
        return Err(fields.error("rope_scaling", message));
    }
    Ok(rope)
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

//! Rotary position embedding in the metadata of a GGUF file.

use super::{FREQUENCY_FACTORS, LONG_FACTORS, RopeConfig, RopeScaling, yarn_factor};
use crate::config::Keys;
use crate::error::Result;

/// Reads the rotation that a GGUF file's metadata describe, but for the divisors that are tensors.
pub(crate) fn from_gguf(
    keys: &Keys<'_>,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<RopeConfig> {
    let theta = keys.f64("rope.freq_base")?.unwrap_or(10_000.0);
    let turning = keys.size("rope.dimension_count")?.unwrap_or(head_dim);
    let partial = turning as f64 / head_dim.max(1) as f64;
    let (newer, older) = (keys.factor(FACTOR)?, keys.factor("rope.scale_linear")?);
    let factor = newer.or(older);
    let long = keys.tensor(LONG_FACTORS).is_some();
    if long && keys.tensor(FREQUENCY_FACTORS).is_some() {
        let message =
            format!("expected `{FREQUENCY_FACTORS}` or `{LONG_FACTORS}`, found both tensors");
        return Err(keys.error(KIND, message));
    }
    let kind = keys.str(KIND)?;
    let original = keys.size(ORIGINAL)?.unwrap_or(max_position_embeddings);
    let beta_fast = keys.f64("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0);
    let beta_slow = keys.f64("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0);
    let multiplier = keys.f64("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
    let scaling = match (kind, factor) {
        (Some("none"), _) => RopeScaling::None,
        (None | Some("linear"), None) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor },
        (Some("yarn"), Some(factor)) => {
            // llama.cpp divides by the factor of a multiplier, where the file has one, and multiplies by
            // what the file says beside it.
            let usual = yarn_factor(factor, 1.0) / yarn_factor(factor, multiplier);
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor: usual * keys.factor(ATTENTION_FACTOR)?.unwrap_or(1.0),
                truncate: true,
                original_max_position_embeddings: original,
            }
        }
        (Some("yarn"), None) => {
            return Err(keys.error(FACTOR, "missing; expected a positive number"));
        }
        // The divisors are tensors of the file: see the model's source.
        (Some("longrope"), _) if long => RopeScaling::None,
        (Some("longrope"), _) => {
            let message =
                format!("found longrope, but no tensor `{LONG_FACTORS}` with its divisors");
            return Err(keys.error(KIND, message));
        }
        (Some(other), _) => {
            let message = format!(
                "the rotary embedding `{other}` is not supported; expected `none`, `linear`, \
                 `yarn` or `longrope`"
            );
            return Err(keys.error(KIND, message));
        }
    };
    let rope = RopeConfig { partial, scaling, ..RopeConfig::plain(theta) };
    let yarn = matches!(rope.scaling, RopeScaling::Yarn { .. });
    // Whatever else is on cosines and sines changes what is computed.
    let fits = |name: &str, usual: &[f64]| match keys.f64(name)? {
        Some(found) if !usual.iter().any(|usual| (found - usual).abs() <= 1e-5) => {
            let message = format!(
                "found {found}, which changes what the model computes and is not supported with this \
                 kind of rotation"
            );
            Err(keys.error(name, message))
        }
        _ => Ok(()),
    };
    let all = keys.f64(ATTENTION_FACTOR)?.unwrap_or(1.0);
    // The model's source takes it with the divisors that are tensors.
    if !long {
        fits(ATTENTION_FACTOR, &[0.0, 1.0, if yarn { all } else { 1.0 }])?;
    }
    fits("rope.scaling.yarn_attn_factor", &[0.0, 1.0, rope.factor()])?;
    // How much of the blend there is; -1 is what the kind implies.
    fits("rope.scaling.yarn_ext_factor", &[-1.0, if yarn { 1.0 } else { 0.0 }])?;
    Ok(rope)
}

/// Metadata of GGUF files: how frequencies are stretched.
const KIND: &str = "rope.scaling.type";
/// By how much.
const FACTOR: &str = "rope.scaling.factor";
/// The length of the original context.
const ORIGINAL: &str = "rope.scaling.original_context_length";
/// A factor on cosines and sines, beside that of YaRN.
pub(crate) const ATTENTION_FACTOR: &str = "rope.scaling.attn_factor";

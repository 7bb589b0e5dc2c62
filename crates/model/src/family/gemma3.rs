//! Gemma 3: Gemma 2's layer with norms of query and key heads, five windowed layers to one, and a rotation
//! of its own for the windowed ones.

use super::kit::{INPUT_NORM, KEY_NORM, LayerContext, LayerPlan, QUERY_NORM};
use super::{About, CHECKED, Defaults, Family, GgufNames, Windows, gemma2};
use crate::config::rope::{RopeDefaults, agreeing, older_scaling, one_from_json};
use crate::config::{Fields, Keys, ModelConfig, RopeConfig};
use crate::error::Result;
use crate::gguf::Value as GgufValue;
use hydralora_kernels::Var;
use serde_json::{Map, Value, json};

pub(super) struct Gemma3;
pub(super) static FAMILY: Gemma3 = Gemma3;

const NAMES: GgufNames = GgufNames::new("gemma3").parts(gemma2::PARTS).windowed();

/// Base of the frequencies of windowed layers.
const LOCAL_THETA: f64 = 10_000.0;
/// Layers of the largest model.
const LARGEST: usize = 62;
/// One layer in so many sees everything.
const PERIOD: usize = 6;

impl Family for Gemma3 {
    fn model_type(&self) -> &'static str {
        "gemma3_text"
    }

    fn about(&self) -> About {
        About { models: "Gemma 3, its text part", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Gemma3ForCausalLM"
    }

    fn defaults(&self) -> Defaults {
        Defaults { rope_theta: 1_000_000.0, ..gemma2::DEFAULTS }
    }

    fn windows(&self) -> Windows {
        Windows::Listed
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn norm_shift(&self, _name: &str) -> f64 {
        1.0
    }

    /// Reads the rotation of the layers that see everything.
    fn rope(&self, fields: &Fields<'_>) -> Result<RopeConfig> {
        let (by_kind, older) = (fields.nested("rope_parameters")?, older_scaling(fields)?);
        let newer = match &by_kind {
            Some(kinds) if kinds.has(FULL) => kinds.nested(FULL)?,
            _ => by_kind,
        };
        let defaults = RopeDefaults { theta: self.defaults().rope_theta, partial: None };
        match (&newer, &older) {
            (Some(_), Some(_)) => agreeing(fields, newer.as_ref(), older.as_ref(), defaults),
            _ => one_from_json(fields, newer.or(older).as_ref(), "rope_theta", defaults),
        }
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        gemma2::read(fields, config)?;
        let mut period = PERIOD;
        for field in ["sliding_window_pattern", "_sliding_window_pattern"] {
            period = fields.optional_size(field)?.unwrap_or(period);
        }
        gemma2::window_by_pattern(fields, config, period, 4096);
        config.sliding_rope = Some(read_sliding_rope(fields, None)?);
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut Map<String, Value>) {
        gemma2::write(config, json);
        write_ropes(config, json);
    }

    fn read_gguf(&self, keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
        gemma2::read_gguf(keys, PERIOD, config)?;
        config.arithmetic.logit_softcap = keys.factor(gemma2::LOGIT_CAP)?;
        config.arithmetic.attention_scale = Some(gemma2::scale_in_gguf(config, LARGEST));
        let local = keys.f64("rope.freq_base_swa")?.unwrap_or(LOCAL_THETA);
        config.sliding_rope = Some(RopeConfig::plain(local));
        Ok(())
    }

    fn gguf_metadata(&self, config: &ModelConfig) -> Vec<(&'static str, GgufValue)> {
        let cap = config.arithmetic.logit_softcap;
        let mut all: Vec<(&'static str, GgufValue)> =
            cap.map(|cap| (gemma2::LOGIT_CAP, GgufValue::F32(cap as f32))).into_iter().collect();
        all.extend(config.sliding_window.map(gemma2::window_metadata));
        let local = config.sliding_rope.as_ref().unwrap_or(&config.rope);
        all.push(("rope.freq_base_swa", GgufValue::F32(local.theta as f32)));
        all
    }

    fn gguf_fault(&self, config: &ModelConfig) -> Option<(&'static str, String)> {
        if config.arithmetic.attention_softcap.is_some() {
            let why = "files of the architecture say nothing of a cap on attention scores";
            return Some(("attn_logit_softcapping", why.to_owned()));
        }
        if config.sliding_rope.as_ref().is_some_and(|rope| *rope != RopeConfig::plain(rope.theta)) {
            let why = "GGUF files imply that frequencies of windowed layers are not stretched";
            return Some(("rope_parameters", why.to_owned()));
        }
        gemma2::gguf_fault(config, gemma2::scale_in_gguf(config, LARGEST), PERIOD)
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        gemma2::layer(config, index).head_norms(config)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        let x = ctx.norm(INPUT_NORM, &h);
        let [query, key, value] = ctx.queries_keys_values(&x);
        let query = ctx.rope(ctx.norm(QUERY_NORM, &query));
        let key = ctx.rope(ctx.norm(KEY_NORM, &key));
        let attended = ctx.attend(query, key, value);
        drop(x);
        gemma2::after_attention(ctx, h, attended)
    }
}

pub(super) const FULL: &str = "full_attention";
pub(super) const SLIDING: &str = "sliding_attention";

/// Reads the rotation of windowed layers; `partial` is that of [`RopeDefaults`].
pub(super) fn read_sliding_rope(fields: &Fields<'_>, partial: Option<f64>) -> Result<RopeConfig> {
    let by_kind = fields.nested("rope_parameters")?;
    let nested = by_kind.map(|kinds| kinds.nested(SLIDING)).transpose()?.flatten();
    let defaults = RopeDefaults { theta: LOCAL_THETA, partial };
    one_from_json(fields, nested.as_ref(), "rope_local_base_freq", defaults)
}

/// Writes a rotation for each kind of layer.
pub(super) fn write_ropes(config: &ModelConfig, json: &mut Map<String, Value>) {
    let of = |rope: &RopeConfig| {
        let mut fields = rope.to_json();
        fields.insert("rope_theta".to_owned(), json!(rope.theta));
        Value::Object(fields)
    };
    let local = config.sliding_rope.as_ref().unwrap_or(&config.rope);
    json.insert("rope_parameters".to_owned(), json!({FULL: of(&config.rope), SLIDING: of(local)}));
    // Older releases of transformers.
    json.insert("rope_local_base_freq".to_owned(), json!(local.theta));
    // Whoever reads the kinds must not read this for both.
    json.remove("rope_scaling");
}

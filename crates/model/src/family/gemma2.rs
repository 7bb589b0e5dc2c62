//! Gemma 2: norms before and after both blocks, every second layer windowed, a gate by GELU, soft caps on
//! attention scores and logits, embeddings times `√hidden_size`.

use super::kit::{
    INPUT_NORM, LayerContext, LayerPlan, O_PROJ, POST_ATTENTION_NORM, POST_FEED_FORWARD_NORM,
    PRE_FEED_FORWARD_NORM, all_but_every,
};
use super::names::{ATTENTION, FEED_FORWARD, Parts, QUERY_KEY_NORMS};
use super::{About, CHECKED, Defaults, Family, GgufNames, Windows};
use crate::config::{Fields, Keys, ModelConfig};
use crate::error::Result;
use crate::gguf::Value as GgufValue;
use hydralora_kernels::Var;
use hydralora_kernels::ops::activation::Activation;
use serde_json::{Map, Value, json};

pub(super) struct Gemma2;
pub(super) static FAMILY: Gemma2 = Gemma2;

/// Norms before and after both blocks.
pub(super) const NORMS: Parts = &[
    ("attn_norm", INPUT_NORM),
    ("post_attention_norm", POST_ATTENTION_NORM),
    ("ffn_norm", PRE_FEED_FORWARD_NORM),
    ("post_ffw_norm", POST_FEED_FORWARD_NORM),
];
/// The layer of Gemma 2 and 3.
pub(super) const PARTS: &[Parts] = &[NORMS, ATTENTION, QUERY_KEY_NORMS, FEED_FORWARD];
const NAMES: GgufNames = GgufNames::new("gemma2").parts(PARTS).windowed();

/// What all Gemmas assume.
pub(super) const DEFAULTS: Defaults =
    Defaults { tie_word_embeddings: true, head_dim: Some(256), ..Defaults::LLAMA };

impl Family for Gemma2 {
    fn model_type(&self) -> &'static str {
        "gemma2"
    }

    fn about(&self) -> About {
        About { models: "Gemma 2", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Gemma2ForCausalLM"
    }

    fn defaults(&self) -> Defaults {
        DEFAULTS
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

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        read(fields, config)?;
        window_by_pattern(fields, config, PERIOD, WINDOW);
        let absent = |field: &str| !fields.has(field);
        let of = &mut config.arithmetic;
        // Where the field is missing, rather than null, the caps of the published models hold.
        let [attention, logits] = CAPS;
        of.attention_softcap = of.attention_softcap.or(absent(ATTENTION_CAP).then_some(attention));
        of.logit_softcap = of.logit_softcap.or(absent(LOGIT_CAP).then_some(logits));
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut Map<String, Value>) {
        write(config, json);
    }

    /// llama.cpp assumes the caps and the window of the published models where a file is silent.
    fn read_gguf(&self, keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
        read_gguf(keys, PERIOD, config)?;
        let [attention, logits] = CAPS;
        let of = &mut config.arithmetic;
        of.attention_softcap = Some(keys.factor(ATTENTION_CAP)?.unwrap_or(attention));
        of.logit_softcap = Some(keys.factor(LOGIT_CAP)?.unwrap_or(logits));
        if !keys.has(WINDOW_KEY) {
            config.sliding_window = Some(WINDOW);
        }
        config.arithmetic.attention_scale = Some(scale_in_gguf(config, LARGEST));
        Ok(())
    }

    fn gguf_metadata(&self, config: &ModelConfig) -> Vec<(&'static str, GgufValue)> {
        let of = &config.arithmetic;
        let caps = [(ATTENTION_CAP, of.attention_softcap), (LOGIT_CAP, of.logit_softcap)];
        let caps =
            caps.into_iter().filter_map(|(key, cap)| Some((key, GgufValue::F32(cap? as f32))));
        // A window that is not there is one that nothing is outside of.
        let window = config.sliding_window.unwrap_or(config.max_position_embeddings);
        caps.chain([window_metadata(window)]).collect()
    }

    fn gguf_fault(&self, config: &ModelConfig) -> Option<(&'static str, String)> {
        let of = &config.arithmetic;
        let uncapped = [(ATTENTION_CAP, of.attention_softcap), (LOGIT_CAP, of.logit_softcap)]
            .into_iter()
            .zip(CAPS)
            .find(|((_, cap), _)| cap.is_none());
        if let Some(((field, _), usual)) = uncapped {
            return Some((field, format!("GGUF files imply {usual} where they are silent")));
        }
        gguf_fault(config, scale_in_gguf(config, LARGEST), PERIOD)
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        layer(config, index)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        let x = ctx.norm(INPUT_NORM, &h);
        let [query, key, value] = ctx.queries_keys_values(&x);
        let attended = ctx.attend(ctx.rope(query), ctx.rope(key), value);
        drop(x);
        after_attention(ctx, h, attended)
    }
}

const ATTENTION_CAP: &str = "attn_logit_softcapping";
pub(super) const LOGIT_CAP: &str = "final_logit_softcapping";
/// The published models' caps, in that order.
const CAPS: [f64; 2] = [50.0, 30.0];
/// Their window.
const WINDOW: usize = 4096;
/// Metadata of GGUF files: the window.
const WINDOW_KEY: &str = "attention.sliding_window";

/// Reads what Gemma 2 and 3 have in common.
pub(super) fn read(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let of = &mut config.arithmetic;
    of.attention_scale =
        Some(1.0 / fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0).sqrt());
    of.attention_softcap = fields.positive(ATTENTION_CAP)?;
    of.logit_softcap = fields.positive(LOGIT_CAP)?;
    common(config);
    if fields.value("hidden_activation").is_none() {
        // An early release wrote `gelu` and `gelu_pytorch_tanh` was computed.
        config.arithmetic.activation = Activation::GeluTanh;
    }
    Ok(())
}

/// Sets what no configuration says.
pub(super) fn common(config: &mut ModelConfig) {
    config.arithmetic.embedding_scale = (config.hidden_size as f64).sqrt();
}

/// Windows all layers but every `period`-th, where the configuration does not list them.
pub(super) fn window_by_pattern(
    fields: &Fields<'_>,
    config: &mut ModelConfig,
    period: usize,
    window: usize,
) {
    if !fields.has("sliding_window") {
        config.sliding_window = Some(window);
    }
    if fields.value("layer_types").is_none() {
        config.sliding_layers = Some(all_but_every(period, config.num_hidden_layers));
    }
}

pub(super) fn write(config: &ModelConfig, json: &mut Map<String, Value>) {
    let of = &config.arithmetic;
    // transformers takes whole numbers alone.
    let width = of.attention_scale.map(|scale| scale.powi(-2).round() as u64);
    json.insert("query_pre_attn_scalar".to_owned(), json!(width));
    json.insert(ATTENTION_CAP.to_owned(), json!(of.attention_softcap));
    json.insert(LOGIT_CAP.to_owned(), json!(of.logit_softcap));
}

/// Reads the metadata that Gemma 2 and 3 have in common; all layers but every `period`-th are windowed where
/// a file does not say which are.
pub(super) fn read_gguf(keys: &Keys<'_>, period: usize, config: &mut ModelConfig) -> Result<()> {
    let layers = config.num_hidden_layers;
    let windowed = keys.windowed_layers("attention.sliding_window_pattern", layers)?;
    config.sliding_layers = Some(windowed.unwrap_or_else(|| all_but_every(period, layers)));
    config.arithmetic.activation = Activation::GeluTanh;
    common(config);
    Ok(())
}

/// The metadata of a window, which is written however wide it is: files are read as having one.
pub(super) fn window_metadata(window: usize) -> (&'static str, GgufValue) {
    (WINDOW_KEY, GgufValue::U32(u32::try_from(window).unwrap_or(u32::MAX)))
}

/// Layers of the largest model.
const LARGEST: usize = 46;
/// One layer in so many sees everything.
const PERIOD: usize = 2;

/// The factor on scores that GGUF files leave out: the largest model, of `largest` layers, divides by the
/// residual stream's share of a head, the others by the head's width.
pub(super) fn scale_in_gguf(config: &ModelConfig, largest: usize) -> f64 {
    let width = match config.num_hidden_layers == largest {
        true => config.hidden_size / config.num_attention_heads.max(1),
        false => config.head_dim,
    };
    1.0 / (width as f64).sqrt()
}

/// Names what a file cannot say that leaves out the factor `scale` on scores, and that all layers but
/// every `period`-th are windowed.
pub(super) fn gguf_fault(
    config: &ModelConfig,
    scale: f64,
    period: usize,
) -> Option<(&'static str, String)> {
    let found = config.arithmetic.attention_scale.unwrap_or(scale);
    if (found - scale).abs() > 1e-9 {
        let why = format!("GGUF files imply {}", scale.powi(-2).round());
        return Some(("query_pre_attn_scalar", why));
    }
    let usual = all_but_every(period, config.num_hidden_layers);
    let windowed = (0..usual.len()).map(|layer| config.window_of(layer).is_some());
    (config.sliding_window.is_some() && !windowed.eq(usual)).then(|| {
        let why = format!("GGUF files imply a window in all layers but every {period}th");
        ("layer_types", why)
    })
}

/// Gemma 2's layer.
pub(super) fn layer(config: &ModelConfig, index: usize) -> LayerPlan {
    let (hidden, bias) = (config.hidden_size, config.attention_bias);
    LayerPlan::new(config, index)
        .norm(INPUT_NORM, hidden)
        .attention_linears(config, bias, bias)
        .norm(POST_ATTENTION_NORM, hidden)
        .norm(PRE_FEED_FORWARD_NORM, hidden)
        .feed_forward_linears(config, false)
        .norm(POST_FEED_FORWARD_NORM, hidden)
}

/// What follows attention in the layers of all Gemmas.
pub(super) fn after_attention(ctx: &mut LayerContext<'_>, h: Var, attended: Var) -> Var {
    let update = ctx.linear(&O_PROJ, &attended);
    drop(attended);
    let h = ctx.add(&h, ctx.norm(POST_ATTENTION_NORM, &update));
    let h = ctx.wanted(h);
    let x = ctx.norm(PRE_FEED_FORWARD_NORM, &h);
    let update = ctx.feed_forward(&x);
    ctx.add(&h, ctx.norm(POST_FEED_FORWARD_NORM, &update))
}

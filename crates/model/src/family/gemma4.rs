//! Gemma 4: Gemma 3's layer with wider heads where attention sees everything, last layers that use the
//! keys and values of earlier ones, and embeddings of every layer's own.
//!
//! ```text
//! e ← (RMSNorm(P h₀ / √hidden) + E[token] · √width) / √2        for all layers at once
//! h ← h + RMSNorm(O·attention(rope(RMSNorm(Q n)), rope(RMSNorm(K n)), RMSNorm₁(V n)))
//! h ← h + RMSNorm(D(gelu(G n') ⊙ U n'))
//! h ← s · (h + RMSNorm(Pₗ(gelu(Gₗ h) ⊙ eₗ)))
//! ```

use super::gemma3::{FULL, SLIDING, read_sliding_rope, write_ropes};
use super::kit::{
    DOWN_PROJ, GATE_PROJ, INPUT_NORM, K_PROJ, KEY_NORM, LLAMA_LINEARS, LayerContext, LayerPlan,
    LinearPlan, ModulesPlan, O_PROJ, POST_ATTENTION_NORM, POST_FEED_FORWARD_NORM,
    PRE_FEED_FORWARD_NORM, Q_PROJ, QUERY_NORM, StartContext, TensorPlan, UP_PROJ, V_PROJ,
};
use super::names::{ATTENTION, FEED_FORWARD, Parts, QUERY_KEY_NORMS};
use super::{About, CHECKED, Defaults, Family, GgufNames, Windows, gemma2};
use crate::config::rope::{FREQUENCY_FACTORS, RopeDefaults, one_from_json};
use crate::config::{Fields, Keys, LayerEmbeddings, ModelConfig, RopeConfig, RopeScaling};
use crate::error::Result;
use crate::gguf::{Array, Value as GgufValue};
use crate::site::{Kind, Linear};
use hydralora_kernels::Var;
use hydralora_kernels::ops::activation::Activation;
use hydralora_kernels::ops::elementwise::{add, scale};
use serde_json::{Map, Value, json};

pub(super) struct Gemma4;
pub(super) static FAMILY: Gemma4 = Gemma4;

const NAMES: GgufNames = GgufNames::new("gemma4")
    .parts(PARTS)
    .tensors(&[("layer_output_scale.weight", LAYER_SCALAR)])
    .outside(&[
        ("per_layer_token_embd.weight", "model.embed_tokens_per_layer.weight"),
        ("per_layer_model_proj.weight", "model.per_layer_model_projection.weight"),
        ("per_layer_proj_norm.weight", "model.per_layer_projection_norm.weight"),
    ])
    .pieces("gemma4")
    .windowed()
    .by_layer();
/// What lies beside Gemma 3's layer.
const LAYER_EMBEDDING: Parts = &[
    ("inp_gate", "per_layer_input_gate"),
    ("proj", "per_layer_projection"),
    ("post_norm", POST_LAYER_EMBEDDING_NORM),
];
const PARTS: &[Parts] = &[gemma2::NORMS, ATTENTION, QUERY_KEY_NORMS, FEED_FORWARD, LAYER_EMBEDDING];

/// Metadata of GGUF files: which layers are windowed.
const PATTERN: &str = "attention.sliding_window_pattern";
/// Width of a key there.
const WINDOWED_KEYS: &str = "attention.key_length_swa";
/// Width of a value there.
const WINDOWED_VALUES: &str = "attention.value_length_swa";
/// How many numbers of a head turn there.
const WINDOWED_TURNING: &str = "rope.dimension_count_swa";
/// Base of the frequencies there.
const WINDOWED_BASE: &str = "rope.freq_base_swa";
/// How many of the last layers use earlier keys.
const SHARED_LAYERS: &str = "attention.shared_kv_layers";
/// Width of a layer's own embedding.
const LAYER_WIDTH: &str = "embedding_length_per_layer_input";
/// Width inside the feed-forward block.
const INNER_WIDTH: &str = "feed_forward_length";

/// The text part of models without towers, whose layers have no embeddings of their own.
const UNIFIED: &str = "gemma4_unified_text";
/// Whether values are what the key projection gives, in layers that see everything.
const KEYS_AS_VALUES: &str = "attention_k_eq_v";
/// How many heads of keys those then have.
const FULL_HEADS: &str = "num_global_key_value_heads";
/// What differs from the rest of the configuration in a layer.
const BY_LAYER: &str = "per_layer_config";

/// Gate of a layer's own embedding.
static LAYER_GATE: Linear = Linear::new("per_layer_input_gate", Kind::LAYER_EMBEDDING, 80);
/// From a layer's own embedding to the residual stream.
static LAYER_PROJECTION: Linear = Linear::new("per_layer_projection", Kind::LAYER_EMBEDDING, 90);
/// From the first hidden states to the embeddings of all layers.
static MODEL_PROJECTION: Linear =
    Linear::outside("per_layer_model_projection", Kind::LAYER_EMBEDDING);
/// Norm of those.
const PROJECTION_NORM: &str = "per_layer_projection_norm";
/// Norm of what a layer's own embedding adds.
const POST_LAYER_EMBEDDING_NORM: &str = "post_per_layer_input_norm";
/// Embeddings of all layers, side by side.
const TABLE: &str = "embed_tokens_per_layer";
/// What a layer's result is multiplied by.
const LAYER_SCALAR: &str = "layer_scalar";

static LINEARS: &[&Linear] = &[
    &Q_PROJ,
    &K_PROJ,
    &V_PROJ,
    &O_PROJ,
    &GATE_PROJ,
    &UP_PROJ,
    &DOWN_PROJ,
    &LAYER_GATE,
    &LAYER_PROJECTION,
    &MODEL_PROJECTION,
];

impl Family for Gemma4 {
    fn model_type(&self) -> &'static str {
        "gemma4_text"
    }

    fn about(&self) -> About {
        About {
            models: "Gemma 4 (without experts), its text part, also of the unified models",
            checked: CHECKED,
        }
    }

    fn also(&self) -> &'static [&'static str] {
        &[UNIFIED]
    }

    fn class(&self) -> &'static str {
        "Gemma4ForCausalLM"
    }

    fn linears(&self) -> &'static [&'static Linear] {
        debug_assert!(LLAMA_LINEARS.iter().zip(LINEARS).all(|(a, b)| a.name == b.name));
        LINEARS
    }

    fn tables(&self) -> &'static [&'static str] {
        &[TABLE]
    }

    fn constants(&self) -> &'static [&'static str] {
        &[LAYER_SCALAR]
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

    fn rope(&self, fields: &Fields<'_>) -> Result<RopeConfig> {
        let kinds = fields.nested("rope_parameters")?;
        let nested = kinds.map(|kinds| kinds.nested(FULL)).transpose()?.flatten();
        let Some(nested) = nested else {
            let scaling = RopeScaling::Proportional { factor: 1.0 };
            return Ok(RopeConfig { partial: 0.25, scaling, ..RopeConfig::plain(1_000_000.0) });
        };
        let defaults = RopeDefaults { theta: self.defaults().rope_theta, partial: Some(1.0) };
        one_from_json(fields, Some(&nested), "rope_theta", defaults)
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        if fields.flag("enable_moe_block")?.unwrap_or(false) {
            return Err(fields.error("enable_moe_block", "experts are not supported"));
        }
        // Without experts they say nothing.
        for unread in ["num_experts", "top_k_experts", "moe_intermediate_size"] {
            let _ = fields.value(unread);
        }
        let layers = config.num_hidden_layers;
        config.arithmetic.logit_softcap = fields.positive("final_logit_softcapping")?;
        config.arithmetic.attention_scale = Some(1.0);
        gemma2::common(config);
        let unified = fields.value("model_type").is_some_and(|name| name == UNIFIED);
        gemma2::window_by_pattern(fields, config, 6, if unified { 1024 } else { 512 });
        if let Some(last) = config.sliding_layers.as_mut().and_then(|windowed| windowed.last_mut())
        {
            *last = false;
        }
        config.sliding_rope = Some(read_sliding_rope(fields, Some(1.0))?);
        let shared = fields.optional("num_kv_shared_layers", "an integer", Value::as_u64)?;
        let shared = usize::try_from(shared.unwrap_or(0)).unwrap_or(usize::MAX);
        let width = fields.optional("hidden_size_per_layer_input", "an integer", Value::as_u64)?;
        let width =
            usize::try_from(width.unwrap_or(if unified { 0 } else { 256 })).unwrap_or(usize::MAX);
        let values_of_keys = fields.flag(KEYS_AS_VALUES)?.unwrap_or(false);
        let (full_head_dim, full_key_value_heads) = full_heads(fields, config, values_of_keys)?;
        // `vision` is about pictures.
        let both_ways =
            fields.optional("use_bidirectional_attention", "a string", Value::as_str)?;
        if let Some(found) = both_ways.filter(|&found| found != "vision") {
            let message = format!("expected null or \"vision\", found {found:?}");
            return Err(fields.error("use_bidirectional_attention", message));
        }
        config.layer_embeddings = Some(LayerEmbeddings {
            width,
            vocab_size: fields
                .optional_size("vocab_size_per_layer_input")?
                .unwrap_or(config.vocab_size),
            full_head_dim,
            full_key_value_heads,
            values_of_keys,
            shared_layers: shared,
            wide_shared: fields.flag("use_double_wide_mlp")?.unwrap_or(false),
        });
        let owned = layers.saturating_sub(shared);
        for layer in owned..layers {
            if owner(config, layer).is_none() {
                let message = format!(
                    "layer {layer} has no earlier layer of its kind whose keys it could use"
                );
                return Err(fields.error("num_kv_shared_layers", message));
            }
        }
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut Map<String, Value>) {
        write_ropes(config, json);
        let Some(of) = &config.layer_embeddings else { return };
        let kinds: Vec<&str> = (0..config.num_hidden_layers)
            .map(|layer| if config.window_of(layer).is_some() { SLIDING } else { FULL })
            .collect();
        for (key, value) in [
            ("final_logit_softcapping", json!(config.arithmetic.logit_softcap)),
            ("hidden_size_per_layer_input", json!(of.width)),
            ("vocab_size_per_layer_input", json!(of.vocab_size)),
            ("global_head_dim", json!(of.full_head_dim)),
            (KEYS_AS_VALUES, json!(of.values_of_keys)),
            ("num_kv_shared_layers", json!(of.shared_layers)),
            ("use_double_wide_mlp", json!(of.wide_shared)),
            ("layer_types", json!(kinds)),
        ] {
            json.insert(key.to_owned(), value);
        }
        if of.values_of_keys {
            json.insert(FULL_HEADS.to_owned(), json!(of.full_key_value_heads));
        } else if of.full_key_value_heads != config.num_key_value_heads {
            // The field above says so of models alone whose values are keys.
            let heads = json!({
                "head_dim": of.full_head_dim, "num_key_value_heads": of.full_key_value_heads,
            });
            let full = (0..config.num_hidden_layers).filter(|&at| config.window_of(at).is_none());
            let by_layer: Map<String, Value> =
                full.map(|layer| (layer.to_string(), heads.clone())).collect();
            json.insert(BY_LAYER.to_owned(), Value::Object(by_layer));
        }
    }

    fn read_gguf(&self, keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
        let layers = config.num_hidden_layers;
        // A number for every layer, or one for all.
        let each = |name: &str| -> Result<Vec<u64>> {
            let found = keys.u64s(name)?.unwrap_or_default();
            match found.as_slice() {
                [one] if layers != 1 => Ok(vec![*one; layers]),
                several if several.len() == layers => Ok(found),
                several => {
                    let message = format!("expected a list of {layers}, found {}", several.len());
                    Err(keys.error(name, message))
                }
            }
        };
        let windowed: Vec<bool> = each(PATTERN)?.iter().map(|&windowed| windowed != 0).collect();
        let full_head_dim = config.head_dim;
        config.head_dim = keys.size(WINDOWED_KEYS)?.unwrap_or(full_head_dim);
        if let Some(found) = keys.size(WINDOWED_VALUES)?.filter(|&found| found != config.head_dim) {
            let message = format!("expected {}, as wide as keys, found {found}", config.head_dim);
            return Err(keys.error(WINDOWED_VALUES, message));
        }
        // The number of heads, the same in all layers that are windowed, or in all that are not.
        let heads = |name: &str, of_windowed: bool| -> Result<Option<usize>> {
            if !keys.has(name) {
                return Ok(None);
            }
            let all = each(name)?;
            let mut those = all.iter().zip(&windowed).filter(|&(_, &of)| of == of_windowed);
            let first = those.next().map(|(&heads, _)| heads);
            if those.any(|(&heads, _)| Some(heads) != first) {
                let message = format!("expected the same in all layers of a kind, found {all:?}");
                return Err(keys.error(name, message));
            }
            Ok(first.and_then(|heads| usize::try_from(heads).ok()))
        };
        let (query, key_value) = ("attention.head_count", "attention.head_count_kv");
        if let (Some(one), Some(other)) = (heads(query, true)?, heads(query, false)?)
            && one != other
        {
            let message = format!("expected the same in all layers, found {one} and {other}");
            return Err(keys.error(query, message));
        }
        let (of_windowed, of_full) = (heads(key_value, true)?, heads(key_value, false)?);
        config.num_key_value_heads = of_windowed.or(of_full).unwrap_or(config.num_attention_heads);
        let full_key_value_heads = of_full.unwrap_or(config.num_key_value_heads);
        let shared_layers = keys.size(SHARED_LAYERS)?.unwrap_or(0);
        let width = keys.size(LAYER_WIDTH)?.unwrap_or(0);
        let inner = each(INNER_WIDTH)?;
        let owning = layers.saturating_sub(shared_layers);
        let (own, sharing) = inner.split_at(owning);
        let usual = inner.first().copied().unwrap_or(0);
        let wide_shared =
            !sharing.is_empty() && sharing.iter().all(|&of| Some(of) == usual.checked_mul(2));
        let narrow = sharing.iter().all(|&of| of == usual);
        if !own.iter().all(|&of| of == usual) || !(wide_shared || narrow) {
            let message = format!(
                "expected {usual}, and as much or twice that in the last {shared_layers} layers, \
                 found {inner:?}"
            );
            return Err(keys.error(INNER_WIDTH, message));
        }
        // Files say it by leaving the projection out.
        let no_values =
            |layer: &usize| keys.tensor(&format!("blk.{layer}.attn_v.weight")).is_none();
        let mut full = (0..owning).filter(|&layer| !windowed[layer]);
        let values_of_keys = full.any(|layer| no_values(&layer));
        config.arithmetic.activation = Activation::GeluTanh;
        config.arithmetic.logit_softcap = keys.factor("final_logit_softcapping")?;
        config.arithmetic.attention_scale = Some(1.0);
        gemma2::common(config);
        let local = RopeConfig::plain(keys.f64(WINDOWED_BASE)?.unwrap_or(10_000.0));
        let turning = keys.size(WINDOWED_TURNING)?.unwrap_or(config.head_dim);
        let partial = turning as f64 / config.head_dim.max(1) as f64;
        config.sliding_rope = Some(RopeConfig { partial, ..local });
        match windowed.contains(&true) {
            true => config.sliding_layers = Some(windowed),
            false => config.sliding_window = None,
        }
        config.layer_embeddings = Some(LayerEmbeddings {
            width,
            vocab_size: config.vocab_size,
            full_head_dim,
            full_key_value_heads,
            values_of_keys,
            shared_layers,
            wide_shared,
        });
        match owner_fault(config) {
            Some(message) => Err(keys.error(SHARED_LAYERS, message)),
            None => Ok(()),
        }
    }

    fn gguf_metadata(&self, config: &ModelConfig) -> Vec<(&'static str, GgufValue)> {
        let Some(of) = &config.layer_embeddings else { return Vec::new() };
        let number = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
        let size = |size: usize| GgufValue::U32(number(size));
        let layers = 0..config.num_hidden_layers;
        let windowed = layers.clone().map(|layer| config.window_of(layer).is_some()).collect();
        let local = config.sliding_rope.as_ref().unwrap_or(&config.rope);
        let inner = layers.clone().map(|layer| number(inner_width(config, layer))).collect();
        let heads = |layer| match config.window_of(layer) {
            Some(_) => number(config.num_key_value_heads),
            None => number(of.full_key_value_heads),
        };
        let heads: Vec<u32> = layers.map(heads).collect();
        let inner = match of.wide_shared {
            true => GgufValue::Array(Array::U32(inner)),
            false => size(config.intermediate_size),
        };
        let mut all = vec![
            (PATTERN, GgufValue::Array(Array::Bool(windowed))),
            ("attention.sliding_window", size(config.sliding_window.unwrap_or(0))),
            ("attention.key_length", size(of.full_head_dim)),
            ("attention.value_length", size(of.full_head_dim)),
            (WINDOWED_KEYS, size(config.head_dim)),
            (WINDOWED_VALUES, size(config.head_dim)),
            (SHARED_LAYERS, size(of.shared_layers)),
            (LAYER_WIDTH, size(of.width)),
            (INNER_WIDTH, inner),
            ("rope.dimension_count", size(config.rope.rotary_dim(of.full_head_dim))),
            (WINDOWED_TURNING, size(local.rotary_dim(config.head_dim))),
            (WINDOWED_BASE, GgufValue::F32(local.theta as f32)),
        ];
        if of.full_key_value_heads != config.num_key_value_heads {
            all.push(("attention.head_count_kv", GgufValue::Array(Array::U32(heads))));
        }
        let cap = config.arithmetic.logit_softcap;
        all.extend(cap.map(|cap| ("final_logit_softcapping", GgufValue::F32(cap as f32))));
        all
    }

    /// llama.cpp reads this tensor whatever the frequencies are.
    fn gguf_factors(&self, config: &ModelConfig) -> Vec<(&'static str, Vec<f32>)> {
        let widest = config.layer_embeddings.map_or(config.head_dim, |of| of.full_head_dim);
        match config.rope.gguf_factors(widest) {
            factors if factors.is_empty() => vec![(FREQUENCY_FACTORS, vec![1.0; widest / 2])],
            factors => factors,
        }
    }

    fn gguf_fault(&self, config: &ModelConfig) -> Option<(&'static str, String)> {
        let of = config.layer_embeddings?;
        let say = |field: &'static str, why: &str| Some((field, why.to_owned()));
        if (0..config.num_hidden_layers).all(|layer| config.window_of(layer).is_none()) {
            return say("layer_types", "GGUF files imply that some layers are windowed");
        }
        if of.width > 0 && of.vocab_size != config.vocab_size {
            return say("vocab_size_per_layer_input", "GGUF files imply vocab_size");
        }
        if config.attention_bias {
            return say("attention_bias", "GGUF files have no such biases");
        }
        let plain = |rope: &RopeConfig| {
            matches!(rope.scaling, RopeScaling::None) && rope.query_scaling.is_none()
        };
        let proportional = matches!(config.rope.scaling, RopeScaling::Proportional { .. });
        let whole = plain(&config.rope) && config.rope.partial == 1.0;
        if !(proportional || whole) || !config.sliding_rope.as_ref().is_none_or(plain) {
            return say(
                "rope_parameters",
                "GGUF files imply `proportional`, and `default` in windows",
            );
        }
        if config.num_hidden_layers.saturating_sub(of.shared_layers) < 2 {
            return say(
                "num_kv_shared_layers",
                "llama.cpp expects two layers with keys of their own",
            );
        }
        owner_fault(config).map(|why| ("num_kv_shared_layers", why))
    }

    fn outside(&self, config: &ModelConfig) -> ModulesPlan {
        let Some(of) = config.layer_embeddings.filter(|of| of.width > 0) else {
            return ModulesPlan::default();
        };
        let all = config.num_hidden_layers * of.width;
        ModulesPlan {
            linears: vec![LinearPlan {
                linear: &MODEL_PROJECTION,
                out_features: all,
                in_features: config.hidden_size,
                bias: false,
            }],
            tensors: vec![TensorPlan {
                name: PROJECTION_NORM,
                shape: vec![of.width],
                is_weight: true,
            }],
            tables: vec![(TABLE, of.vocab_size, all)],
        }
    }

    /// Checkpoints may hold what layers with others' keys do not use.
    fn ignores(&self, config: &ModelConfig, name: &str) -> bool {
        let Some((layer, rest)) =
            name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
        else {
            return false;
        };
        let unused = ["k_proj", "v_proj", "k_norm", "v_norm"];
        let of_keys = rest.strip_prefix("self_attn.").and_then(|rest| rest.split('.').next());
        layer.parse().is_ok_and(|layer| owner(config, layer).is_some())
            && of_keys.is_some_and(|module| unused.contains(&module))
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        let hidden = config.hidden_size;
        let mut plan = LayerPlan::new(config, index);
        let of = config.layer_embeddings.unwrap_or_default();
        plan.keys_of = owner(config, index);
        if config.window_of(index).is_none() {
            plan.attention.head_dim = of.full_head_dim;
            plan.attention.num_key_value_heads = of.full_key_value_heads;
        }
        let head_dim = plan.attention.head_dim;
        let query = config.num_attention_heads * head_dim;
        let key_value = plan.attention.num_key_value_heads * head_dim;
        let own_values = !of.values_of_keys || config.window_of(index).is_some();
        let owns = plan.keys_of.is_none();
        let bias = config.attention_bias;
        let inner = inner_width(config, index);
        plan = plan
            .norm(INPUT_NORM, hidden)
            .norm(QUERY_NORM, head_dim)
            .linear(&Q_PROJ, query, hidden, bias);
        if owns {
            plan = plan.norm(KEY_NORM, head_dim).linear(&K_PROJ, key_value, hidden, bias);
            if own_values {
                plan = plan.linear(&V_PROJ, key_value, hidden, bias);
            }
        }
        plan = plan
            .linear(&O_PROJ, hidden, query, bias)
            .norm(POST_ATTENTION_NORM, hidden)
            .norm(PRE_FEED_FORWARD_NORM, hidden)
            .linear(&GATE_PROJ, inner, hidden, false)
            .linear(&UP_PROJ, inner, hidden, false)
            .linear(&DOWN_PROJ, hidden, inner, false)
            .norm(POST_FEED_FORWARD_NORM, hidden)
            .list(LAYER_SCALAR, 1);
        if of.width > 0 {
            plan = plan
                .linear(&LAYER_GATE, of.width, hidden, false)
                .linear(&LAYER_PROJECTION, hidden, of.width, false)
                .norm(POST_LAYER_EMBEDDING_NORM, hidden);
        }
        plan
    }

    fn start(&self, ctx: &StartContext<'_>, tokens: &[u32], h: &Var) -> Option<Var> {
        let config = ctx.config();
        let width = config.layer_embeddings.map(|of| of.width).filter(|&width| width > 0)?;
        let projected = ctx.linear(&MODEL_PROJECTION, h);
        let projected = scale(&projected, 1.0 / (config.hidden_size as f64).sqrt());
        let projected = ctx.norm(PROJECTION_NORM, &projected);
        let looked_up = scale(&ctx.gather(TABLE, tokens), (width as f64).sqrt());
        Some(scale(&add(&projected, looked_up), std::f64::consts::FRAC_1_SQRT_2))
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        let x = ctx.norm(INPUT_NORM, &h);
        let attended = if ctx.owns_keys() {
            let [query, key, value] = if ctx.has(&V_PROJ) {
                ctx.queries_keys_values(&x)
            } else {
                let [query, key] = ctx.linears([&Q_PROJ, &K_PROJ], &x);
                let value = key.clone();
                [query, key, value]
            };
            let width = ctx.head_dim();
            let query = ctx.rope(ctx.norm(QUERY_NORM, &query));
            let key = ctx.rope(ctx.norm(KEY_NORM, &key));
            let value = ctx.unit_norm(&value, width);
            ctx.attend(query, key, value)
        } else {
            let query = ctx.linear(&Q_PROJ, &x);
            let query = ctx.rope(ctx.norm(QUERY_NORM, &query));
            ctx.attend_again(query)
        };
        drop(x);
        let width = ctx.config().layer_embeddings.map_or(0, |of| of.width);
        let own = ctx.index() * width..(ctx.index() + 1) * width;
        let own = (width > 0).then(|| ctx.shared(own));
        let own = own.map(|own| ctx.wanted_rows(own));
        let mut h = gemma2::after_attention(ctx, h, attended);
        if let Some(own) = own {
            let gate = ctx.linear(&LAYER_GATE, &h);
            let update = ctx.linear(&LAYER_PROJECTION, &ctx.glu(&gate, &own));
            h = ctx.add(&h, ctx.norm(POST_LAYER_EMBEDDING_NORM, &update));
        }
        scale(&h, ctx.number(LAYER_SCALAR))
    }
}

/// Reads how wide heads are in layers that see everything, and how many heads of keys they have.
fn full_heads(
    fields: &Fields<'_>,
    config: &ModelConfig,
    values_of_keys: bool,
) -> Result<(usize, usize)> {
    let mut width = fields.optional_size("global_head_dim")?;
    // Where values are a projection of their own the field says nothing.
    let mut heads = fields.optional_size(FULL_HEADS)?.filter(|_| values_of_keys);
    let field = if heads.is_some() { FULL_HEADS } else { "num_key_value_heads" };
    if let Some(by_layer) = fields.nested(BY_LAYER)? {
        let names = fields.value(BY_LAYER).and_then(Value::as_object).into_iter().flatten();
        for (name, _) in names {
            // Numbers may be padded with zeros.
            let layer = name.parse().ok().filter(|&layer| layer < config.num_hidden_layers);
            let (Some(layer), Some(own)) = (layer, by_layer.nested(name)?) else {
                let message = format!("expected a layer below {}", config.num_hidden_layers);
                return Err(by_layer.error(name, message));
            };
            let windowed = config.window_of(layer).is_some();
            for (field, usual, full) in [
                ("head_dim", config.head_dim, &mut width),
                ("num_key_value_heads", config.num_key_value_heads, &mut heads),
            ] {
                let Some(found) = own.optional_size(field)? else { continue };
                if windowed && found != usual {
                    return Err(own.error(field, format!("expected {usual} in a windowed layer")));
                }
                if !windowed && *full.get_or_insert(found) != found {
                    let message = "expected the same in all layers of a kind";
                    return Err(own.error(field, message));
                }
            }
            own.refuse_unread()?;
        }
        by_layer.refuse_unread()?;
    }
    let heads = heads.unwrap_or(config.num_key_value_heads);
    if heads == 0 || !config.num_attention_heads.is_multiple_of(heads) {
        let message = format!(
            "expected a divisor of num_attention_heads {}, found {heads}",
            config.num_attention_heads
        );
        return Err(fields.error(field, message));
    }
    Ok((width.unwrap_or(512), heads))
}

/// Width inside the feed-forward block of a layer.
fn inner_width(config: &ModelConfig, layer: usize) -> usize {
    let wide = config.layer_embeddings.is_some_and(|of| of.wide_shared);
    config.intermediate_size * if wide && owner(config, layer).is_some() { 2 } else { 1 }
}

/// Says why llama.cpp would have a layer use other keys than it does here, if it would: always those of
/// the last two layers that have their own, a windowed one and one that sees everything.
fn owner_fault(config: &ModelConfig) -> Option<String> {
    let shared = config.layer_embeddings.map_or(0, |of| of.shared_layers);
    let owned = config.num_hidden_layers.saturating_sub(shared);
    let differs = |layer: &usize| {
        let expected = owned.checked_sub(if config.window_of(*layer).is_some() { 2 } else { 1 });
        expected.is_none() || owner(config, *layer) != expected
    };
    (owned..config.num_hidden_layers).find(differs).map(|layer| {
        format!(
            "GGUF files imply that the last layers use the keys of the two before them, a windowed one \
             and one that sees everything; layer {layer} does not"
        )
    })
}

/// The earlier layer whose keys and values layer `layer` uses: the last of its kind that has its own.
fn owner(config: &ModelConfig, layer: usize) -> Option<usize> {
    let shared = config.layer_embeddings.map_or(0, |of| of.shared_layers);
    let owned = config.num_hidden_layers.saturating_sub(shared);
    let same = |other: &usize| config.window_of(*other) == config.window_of(layer);
    (layer >= owned).then(|| (0..owned).rev().find(same)).flatten()
}

//! Qwen3.5: three layers of four keep a state by the gated delta rule, the fourth attends with gated
//! outputs.
//!
//! ```text
//! h ← h + O(RMSNorm(delta(conv(QKV n), g(A n), β(B n))) ⊙ silu(Z n))      linear attention
//! h ← h + O(attention(rope(RMSNorm(Q n)), rope(RMSNorm(K n)), V n) ⊙ σ(Q' n))
//! h ← h + D(silu(G n') ⊙ U n')
//! ```

use super::kit::{
    DOWN_PROJ, GATE_PROJ, INPUT_NORM, K_PROJ, KEY_NORM, LayerContext, LayerPlan, O_PROJ,
    POST_ATTENTION_NORM, Q_PROJ, QUERY_NORM, UP_PROJ, V_PROJ, all_but_every,
};
use super::names::{ATTENTION, FEED_FORWARD, Parts, QUERY_KEY_NORMS};
use super::{About, CHECKED, Defaults, Family, GgufNames, Heads, Layout, Numbers, Order, llama};
use crate::config::{Fields, Keys, LinearAttention, ModelConfig};
use crate::error::{Error, Result};
use crate::gguf::{Array, Value as GgufValue};
use crate::site::{Kind, Linear};
use hydralora_kernels::Var;
use hydralora_kernels::ops::delta_net::{decay_and_beta, gated_rms_norm};
use hydralora_kernels::ops::rows::columns_of_each;
use hydralora_kernels::ops::swiglu::sigmoid_gate;
use serde_json::{Map, Value, json};

pub(super) struct Qwen35;
pub(super) static FAMILY: Qwen35 = Qwen35;

const NAMES: GgufNames =
    GgufNames::new("qwen35").parts(PARTS).tensors(&[("ssm_a", DECAY), ("ssm_dt.bias", STEP_BIAS)]);
const NORMS: Parts = &[("attn_norm", INPUT_NORM), ("post_attention_norm", POST_ATTENTION_NORM)];
/// The delta rule's.
const LINEAR_ATTENTION: Parts = &[
    ("attn_qkv", "linear_attn.in_proj_qkv"),
    ("attn_gate", "linear_attn.in_proj_z"),
    ("ssm_beta", "linear_attn.in_proj_b"),
    ("ssm_alpha", "linear_attn.in_proj_a"),
    ("ssm_conv1d", CONV),
    ("ssm_norm", STATE_NORM),
    ("ssm_out", "linear_attn.out_proj"),
];
const PARTS: &[Parts] = &[NORMS, ATTENTION, QUERY_KEY_NORMS, LINEAR_ATTENTION, FEED_FORWARD];

/// Queries, keys and values of the delta rule in one.
static IN_QKV: Linear =
    Linear::new("linear_attn.in_proj_qkv", Kind::QUERY.and(Kind::KEY).and(Kind::VALUE), 32);
/// Gate of what the state gives.
static IN_Z: Linear = Linear::new("linear_attn.in_proj_z", Kind::STATE, 34);
/// How much of a value is written.
static IN_B: Linear = Linear::new("linear_attn.in_proj_b", Kind::STATE, 36);
/// How much of the state is kept.
static IN_A: Linear = Linear::new("linear_attn.in_proj_a", Kind::STATE, 38);
/// Output projection of the delta rule.
static OUT: Linear = Linear::new("linear_attn.out_proj", Kind::OUTPUT, 42);

const CONV: &str = "linear_attn.conv1d";
const DECAY: &str = "linear_attn.A_log";
const STEP_BIAS: &str = "linear_attn.dt_bias";
const STATE_NORM: &str = "linear_attn.norm";
/// Every so many layers one attends, unless the configuration lists them.
const INTERVAL: usize = 4;

static LINEARS: &[&Linear] = &[
    &Q_PROJ, &K_PROJ, &V_PROJ, &IN_QKV, &IN_Z, &IN_B, &IN_A, &O_PROJ, &OUT, &GATE_PROJ, &UP_PROJ,
    &DOWN_PROJ,
];

impl Family for Qwen35 {
    fn model_type(&self) -> &'static str {
        "qwen3_5_text"
    }

    fn about(&self) -> About {
        About { models: "Qwen3.5 (dense), its text part", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Qwen3_5ForCausalLM"
    }

    fn linears(&self) -> &'static [&'static Linear] {
        LINEARS
    }

    fn defaults(&self) -> Defaults {
        Defaults { partial_rotary_factor: Some(0.25), head_dim: Some(256), ..Defaults::LLAMA }
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn norm_shift(&self, name: &str) -> f64 {
        if name == STATE_NORM { 0.0 } else { 1.0 }
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let layers = config.num_hidden_layers;
        let interval = fields.optional_size("full_attention_interval")?.unwrap_or(INTERVAL);
        let linear = match fields.by_layer("layer_types", layers)? {
            Some(kinds) => kinds.iter().map(|kind| kind == "linear_attention").collect(),
            None => all_but_every(interval, layers),
        };
        let size = |field: &str, usual: usize| -> Result<usize> {
            Ok(fields.optional_size(field)?.unwrap_or(usual))
        };
        let of = LinearAttention {
            layers: linear,
            num_key_heads: size("linear_num_key_heads", 16)?,
            num_value_heads: size("linear_num_value_heads", 32)?,
            key_head_dim: size("linear_key_head_dim", 128)?,
            value_head_dim: size("linear_value_head_dim", 128)?,
            conv_kernel: size("linear_conv_kernel_dim", 4)?,
        };
        config.linear_attention = Some(checked(of, |field, message| fields.error(field, message))?);
        // How a kernel library is to compute.
        let _ = fields.value("mamba_ssm_dtype");
        if fields.flag("attn_output_gate")? == Some(false) {
            let message = "found false; attention without the gate on its output is not supported";
            return Err(fields.error("attn_output_gate", message));
        }
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut Map<String, Value>) {
        let Some(of) = &config.linear_attention else { return };
        let kind = |&linear: &bool| if linear { "linear_attention" } else { "full_attention" };
        let kinds: Vec<&str> = of.layers.iter().map(kind).collect();
        for (key, value) in [
            ("layer_types", json!(kinds)),
            ("linear_num_key_heads", json!(of.num_key_heads)),
            ("linear_num_value_heads", json!(of.num_value_heads)),
            ("linear_key_head_dim", json!(of.key_head_dim)),
            ("linear_value_head_dim", json!(of.value_head_dim)),
            ("linear_conv_kernel_dim", json!(of.conv_kernel)),
        ] {
            json.insert(key.to_owned(), value);
        }
    }

    fn read_gguf(&self, keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
        let layers = config.num_hidden_layers;
        let size = |name: &str| -> Result<usize> {
            keys.size(name)?.ok_or_else(|| keys.error(name, "missing; expected a size"))
        };
        let recurrent = "attention.recurrent_layers";
        let interval = keys.size("full_attention_interval")?.unwrap_or(INTERVAL);
        let linear = match keys.u64s(recurrent)? {
            Some(listed) if listed.len() >= layers => {
                listed[..layers].iter().map(|&x| x != 0).collect()
            }
            Some(listed) => {
                let message = format!("expected {layers}, found {}", listed.len());
                return Err(keys.error(recurrent, message));
            }
            None => all_but_every(interval, layers),
        };
        let (heads, inner) = (size("ssm.time_step_rank")?, size("ssm.inner_size")?);
        let of = LinearAttention {
            layers: linear,
            num_key_heads: size("ssm.group_count")?,
            num_value_heads: heads,
            key_head_dim: size("ssm.state_size")?,
            value_head_dim: inner / heads.max(1),
            conv_kernel: size("ssm.conv_kernel")?,
        };
        let of = checked(of, |field, message| Error::config(keys.path(), field, message))?;
        config.linear_attention = Some(of);
        Ok(())
    }

    fn gguf_metadata(&self, config: &ModelConfig) -> Vec<(&'static str, GgufValue)> {
        let Some(of) = &config.linear_attention else { return Vec::new() };
        let size = |size: usize| GgufValue::U32(u32::try_from(size).unwrap_or(u32::MAX));
        let pairs = config.rope.rotary_dim(config.head_dim) / 2;
        // Pairs take turns in following a picture's time, height and width, which are one for text.
        let sections = [pairs.div_ceil(3), (pairs + 1) / 3, pairs / 3, 0];
        let sections = sections.map(|pairs| i32::try_from(pairs).unwrap_or(i32::MAX));
        vec![
            ("rope.dimension_sections", GgufValue::Array(Array::I32(sections.to_vec()))),
            ("full_attention_interval", size(interval(&of.layers).unwrap_or(INTERVAL))),
            ("ssm.conv_kernel", size(of.conv_kernel)),
            ("ssm.state_size", size(of.key_head_dim)),
            ("ssm.group_count", size(of.num_key_heads)),
            ("ssm.time_step_rank", size(of.num_value_heads)),
            ("ssm.inner_size", size(of.num_value_heads * of.value_head_dim)),
        ]
    }

    fn gguf_fault(&self, config: &ModelConfig) -> Option<(&'static str, String)> {
        let of = config.linear_attention.as_ref()?;
        if of.key_head_dim != of.value_head_dim {
            let why = format!("GGUF files imply {}, the width of keys", of.key_head_dim);
            return Some(("linear_value_head_dim", why));
        }
        if config.attention_bias {
            return Some(("attention_bias", "GGUF files have no such biases".to_owned()));
        }
        interval(&of.layers).is_none().then(|| {
            let why = "GGUF files imply that every so many layers one attends";
            ("layer_types", why.to_owned())
        })
    }

    fn gguf_layout(&self, name: &str, heads: &Heads) -> Layout {
        let mut layout =
            Layout { squeezed: name.strip_suffix(".weight") == Some(CONV), ..Layout::default() };
        if name == DECAY {
            layout.numbers = Numbers::NegativeExp;
        }
        let Some(of) = heads.delta else { return layout };
        let per = of.num_value_heads / of.num_key_heads;
        // llama.cpp repeats all heads of keys in turn, where each is repeated by itself here.
        let tiled = |start: usize, width: usize| {
            (per > 1).then_some(Order::Tiled { start, groups: of.num_key_heads, per, width })
        };
        let (keys, width) = (2 * of.num_key_heads * of.key_head_dim, of.value_head_dim);
        let module = name.strip_suffix(".weight").unwrap_or(name);
        match module {
            CONV => layout.rows = tiled(keys, width),
            DECAY | STEP_BIAS => layout.rows = tiled(0, 1),
            _ if module == IN_QKV.name => layout.rows = tiled(keys, width),
            _ if module == IN_Z.name => layout.rows = tiled(0, width),
            _ if module == IN_B.name || module == IN_A.name => layout.rows = tiled(0, 1),
            _ if module == OUT.name => layout.columns = tiled(0, width),
            _ => {}
        }
        layout
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        let hidden = config.hidden_size;
        let mut plan = LayerPlan::new(config, index).norm(INPUT_NORM, hidden);
        let linear = config.linear_attention.as_ref();
        plan = match linear.filter(|of| of.layers.get(index) == Some(&true)) {
            Some(of) => {
                let delta = of.delta();
                plan.rope = None;
                plan.recurrent = Some((delta, of.conv_kernel));
                plan.linear(&IN_QKV, delta.joined_width(), hidden, false)
                    .linear(&IN_Z, delta.value_width(), hidden, false)
                    .linear(&IN_B, of.num_value_heads, hidden, false)
                    .linear(&IN_A, of.num_value_heads, hidden, false)
                    .weight(CONV, &[delta.joined_width(), 1, of.conv_kernel])
                    .list(DECAY, of.num_value_heads)
                    .list(STEP_BIAS, of.num_value_heads)
                    .norm(STATE_NORM, of.value_head_dim)
                    .linear(&OUT, hidden, delta.value_width(), false)
            }
            None => {
                let query = config.num_attention_heads * config.head_dim;
                let key_value = config.num_key_value_heads * config.head_dim;
                let bias = config.attention_bias;
                plan.linear(&Q_PROJ, 2 * query, hidden, bias)
                    .linear(&K_PROJ, key_value, hidden, bias)
                    .linear(&V_PROJ, key_value, hidden, bias)
                    .linear(&O_PROJ, hidden, query, bias)
                    .head_norms(config)
            }
        };
        plan.norm(POST_ATTENTION_NORM, hidden).feed_forward_linears(config, false)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        let x = ctx.norm(INPUT_NORM, &h);
        let update = match ctx.is_recurrent() {
            true => linear_attention(ctx, &x),
            false => gated_attention(ctx, &x),
        };
        drop(x);
        let h = ctx.add(&h, update);
        llama::feed_forward(ctx, h)
    }
}

/// Checks sizes against each other; `fault` names a field.
fn checked(
    of: LinearAttention,
    fault: impl Fn(&'static str, String) -> Error,
) -> Result<LinearAttention> {
    for (field, size) in [
        ("linear_num_key_heads", of.num_key_heads),
        ("linear_num_value_heads", of.num_value_heads),
        ("linear_key_head_dim", of.key_head_dim),
        ("linear_value_head_dim", of.value_head_dim),
        ("linear_conv_kernel_dim", of.conv_kernel),
    ] {
        if size == 0 || size > 1 << 20 {
            return Err(fault(field, format!("expected a size from 1 to 1048576, found {size}")));
        }
    }
    if !of.num_value_heads.is_multiple_of(of.num_key_heads) {
        let message = format!(
            "expected a multiple of linear_num_key_heads {}, found {}",
            of.num_key_heads, of.num_value_heads
        );
        return Err(fault("linear_num_value_heads", message));
    }
    Ok(of)
}

/// Finds the number such that of so many layers the last attends and the others are linear.
fn interval(linear: &[bool]) -> Option<usize> {
    (1..=linear.len() + 1).find(|&every| all_but_every(every, linear.len()) == linear)
}

fn linear_attention(ctx: &mut LayerContext<'_>, x: &Var) -> Var {
    let [qkv, z, b, a] = ctx.linears([&IN_QKV, &IN_Z, &IN_B, &IN_A], x);
    let qkv = ctx.convolve(CONV, &qkv);
    let [decay, beta] = ctx.with_tensors([DECAY, STEP_BIAS], [&a, &b], |[a, b], own| {
        let (decay, beta) = decay_and_beta(a, b, own[0], own[1]);
        [decay, beta]
    });
    let read = ctx.delta(&qkv, &decay, &beta);
    let epsilon = ctx.config().rms_norm_eps;
    let [gated] = ctx.with_tensors([STATE_NORM], [&read, &z], |[read, z], own| {
        [gated_rms_norm(read, own[0], z, epsilon)]
    });
    ctx.linear(&OUT, &gated)
}

fn gated_attention(ctx: &mut LayerContext<'_>, x: &Var) -> Var {
    let [both, key, value] = ctx.linears([&Q_PROJ, &K_PROJ, &V_PROJ], x);
    let dim = ctx.config().head_dim;
    // Query and gate of a head lie side by side.
    let query = columns_of_each(&both, 2 * dim, 0..dim);
    let gate = columns_of_each(&both, 2 * dim, dim..2 * dim);
    let query = ctx.rope(ctx.norm(QUERY_NORM, &query));
    let key = ctx.rope(ctx.norm(KEY_NORM, &key));
    let attended = ctx.attend(query, key, value);
    ctx.linear(&O_PROJ, &sigmoid_gate(&attended, &gate))
}

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
use super::{About, CHECKED, Defaults, Family, GgufNames, llama};
use crate::config::{Fields, LinearAttention, ModelConfig};
use crate::error::Result;
use crate::site::{Kind, Linear};
use hydralora_kernels::Var;
use hydralora_kernels::ops::delta_net::{decay_and_beta, gated_rms_norm};
use hydralora_kernels::ops::rows::columns_of_each;
use hydralora_kernels::ops::swiglu::sigmoid_gate;
use serde_json::{Map, Value, json};

pub(super) struct Qwen35;
pub(super) static FAMILY: Qwen35 = Qwen35;

const NAMES: GgufNames = GgufNames::new("qwen35").unsupported();

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
        for (field, size) in [
            ("linear_num_key_heads", of.num_key_heads),
            ("linear_num_value_heads", of.num_value_heads),
            ("linear_key_head_dim", of.key_head_dim),
            ("linear_value_head_dim", of.value_head_dim),
            ("linear_conv_kernel_dim", of.conv_kernel),
        ] {
            if size == 0 || size > 1 << 20 {
                let message = format!("expected a size from 1 to 1048576, found {size}");
                return Err(fields.error(field, message));
            }
        }
        if !of.num_value_heads.is_multiple_of(of.num_key_heads) {
            let message = format!(
                "expected a multiple of linear_num_key_heads {}, found {}",
                of.num_key_heads, of.num_value_heads
            );
            return Err(fields.error("linear_num_value_heads", message));
        }
        config.linear_attention = Some(of);
        // How a kernel library is to compute, and a gate that the families' code always has.
        for known in ["mamba_ssm_dtype", "attn_output_gate"] {
            let _ = fields.value(known);
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

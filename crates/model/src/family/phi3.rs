//! Phi-3 and Phi-4: Llama's layer with queries, keys and values in one projection, gate and up-projection
//! in another, and heads of which a part may turn.

use super::kit::{
    DOWN_PROJ, GATE_UP_PROJ, INPUT_NORM, LayerContext, LayerPlan, O_PROJ, POST_ATTENTION_NORM,
    QKV_PROJ,
};
use super::names::{FUSED_FEED_FORWARD, NORMS, Parts};
use super::{About, CHECKED, Defaults, Family, GgufNames, Windows, llama};
use crate::config::ModelConfig;
use crate::site::Linear;
use hydralora_kernels::Var;

pub(super) struct Phi3;
pub(super) static FAMILY: Phi3 = Phi3;

const ATTENTION: Parts = &[("attn_qkv", "self_attn.qkv_proj"), ("attn_output", "self_attn.o_proj")];
const PARTS: &[Parts] = &[NORMS, ATTENTION, FUSED_FEED_FORWARD];
const NAMES: GgufNames = GgufNames::new("phi3").parts(PARTS).windowed();

static LINEARS: &[&Linear] = &[&QKV_PROJ, &O_PROJ, &GATE_UP_PROJ, &DOWN_PROJ];

impl Family for Phi3 {
    fn model_type(&self) -> &'static str {
        "phi3"
    }

    fn about(&self) -> About {
        About { models: "Phi-3, Phi-3.5 mini, Phi-4", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Phi3ForCausalLM"
    }

    fn defaults(&self) -> Defaults {
        Defaults { partial_rotary_factor: Some(1.0), rms_norm_eps: 1e-5, ..Defaults::LLAMA }
    }

    fn linears(&self) -> &'static [&'static Linear] {
        LINEARS
    }

    fn windows(&self) -> Windows {
        Windows::All
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        let hidden = config.hidden_size;
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        LayerPlan::new(config, index)
            .norm(INPUT_NORM, hidden)
            .linear(&QKV_PROJ, query + 2 * key_value, hidden, false)
            .linear(&O_PROJ, hidden, query, false)
            .norm(POST_ATTENTION_NORM, hidden)
            .fused_feed_forward_linears(config)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        llama::forward(ctx, h)
    }
}

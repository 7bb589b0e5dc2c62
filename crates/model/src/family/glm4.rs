//! GLM-4 (0414): norms before and after both blocks, gate and up-projection in one, and heads of which
//! neighbouring numbers of a part turn together.

use super::kit::{
    DOWN_PROJ, GATE_UP_PROJ, INPUT_NORM, K_PROJ, LayerContext, LayerPlan, O_PROJ,
    POST_ATTENTION_NORM, Q_PROJ, V_PROJ,
};
use super::names::{ATTENTION, FUSED_FEED_FORWARD, Parts};
use super::{About, CHECKED, Defaults, Family, GgufNames};
use crate::config::ModelConfig;
use crate::site::Linear;
use hydralora_kernels::Var;
use hydralora_kernels::ops::rope::Pairs;

pub(super) struct Glm4;
pub(super) static FAMILY: Glm4 = Glm4;

/// Norm of what attention adds; the one before the feed-forward block has Llama's name.
const POST_SELF_ATTENTION_NORM: &str = "post_self_attn_layernorm";
/// Norm of what the feed-forward block adds.
const POST_MLP_NORM: &str = "post_mlp_layernorm";

const NORMS: Parts = &[
    ("attn_norm", INPUT_NORM),
    ("post_attention_norm", POST_SELF_ATTENTION_NORM),
    ("ffn_norm", POST_ATTENTION_NORM),
    ("post_ffw_norm", POST_MLP_NORM),
];
const PARTS: &[Parts] = &[NORMS, ATTENTION, FUSED_FEED_FORWARD];
const NAMES: GgufNames = GgufNames::new("glm4").parts(PARTS);

static LINEARS: &[&Linear] = &[&Q_PROJ, &K_PROJ, &V_PROJ, &O_PROJ, &GATE_UP_PROJ, &DOWN_PROJ];

impl Family for Glm4 {
    fn model_type(&self) -> &'static str {
        "glm4"
    }

    fn about(&self) -> About {
        About { models: "GLM-4 (0414)", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Glm4ForCausalLM"
    }

    fn linears(&self) -> &'static [&'static Linear] {
        LINEARS
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            partial_rotary_factor: Some(0.5),
            attention_bias: true,
            head_dim: Some(128),
            rms_norm_eps: 1.5625e-7,
            ..Defaults::LLAMA
        }
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        let hidden = config.hidden_size;
        let plan = LayerPlan { pairs: Pairs::Neighbours, ..LayerPlan::new(config, index) };
        plan.norm(INPUT_NORM, hidden)
            .attention_linears(config, config.attention_bias, false)
            .norm(POST_SELF_ATTENTION_NORM, hidden)
            .norm(POST_ATTENTION_NORM, hidden)
            .fused_feed_forward_linears(config)
            .norm(POST_MLP_NORM, hidden)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        let x = ctx.norm(INPUT_NORM, &h);
        let [query, key, value] = ctx.queries_keys_values(&x);
        let attended = ctx.attend(ctx.rope(query), ctx.rope(key), value);
        let update = ctx.linear(&O_PROJ, &attended);
        drop((x, attended));
        let h = ctx.add(&h, ctx.norm(POST_SELF_ATTENTION_NORM, &update));
        let h = ctx.wanted(h);
        let x = ctx.norm(POST_ATTENTION_NORM, &h);
        let update = ctx.feed_forward(&x);
        ctx.add(&h, ctx.norm(POST_MLP_NORM, &update))
    }
}

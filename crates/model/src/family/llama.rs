//! Llama 1–3 and the many models of the same architecture, SmolLM2 among them.
//!
//! ```text
//! h ← h + O·attention(rope(Q n₁), rope(K n₁), V n₁)     n₁ = RMSNorm(h)
//! h ← h + D(silu(G n₂) ⊙ U n₂)                          n₂ = RMSNorm(h)
//! ```

use super::kit::{INPUT_NORM, LayerContext, LayerPlan, O_PROJ, POST_ATTENTION_NORM};
use super::{About, CHECKED, Family, GgufNames};
use crate::config::ModelConfig;
use hydralora_kernels::Var;

pub(super) struct Llama;
pub(super) static FAMILY: Llama = Llama;

impl Family for Llama {
    fn model_type(&self) -> &'static str {
        "llama"
    }

    fn about(&self) -> About {
        About { models: "Llama 1–3, SmolLM2, TinyLlama, …", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "LlamaForCausalLM"
    }

    fn gguf(&self) -> &'static GgufNames {
        &GgufNames::LLAMA
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        LayerPlan::new(config, index).llama(config, config.attention_bias, config.mlp_bias)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        forward(ctx, h)
    }
}

/// Llama's layer, which other families share.
pub(super) fn forward(ctx: &mut LayerContext<'_>, h: Var) -> Var {
    let x = ctx.norm(INPUT_NORM, &h);
    let [query, key, value] = ctx.queries_keys_values(&x);
    let query = ctx.scale_queries(ctx.rope(query));
    let attended = ctx.attend(query, ctx.rope(key), value);
    let h = ctx.add(&h, ctx.linear(&O_PROJ, &attended));
    drop((x, attended));
    feed_forward(ctx, h)
}

/// The second half of Llama's layer.
pub(super) fn feed_forward(ctx: &mut LayerContext<'_>, h: Var) -> Var {
    let h = ctx.wanted(h);
    let x = ctx.norm(POST_ATTENTION_NORM, &h);
    let update = ctx.feed_forward(&x);
    ctx.add(&h, update)
}

//! OLMo 2: norms on what the blocks add instead of on what they read, and on all queries and all keys of a
//! token together.
//!
//! ```text
//! h ← h + RMSNorm(O·attention(rope(RMSNorm(Q h)), rope(RMSNorm(K h)), V h))
//! h ← h + RMSNorm(D(silu(G h) ⊙ U h))
//! ```

use super::kit::{
    KEY_NORM, LayerContext, LayerPlan, O_PROJ, POST_ATTENTION_NORM, POST_FEED_FORWARD_NORM,
    QUERY_NORM,
};
use super::names::{ATTENTION, FEED_FORWARD, Parts, QUERY_KEY_NORMS};
use super::{About, CHECKED, Defaults, Family, GgufNames};
use crate::config::ModelConfig;
use hydralora_kernels::Var;

pub(super) struct Olmo2;
pub(super) static FAMILY: Olmo2 = Olmo2;

const NORMS: Parts =
    &[("post_attention_norm", POST_ATTENTION_NORM), ("post_ffw_norm", POST_FEED_FORWARD_NORM)];
const PARTS: &[Parts] = &[NORMS, ATTENTION, QUERY_KEY_NORMS, FEED_FORWARD];
const NAMES: GgufNames = GgufNames::new("olmo2").parts(PARTS);

impl Family for Olmo2 {
    fn model_type(&self) -> &'static str {
        "olmo2"
    }

    fn about(&self) -> About {
        About { models: "OLMo 2", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Olmo2ForCausalLM"
    }

    fn defaults(&self) -> Defaults {
        Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA }
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        let bias = config.attention_bias;
        LayerPlan::new(config, index)
            .attention_linears(config, bias, bias)
            .norm(QUERY_NORM, config.num_attention_heads * config.head_dim)
            .norm(KEY_NORM, config.num_key_value_heads * config.head_dim)
            .norm(POST_ATTENTION_NORM, config.hidden_size)
            .feed_forward_linears(config, false)
            .norm(POST_FEED_FORWARD_NORM, config.hidden_size)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        let [query, key, value] = ctx.queries_keys_values(&h);
        let query = ctx.rope(ctx.norm(QUERY_NORM, &query));
        let key = ctx.rope(ctx.norm(KEY_NORM, &key));
        let attended = ctx.attend(query, key, value);
        let update = ctx.linear(&O_PROJ, &attended);
        drop(attended);
        let h = ctx.add(&h, ctx.norm(POST_ATTENTION_NORM, &update));
        let h = ctx.wanted(h);
        let update = ctx.feed_forward(&h);
        ctx.add(&h, ctx.norm(POST_FEED_FORWARD_NORM, &update))
    }
}

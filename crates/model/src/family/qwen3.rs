//! Qwen3: Llama's layer with a norm of every query and key head before the rotation, and heads whose
//! width the configuration names.
//!
//! ```text
//! h ← h + O·attention(rope(RMSNorm(Q n₁)), rope(RMSNorm(K n₁)), V n₁)
//! h ← h + D(silu(G n₂) ⊙ U n₂)
//! ```

use super::kit::{INPUT_NORM, KEY_NORM, LayerContext, LayerPlan, O_PROJ, QUERY_NORM};
use super::{About, CHECKED, Family, GgufNames, Windows, llama, qwen2};
use crate::config::{Fields, ModelConfig};
use crate::error::Result;
use hydralora_kernels::Var;

pub(super) struct Qwen3;
pub(super) static FAMILY: Qwen3 = Qwen3;

const NAMES: GgufNames = GgufNames::new("qwen3");

impl Family for Qwen3 {
    fn model_type(&self) -> &'static str {
        "qwen3"
    }

    fn about(&self) -> About {
        About { models: "Qwen3 (dense)", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Qwen3ForCausalLM"
    }

    fn windows(&self) -> Windows {
        Windows::Listed
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        qwen2::read_window(fields, config)
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        LayerPlan::new(config, index).llama(config, config.attention_bias, false).head_norms(config)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        let x = ctx.norm(INPUT_NORM, &h);
        let [query, key, value] = ctx.queries_keys_values(&x);
        let query = ctx.rope(ctx.norm(QUERY_NORM, &query));
        let key = ctx.rope(ctx.norm(KEY_NORM, &key));
        let attended = ctx.attend(query, key, value);
        let h = ctx.add(&h, ctx.linear(&O_PROJ, &attended));
        drop((x, attended));
        llama::feed_forward(ctx, h)
    }
}

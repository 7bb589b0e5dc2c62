//! Qwen3: Llama's layer with a norm of every query and key head before the rotation, and heads whose
//! width the configuration names.
//!
//! ```text
//! h ← h + O·attention(rope(RMSNorm(Q n₁)), rope(RMSNorm(K n₁)), V n₁)
//! h ← h + D(silu(G n₂) ⊙ U n₂)
//! ```

use super::kit::{INPUT_NORM, K_PROJ, LayerContext, LayerPlan, O_PROJ, Q_PROJ, V_PROJ};
use super::{Family, GgufNames, llama};
use crate::config::{Fields, ModelConfig};
use crate::error::Result;
use hydralora_kernels::Var;

pub(super) struct Qwen3;
pub(super) static FAMILY: Qwen3 = Qwen3;

const NAMES: GgufNames = GgufNames::new("qwen3");
const QUERY_NORM: &str = "self_attn.q_norm";
const KEY_NORM: &str = "self_attn.k_norm";

impl Family for Qwen3 {
    fn model_type(&self) -> &'static str {
        "qwen3"
    }

    fn class(&self) -> &'static str {
        "Qwen3ForCausalLM"
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        // Attention is windowed only if `use_sliding_window` says so, and then from a layer on.
        if !fields.flag("use_sliding_window")?.unwrap_or(false) {
            config.sliding_window = None;
        } else if config.sliding_layers.is_none() {
            let full = fields.optional_size("max_window_layers")?.unwrap_or(28);
            let windowed = (0..config.num_hidden_layers).map(|layer| layer >= full).collect();
            config.sliding_layers = Some(windowed);
        }
        Ok(())
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        LayerPlan::new(config, index)
            .llama(config, config.attention_bias, false)
            .norm(QUERY_NORM, config.head_dim)
            .norm(KEY_NORM, config.head_dim)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        let x = ctx.norm(INPUT_NORM, &h);
        let [query, key, value] = ctx.linears([&Q_PROJ, &K_PROJ, &V_PROJ], &x);
        let query = ctx.rope(ctx.head_norm(QUERY_NORM, &query));
        let key = ctx.rope(ctx.head_norm(KEY_NORM, &key));
        let attended = ctx.attend(query, key, value);
        let h = ctx.add(&h, ctx.linear(&O_PROJ, &attended));
        drop((x, attended));
        llama::feed_forward(ctx, h)
    }
}

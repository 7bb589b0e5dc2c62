//! Qwen2 and Qwen2.5: Llama's layer with biases on queries, keys and values.

use super::kit::{INPUT_NORM, LayerContext, LayerPlan, POST_ATTENTION_NORM};
use super::{About, CHECKED, Family, GgufNames, Windows, llama};
use crate::config::{Fields, ModelConfig};
use crate::error::Result;
use hydralora_kernels::Var;

pub(super) struct Qwen2;
pub(super) static FAMILY: Qwen2 = Qwen2;

const NAMES: GgufNames = GgufNames::new("qwen2");

impl Family for Qwen2 {
    fn model_type(&self) -> &'static str {
        "qwen2"
    }

    fn about(&self) -> About {
        About { models: "Qwen2, Qwen2.5 and their distills", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Qwen2ForCausalLM"
    }

    fn windows(&self) -> Windows {
        Windows::Listed
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        read_window(fields, config)
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        LayerPlan::new(config, index)
            .norm(INPUT_NORM, config.hidden_size)
            .attention_linears(config, true, false)
            .norm(POST_ATTENTION_NORM, config.hidden_size)
            .feed_forward_linears(config, false)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        llama::forward(ctx, h)
    }
}

/// Reads Qwen's window: attention has one only if `use_sliding_window` says so, and then from a layer on.
pub(super) fn read_window(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let full = fields.optional_size("max_window_layers")?.unwrap_or(28);
    if !fields.flag("use_sliding_window")?.unwrap_or(false) {
        config.sliding_window = None;
    } else if config.sliding_layers.is_none() {
        let windowed = (0..config.num_hidden_layers).map(|layer| layer >= full).collect();
        config.sliding_layers = Some(windowed);
    }
    Ok(())
}

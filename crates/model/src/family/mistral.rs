//! Mistral: Llama's layer without biases, optionally with a sliding attention window.

use super::kit::{LayerContext, LayerPlan};
use super::{About, CHECKED, Family, GgufNames, Windows, llama};
use crate::config::{Fields, ModelConfig};
use crate::error::Result;
use hydralora_kernels::Var;

pub(super) struct Mistral;
pub(super) static FAMILY: Mistral = Mistral;

impl Family for Mistral {
    fn model_type(&self) -> &'static str {
        "mistral"
    }

    fn about(&self) -> About {
        About { models: "Mistral 7B, …", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "MistralForCausalLM"
    }

    fn windows(&self) -> Windows {
        Windows::All
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        // As the first model; later ones say null.
        if !fields.has("sliding_window") {
            config.sliding_window = Some(4096);
        }
        Ok(())
    }

    /// llama.cpp knows its models as `llama`.
    fn gguf(&self) -> &'static GgufNames {
        &GgufNames::LLAMA
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        LayerPlan::new(config, index).llama(config, false, false)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        llama::forward(ctx, h)
    }
}

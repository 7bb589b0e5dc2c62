//! Ministral 3: Mistral's layer with queries that grow with their position.

use super::kit::{LayerContext, LayerPlan};
use super::{About, CHECKED, Defaults, Family, GgufNames, Windows, llama};
use crate::config::{Keys, ModelConfig, QueryScaling};
use crate::error::Result;
use crate::gguf::Value as GgufValue;
use hydralora_kernels::Var;
use serde_json::{Map, Value};

pub(super) struct Ministral3;
pub(super) static FAMILY: Ministral3 = Ministral3;

const NAMES: GgufNames = GgufNames::new("mistral3").interleaving();

impl Family for Ministral3 {
    fn model_type(&self) -> &'static str {
        "ministral3"
    }

    fn about(&self) -> About {
        About { models: "Ministral 3; the text part of Mistral 3", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "Ministral3ForCausalLM"
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            rope_theta: 1_000_000.0,
            head_dim: Some(128),
            rms_norm_eps: 1e-5,
            ..Defaults::LLAMA
        }
    }

    fn windows(&self) -> Windows {
        Windows::All
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn read_gguf(&self, keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
        let original = keys.size("rope.scaling.original_context_length")?;
        if let Some(beta) = keys.factor("attention.temperature_scale")? {
            config.rope.query_scaling = Some(QueryScaling {
                beta,
                original_max_position_embeddings: original
                    .unwrap_or(config.max_position_embeddings),
            });
        }
        Ok(())
    }

    fn write(&self, _config: &ModelConfig, json: &mut Map<String, Value>) {
        json.remove("attention_bias");
    }

    fn gguf_metadata(&self, config: &ModelConfig) -> Vec<(&'static str, GgufValue)> {
        let scaling = config.rope.query_scaling;
        let key = "attention.temperature_scale";
        scaling.map(|scaling| (key, GgufValue::F32(scaling.beta as f32))).into_iter().collect()
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        LayerPlan::new(config, index).llama(config, false, false)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        llama::forward(ctx, h)
    }
}

//! Granite 3 and dense Granite 4: Llama's layer with four factors, on embeddings, attention scores, what
//! a block adds, and logits.

use super::kit::{LayerContext, LayerPlan};
use super::{About, CHECKED, Family, GgufNames, llama};
use crate::config::{Arithmetic, Fields, Keys, ModelConfig};
use crate::error::Result;
use crate::gguf::Value as GgufValue;
use hydralora_kernels::Var;
use serde_json::{Map, Value, json};

pub(super) struct Granite;
pub(super) static FAMILY: Granite = Granite;

const NAMES: GgufNames = GgufNames::new("granite").interleaving();

impl Family for Granite {
    fn model_type(&self) -> &'static str {
        "granite"
    }

    fn about(&self) -> About {
        About { models: "Granite 3; dense Granite 4 from GGUF files", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "GraniteForCausalLM"
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let of = &mut config.arithmetic;
        of.embedding_scale = fields.positive("embedding_multiplier")?.unwrap_or(1.0);
        of.scales_prompt = true;
        of.residual_scale = fields.positive("residual_multiplier")?.unwrap_or(1.0);
        of.attention_scale = Some(fields.positive("attention_multiplier")?.unwrap_or(1.0));
        of.logit_scale = 1.0 / fields.positive("logits_scaling")?.unwrap_or(1.0);
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut Map<String, Value>) {
        let Arithmetic { embedding_scale, residual_scale, logit_scale, .. } = config.arithmetic;
        for (key, value) in [
            ("embedding_multiplier", json!(embedding_scale)),
            ("residual_multiplier", json!(residual_scale)),
            ("attention_multiplier", json!(config.arithmetic.attention_scale)),
            ("logits_scaling", json!(1.0 / logit_scale)),
        ] {
            json.insert(key.to_owned(), value);
        }
    }

    fn read_gguf(&self, keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
        // Of this architecture llama.cpp takes the key as whether anything turns.
        let turns = "rope.scaling.finetuned";
        if keys.bool(turns)? == Some(false) {
            return Err(
                keys.error(turns, "found false; layers without a rotation are not supported")
            );
        }
        let number = |key: &str| keys.factor(key);
        let of = &mut config.arithmetic;
        of.embedding_scale = number("embedding_scale")?.unwrap_or(1.0);
        of.scales_prompt = true;
        of.residual_scale = number("residual_scale")?.unwrap_or(1.0);
        of.attention_scale = number("attention.scale")?.or(of.attention_scale);
        of.logit_scale = 1.0 / number("logit_scale")?.unwrap_or(1.0);
        Ok(())
    }

    fn gguf_metadata(&self, config: &ModelConfig) -> Vec<(&'static str, GgufValue)> {
        let of = &config.arithmetic;
        let number = |value: f64| GgufValue::F32(value as f32);
        vec![
            ("embedding_scale", number(of.embedding_scale)),
            ("residual_scale", number(of.residual_scale)),
            ("attention.scale", number(of.attention_scale.unwrap_or(1.0))),
            ("logit_scale", number(1.0 / of.logit_scale)),
        ]
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        LayerPlan::new(config, index).llama(config, config.attention_bias, config.mlp_bias)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        llama::forward(ctx, h)
    }
}

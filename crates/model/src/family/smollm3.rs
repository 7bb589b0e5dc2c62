//! SmolLM3: Llama's layer, in every few layers without a rotation.

use super::kit::{LayerContext, LayerPlan, all_but_every};
use super::{About, CHECKED, Defaults, Family, GgufNames, Windows, llama};
use crate::config::{Fields, Keys, ModelConfig};
use crate::error::Result;
use hydralora_kernels::Var;
use serde_json::{Map, Value, json};

pub(super) struct SmolLm3;
pub(super) static FAMILY: SmolLm3 = SmolLm3;

const NAMES: GgufNames = GgufNames::new("smollm3").interleaving();

/// Every so many layers one has no rotation, unless the configuration says otherwise; GGUF files never
/// say.
const INTERVAL: usize = 4;

impl Family for SmolLm3 {
    fn model_type(&self) -> &'static str {
        "smollm3"
    }

    fn about(&self) -> About {
        About { models: "SmolLM3", checked: CHECKED }
    }

    fn class(&self) -> &'static str {
        "SmolLM3ForCausalLM"
    }

    fn defaults(&self) -> Defaults {
        Defaults { rope_theta: 2_000_000.0, tie_word_embeddings: true, ..Defaults::LLAMA }
    }

    fn windows(&self) -> Windows {
        Windows::Listed
    }

    fn gguf(&self) -> &'static GgufNames {
        &NAMES
    }

    fn read(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let layers = config.num_hidden_layers;
        let interval = fields.optional_size("no_rope_layer_interval")?.unwrap_or(INTERVAL);
        config.rotated_layers = Some(match fields.by_layer("no_rope_layers", layers)? {
            // Despite its name a 1 marks a layer with a rotation.
            Some(marks) => marks
                .iter()
                .map(|mark| match mark.as_u64() {
                    Some(mark @ 0..=1) => Ok(mark == 1),
                    _ => Err(fields.error("no_rope_layers", "expected a list of 0 and 1")),
                })
                .collect::<Result<_>>()?,
            None => all_but_every(interval, layers),
        });
        if !fields.flag("use_sliding_window")?.unwrap_or(false) {
            config.sliding_window = None;
        } else if fields.value("layer_types").is_none() {
            let rotated = config.rotated_layers.iter().flatten();
            config.sliding_layers = Some(rotated.map(|rotated| !rotated).collect());
        }
        Ok(())
    }

    fn write(&self, config: &ModelConfig, json: &mut Map<String, Value>) {
        let marks: Option<Vec<u8>> = (config.rotated_layers.as_ref())
            .map(|layers| layers.iter().map(|&rotated| u8::from(rotated)).collect());
        json.insert("no_rope_layers".to_owned(), json!(marks));
    }

    fn read_gguf(&self, _keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
        config.rotated_layers = Some(all_but_every(INTERVAL, config.num_hidden_layers));
        Ok(())
    }

    fn gguf_fault(&self, config: &ModelConfig) -> Option<(&'static str, String)> {
        let usual = all_but_every(INTERVAL, config.num_hidden_layers);
        (config.rotated_layers.as_ref() != Some(&usual)).then(|| {
            let why = format!("GGUF files leave out the rotation of every {INTERVAL}th layer");
            ("no_rope_layers", why)
        })
    }

    fn layer(&self, config: &ModelConfig, index: usize) -> LayerPlan {
        LayerPlan::new(config, index).llama(config, config.attention_bias, config.mlp_bias)
    }

    fn forward(&self, ctx: &mut LayerContext<'_>, h: Var) -> Var {
        llama::forward(ctx, h)
    }
}

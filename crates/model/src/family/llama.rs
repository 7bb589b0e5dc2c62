//! Llama 1–3 and the many models of the same architecture, SmolLM2 among them.

use super::{Family, LayerPlan};
use crate::config::ModelConfig;

pub(super) struct Llama;
pub(super) static FAMILY: Llama = Llama;

impl Family for Llama {
    fn model_type(&self) -> &'static str {
        "llama"
    }

    fn plan(&self, config: &ModelConfig) -> LayerPlan {
        LayerPlan {
            query_key_value_bias: config.attention_bias,
            output_bias: config.attention_bias,
            feed_forward_bias: config.mlp_bias,
            window: None,
        }
    }
}

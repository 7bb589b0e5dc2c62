//! Mistral: Llama's layer without biases, optionally with a sliding attention window.

use super::{Family, LayerPlan};
use crate::config::ModelConfig;

pub(super) struct Mistral;
pub(super) static FAMILY: Mistral = Mistral;

impl Family for Mistral {
    fn model_type(&self) -> &'static str {
        "mistral"
    }

    fn plan(&self, config: &ModelConfig) -> LayerPlan {
        LayerPlan {
            query_key_value_bias: false,
            output_bias: false,
            feed_forward_bias: false,
            window: config.sliding_window,
        }
    }
}

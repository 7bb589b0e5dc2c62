//! `config.json` as transformers reads it.

use crate::config::{ModelConfig, RopeScaling};
use crate::family;
use hydralora_kernels::ops::activation::Activation;
use serde_json::{Map, Value, json};

impl ModelConfig {
    /// The content of a `config.json` that says what this configuration says, for weights stored
    /// as `dtype` (`float32`, `float16`, …). Reading it back gives an equal configuration.
    pub fn to_json(&self, dtype: &str) -> Value {
        let class = family::find(&self.model_type).map(|family| family.class());
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            several => json!(several),
        };
        let activation = match self.arithmetic.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        };
        // Both layouts, so that older releases of transformers read the same numbers.
        let scaling = self.rope.to_json();
        let older = match self.rope.scaling {
            RopeScaling::None => Value::Null,
            _ => Value::Object(scaling.clone()),
        };
        let mut newer = scaling;
        newer.insert("rope_theta".to_owned(), json!(self.rope.theta));
        let mut config = Map::new();
        for (key, value) in [
            ("architectures", json!([class])),
            ("model_type", json!(self.model_type)),
            ("dtype", json!(dtype)),
            ("torch_dtype", json!(dtype)),
            ("vocab_size", json!(self.vocab_size)),
            ("hidden_size", json!(self.hidden_size)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("num_hidden_layers", json!(self.num_hidden_layers)),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_key_value_heads", json!(self.num_key_value_heads)),
            ("head_dim", json!(self.head_dim)),
            ("hidden_act", json!(activation)),
            ("hidden_activation", json!(activation)),
            ("max_position_embeddings", json!(self.max_position_embeddings)),
            ("rms_norm_eps", json!(self.rms_norm_eps)),
            ("rope_theta", json!(self.rope.theta)),
            ("rope_scaling", older),
            ("rope_parameters", Value::Object(newer)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("attention_bias", json!(self.attention_bias)),
            ("mlp_bias", json!(self.mlp_bias)),
            ("sliding_window", json!(self.sliding_window)),
            ("use_sliding_window", json!(self.sliding_window.is_some())),
            ("bos_token_id", json!(self.bos_token_id)),
            ("eos_token_id", eos),
            // Families have one by default, which need not be inside the vocabulary.
            ("pad_token_id", Value::Null),
        ] {
            config.insert(key.to_owned(), value);
        }
        if let Some(windowed) = &self.sliding_layers {
            let kind = |&windowed: &bool| match windowed {
                true => "sliding_attention",
                false => "full_attention",
            };
            let kinds: Vec<&str> = windowed.iter().map(kind).collect();
            config.insert("layer_types".to_owned(), json!(kinds));
        }
        if let Some(family) = family::find(&self.model_type) {
            family.write(self, &mut config);
        }
        Value::Object(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Arithmetic, RopeConfig};
    use std::path::Path;

    #[test]
    fn what_is_written_reads_back_the_same() {
        let mut config = ModelConfig {
            model_type: "llama".to_owned(),
            vocab_size: 320,
            hidden_size: 48,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 6,
            num_key_value_heads: 2,
            head_dim: 8,
            max_position_embeddings: 256,
            rms_norm_eps: 1e-5,
            rope: RopeConfig::plain(10_000.0),
            sliding_rope: None,
            rotated_layers: None,
            arithmetic: Arithmetic::default(),
            layer_embeddings: None,
            linear_attention: None,
            tie_word_embeddings: true,
            attention_bias: false,
            mlp_bias: false,
            sliding_window: None,
            sliding_layers: None,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
        };
        let check = |config: &ModelConfig| {
            let json = config.to_json("float32");
            let read = ModelConfig::from_json(&json, Path::new("config.json")).unwrap();
            assert_eq!(&read, config);
        };
        check(&config);
        config.rope.scaling = RopeScaling::Linear { factor: 4.0 };
        config.eos_token_ids = vec![2, 3];
        config.attention_bias = true;
        check(&config);
        config.rope.scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 128,
        };
        config.model_type = "mistral".to_owned();
        config.attention_bias = false;
        config.sliding_window = Some(64);
        config.tie_word_embeddings = false;
        config.bos_token_id = None;
        config.eos_token_ids.clear();
        check(&config);
        config.model_type = "qwen3".to_owned();
        config.sliding_layers = Some(vec![false, true]);
        check(&config);
    }
}

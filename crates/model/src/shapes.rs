//! The dimensions of published models, for plans, benchmarks and tables that need no weights.

use crate::config::ModelConfig;
use crate::error::Result;
use serde_json::{Value, json};
use std::path::Path;

/// A published model's dimensions.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its name here: `qwen3-0.6b`.
    pub name: &'static str,
    /// `model_type`.
    family: &'static str,
    /// Width of the residual stream, width inside the feed-forward block, layers.
    widths: [usize; 3],
    /// Query heads, key and value heads, width of a head.
    heads: [usize; 3],
    vocab_size: usize,
    tied: bool,
}

const fn shape(
    name: &'static str,
    family: &'static str,
    widths: [usize; 3],
    heads: [usize; 3],
    vocab_size: usize,
    tied: bool,
) -> Shape {
    Shape { name, family, widths, heads, vocab_size, tied }
}

/// Every known shape, by family and size.
pub static SHAPES: &[Shape] = &[
    shape("smollm2-135m", "llama", [576, 1536, 30], [9, 3, 64], 49_152, true),
    shape("smollm2-360m", "llama", [960, 2560, 32], [15, 5, 64], 49_152, true),
    shape("smollm2-1.7b", "llama", [2048, 8192, 24], [32, 32, 64], 49_152, true),
    shape("llama3.2-1b", "llama", [2048, 8192, 16], [32, 8, 64], 128_256, true),
    shape("llama3.2-3b", "llama", [3072, 8192, 28], [24, 8, 128], 128_256, true),
    shape("llama3.1-8b", "llama", [4096, 14_336, 32], [32, 8, 128], 128_256, false),
    shape("llama2-7b", "llama", [4096, 11_008, 32], [32, 32, 128], 32_000, false),
    shape("mistral-7b", "mistral", [4096, 14_336, 32], [32, 8, 128], 32_768, false),
    shape("ministral3-3b", "ministral3", [3072, 9216, 26], [32, 8, 128], 131_072, true),
    shape("ministral3-8b", "ministral3", [4096, 14_336, 34], [32, 8, 128], 131_072, false),
    shape("ministral3-14b", "ministral3", [5120, 16_384, 40], [32, 8, 128], 131_072, false),
    shape("qwen2.5-0.5b", "qwen2", [896, 4864, 24], [14, 2, 64], 151_936, true),
    shape("qwen2.5-1.5b", "qwen2", [1536, 8960, 28], [12, 2, 128], 151_936, true),
    shape("qwen2.5-7b", "qwen2", [3584, 18_944, 28], [28, 4, 128], 152_064, false),
    shape("qwen3-0.6b", "qwen3", [1024, 3072, 28], [16, 8, 128], 151_936, true),
    shape("qwen3-1.7b", "qwen3", [2048, 6144, 28], [16, 8, 128], 151_936, true),
    shape("qwen3-4b", "qwen3", [2560, 9728, 36], [32, 8, 128], 151_936, true),
    shape("qwen3-8b", "qwen3", [4096, 12_288, 36], [32, 8, 128], 151_936, false),
    shape("qwen3-14b", "qwen3", [5120, 17_408, 40], [40, 8, 128], 151_936, false),
    shape("qwen3.5-9b", "qwen3_5_text", [4096, 12_288, 32], [16, 4, 256], 248_320, false),
    shape("gemma2-2b", "gemma2", [2304, 9216, 26], [8, 4, 256], 256_000, true),
    shape("gemma2-9b", "gemma2", [3584, 14_336, 42], [16, 8, 256], 256_000, true),
    shape("gemma3-270m", "gemma3_text", [640, 2048, 18], [4, 1, 256], 262_144, true),
    shape("gemma3-1b", "gemma3_text", [1152, 6912, 26], [4, 1, 256], 262_144, true),
    shape("gemma3-4b", "gemma3_text", [2560, 10_240, 34], [8, 4, 256], 262_208, true),
    shape("phi3-mini", "phi3", [3072, 8192, 32], [32, 32, 96], 32_064, false),
    shape("phi4-mini", "phi3", [3072, 8192, 32], [24, 8, 128], 200_064, true),
    shape("phi4", "phi3", [5120, 17_920, 40], [40, 10, 128], 100_352, false),
    shape("smollm3-3b", "smollm3", [2048, 11_008, 36], [16, 4, 128], 128_256, true),
    shape("granite3.3-2b", "granite", [2048, 8192, 40], [32, 8, 64], 49_159, true),
    shape("granite3.3-8b", "granite", [4096, 12_800, 40], [32, 8, 128], 49_159, true),
    shape("olmo2-1b", "olmo2", [2048, 8192, 16], [16, 16, 128], 100_352, false),
    shape("olmo2-7b", "olmo2", [4096, 11_008, 32], [32, 32, 128], 100_352, false),
    shape("glm4-9b", "glm4", [4096, 13_696, 40], [32, 2, 128], 151_552, false),
];

/// Finds a shape by name.
pub fn find(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().find(|shape| shape.name == name)
}

impl Shape {
    /// Gives the `model_type` of the family.
    pub fn family(&self) -> &'static str {
        self.family
    }

    /// Makes a configuration of these dimensions with the family's usual constants and a context of
    /// 32,768 tokens.
    ///
    /// # Errors
    /// If the family refuses it, which a test rules out.
    pub fn config(&self) -> Result<ModelConfig> {
        let [hidden, inner, layers] = self.widths;
        let [heads, kv_heads, head_dim] = self.heads;
        let mut config: Value = json!({
            "model_type": self.family, "vocab_size": self.vocab_size, "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "max_position_embeddings": 32_768, "tie_word_embeddings": self.tied,
        });
        // The published models have none any more, where the family's default is their first's.
        if self.family == "mistral" {
            config["sliding_window"] = Value::Null;
        }
        ModelConfig::from_json(&config, Path::new(self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_one_of_its_family() {
        for shape in SHAPES {
            let config = shape.config().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(config.model_type, shape.family, "{}", shape.name);
            assert_eq!(SHAPES.iter().filter(|other| other.name == shape.name).count(), 1);
        }
    }

    #[test]
    fn parameters_are_those_that_the_models_are_named_for() {
        for (name, millions) in [
            ("smollm2-135m", 134.5),
            ("qwen3-0.6b", 596.0),
            ("qwen3-8b", 8190.7),
            ("llama3.1-8b", 8030.3),
        ] {
            let config = find(name).unwrap().config().unwrap();
            let found = config.num_parameters() as f64 / 1e6;
            assert!((found - millions).abs() < 0.1, "{name}: {found} million parameters");
        }
    }
}

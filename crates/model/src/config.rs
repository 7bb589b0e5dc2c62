//! A decoder's dimensions and constants, from `config.json` or a GGUF file's metadata.

use crate::error::{Error, Result};
use crate::family;
use crate::weights::{GgufFile, MetaValue};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// How rotary frequencies are rescaled for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Fewer turns than this over the original context count as low.
        low_freq_factor: f64,
        /// More turns than this count as high.
        high_freq_factor: f64,
        /// The original context.
        original_max_position_embeddings: usize,
    },
}

/// Rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rescaling.
    pub scaling: RopeScaling,
}

/// Dimensions and constants of a decoder, under the names of `config.json`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct ModelConfig {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope: RopeConfig,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub sliding_window: Option<usize>,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// If it is missing or malformed, the family is not supported, or a value makes no sense.
    pub fn from_json_file(path: &Path) -> Result<Self> {
        let text = fs::read(path).map_err(Error::io(path))?;
        let json: Value = serde_json::from_slice(&text)
            .map_err(|error| Error::malformed(path, error.to_string()))?;
        let read = JsonReader { path, json: &json };
        let model_type = read.text("model_type")?;
        require_family(path, &model_type)?;
        let activation = json["hidden_act"].as_str().unwrap_or("silu");
        if activation != "silu" {
            return Err(
                read.fault("hidden_act", format!("`{activation}` is not supported; expected silu"))
            );
        }
        let heads = read.size("num_attention_heads")?;
        let hidden_size = read.size("hidden_size")?;
        let config = Self {
            vocab_size: read.size("vocab_size")?,
            hidden_size,
            intermediate_size: read.size("intermediate_size")?,
            num_hidden_layers: read.size("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: read.size_or("num_key_value_heads", heads)?,
            head_dim: read.size_or("head_dim", hidden_size / heads.max(1))?,
            max_position_embeddings: read.size_or("max_position_embeddings", 2048)?,
            rms_norm_eps: read.number_or("rms_norm_eps", 1e-6)?,
            rope: read.rope()?,
            tie_word_embeddings: read.flag("tie_word_embeddings"),
            attention_bias: read.flag("attention_bias"),
            mlp_bias: read.flag("mlp_bias"),
            sliding_window: json["sliding_window"].as_u64().map(|window| window as usize),
            bos_token_id: json["bos_token_id"].as_u64().map(|id| id as u32),
            eos_token_ids: token_ids(&json["eos_token_id"]),
            model_type,
        };
        config.validate(path)?;
        Ok(config)
    }

    /// Reads a GGUF file's metadata.
    ///
    /// # Errors
    /// As [`from_json_file`](Self::from_json_file).
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let path = file.path();
        let architecture =
            file.get("general.architecture").and_then(MetaValue::as_str).unwrap_or("missing");
        require_family(path, architecture)?;
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| {
            let value = file.get(&key(name)).and_then(MetaValue::as_u64);
            value.map(|value| value as usize)
        };
        let required = |name: &str| {
            size(name).ok_or_else(|| Error::Config {
                path: path.to_path_buf(),
                field: key(name),
                message: "missing; expected a whole number".to_owned(),
            })
        };
        let number = |name: &str| file.get(&key(name)).and_then(MetaValue::as_f64);
        let heads = required("attention.head_count")?;
        let hidden_size = required("embedding_length")?;
        let tokens = file.get("tokenizer.ggml.tokens").and_then(MetaValue::as_list);
        let vocab_size = match size("vocab_size").or(tokens.map(<[MetaValue]>::len)) {
            Some(size) => size,
            None => required("vocab_size")?,
        };
        let scaling = match file.get(&key("rope.scaling.type")).and_then(MetaValue::as_str) {
            None | Some("none") => RopeScaling::None,
            Some("linear") => {
                RopeScaling::Linear { factor: number("rope.scaling.factor").unwrap_or(1.0) }
            }
            Some(other) => {
                return Err(Error::Config {
                    path: path.to_path_buf(),
                    field: key("rope.scaling.type"),
                    message: format!("`{other}` is not supported; expected none or linear"),
                });
            }
        };
        if file.has_tensor("rope_freqs.weight") {
            return Err(Error::Config {
                path: path.to_path_buf(),
                field: "rope_freqs.weight".to_owned(),
                message: "frequency factors are not supported in GGUF files; use the model's \
                          Hugging Face folder"
                    .to_owned(),
            });
        }
        let token = |name: &str| {
            file.get(&format!("tokenizer.ggml.{name}"))
                .and_then(MetaValue::as_u64)
                .map(|id| id as u32)
        };
        let config = Self {
            model_type: architecture.to_owned(),
            vocab_size,
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            num_hidden_layers: required("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: size("attention.head_count_kv").unwrap_or(heads),
            head_dim: size("attention.key_length").unwrap_or(hidden_size / heads.max(1)),
            max_position_embeddings: required("context_length")?,
            rms_norm_eps: number("attention.layer_norm_rms_epsilon").unwrap_or(1e-6),
            rope: RopeConfig { theta: number("rope.freq_base").unwrap_or(10_000.0), scaling },
            tie_word_embeddings: !file.has_tensor("output.weight"),
            attention_bias: file.has_tensor("blk.0.attn_q.bias"),
            mlp_bias: file.has_tensor("blk.0.ffn_gate.bias"),
            sliding_window: size("attention.sliding_window"),
            bos_token_id: token("bos_token_id"),
            eos_token_ids: ["eos_token_id", "eot_token_id"]
                .iter()
                .filter_map(|n| token(n))
                .collect(),
        };
        config.validate(path)?;
        Ok(config)
    }

    fn validate(&self, path: &Path) -> Result<()> {
        let fault = |field: &str, message: String| {
            Err(Error::Config { path: path.to_path_buf(), field: field.to_owned(), message })
        };
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (field, size) in sizes {
            if size == 0 {
                return fault(field, "is 0; expected at least 1".to_owned());
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let heads = self.num_attention_heads;
            return fault(
                "num_key_value_heads",
                format!("{} does not divide {heads} heads", self.num_key_value_heads),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return fault(
                "head_dim",
                format!("{} is odd; rotary embedding needs pairs", self.head_dim),
            );
        }
        if !(self.rms_norm_eps > 0.0 && self.rope.theta > 0.0) {
            return fault("rms_norm_eps or rope_theta", "expected a positive number".to_owned());
        }
        Ok(())
    }
}

fn require_family(path: &Path, model_type: &str) -> Result<()> {
    if family::find(model_type).is_some() {
        return Ok(());
    }
    Err(Error::UnknownModelType {
        path: path.to_path_buf(),
        found: model_type.to_owned(),
        supported: family::supported().join(", "),
    })
}

/// One id or a list of ids.
pub(crate) fn token_ids(value: &Value) -> Vec<u32> {
    match value {
        Value::Array(list) => list.iter().filter_map(Value::as_u64).map(|id| id as u32).collect(),
        value => value.as_u64().map(|id| id as u32).into_iter().collect(),
    }
}

struct JsonReader<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl JsonReader<'_> {
    fn fault(&self, field: &str, message: impl Into<String>) -> Error {
        let (path, field) = (self.path.to_path_buf(), field.to_owned());
        Error::Config { path, field, message: message.into() }
    }

    fn text(&self, field: &str) -> Result<String> {
        let text = self.json[field].as_str();
        text.map(str::to_owned).ok_or_else(|| self.fault(field, "missing; expected a text"))
    }

    fn size(&self, field: &str) -> Result<usize> {
        match &self.json[field] {
            Value::Null => Err(self.fault(field, "missing; expected a whole number")),
            value => value
                .as_u64()
                .map(|size| size as usize)
                .ok_or_else(|| self.fault(field, format!("`{value}`; expected a whole number"))),
        }
    }

    fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        if self.json[field].is_null() { Ok(default) } else { self.size(field) }
    }

    fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        match &self.json[field] {
            Value::Null => Ok(default),
            value => value
                .as_f64()
                .ok_or_else(|| self.fault(field, format!("`{value}`; expected a number"))),
        }
    }

    fn flag(&self, field: &str) -> bool {
        self.json[field].as_bool().unwrap_or(false)
    }

    /// Both layouts: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`.
    fn rope(&self) -> Result<RopeConfig> {
        let parameters = &self.json["rope_parameters"];
        let scaling = if parameters.is_object() { parameters } else { &self.json["rope_scaling"] };
        let theta = parameters["rope_theta"].as_f64().or(self.json["rope_theta"].as_f64());
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
        let number = |field: &str| {
            scaling[field].as_f64().ok_or_else(|| {
                self.fault(&format!("rope_scaling.{field}"), "missing; expected a number")
            })
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?
                    as usize,
            },
            other => {
                return Err(self.fault(
                    "rope_scaling.rope_type",
                    format!("`{other}` is not supported; expected default, linear or llama3"),
                ));
            }
        };
        Ok(RopeConfig { theta: theta.unwrap_or(10_000.0), scaling })
    }
}

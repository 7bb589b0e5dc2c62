//! What a base model's files say about its shape.
//!
//! Read from Hugging Face's `config.json`, in the older layout (`rope_theta`, `rope_scaling`) and
//! the newer one (`rope_parameters`), or from the metadata of a GGUF file.

use crate::error::{Error, Result};
use crate::family::{self, Family};
use crate::gguf::GgufFile;
use fields::kind;
use serde_json::Value;
use std::path::Path;

mod fields;

pub use fields::Fields;
pub(crate) use fields::token_ids;

/// The shape of a decoder and the constants of its arithmetic.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family, as `llama`: `model_type` in `config.json`, `general.architecture` in a GGUF file.
    pub model_type: String,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads, a divisor of `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// The constant added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the attention projections have biases.
    pub attention_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
    /// How many positions back attention reaches in windowed layers; all if none.
    pub sliding_window: Option<usize>,
    /// Which layers are windowed; all of them if none.
    pub sliding_layers: Option<Vec<bool>>,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies `θ^(−2i/head_dim)`.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched for contexts longer than those of the first training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3's: low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Below this many turns in the original context a frequency counts as low.
        low_freq_factor: f64,
        /// Above this many turns in the original context a frequency counts as high.
        high_freq_factor: f64,
        /// Length of the original context.
        original_max_position_embeddings: usize,
    },
}

impl ModelConfig {
    /// How many positions back attention reaches in layer `layer`; all if none.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let windowed = |layers: &Vec<bool>| layers.get(layer).copied().unwrap_or(true);
        self.sliding_window.filter(|_| self.sliding_layers.as_ref().is_none_or(windowed))
    }

    /// Reads `config.json` at `path`.
    ///
    /// # Errors
    /// If the file is missing or no JSON, a field is missing or malformed, the model type, its
    /// activation, rotary embedding or quantisation is not supported, or sizes contradict
    /// each other.
    pub fn from_json_file(path: &Path) -> Result<Self> {
        let text = fs_err::read_to_string(path)?;
        let root: Value = serde_json::from_str(&text)
            .map_err(|fault| Error::Json { path: path.to_path_buf(), fault })?;
        Self::from_json(&root, path)
    }

    /// Reads the content `root` of a `config.json` that came from `path`.
    ///
    /// # Errors
    /// As [`from_json_file`](Self::from_json_file).
    pub fn from_json(root: &Value, path: &Path) -> Result<Self> {
        let Value::Object(object) = root else {
            return Err(Error::malformed(
                path,
                format!("expected an object, found {}", kind(root)),
            ));
        };
        let fields = Fields { object, path, prefix: String::new() };
        let model_type = fields.required("model_type", "a string", |v| v.as_str())?.to_owned();
        let family = family_of(&model_type, path)?;
        if let Some(quantization) = fields.value("quantization_config") {
            let method = quantization["quant_method"].as_str().unwrap_or("an unnamed method");
            let message = format!(
                "the weights are quantised with {method}, which is not supported; use the \
                 unquantised model or a GGUF file"
            );
            return Err(fields.error("quantization_config", message));
        }
        let hidden_size = fields.size("hidden_size")?;
        let num_attention_heads = fields.size("num_attention_heads")?;
        let head_dim = match fields.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if num_attention_heads == 0 => 0,
            None if hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                let message = format!(
                    "hidden_size {hidden_size} is not divisible by num_attention_heads \
                     {num_attention_heads}, and head_dim is not given"
                );
                return Err(fields.error("hidden_size", message));
            }
        };
        if let Some(name) = fields.optional("hidden_act", "a string", |v| v.as_str())?
            && !matches!(name, "silu" | "swish")
        {
            let message = format!("the activation `{name}` is not supported; expected `silu`");
            return Err(fields.error("hidden_act", message));
        }
        let windowed = fields.flag("use_sliding_window")?.unwrap_or(true);
        let mut config = Self {
            model_type,
            vocab_size: fields.size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_hidden_layers: fields.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: fields
                .optional_size("num_key_value_heads")?
                .unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings: fields.size("max_position_embeddings")?,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: rope_from_json(&fields)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: fields.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
            sliding_window: fields.optional_size("sliding_window")?.filter(|_| windowed),
            sliding_layers: None,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.token_ids("eos_token_id")?,
        };
        read_layer_types(&fields, &mut config)?;
        family.read(&fields, &mut config)?;
        config.validate(path)?;
        Ok(config)
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// The stretching of rotary frequencies that such a file holds as a tensor is not part of the
    /// metadata: see [`RopeScaling::from_factors`].
    ///
    /// # Errors
    /// As [`from_json_file`](Self::from_json_file).
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let path = file.path();
        let architecture = file.str("general.architecture")?;
        let architecture = architecture.ok_or_else(|| {
            Error::config(path, "general.architecture", "missing; expected a model type")
        })?;
        let family = family::find_gguf(architecture)
            .ok_or_else(|| unknown_model_type(architecture, path))?;
        let key = |name: &str| format!("{architecture}.{name}");
        let optional = |name: &str| -> Result<Option<usize>> {
            let Some(value) = file.u64(&key(name))? else { return Ok(None) };
            let value = usize::try_from(value)
                .map_err(|_| Error::config(path, key(name), format!("{value} is too large")))?;
            Ok(Some(value))
        };
        let required = |name: &str| -> Result<usize> {
            optional(name)?.ok_or_else(|| {
                Error::config(path, key(name), "missing; expected a positive integer")
            })
        };
        let token = |name: &str| -> Result<Option<u32>> {
            let name = format!("tokenizer.ggml.{name}");
            let Some(value) = file.u64(&name)? else { return Ok(None) };
            let id = u32::try_from(value)
                .map_err(|_| Error::config(path, name, format!("{value} is no token id")))?;
            Ok(Some(id))
        };
        let hidden_size = required("embedding_length")?;
        let num_attention_heads = required("attention.head_count")?;
        let head_dim = match optional("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                let message = format!(
                    "{hidden_size} is not divisible by {} {num_attention_heads}",
                    key("attention.head_count")
                );
                return Err(Error::config(path, key("embedding_length"), message));
            }
        };
        for (name, what) in [
            ("attention.value_length", "values as wide as keys"),
            ("rope.dimension_count", "rotation of the whole head"),
        ] {
            if let Some(found) = optional(name)?.filter(|&found| found != head_dim) {
                let message = format!("expected {head_dim} ({what}), found {found}");
                return Err(Error::config(path, key(name), message));
            }
        }
        let vocab_size = match (optional("vocab_size")?, file.tensor("token_embd.weight")) {
            (Some(size), _) => size,
            (None, Some(embedding)) => embedding.shape.first().copied().unwrap_or(0),
            (None, None) => {
                return Err(Error::config(
                    path,
                    key("vocab_size"),
                    "missing; expected a positive integer",
                ));
            }
        };
        let mut eos_token_ids: Vec<u32> = Vec::new();
        for name in ["eos_token_id", "eot_token_id"] {
            eos_token_ids.extend(token(name)?.filter(|id| !eos_token_ids.contains(id)));
        }
        let epsilon = key("attention.layer_norm_rms_epsilon");
        let mut config = Self {
            model_type: family.model_type().to_owned(),
            vocab_size,
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            num_hidden_layers: required("block_count")?,
            num_attention_heads,
            num_key_value_heads: optional("attention.head_count_kv")?
                .unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings: required("context_length")?,
            rms_norm_eps: file
                .f64(&epsilon)?
                .ok_or_else(|| Error::config(path, epsilon, "missing; expected a number"))?,
            rope: rope_from_gguf(file, architecture)?,
            tie_word_embeddings: file.tensor("output.weight").is_none(),
            attention_bias: file.tensor("blk.0.attn_q.bias").is_some(),
            mlp_bias: file.tensor("blk.0.ffn_gate.bias").is_some(),
            sliding_window: optional("attention.sliding_window")?.filter(|&window| window > 0),
            sliding_layers: None,
            bos_token_id: token("bos_token_id")?,
            eos_token_ids,
        };
        family.read_gguf(file, &mut config)?;
        config.validate(path)?;
        Ok(config)
    }

    /// Checks that all sizes are positive and agree with each other.
    ///
    /// # Errors
    /// Naming the first field that does not, as one of the file at `path`.
    pub fn validate(&self, path: &Path) -> Result<()> {
        for (field, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ] {
            // Products of two such sizes still fit, so that no shape overflows later.
            if size == 0 || size > 1 << 31 {
                let message = format!("expected a size from 1 to 2147483648, found {size}");
                return Err(Error::config(path, field, message));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let message = format!(
                "expected a divisor of num_attention_heads {}, found {}",
                self.num_attention_heads, self.num_key_value_heads
            );
            return Err(Error::config(path, "num_key_value_heads", message));
        }
        if !self.head_dim.is_multiple_of(2) {
            let message = format!("expected an even number, found {}", self.head_dim);
            return Err(Error::config(path, "head_dim", message));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            let message = format!("expected a number between 0 and 1, found {}", self.rms_norm_eps);
            return Err(Error::config(path, "rms_norm_eps", message));
        }
        if !(self.rope.theta > 1.0 && self.rope.theta.is_finite()) {
            let message = format!("expected a number above 1, found {}", self.rope.theta);
            return Err(Error::config(path, "rope_theta", message));
        }
        for (field, ids) in
            [("bos_token_id", self.bos_token_id.as_slice()), ("eos_token_id", &self.eos_token_ids)]
        {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
                let message = format!("{id} is outside the vocabulary of {}", self.vocab_size);
                return Err(Error::config(path, field, message));
            }
        }
        Ok(())
    }
}

impl RopeConfig {
    /// `θ^(−2i/d)` for `i` in `0..d/2`, rescaled as the configuration says.
    pub(crate) fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| {
                let frequency = self.theta.powf(-2.0 * i as f64 / head_dim as f64);
                match self.scaling {
                    RopeScaling::None => frequency,
                    RopeScaling::Linear { factor } => frequency / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_max_position_embeddings,
                    } => {
                        let turns = original_max_position_embeddings as f64 * frequency
                            / (2.0 * std::f64::consts::PI);
                        let smooth = ((turns - low_freq_factor)
                            / (high_freq_factor - low_freq_factor))
                            .clamp(0.0, 1.0);
                        frequency * (smooth + (1.0 - smooth) / factor)
                    }
                }
            })
            .collect()
    }
}

impl RopeScaling {
    /// The scaling whose frequencies a GGUF file divides by `factors`, one per pair of a head,
    /// when `theta` is the base; the published Llama 3 models are the ones that hold such factors.
    ///
    /// Returns `None` if no scaling this crate knows has these factors.
    pub fn from_factors(factors: &[f32], theta: f64) -> Option<Self> {
        if factors.iter().all(|&factor| factor == 1.0) {
            return Some(Self::None);
        }
        let factor = factors.iter().copied().fold(1.0f32, f32::max);
        if factors.iter().all(|&found| found == factor) {
            return Some(Self::Linear { factor: factor.into() });
        }
        let (low, high, original) = (1.0, 4.0, 8192);
        let scaling = Self::Llama3 {
            factor: factor.into(),
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        };
        let pairs = factors.len() as f64;
        let matches = factors.iter().enumerate().all(|(i, &found)| {
            let frequency = theta.powf(-(i as f64) / pairs);
            let turns = original as f64 * frequency / (2.0 * std::f64::consts::PI);
            let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            let expected = 1.0 / (smooth + (1.0 - smooth) / f64::from(factor));
            (f64::from(found) - expected).abs() <= 1e-3 * expected
        });
        matches.then_some(scaling)
    }
}

fn family_of(model_type: &str, path: &Path) -> Result<&'static dyn Family> {
    family::find(model_type).ok_or_else(|| unknown_model_type(model_type, path))
}

fn unknown_model_type(found: &str, path: &Path) -> Error {
    Error::UnknownModelType {
        path: path.to_path_buf(),
        found: found.to_owned(),
        supported: family::supported().join(", "),
    }
}

/// Reads which layers are windowed.
fn read_layer_types(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let Some(types) = fields.optional("layer_types", "a list", Value::as_array)? else {
        return Ok(());
    };
    if types.len() != config.num_hidden_layers {
        let layers = config.num_hidden_layers;
        let message =
            format!("expected one entry for each of {layers} layers, found {}", types.len());
        return Err(fields.error("layer_types", message));
    }
    let windowed = types.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => {
            let message = format!("expected `full_attention` or `sliding_attention`, found {kind}");
            Err(fields.error("layer_types", message))
        }
    });
    let windowed = windowed.collect::<Result<Vec<bool>>>()?;
    if !windowed.contains(&true) {
        config.sliding_window = None;
    } else if windowed.contains(&false) {
        config.sliding_layers = Some(windowed);
    }
    Ok(())
}

fn rope_from_json(fields: &Fields<'_>) -> Result<RopeConfig> {
    const DEFAULT_THETA: f64 = 10_000.0;
    let top_theta = fields.number("rope_theta")?;
    let nested = match fields.nested("rope_parameters")? {
        Some(nested) => Some(nested),
        None => fields.nested("rope_scaling")?,
    };
    let partial = match &nested {
        Some(nested) => nested.number("partial_rotary_factor")?,
        None => None,
    };
    let partial = partial.or(fields.number("partial_rotary_factor")?).unwrap_or(1.0);
    if partial != 1.0 {
        let message =
            format!("only rotation of the whole head (1.0) is supported, found {partial}");
        return Err(fields.error("partial_rotary_factor", message));
    }
    let Some(nested) = nested else {
        return Ok(RopeConfig {
            theta: top_theta.unwrap_or(DEFAULT_THETA),
            scaling: RopeScaling::None,
        });
    };
    let theta = nested.number("rope_theta")?.or(top_theta).unwrap_or(DEFAULT_THETA);
    let required = |name: &str| -> Result<f64> {
        nested.number(name)?.ok_or_else(|| nested.error(name, "missing; expected a number"))
    };
    let positive = |name: &str| -> Result<f64> {
        let value = required(name)?;
        if value > 0.0 && value.is_finite() {
            return Ok(value);
        }
        Err(nested.error(name, format!("expected a positive number, found {value}")))
    };
    let string = |name: &str| nested.optional(name, "a string", |v| v.as_str());
    let rope_type = string("rope_type")?.or(string("type")?).unwrap_or("default");
    let scaling = match rope_type {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: positive("factor")? },
        "llama3" => {
            let low_freq_factor = positive("low_freq_factor")?;
            let high_freq_factor = positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                let message = format!(
                    "expected more than low_freq_factor {low_freq_factor}, found {high_freq_factor}"
                );
                return Err(nested.error("high_freq_factor", message));
            }
            RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: nested
                    .size("original_max_position_embeddings")?,
            }
        }
        other => {
            let message = format!(
                "the rotary embedding `{other}` is not supported; expected `default`, `linear` or \
                 `llama3`"
            );
            return Err(nested.error("rope_type", message));
        }
    };
    Ok(RopeConfig { theta, scaling })
}

fn rope_from_gguf(file: &GgufFile, architecture: &str) -> Result<RopeConfig> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let theta = file.f64(&key("freq_base"))?.unwrap_or(10_000.0);
    let factor = file.f64(&key("scaling.factor"))?.or(file.f64(&key("scale_linear"))?);
    let scaling = match (file.str(&key("scaling.type"))?, factor) {
        (None | Some("none"), None) | (Some("none"), _) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) if factor > 0.0 && factor.is_finite() => {
            RopeScaling::Linear { factor }
        }
        (None | Some("linear"), found) => {
            let message = format!("expected a positive number, found {found:?}");
            return Err(Error::config(file.path(), key("scaling.factor"), message));
        }
        (Some(other), _) => {
            let message = format!(
                "the rotary embedding `{other}` is not supported; expected `none` or `linear`"
            );
            return Err(Error::config(file.path(), key("scaling.type"), message));
        }
    };
    Ok(RopeConfig { theta, scaling })
}

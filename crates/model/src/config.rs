//! What a base model's files say about its shape.
//!
//! Read from Hugging Face's `config.json`, in the older layout (`rope_theta`, `rope_scaling`) and
//! the newer one (`rope_parameters`), or from the metadata of a GGUF file.

use crate::error::{Error, Result};
use crate::family::{self, Family, Windows};
use crate::gguf::GgufFile;
use crate::site::Kind;
use fields::kind;
use hydralora_kernels::ops::activation::Activation;
use serde_json::Value;
use std::path::Path;

mod arithmetic;
mod fields;
mod keys;
pub(crate) mod rope;

pub use arithmetic::{Arithmetic, LayerEmbeddings, LinearAttention};
pub use fields::Fields;
pub(crate) use fields::token_ids;
pub use keys::Keys;
pub use rope::{QueryScaling, RopeConfig, RopeScaling};

/// Models of pictures and text; the decoder of text inside them is one of the families, its configuration
/// their `text_config`.
const COMPOSITES: &[&str] = &["gemma3", "gemma4", "gemma4_unified", "mistral3", "qwen3_5"];

/// The most layers; the deepest models have some hundreds.
const MOST_LAYERS: usize = 1 << 12;

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
    /// That of windowed layers, where it is another one.
    pub sliding_rope: Option<RopeConfig>,
    /// Whether queries and keys of each layer are rotated; all of them if none.
    pub rotated_layers: Option<Vec<bool>>,
    /// Factors, caps and the activation.
    pub arithmetic: Arithmetic,
    /// Embeddings of every layer's own.
    pub layer_embeddings: Option<LayerEmbeddings>,
    /// Layers that keep a state in place of keys and values.
    pub linear_attention: Option<LinearAttention>,
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

impl ModelConfig {
    /// How many positions back attention reaches in layer `layer`; all if none.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let windowed = |layers: &Vec<bool>| layers.get(layer).copied().unwrap_or(true);
        self.sliding_window.filter(|_| self.sliding_layers.as_ref().is_none_or(windowed))
    }

    /// Gives the rotation of layer `layer`, if its queries and keys are rotated.
    pub fn rope_of(&self, layer: usize) -> Option<&RopeConfig> {
        let rotated = |layers: &Vec<bool>| layers.get(layer).copied().unwrap_or(true);
        if !self.rotated_layers.as_ref().is_none_or(rotated) {
            return None;
        }
        let sliding = self.sliding_rope.as_ref().filter(|_| self.window_of(layer).is_some());
        Some(sliding.unwrap_or(&self.rope))
    }

    /// The longest sequence that the model can be given.
    pub fn context_length(&self) -> usize {
        match self.rope.scaling {
            RopeScaling::Dynamic { factor, .. } => {
                (self.max_position_embeddings as f64 * factor.max(1.0)) as usize
            }
            _ => self.max_position_embeddings,
        }
    }

    /// Reads `config.json` at `path`.
    ///
    /// # Errors
    /// If the file is missing or no JSON, a field is missing or malformed, the model type, its
    /// activation, rotary embedding or quantisation is not supported, or sizes contradict
    /// each other.
    pub fn from_json_file(path: &Path) -> Result<Self> {
        let text = hydralora_files::read_to_string(path)?;
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
        let outer = Fields::new(object, path, String::new());
        let (fields, family) = text_of(&outer)?;
        let quantization =
            outer.value("quantization_config").or(fields.value("quantization_config"));
        if let Some(quantization) = quantization {
            let method = quantization["quant_method"].as_str().unwrap_or("an unnamed method");
            let message = format!(
                "the weights are quantised with {method}, which is not supported; use the \
                 unquantised model or a GGUF file"
            );
            return Err(fields.error("quantization_config", message));
        }
        let hidden_size = fields.size("hidden_size")?;
        let num_attention_heads = fields.size("num_attention_heads")?;
        let defaults = family.defaults();
        let head_dim = match fields.optional_size("head_dim")?.or(defaults.head_dim) {
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
        if fields.flag("is_causal")? == Some(false) {
            let message = "found false; attention in both directions is not supported";
            return Err(fields.error("is_causal", message));
        }
        let tied = outer.flag("tie_word_embeddings")?.or(fields.flag("tie_word_embeddings")?);
        let ids = |name: &str| -> Result<Vec<u32>> {
            let own = fields.token_ids(name)?;
            if own.is_empty() { outer.token_ids(name) } else { Ok(own) }
        };
        let mut config = Self {
            model_type: family.model_type().to_owned(),
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
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
            rope: family.rope(&fields)?,
            sliding_rope: None,
            rotated_layers: None,
            arithmetic: Arithmetic { activation: activation(&fields)?, ..Arithmetic::default() },
            layer_embeddings: None,
            linear_attention: None,
            tie_word_embeddings: tied.unwrap_or(defaults.tie_word_embeddings),
            attention_bias: fields.flag("attention_bias")?.unwrap_or(defaults.attention_bias),
            mlp_bias: fields.flag("mlp_bias")?.unwrap_or(false),
            sliding_window: fields.optional_size("sliding_window")?,
            sliding_layers: None,
            bos_token_id: ids("bos_token_id")?.first().copied(),
            eos_token_ids: ids("eos_token_id")?,
        };
        config.check_sizes(path)?;
        read_windows(&fields, family, &mut config)?;
        family.read(&fields, &mut config)?;
        fields.refuse_unknown()?;
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
        let keys = Keys::new(file, architecture);
        let optional = |name: &str| -> Result<Option<usize>> {
            let Some(values) = keys.u64s(name)? else { return Ok(None) };
            let Some(&value) = values.first() else { return Ok(None) };
            if !family.gguf().by_layer && values.iter().any(|&other| other != value) {
                let message = format!("expected the same in all layers, found {values:?}");
                return Err(keys.error(name, message));
            }
            let value = usize::try_from(value)
                .map_err(|_| keys.error(name, format!("{value} is too large")))?;
            Ok(Some(value))
        };
        let required = |name: &str| -> Result<usize> {
            optional(name)?.ok_or_else(|| keys.error(name, "missing; expected a positive integer"))
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
                    "{hidden_size} is not divisible by {architecture}.attention.head_count \
                     {num_attention_heads}"
                );
                return Err(keys.error("embedding_length", message));
            }
        };
        let values = "attention.value_length";
        if let Some(found) = optional(values)?.filter(|&found| found != head_dim) {
            let message = format!("expected {head_dim} (values as wide as keys), found {found}");
            return Err(keys.error(values, message));
        }
        let turning = "rope.dimension_count";
        if family.defaults().partial_rotary_factor.is_none()
            && let Some(found) = optional(turning)?.filter(|&found| found != head_dim)
        {
            let message =
                format!("expected {head_dim} (rotation of the whole head), found {found}");
            return Err(keys.error(turning, message));
        }
        if keys.bool("attention.causal")? == Some(false) {
            let message = "found false; attention in both directions is not supported";
            return Err(keys.error("attention.causal", message));
        }
        let max_position_embeddings = required("context_length")?;
        let vocab_size = match (optional("vocab_size")?, file.tensor("token_embd.weight")) {
            (Some(size), _) => size,
            (None, Some(embedding)) => embedding.shape.first().copied().unwrap_or(0),
            (None, None) => {
                return Err(keys.error("vocab_size", "missing; expected a positive integer"));
            }
        };
        let mut eos_token_ids: Vec<u32> = Vec::new();
        for name in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            eos_token_ids.extend(token(name)?.filter(|id| !eos_token_ids.contains(id)));
        }
        let epsilon = "attention.layer_norm_rms_epsilon";
        let window = "attention.sliding_window";
        let sliding_window = optional(window)?.filter(|&window| window > 0);
        if let Some(found) = sliding_window.filter(|&found| found < max_position_embeddings)
            && !family.gguf().windowed
        {
            let message = format!(
                "found {found}; attention of the architecture `{architecture}` reaches back to the first \
                 token here (OLMo 3 and other models with windows are not supported)"
            );
            return Err(keys.error(window, message));
        }
        let mut config = Self {
            model_type: family.model_type().to_owned(),
            vocab_size,
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            num_hidden_layers: required("block_count")?
                .saturating_sub(optional(family::NEXT_LAYERS)?.unwrap_or(0)),
            num_attention_heads,
            num_key_value_heads: optional("attention.head_count_kv")?
                .unwrap_or(num_attention_heads),
            head_dim,
            max_position_embeddings,
            rms_norm_eps: keys
                .f64(epsilon)?
                .ok_or_else(|| keys.error(epsilon, "missing; expected a number"))?,
            rope: rope::from_gguf(&keys, head_dim, max_position_embeddings)?,
            sliding_rope: None,
            rotated_layers: None,
            arithmetic: Arithmetic::default(),
            layer_embeddings: None,
            linear_attention: None,
            tie_word_embeddings: file.tensor("output.weight").is_none(),
            attention_bias: file.tensor("blk.0.attn_q.bias").is_some(),
            mlp_bias: file.tensor("blk.0.ffn_gate.bias").is_some(),
            sliding_window: sliding_window.filter(|_| family.gguf().windowed),
            sliding_layers: None,
            bos_token_id: token("bos_token_id")?,
            eos_token_ids,
        };
        config.check_sizes(path)?;
        family.read_gguf(&keys, &mut config)?;
        keys.refuse_unread()?;
        config.validate(path)?;
        Ok(config)
    }

    /// Checks that every size by itself can be one, before anything is made of that size.
    fn check_sizes(&self, path: &Path) -> Result<()> {
        for (field, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
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
        // Layers are listed, and lists of them multiplied, before the weights say which there are.
        let layers = self.num_hidden_layers;
        if layers == 0 || layers > MOST_LAYERS {
            let message = format!("expected a size from 1 to {MOST_LAYERS}, found {layers}");
            return Err(Error::config(path, "num_hidden_layers", message));
        }
        let Some(of) = &self.layer_embeddings else { return Ok(()) };
        for (field, size, least) in [
            ("hidden_size_per_layer_input", of.width.saturating_mul(layers), 0),
            ("vocab_size_per_layer_input", of.vocab_size, 1),
            ("global_head_dim", of.full_head_dim, 1),
        ] {
            if size < least || size > 1 << 31 {
                let message =
                    format!("expected a size up to 2147483648 for all layers, found {size}");
                return Err(Error::config(path, field, message));
            }
        }
        Ok(())
    }

    /// Checks that all sizes are positive and agree with each other.
    ///
    /// # Errors
    /// Naming the first field that does not, as one of the file at `path`.
    pub fn validate(&self, path: &Path) -> Result<()> {
        self.check_sizes(path)?;
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let message = format!(
                "expected a divisor of num_attention_heads {}, found {}",
                self.num_attention_heads, self.num_key_value_heads
            );
            return Err(Error::config(path, "num_key_value_heads", message));
        }
        let wide = self.layer_embeddings.as_ref().map(|of| ("global_head_dim", of.full_head_dim));
        if let Some(of) = self.layer_embeddings
            && !self.num_attention_heads.is_multiple_of(of.full_key_value_heads)
        {
            let message = format!(
                "expected a divisor of num_attention_heads {}, found {}",
                self.num_attention_heads, of.full_key_value_heads
            );
            return Err(Error::config(path, "num_global_key_value_heads", message));
        }
        for (field, width) in [("head_dim", self.head_dim)].into_iter().chain(wide) {
            if !width.is_multiple_of(2) {
                let message = format!("expected an even number, found {width}");
                return Err(Error::config(path, field, message));
            }
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            let message = format!("expected a number between 0 and 1, found {}", self.rms_norm_eps);
            return Err(Error::config(path, "rms_norm_eps", message));
        }
        for rope in [Some(&self.rope), self.sliding_rope.as_ref()].into_iter().flatten() {
            if let Some((field, message)) = rope.fault(self.head_dim) {
                return Err(Error::config(path, field, message));
            }
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

/// Finds the fields that describe the decoder of text, and its family.
fn text_of<'a>(outer: &Fields<'a>) -> Result<(Fields<'a>, &'static dyn Family)> {
    let model_type =
        |fields: &Fields<'a>| fields.required("model_type", "a string", |v| v.as_str());
    let found = model_type(outer)?;
    let inner = match COMPOSITES.contains(&found) {
        true => outer.nested("text_config")?,
        false => None,
    };
    let fields = match inner {
        Some(inner) => inner,
        None => Fields::new(outer.object, outer.path, outer.prefix.clone()),
    };
    let found = model_type(&fields)?;
    let family = family::find(found).ok_or_else(|| unknown_model_type(found, outer.path))?;
    Ok((fields, family))
}

/// Reads the activation of the feed-forward block.
fn activation(fields: &Fields<'_>) -> Result<Activation> {
    let mut found = None;
    for field in ["hidden_act", "hidden_activation"] {
        let name = fields.optional(field, "a string", |v| v.as_str())?;
        found = name.map(|name| (field, name)).or(found);
    }
    match found {
        None | Some((_, "silu" | "swish")) => Ok(Activation::Silu),
        Some((_, "gelu_pytorch_tanh")) => Ok(Activation::GeluTanh),
        Some((field, name)) => {
            let message = format!(
                "the activation `{name}` is not supported; expected `silu` or `gelu_pytorch_tanh`"
            );
            Err(fields.error(field, message))
        }
    }
}

pub(crate) fn unknown_model_type(found: &str, path: &Path) -> Error {
    Error::UnknownModelType {
        path: path.to_path_buf(),
        found: found.to_owned(),
        hint: family::hint(found),
        supported: family::supported().join(", "),
    }
}

/// Reads which layers are windowed, as far as the family lets a configuration say.
fn read_windows(fields: &Fields<'_>, family: &dyn Family, config: &mut ModelConfig) -> Result<()> {
    let (window, switch) = ("sliding_window", "use_sliding_window");
    let wanted = fields.flag(switch)?;
    // Once written, the window of another program's file.
    if let Some(found) = fields.optional_size("sliding_window_size")?
        && config.sliding_window != Some(found)
    {
        let message = format!("found {found}; expected the same as sliding_window");
        return Err(fields.error("sliding_window_size", message));
    }
    match (family.windows(), config.sliding_window, wanted) {
        (Windows::None, _, Some(true)) => {
            let message = "found true; attention of this model_type has no window";
            return Err(fields.error(switch, message));
        }
        (Windows::None, Some(found), wanted) => {
            if wanted.is_none() && found < config.max_position_embeddings {
                let message = format!(
                    "found {found}; attention of this model_type reaches back to the first token"
                );
                return Err(fields.error(window, message));
            }
            config.sliding_window = None;
        }
        (Windows::All, Some(found), Some(false)) => {
            let message = format!(
                "found false, and a sliding_window of {found}, which this model_type uses whatever this \
                 says; expected true, or null there"
            );
            return Err(fields.error(switch, message));
        }
        _ => {}
    }
    let Some(types) = fields.by_layer("layer_types", config.num_hidden_layers)? else {
        return Ok(());
    };
    let stateful = family.linears().iter().any(|linear| linear.kind.overlaps(Kind::STATE));
    let windowed = types.iter().map(|kind| match (kind.as_str(), family.windows()) {
        (Some("full_attention" | "attention"), _) => Ok(false),
        (Some("linear_attention"), _) if stateful => Ok(false),
        (Some("sliding_attention"), Windows::None) => {
            let message = "names `sliding_attention`, which layers of this model_type do not have";
            Err(fields.error("layer_types", message))
        }
        (Some("sliding_attention"), _) if config.sliding_window.is_some() => Ok(true),
        (Some("sliding_attention"), _) if fields.has(window) => {
            let message = "names `sliding_attention`, but there is no sliding_window";
            Err(fields.error("layer_types", message))
        }
        // Some families have a usual window.
        (Some("sliding_attention"), _) => Ok(true),
        _ => {
            let message = format!("expected `full_attention` or `sliding_attention`, found {kind}");
            Err(fields.error("layer_types", message))
        }
    });
    let windowed = windowed.collect::<Result<Vec<bool>>>()?;
    if family.windows() == Windows::All {
        if let Some(found) = config.sliding_window
            && windowed.contains(&false)
        {
            let message = format!(
                "names `full_attention`, but all layers of this model_type have the sliding_window of \
                 {found}"
            );
            return Err(fields.error("layer_types", message));
        }
        return Ok(());
    }
    if !windowed.contains(&true) {
        config.sliding_window = None;
    } else if windowed.contains(&false) {
        config.sliding_layers = Some(windowed);
    }
    Ok(())
}

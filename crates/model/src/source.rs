//! A base model as it lies on disk: configuration, weights, tokenizer.

use crate::config::rope::{
    ATTENTION_FACTOR, FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS, long_rope_factor,
};
use crate::config::{
    Arithmetic, LayerEmbeddings, LinearAttention, ModelConfig, RopeConfig, RopeScaling,
};
use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::tokenizer::{AddedToken, Tokenizer};
use crate::weights::{Weights, split};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes at either end of a tensor that enter the fingerprint.
const SAMPLE: usize = 4096;
/// One token in so many may have no row in the embedding.
const EXCESS: usize = 16;
/// The embedding's weight.
const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output layer's, where it is not tied.
const HEAD: &str = "lm_head.weight";

/// What tells one base model from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelIdentity {
    /// Name of the folder or file.
    pub name: String,
    /// What the model can be opened by again: a hub id, or the absolute path.
    pub reference: String,
    /// SHA-256, in hexadecimal, over what determines the model's output: the configuration, and
    /// each tensor's name, shape, number format and the bytes at its two ends.
    pub fingerprint: String,
}

/// An opened base model.
#[derive(Debug)]
pub struct ModelSource {
    /// Dimensions.
    pub config: ModelConfig,
    /// Tensors.
    pub weights: Weights,
    /// Tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// Which model it is, as it lies on disk.
    pub identity: ModelIdentity,
    /// Tokens that were added to it since, in the order of their ids.
    pub added: Vec<AddedToken>,
}

impl ModelSource {
    /// Opens a Hugging Face folder, a folder with one `.gguf` file or those of one model, a `.gguf`
    /// file (one of several stands for all), or a `.safetensors` file that has the model's other
    /// files beside it.
    ///
    /// # Errors
    /// If there is no model, or one of its files is missing, malformed or not supported.
    pub fn open(path: &Path) -> Result<Self> {
        hydralora_files::expect_file(path)?;
        let resolved = std::path::absolute(path)?;
        let name = resolved.file_stem().filter(|_| path.is_file()).or(resolved.file_name());
        let name = name.unwrap_or(resolved.as_os_str()).to_string_lossy().into_owned();
        let (config, weights, folder) = open_parts(path)?;
        let name = match weights.gguf() {
            Some(_) if path.is_file() => split::model_name(&name).to_owned(),
            _ => name,
        };
        let tokenizer = match weights.gguf() {
            Some(file) => Tokenizer::from_gguf(file)?,
            None => Tokenizer::from_folder(&folder, &config.eos_token_ids)?,
        };
        // A few tokens more than rows are usual; many more are the tokenizer of another model.
        if tokenizer.vocab_size() > config.vocab_size + config.vocab_size / EXCESS {
            let message = format!(
                "{} tokens for an embedding of {} rows",
                tokenizer.vocab_size(),
                config.vocab_size
            );
            return Err(Error::tokenizer(path, message));
        }
        let tokenizer = tokenizer.with_rows(config.vocab_size);
        let fingerprint = fingerprint(&config, &weights);
        let reference = resolved.to_string_lossy().into_owned();
        let identity = ModelIdentity { name, reference, fingerprint };
        Ok(Self { config, weights, tokenizer, identity, added: Vec::new() })
    }

    /// Adds tokens of these texts to the vocabulary, each a mark or text, and gives them with their
    /// ids. Where the embedding has no row for one, it and the output layer get more, of zeros; they
    /// get at least `rows`.
    ///
    /// # Errors
    /// As [`Tokenizer::add`], and if the model has more than one embedding.
    pub fn add_tokens(
        &mut self,
        tokens: &[(String, bool)],
        rows: usize,
    ) -> Result<Vec<AddedToken>> {
        let mut tokenizer = self.tokenizer.clone();
        let added = tokenizer.add(tokens)?;
        let needed = added.iter().map(|token| token.id as usize + 1).max().unwrap_or(0);
        let rows = rows.max(needed).max(self.config.vocab_size);
        if rows > self.config.vocab_size && self.config.layer_embeddings.is_some() {
            let message =
                "every layer has an embedding of its own, to which no tokens can be added";
            return Err(Error::malformed(self.weights.path(), message));
        }
        self.config.vocab_size = rows;
        for name in [EMBEDDING, HEAD] {
            self.weights.grow(name, rows);
        }
        self.tokenizer = tokenizer.with_rows(rows);
        self.added.extend_from_slice(&added);
        Ok(added)
    }
}

/// Configuration and tensors of a model whose tokenizer is not needed.
///
/// # Errors
/// As [`ModelSource::open`].
pub fn open_weights(path: &Path) -> Result<(ModelConfig, Weights)> {
    open_parts(path).map(|(config, weights, _)| (config, weights))
}

/// Configuration, tensors, and the folder of the model's other files.
fn open_parts(path: &Path) -> Result<(ModelConfig, Weights, PathBuf)> {
    let (weights, folder) = locate(path)?;
    let config = match weights.gguf() {
        None => {
            let mut config = config_of_folder(&folder)?;
            // Programs that trained a head of its own may have left the flag as it was.
            if config.tie_word_embeddings && has_own_head(&weights)? {
                config.tie_word_embeddings = false;
            }
            config
        }
        Some(file) => {
            let mut config = ModelConfig::from_gguf(file)?;
            if weights.contains(FREQUENCY_FACTORS) {
                config.rope = stretched_rope(&weights, &config)?;
            }
            if weights.contains(LONG_FACTORS) {
                config.rope.scaling = long_rope(file, &weights, &config)?;
            }
            config
        }
    };
    Ok((config, weights, folder))
}

/// The configuration of the model at `path`, for which as little is read as can be.
///
/// # Errors
/// If there is no model, or its configuration is malformed or not supported.
pub fn config_at(path: &Path) -> Result<ModelConfig> {
    if path.join("config.json").exists() {
        return config_of_folder(path);
    }
    open_weights(path).map(|(config, _)| config)
}

/// Whether there is an output layer that differs from the embedding.
fn has_own_head(weights: &Weights) -> Result<bool> {
    const NAMES: [&str; 2] = ["lm_head.weight", "model.embed_tokens.weight"];
    if !NAMES.iter().all(|name| weights.contains(name)) {
        return Ok(false);
    }
    let [head, embedding] = NAMES.map(|name| weights.get(name));
    let (head, embedding) = (head?, embedding?);
    if head.format == embedding.format {
        return Ok(head.shape != embedding.shape || head.bytes != embedding.bytes);
    }
    let numbers = |name: &str, shape: &[usize]| weights.take_f32(name, shape);
    let (head, embedding) = (numbers(NAMES[0], &head.shape)?, numbers(NAMES[1], &embedding.shape)?);
    Ok(head[..] != embedding[..])
}

/// The configuration of a Hugging Face folder.
///
/// # Errors
/// If there is none, or it is malformed or not supported.
pub fn config_of_folder(folder: &Path) -> Result<ModelConfig> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Err(match of_another_kind(folder) {
            Some(what) => Error::NotTextModel { path: folder.to_path_buf(), what },
            None => Error::NoModel { path: folder.to_path_buf() },
        });
    }
    ModelConfig::from_json_file(&path)
}

/// The weights at `path`, and the folder they are in.
fn locate(path: &Path) -> Result<(Weights, PathBuf)> {
    if path.is_dir() {
        if path.join("config.json").exists() {
            return Ok((Weights::open(path)?, path.to_path_buf()));
        }
        if let Some(what) = of_another_kind(path) {
            return Err(Error::NotTextModel { path: path.to_path_buf(), what });
        }
        let mut files = Vec::new();
        for entry in fs_err::read_dir(path)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "gguf") {
                files.push(path);
            }
        }
        if let Some(first) = split::one_series(&files) {
            return Ok((Weights::open(first)?, path.to_path_buf()));
        }
        return match files.as_slice() {
            [file] => Ok((Weights::open(file)?, path.to_path_buf())),
            [] => Err(Error::NoModel { path: path.to_path_buf() }),
            several => {
                let message = format!("{} .gguf files here; name one of them", several.len());
                Err(Error::malformed(path, message))
            }
        };
    }
    if !path.is_file() {
        return Err(Error::NoModel { path: path.to_path_buf() });
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((Weights::open(path)?, parent.to_path_buf()))
}

/// What a folder without a model is, if that is known.
fn of_another_kind(folder: &Path) -> Option<String> {
    if folder.join("adapter_config.json").exists() {
        return Some(
            "an adapter and no model; expected the base model that it was trained on".to_owned(),
        );
    }
    let inside = folder.join("adapter");
    let whole = inside.join("config.json").exists();
    (whole || inside.join("adapter_config.json").exists()).then(|| {
        let kind = if whole { "model" } else { "adapter" };
        format!("the folder of a run and no model; its {kind} is {}", inside.display())
    })
}

fn stretched_rope(weights: &Weights, config: &ModelConfig) -> Result<RopeConfig> {
    let widest = config.layer_embeddings.map_or(config.head_dim, |of| of.full_head_dim);
    let pairs = config.rope.rotary_dim(widest) / 2;
    let factors = weights.take_f32(FREQUENCY_FACTORS, &[pairs])?;
    if let Some(found) = factors.iter().find(|&&factor| !(factor > 0.0 && factor.is_finite())) {
        let message = format!("the tensor `{FREQUENCY_FACTORS}` holds the divisor {found}");
        return Err(Error::malformed(weights.path(), message));
    }
    let mut rope = config.rope.clone().stretched(widest, &factors);
    if let RopeScaling::LongRope { original_max_position_embeddings, .. } = &mut rope.scaling {
        *original_max_position_embeddings = config.max_position_embeddings;
    }
    Ok(rope)
}

/// LongRoPE's divisors, which a GGUF file holds as tensors.
fn long_rope(file: &GgufFile, weights: &Weights, config: &ModelConfig) -> Result<RopeScaling> {
    let pairs = config.rope.rotary_dim(config.head_dim) / 2;
    let list = |name: &str| -> Result<Arc<[f64]>> {
        let factors = weights.take_f32(name, &[pairs])?;
        Ok(factors.iter().map(|&factor| f64::from(factor)).collect())
    };
    let architecture = config.gguf_names().architecture;
    let original = file.u64(&format!("{architecture}.rope.scaling.original_context_length"))?;
    let original = original.and_then(|length| usize::try_from(length).ok());
    let original = original.unwrap_or(config.max_position_embeddings);
    let stretch = config.max_position_embeddings as f64 / original.max(1) as f64;
    let usual = long_rope_factor(stretch, original);
    Ok(RopeScaling::LongRope {
        short: list(SHORT_FACTORS)?,
        long: list(LONG_FACTORS)?,
        attention_factor: file.f64(&format!("{architecture}.{ATTENTION_FACTOR}"))?.unwrap_or(usual),
        original_max_position_embeddings: original,
    })
}

fn fingerprint(config: &ModelConfig, weights: &Weights) -> String {
    let mut hash = Sha256::new();
    let constants = format!(
        "{} {} {} {} {} {} {} {} {} {} {} {} {}\n",
        config.model_type,
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
        config.rope.theta,
        config.rope.identity(),
        config.tie_word_embeddings,
        config.sliding_window.unwrap_or(0),
    );
    hash.update(constants);
    if let Some(windowed) = &config.sliding_layers {
        hash.update(format!("{windowed:?}\n"));
    }
    if let Some(rope) = &config.sliding_rope {
        hash.update(format!("{} {}\n", rope.theta, rope.identity()));
    }
    if let Some(rotated) = &config.rotated_layers {
        hash.update(format!("{rotated:?}\n"));
    }
    if let Some(of) = config.layer_embeddings {
        let LayerEmbeddings {
            width,
            vocab_size,
            full_head_dim,
            full_key_value_heads,
            values_of_keys,
            shared_layers,
            wide_shared,
        } = of;
        let line = format!("{width} {vocab_size} {full_head_dim} {shared_layers} {wide_shared}\n");
        hash.update(line);
        // Lines of models without these stay as they were.
        if values_of_keys || full_key_value_heads != config.num_key_value_heads {
            hash.update(format!("{full_key_value_heads} {values_of_keys}\n"));
        }
    }
    if let Some(of) = &config.linear_attention {
        let LinearAttention {
            layers,
            num_key_heads,
            num_value_heads,
            key_head_dim,
            value_head_dim,
            conv_kernel,
        } = of;
        hash.update(format!(
            "{layers:?} {num_key_heads} {num_value_heads} {key_head_dim} {value_head_dim} \
             {conv_kernel}\n"
        ));
    }
    if config.arithmetic != Arithmetic::default() {
        hash.update(config.arithmetic.identity());
    }
    for (name, format, shape, bytes) in weights.stored_tensors() {
        hash.update(format!("{name} {format} {shape:?}\n"));
        hash.update(&bytes[..SAMPLE.min(bytes.len())]);
        hash.update(&bytes[bytes.len().saturating_sub(SAMPLE)..]);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

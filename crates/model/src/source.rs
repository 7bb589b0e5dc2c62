//! A base model as it lies on disk: configuration, weights, tokenizer.

use crate::config::{ModelConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Bytes at either end of a tensor that enter the fingerprint.
const SAMPLE: usize = 4096;
/// GGUF's tensor of divisors of the rotary frequencies.
const FREQUENCY_FACTORS: &str = "rope_freqs.weight";

/// What tells one base model from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelIdentity {
    /// Name of the folder or file.
    pub name: String,
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
    /// Which model it is.
    pub identity: ModelIdentity,
}

impl ModelSource {
    /// Opens a Hugging Face folder, a folder with one `.gguf` file, a `.gguf` file, or a
    /// `.safetensors` file that has the model's other files beside it.
    ///
    /// # Errors
    /// If there is no model, or one of its files is missing, malformed or not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let resolved = std::path::absolute(path)?;
        let name = resolved.file_stem().filter(|_| path.is_file()).or(resolved.file_name());
        let name = name.unwrap_or(resolved.as_os_str()).to_string_lossy().into_owned();
        let (config, weights, folder) = open_parts(path)?;
        let tokenizer = match weights.gguf() {
            Some(file) => Tokenizer::from_gguf(file)?,
            None => Tokenizer::from_folder(&folder, &config.eos_token_ids)?,
        };
        if tokenizer.vocab_size() > config.vocab_size {
            let message = format!(
                "{} tokens for an embedding of {} rows",
                tokenizer.vocab_size(),
                config.vocab_size
            );
            return Err(Error::tokenizer(path, message));
        }
        let fingerprint = fingerprint(&config, &weights);
        Ok(Self { config, weights, tokenizer, identity: ModelIdentity { name, fingerprint } })
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
        None => config_of_folder(&folder)?,
        Some(file) => {
            let mut config = ModelConfig::from_gguf(file)?;
            if weights.contains(FREQUENCY_FACTORS) {
                config.rope.scaling = frequency_scaling(&weights, &config)?;
            }
            config
        }
    };
    Ok((config, weights, folder))
}

/// The configuration of a Hugging Face folder.
///
/// # Errors
/// If there is none, or it is malformed or not supported.
pub fn config_of_folder(folder: &Path) -> Result<ModelConfig> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Err(Error::NoModel { path: folder.to_path_buf() });
    }
    ModelConfig::from_json_file(&path)
}

/// The weights at `path`, and the folder they are in.
fn locate(path: &Path) -> Result<(Weights, PathBuf)> {
    if path.is_dir() {
        if path.join("config.json").exists() {
            return Ok((Weights::open(path)?, path.to_path_buf()));
        }
        let mut files = Vec::new();
        for entry in fs_err::read_dir(path)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "gguf") {
                files.push(path);
            }
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

fn frequency_scaling(weights: &Weights, config: &ModelConfig) -> Result<RopeScaling> {
    let factors = weights.take_f32(FREQUENCY_FACTORS, &[config.head_dim / 2])?;
    RopeScaling::from_factors(&factors, config.rope.theta).ok_or_else(|| {
        let message = format!(
            "the tensor `{FREQUENCY_FACTORS}` holds divisors of the rotary frequencies that are \
             not those of Llama 3"
        );
        Error::malformed(weights.path(), message)
    })
}

fn fingerprint(config: &ModelConfig, weights: &Weights) -> String {
    // Written out rather than by `Debug`, which a renamed field would change.
    let scaling = match config.rope.scaling {
        RopeScaling::None => "none".to_owned(),
        RopeScaling::Linear { factor } => format!("linear {factor}"),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => format!(
            "llama3 {factor} {low_freq_factor} {high_freq_factor} \
             {original_max_position_embeddings}"
        ),
    };
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
        scaling,
        config.tie_word_embeddings,
        config.sliding_window.unwrap_or(0),
    );
    hash.update(constants);
    if let Some(windowed) = &config.sliding_layers {
        hash.update(format!("{windowed:?}\n"));
    }
    for (name, format, shape, bytes) in weights.stored_tensors() {
        hash.update(format!("{name} {format} {shape:?}\n"));
        hash.update(&bytes[..SAMPLE.min(bytes.len())]);
        hash.update(&bytes[bytes.len().saturating_sub(SAMPLE)..]);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

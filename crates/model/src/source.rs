//! A base model as it lies on disk: configuration, weights, tokenizer.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::weights::{GgufFile, Weights};
use std::path::Path;

/// What tells one base model from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelIdentity {
    /// Name of the folder or file.
    pub name: String,
    /// Hash over configuration and weights.
    pub fingerprint: String,
}

/// An opened base model.
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
    /// Opens a Hugging Face folder or a `.gguf` file.
    ///
    /// # Errors
    /// If there is no model, or one of its files is missing, malformed or not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let (config, weights, tokenizer) = open_parts(path)?;
        let tokenizer = match tokenizer {
            Some(tokenizer) => tokenizer,
            None => Tokenizer::from_folder(path, &config.eos_token_ids)?,
        };
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(Error::Tokenizer {
                path: path.to_path_buf(),
                message: format!(
                    "{} tokens for an embedding of {} rows",
                    tokenizer.vocab_size(),
                    config.vocab_size
                ),
            });
        }
        let identity = ModelIdentity { name, fingerprint: weights.fingerprint() };
        Ok(Self { config, weights, tokenizer, identity })
    }
}

/// Dimensions and tensors of a model whose tokenizer is not needed.
///
/// # Errors
/// As [`ModelSource::open`].
pub fn open_weights(path: &Path) -> Result<(ModelConfig, Weights)> {
    open_parts(path).map(|(config, weights, _)| (config, weights))
}

/// The tokenizer too where it is in the same file.
fn open_parts(path: &Path) -> Result<(ModelConfig, Weights, Option<Tokenizer>)> {
    if path.is_dir() {
        return Ok((config_of_folder(path)?, Weights::open_folder(path)?, None));
    }
    if !path.is_file() {
        return Err(Error::NoModel { path: path.to_path_buf() });
    }
    let file = GgufFile::open(path)?;
    let config = ModelConfig::from_gguf(&file)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let (heads, key_value_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let weights = Weights::from_gguf(file, heads, key_value_heads)?;
    Ok((config, weights, Some(tokenizer)))
}

/// The configuration of a Hugging Face folder.
///
/// # Errors
/// If there is none.
pub fn config_of_folder(folder: &Path) -> Result<ModelConfig> {
    let path = folder.join("config.json");
    if !path.exists() {
        return Err(Error::NoModel { path: folder.to_path_buf() });
    }
    ModelConfig::from_json_file(&path)
}

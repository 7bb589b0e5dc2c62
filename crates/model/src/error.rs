//! What can go wrong with a base model.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a base model's files or of a run through it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: {message}", path = path.display())]
    Malformed { path: PathBuf, message: String },
    #[error("{path}: no model here; expected config.json with *.safetensors, or a .gguf file", path = path.display())]
    NoModel { path: PathBuf },
    #[error("{path}: model_type `{found}` is not supported; supported: {supported}", path = path.display())]
    UnknownModelType { path: PathBuf, found: String, supported: String },
    #[error("{path}: {field}: {message}", path = path.display())]
    Config { path: PathBuf, field: String, message: String },
    #[error("{path}: tensor `{name}` is missing", path = path.display())]
    MissingTensor { path: PathBuf, name: String },
    #[error("{path}: tensor `{name}` has shape {found:?}, expected {expected:?}", path = path.display())]
    WrongShape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{path}: tensor `{name}` has type {found}, which is not supported", path = path.display())]
    UnknownDtype { path: PathBuf, name: String, found: String },
    #[error("{path}: tensor `{name}` holds a number that is not finite", path = path.display())]
    NonFinite { path: PathBuf, name: String },
    #[error("{path}: the model does not use the tensors {}", summary(names), path = path.display())]
    UnusedTensors { path: PathBuf, names: Vec<String> },
    #[error("{path}: tokenizer: {message}", path = path.display())]
    Tokenizer { path: PathBuf, message: String },
    #[error("sequence {sequence} is empty")]
    EmptySequence { sequence: usize },
    #[error("sequence {sequence} has {length} tokens, the model's context holds {limit}")]
    ContextExceeded { sequence: usize, length: usize, limit: usize },
    #[error("token id {token} is not below the vocabulary size {vocab_size}")]
    TokenOutOfRange { token: u32, vocab_size: usize },
    #[error(
        "`{spec}` is no folder or file here, no known name ({known}) and not a hub id (organisation/name)"
    )]
    UnknownModel { spec: String, known: String },
    #[error("cannot get the model `{spec}`:\n{}", tried.iter().map(|t| format!("  - {t}")).collect::<Vec<_>>().join("\n"))]
    Unavailable { spec: String, tried: Vec<String> },
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn malformed(path: &Path, message: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), message: message.into() }
    }
}

fn summary(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(5).map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(5);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

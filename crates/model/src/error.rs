//! What can go wrong with a base model.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a base model, its files or its use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Learned positions stand before every sequence, and no cache holds them.
    #[error("the adapter's learned positions have to be in the cache of a tree of continuations")]
    LeadNeedsCache,
    /// Sequences of several adapters start together, and one of them has learned positions.
    #[error(
        "an adapter's learned positions stand before a sequence that starts beside sequences of \
         other adapters; it has to start in a pass of its own"
    )]
    LeadNeedsOwnPass,
    /// A file could not be read or written; the message names it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A file is not valid JSON, or not of the expected form.
    #[error("{path}: {fault}", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser found, with line and column.
        fault: serde_json::Error,
    },
    /// A file's content is not what its format demands.
    #[error("{path}: {message}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// A file ends before its content does.
    #[error(
        "{path}: not a whole {format} file, it was cut off at byte {found}: {what} would end at {expected}",
        path = path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: &'static str,
        /// What is cut short.
        what: String,
        /// Bytes the file should have.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// A field of the configuration is missing, malformed or not supported.
    #[error("{path}: {field}: {message}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field, as `rope_scaling.factor`.
        field: String,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// The model's architecture is not supported.
    #[error(
        "{path}: model_type `{found}` is not supported{hint}; supported are {supported}",
        path = path.display()
    )]
    UnknownModelType {
        /// The file.
        path: PathBuf,
        /// The architecture found.
        found: String,
        /// What it is, or what it may be meant to be; empty if nothing is known of it.
        hint: String,
        /// The architectures there are.
        supported: String,
    },
    /// A file holds something else than a dense text model.
    #[error("{path}: this is {what}", path = path.display())]
    NotTextModel {
        /// The file.
        path: PathBuf,
        /// What it holds.
        what: String,
    },
    /// There is no model at a path.
    #[error(
        "{path}: no model here; expected a folder with config.json and *.safetensors, or a .gguf file",
        path = path.display()
    )]
    NoModel {
        /// Where it was sought.
        path: PathBuf,
    },
    /// No weights were found where they should be.
    #[error("{path}: no model here: {message}", path = path.display())]
    NoWeights {
        /// Where they were sought.
        path: PathBuf,
        /// What was expected.
        message: String,
    },
    /// A tensor is not in the weights.
    #[error("{path}: tensor `{name}` is missing{}", near(nearest), path = path.display())]
    MissingTensor {
        /// The weights.
        path: PathBuf,
        /// The name sought.
        name: String,
        /// The names most like it.
        nearest: Vec<String>,
    },
    /// A tensor has another shape than the configuration says.
    #[error(
        "{path}: tensor `{name}` has shape {found:?}, expected {expected:?}",
        path = path.display()
    )]
    Shape {
        /// The weights.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The shape the configuration asks for.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor's number format is not supported.
    #[error(
        "{path}: tensor `{name}` has type {dtype}, which is not supported; supported are {supported}",
        path = path.display()
    )]
    UnknownDtype {
        /// The weights.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The format found.
        dtype: String,
        /// The formats that can be read.
        supported: &'static str,
    },
    /// An index lists a weight file that does not exist.
    #[error("{index}: lists the shard `{shard}`, which does not exist", index = index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The file it lists.
        shard: String,
    },
    /// An index names a tensor that its weight file lacks.
    #[error(
        "{index}: tensor `{name}` should be in `{shard}`, which does not hold it",
        index = index.display()
    )]
    MissingFromShard {
        /// The index file.
        index: PathBuf,
        /// The weight file.
        shard: String,
        /// The tensor.
        name: String,
    },
    /// Two tensors have the same name.
    #[error(
        "tensor `{name}` occurs twice: in {first} and in {second}",
        first = first.display(),
        second = second.display()
    )]
    DuplicateTensor {
        /// The tensor.
        name: String,
        /// One file.
        first: PathBuf,
        /// The other, or the same.
        second: PathBuf,
    },
    /// The weights hold tensors the decoder has no use for, so it would compute something else
    /// than the model it was asked for.
    #[error(
        "{path}: the model does not use the tensors {}",
        shorten(names),
        path = path.display()
    )]
    UnusedTensors {
        /// The weights.
        path: PathBuf,
        /// The tensors left.
        names: Vec<String>,
    },
    /// A weight is infinite or not a number.
    #[error("{path}: tensor `{name}` holds a number that is not finite", path = path.display())]
    NonFinite {
        /// The weights.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// There is no tokenizer where one should be.
    #[error("{folder}: no tokenizer found: {message}", folder = folder.display())]
    MissingTokenizer {
        /// Where it was sought.
        folder: PathBuf,
        /// What was expected.
        message: String,
    },
    /// A special token the model relies on is not in the vocabulary.
    #[error(
        "{path}: {role} is {token}, which is not in the vocabulary of {vocab_size} tokens",
        path = path.display()
    )]
    MissingSpecialToken {
        /// The file that names the token.
        path: PathBuf,
        /// What it is for, as `eos_token`.
        role: String,
        /// Its text in backquotes, or its id.
        token: String,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A tokenizer is malformed or not supported, or refused a text.
    #[error("{path}: tokenizer: {message}", path = path.display())]
    Tokenizer {
        /// The file that describes it.
        path: PathBuf,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// A sequence has no token.
    #[error("sequence {sequence} is empty")]
    EmptySequence {
        /// Its place in the batch.
        sequence: usize,
    },
    /// No row of a training batch carries a label.
    #[error("the batch has no token to predict: every label is masked")]
    NoLabels,
    /// A number in the final hidden states is infinite or not a number.
    #[error(
        "the model's activations are not finite: the adapter's weights have diverged or are damaged"
    )]
    NonFiniteActivations,
    /// A sequence is longer than the model's context.
    #[error("sequence {sequence} has {length} tokens, the model's context holds {limit}")]
    ContextExceeded {
        /// Its place in the batch.
        sequence: usize,
        /// Its length, cached tokens included.
        length: usize,
        /// The most the model takes.
        limit: usize,
    },
    /// A token id is not in the model's vocabulary.
    #[error("token id {token} is not below the vocabulary size {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// What was asked for is no model by any reading.
    #[error(
        "`{spec}` is no folder or file here, no known name ({known}) and not a hub id (organisation/name)"
    )]
    UnknownModel {
        /// What was asked for.
        spec: String,
        /// The known names.
        known: String,
    },
    /// A model could not be had from anywhere.
    #[error("cannot get the model `{spec}`; tried:{}", bullets(tried))]
    Unavailable {
        /// What was asked for.
        spec: String,
        /// Each place tried, and what it answered.
        tried: Vec<String>,
    },
}

impl Error {
    pub(crate) fn malformed(path: &Path, message: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn tokenizer(path: &Path, message: impl Into<String>) -> Self {
        Self::Tokenizer { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn config(
        path: &Path,
        field: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self::Config { path: path.to_path_buf(), field: field.into(), message: message.into() }
    }
}

fn near(nearest: &[String]) -> String {
    if nearest.is_empty() {
        return String::new();
    }
    let quoted: Vec<_> = nearest.iter().map(|name| format!("`{name}`")).collect();
    format!("; the nearest names are {}", quoted.join(", "))
}

fn shorten(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let more = names.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

fn bullets(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  - {line}")).collect()
}

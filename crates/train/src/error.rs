//! What can stop a training run.

use std::io;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of training or evaluation.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error(transparent)]
    Model(#[from] hydralora_model::Error),
    #[error(transparent)]
    Adapter(#[from] hydralora_peft::Error),
    #[error(transparent)]
    Data(#[from] hydralora_data::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{}", faults.join("\n"))]
    Config { faults: Vec<String> },
    #[error(
        "step {step}: the loss is {loss} (epoch {epoch}, batch {batch}; {records}); training stopped, {kept}"
    )]
    NonFiniteLoss {
        step: usize,
        loss: f64,
        epoch: usize,
        batch: usize,
        records: String,
        kept: String,
    },
    #[error("step {step}: the gradient of `{name}` is not finite; training stopped, {kept}")]
    NonFiniteGradient { step: usize, name: String, kept: String },
    #[error("step {step}: `{name}` is not finite any more; training stopped, {kept}")]
    NonFiniteWeights { step: usize, name: String, kept: String },
    #[error("reading the training data broke down: {message}")]
    Loader { message: String },
    #[error("{path}: {message}", path = path.display())]
    Checkpoint { path: PathBuf, message: String },
    #[error("{message}")]
    Nothing { message: String },
    /// What ended another rank of the run, with the exit status that it deserves.
    #[error("rank {rank}: {message}")]
    OfRank { rank: usize, message: String, code: u8 },
    #[error("rank {rank} is gone, and the run cannot go on without it")]
    Lost { rank: usize },
    #[error("rank {rank} has another value of {what} than rank 0: {other}, and there {first}")]
    Disagree { rank: usize, what: String, first: String, other: String },
    #[error("{message}")]
    Ranks { message: String },
}

//! What can go wrong while models are scored.

use std::path::{Path, PathBuf};

/// Result of evaluation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the benchmark tasks, their data, or the run over them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written; the message names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The base model refused a request.
    #[error(transparent)]
    Model(#[from] hydralora_model::Error),
    /// A text could not be written.
    #[error(transparent)]
    Engine(#[from] crate::engine::Error),
    /// Records or a chat template are wrong.
    #[error(transparent)]
    Data(#[from] hydralora_data::Error),
    /// No task has this name.
    #[error("--tasks: unknown task `{name}`; {hint}")]
    UnknownTask {
        /// The name given.
        name: String,
        /// The nearest names, or all of them.
        hint: String,
    },
    /// A task's data are not where they were looked for.
    #[error(
        "task `{task}`: found no {what}; looked for {}; `--data hub` fetches it",
        looked.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    MissingData {
        /// The task.
        task: String,
        /// What is missing.
        what: String,
        /// Every place that was tried.
        looked: Vec<PathBuf>,
    },
    /// A task's data could not be had from the hub.
    #[error("task `{task}`: cannot fetch its data: {message}")]
    Unavailable {
        /// The task.
        task: String,
        /// What went wrong.
        message: String,
    },
    /// A data file is not what the task expects.
    #[error("{}{}: {message}", path.display(), line.map_or(String::new(), |line| format!(", line {line}")))]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, from 1, where there are lines.
        line: Option<usize>,
        /// What is wrong and what was expected.
        message: String,
    },
    /// An option makes no sense for the task or the model.
    #[error("--{option}: {message}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What is wrong and what was expected.
        message: String,
    },
    /// The per-sample log belongs to another run.
    #[error("{}: {message}", path.display())]
    Log {
        /// The log.
        path: PathBuf,
        /// Why it cannot be continued.
        message: String,
    },
    /// Whoever watched the run ended it.
    #[error("interrupted")]
    Interrupted,
    /// Model-written programs cannot be run safely here.
    #[error("{0}")]
    Sandbox(String),
    /// A number came out that is not finite.
    #[error("task `{task}`, record {record}: the model's score is {value}; its weights are broken")]
    NotFinite {
        /// The task.
        task: String,
        /// The record's number in its file, from 0.
        record: usize,
        /// The number.
        value: f64,
    },
}

impl Error {
    /// A malformed file.
    pub(crate) fn malformed(path: &Path, line: Option<usize>, message: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), line, message: message.into() }
    }

    /// Whether the user's input is at fault rather than the machine.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Io(error) => error.kind() == std::io::ErrorKind::NotFound,
            Self::Model(error) => !matches!(error, hydralora_model::Error::Unavailable { .. }),
            Self::Engine(error) => matches!(error, crate::engine::Error::Refused(_)),
            Self::Unavailable { .. } => false,
            Self::Sandbox(_) | Self::NotFinite { .. } | Self::Interrupted => false,
            _ => true,
        }
    }
}

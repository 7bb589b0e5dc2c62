//! What can go wrong with a study.

use std::path::{Path, PathBuf};

/// Whatever goes wrong with a study.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The study file or a folder does not say what it should; the user can mend it.
    #[error("{0}")]
    Bad(String),
    /// A file that was read is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what would be right.
        message: String,
    },
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A table or picture could not be made.
    #[error("{0}")]
    Failed(String),
}

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Makes an error of what the user gave.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::Bad(message.into())
    }

    /// Makes an error about the content of a file.
    pub fn file(path: &Path, message: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), message: message.into() }
    }

    /// Makes an error of the file system with the path it concerns.
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    /// Whether the user has to mend something, rather than the machine.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Error::Bad(_) | Error::File { .. } => true,
            Error::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Error::Failed(_) => false,
        }
    }
}

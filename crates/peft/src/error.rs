//! What can go wrong with an adapter.

use std::io;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One wrong option in a recipe or an adapter configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it stands, as `method.rank`.
    pub field: String,
    /// What is wrong and what was expected.
    pub message: String,
}

impl Fault {
    /// A fault of `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// An error of a fine-tuning method or of its files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written; the message names it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The base model refused what a method asked of it.
    #[error(transparent)]
    Model(#[from] hydralora_model::Error),
    /// A file is not what it should be.
    #[error("{path}: {message}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// Weights hold a number that is not finite, so that they are not written.
    #[error("{path}: `{name}` holds a number that is not finite; nothing was written", path = path.display())]
    NonFinite {
        /// The file that would have been written.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// The method's name is not known.
    #[error("unknown method `{name}`; expected one of {known}")]
    UnknownMethod {
        /// The name given.
        name: String,
        /// All names there are.
        known: String,
    },
    /// Options are wrong; all of them are listed.
    #[error("{}", faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Options {
        /// Each wrong option.
        faults: Vec<Fault>,
    },
    /// The adapter knows no such domain.
    #[error("`{name}` is no domain of this adapter; expected one of {known}")]
    UnknownDomain {
        /// The name given.
        name: String,
        /// Its domains; none if it treats all texts alike.
        known: String,
    },
    /// A target names no layer of the model.
    #[error(
        "method.targets: `{target}` matches no linear layer of the model; expected a preset (qv, ffn, \
         attention, all), a layer name ({names}) or a pattern such as `model.layers.0.*`"
    )]
    TargetMatchesNothing {
        /// The entry.
        target: String,
        /// Names that would match.
        names: String,
    },
    /// The tensors in a file are not those the adapter needs.
    #[error("{path}: {}", mismatches.join("; "), path = path.display())]
    Tensors {
        /// The file.
        path: PathBuf,
        /// Every tensor that is missing, left over, or of another shape.
        mismatches: Vec<String>,
    },
    /// An adapter has no form as a change of the base's weights.
    #[error("this adapter cannot be folded into a weight: {reason}")]
    CannotMerge {
        /// Why.
        reason: String,
    },
    /// Two adapters do not go together.
    #[error("{first} and {second}: {message}", first = first.display(), second = second.display())]
    Incompatible {
        /// One adapter's folder.
        first: PathBuf,
        /// The other's.
        second: PathBuf,
        /// In what they differ, and what was expected.
        message: String,
    },
    /// The adapter belongs to another base model.
    #[error(
        "{path}: this adapter was trained on `{trained_on}` (fingerprint {expected}), the model given \
         is `{given}` (fingerprint {found})",
        path = path.display()
    )]
    AnotherBase {
        /// The adapter's folder.
        path: PathBuf,
        /// Name of the base it was trained on.
        trained_on: String,
        /// Fingerprint of that base.
        expected: String,
        /// Name of the base at hand.
        given: String,
        /// Its fingerprint.
        found: String,
    },
}

//! Using a model: generation.

#![forbid(unsafe_code)]

mod generate;
mod sample;

pub use generate::{Finish, Generation, Generator};
pub use sample::Sampling;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, hydralora_model::Error>;

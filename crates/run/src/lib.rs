//! Using a model: generation, and scoring on benchmarks.

#![forbid(unsafe_code)]

mod encoder;
pub mod eval;
mod generate;
mod sample;

pub use encoder::ModelEncoder;
pub use generate::{Finish, Generation, Generator};
pub use sample::{Sampling, likeliest};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, hydralora_model::Error>;

//! Using a model: generation, scoring on benchmarks, and what it makes of texts on the way.

#![forbid(unsafe_code)]

mod encoder;
pub mod ends;
pub mod engine;
pub mod eval;
mod generate;
pub mod probe;
mod sample;
mod stops;

pub use encoder::{ModelEncoder, start_ids};
pub use engine::Finish;
pub use generate::{Generation, Generator, Request};
pub use sample::{Bias, Sampling, likeliest};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, hydralora_model::Error>;

//! The fine-tuning methods of hydralora and their file formats.
//!
//! A method is one file under `methods/` and one word in its list. It says how its options are read
//! from a recipe and from PEFT's files, and builds a [`Tuned`] adapter: the trainable tensors, and
//! what they do to each linear layer of the frozen decoder.

#![forbid(unsafe_code)]

mod error;
pub mod io;
mod low_rank;
mod method;
pub mod methods;
mod options;
mod targets;

pub use error::{Error, Fault, Result};
pub use method::{
    Method, MethodOptions, Role, TensorMap, Trainable, Tuned, count, nearest, read_section,
};
pub use targets::{PRESETS, Targets};

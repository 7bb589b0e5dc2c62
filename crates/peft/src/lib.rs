//! The fine-tuning methods of hydralora and their file formats.
//!
//! A method is one file under `methods/` and one word in its list. It says how its options are read
//! from a recipe and from PEFT's files, and builds a [`Tuned`] adapter: the trainable tensors, what
//! they do to the frozen decoder, and what training has to do for them beyond following gradients.

#![forbid(unsafe_code)]

pub mod analysis;
pub mod compose;
mod described;
mod domains;
mod error;
pub mod exchange;
pub mod io;
mod low_rank;
mod low_rank_options;
pub mod merge;
mod method;
pub mod methods;
pub mod new_tokens;
mod options;
mod patterns;
mod random;
mod section;
mod targets;
mod trainable;
mod tuned;
mod virtual_tokens;
mod warm;

pub use error::{Error, Fault, Result};
pub use method::{ClustersOf, Method, MethodOptions, RouterStart};
pub use section::{listed, nearest, read_rest, read_section, suggestion};
pub use targets::{PRESETS, Targets};
pub use trainable::{Role, TensorMap, Trainable, count};
pub use tuned::{
    Base, DomainAware, Mergeable, Parameters, Persist, Routed, TrainHooks, TrainingPlan, Tuned,
    WholeModel,
};
pub use warm::{INIT_FROM, start_from_adapter};

//! Tensors, reverse-mode differentiation and the fused operations of hydralora.
//!
//! This crate knows no model and no fine-tuning method. One file an operation under [`ops`]; each
//! holds its formula, a forward and a hand-written backward over raw slices, and is generic over
//! `f32` and `f64`, so that the code that trains is the code that finite differences check.

#![deny(unsafe_code)]

/// Returns what a function of [`gpu`] gives if it gives something: the device's version of the function
/// it stands in. Nothing in a build without devices.
macro_rules! on_device {
    ($($call:tt)*) => {
        #[cfg(feature = "gpu")]
        if let Some(result) = crate::gpu::$($call)* {
            return result;
        }
    };
}

pub mod block;
pub mod check;
mod dense;
mod element;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod graph;
#[allow(unsafe_code)]
pub mod matmul;
pub mod ops;
mod parameter;
pub mod profile;
pub mod simd;
mod tensor;
#[allow(unsafe_code)]
mod tile;

pub use dense::{FewRows, few_rows};
pub use element::{DType, Element};
pub use graph::{Gradients, NoGrad, Var, backward_from, backward_onto, no_grad};
pub use hydralora_runtime::buffer;
pub use parameter::Parameter;
pub use tensor::{Tensor, TensorElement};

//! The differentiable operations, one file each: formula, forward, backward, tests.

pub mod activation;
pub mod adapted_linear;
pub mod attention;
pub mod balance;
pub mod cross_entropy;
pub mod domain_update;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod frozen_linear;
pub mod gated_low_rank;
pub mod linear;
pub mod lstm;
pub mod orthogonality;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod swiglu;
pub mod top_k;

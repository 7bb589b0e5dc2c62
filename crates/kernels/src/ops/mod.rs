//! The differentiable operations, one file each: formula, forward, backward, tests. The low-rank
//! update has a folder: one formula, and a kernel for each number of rows and type.

pub mod activation;
pub mod align;
pub mod attention;
pub mod balance;
pub mod cross_entropy;
pub mod delta_net;
pub mod discrepancy;
pub mod domain_update;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod frozen_linear;
pub mod guide;
pub mod linear;
pub mod low_rank;
pub mod lstm;
pub mod orthogonality;
mod product;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod running_mean;
pub mod softcap;
pub mod swiglu;
pub mod top_k;
pub mod z_loss;

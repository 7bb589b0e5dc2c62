//! Training from files to checkpoints.

mod matrix;
mod parity;

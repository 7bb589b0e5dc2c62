//! Training from files to checkpoints.

mod families;
mod matrix;
mod parity;

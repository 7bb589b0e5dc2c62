//! Training from files to checkpoints.

mod parity;

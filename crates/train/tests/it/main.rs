//! Training from files to checkpoints.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests tell people")]

mod families;
mod matrix;
mod optimizers;
mod parity;

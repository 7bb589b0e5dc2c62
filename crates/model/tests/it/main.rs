//! Behaviour of whole base models.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests tell people")]

mod files;
mod smollm2;
mod stories;
mod threads;
mod windows;

//! Behaviour of whole base models.

mod files;
mod smollm2;
mod stories;
mod threads;
mod windows;

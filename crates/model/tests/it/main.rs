//! Behaviour of whole base models.

mod smollm2;
mod stories;

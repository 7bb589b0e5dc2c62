//! Behaviour of scoring, on a small trained model.

mod engine;
mod families;
mod own_files;
mod sandbox;
mod scoring;
mod serving;
mod support;

//! Behaviour of scoring, on a small trained model.

mod engine;
mod sandbox;
mod scoring;
mod support;

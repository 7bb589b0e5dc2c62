//! hydralora-model

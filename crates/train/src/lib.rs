//! hydralora-train

//! hydralora-run

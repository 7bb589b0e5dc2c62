//! hydralora-data

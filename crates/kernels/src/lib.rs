//! hydralora-kernels

//! Number formats of weight files, and their widening to `f32`.
//!
//! Quantised formats are GGUF's: a row is cut into blocks of 32 or 256 numbers that share a scale
//! `d` (and an offset `m`), and each number is `d·q` or `d·q + m` for a small integer `q`. The
//! layouts are those of GGML's `ggml-common.h`; each kind of format has a file here that says them.

mod classic;
mod k;
mod plain;
mod tables;
#[cfg(test)]
mod tests;

use crate::simd;
pub(crate) use plain::{dot_bf16, half_at};

/// How the bytes of a weight encode numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
pub enum BlockFormat {
    F64,
    F32,
    F16,
    BF16,
    Q8_0,
    Q8_1,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// Format, GGML type id, numbers per block, bytes per block.
const TABLE: &[(BlockFormat, u32, usize, usize)] = &[
    (BlockFormat::F32, 0, 1, 4),
    (BlockFormat::F16, 1, 1, 2),
    (BlockFormat::Q4_0, 2, 32, 18),
    (BlockFormat::Q4_1, 3, 32, 20),
    (BlockFormat::Q5_0, 6, 32, 22),
    (BlockFormat::Q5_1, 7, 32, 24),
    (BlockFormat::Q8_0, 8, 32, 34),
    (BlockFormat::Q8_1, 9, 32, 36),
    (BlockFormat::Q2_K, 10, 256, 84),
    (BlockFormat::Q3_K, 11, 256, 110),
    (BlockFormat::Q4_K, 12, 256, 144),
    (BlockFormat::Q5_K, 13, 256, 176),
    (BlockFormat::Q6_K, 14, 256, 210),
    (BlockFormat::Q8_K, 15, 256, 292),
    (BlockFormat::IQ4_NL, 20, 32, 18),
    (BlockFormat::IQ4_XS, 23, 256, 136),
    (BlockFormat::F64, 28, 1, 8),
    (BlockFormat::BF16, 30, 1, 2),
    (BlockFormat::MXFP4, 39, 32, 17),
];

impl BlockFormat {
    /// The format with GGML's type number `id`.
    pub fn from_ggml(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// GGML's type number of the format.
    pub fn ggml_id(self) -> u32 {
        self.row().1
    }

    fn row(self) -> &'static (BlockFormat, u32, usize, usize) {
        // Every variant has a row; a unit test goes through them.
        TABLE.iter().find(|row| row.0 == self).unwrap_or(&TABLE[0])
    }

    /// Numbers per block.
    pub fn block_len(self) -> usize {
        self.row().2
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Bytes of a row of `len` numbers, a whole number of blocks.
    pub fn bytes_for(self, len: usize) -> usize {
        len / self.block_len() * self.block_bytes()
    }
}

impl std::fmt::Display for BlockFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Widens `bytes` into `out`.
///
/// # Panics
/// If `bytes` does not hold exactly `out.len()` numbers.
pub fn dequantize(format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(out.len() % format.block_len(), 0, "a whole number of blocks");
    assert_eq!(bytes.len(), format.bytes_for(out.len()), "bytes and numbers disagree");
    simd::vectorize(
        #[inline(always)]
        || widen_blocks(format, bytes, out),
    );
}

#[inline(always)]
fn widen_blocks(format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    match format {
        BlockFormat::F64 => each(bytes, out, plain::from_f64),
        BlockFormat::F32 => each(bytes, out, plain::from_f32),
        BlockFormat::F16 => each(bytes, out, plain::from_f16),
        BlockFormat::BF16 => each(bytes, out, plain::from_bf16),
        BlockFormat::Q8_0 => each(bytes, out, classic::q8_0),
        BlockFormat::Q8_1 => each(bytes, out, classic::q8_1),
        BlockFormat::Q4_0 => each(bytes, out, classic::q4_0),
        BlockFormat::Q4_1 => each(bytes, out, classic::q4_1),
        BlockFormat::Q5_0 => each(bytes, out, classic::q5_0),
        BlockFormat::Q5_1 => each(bytes, out, classic::q5_1),
        BlockFormat::Q2_K => each(bytes, out, k::q2),
        BlockFormat::Q3_K => each(bytes, out, k::q3),
        BlockFormat::Q4_K => each(bytes, out, k::q4),
        BlockFormat::Q5_K => each(bytes, out, k::q5),
        BlockFormat::Q6_K => each(bytes, out, k::q6),
        BlockFormat::Q8_K => each(bytes, out, k::q8),
        BlockFormat::IQ4_NL => each(bytes, out, tables::iq4_nl),
        BlockFormat::IQ4_XS => each(bytes, out, tables::iq4_xs),
        BlockFormat::MXFP4 => each(bytes, out, tables::mxfp4),
    }
}

/// Widens block by block.
#[inline(always)]
fn each<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    widen: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        widen(block, out);
    }
}

/// Whether `bytes`, a whole number of blocks, encode finite numbers only.
pub fn is_finite(format: BlockFormat, bytes: &[u8]) -> bool {
    let block_len = format.block_len();
    let step = (4096 / block_len).max(1);
    let mut wide = vec![0.0_f32; step * block_len];
    bytes.chunks(step * format.block_bytes()).all(|bytes| {
        let wide = &mut wide[..bytes.len() / format.block_bytes() * block_len];
        dequantize(format, bytes, wide);
        simd::vectorize(
            #[inline(always)]
            || wide.iter().fold(true, |all, x| all & x.is_finite()),
        )
    })
}

/// Narrows `values` to `format` and appends the bytes to `out`. The quantised formats are rounded as
/// GGML's reference does: the number of largest magnitude (or the range) sets the scale.
///
/// # Panics
/// If `values` is no whole number of blocks, or the format can only be read (all quantised ones but
/// `Q8_0`, `Q4_0` and `Q4_1`).
pub fn quantize(format: BlockFormat, values: &[f32], out: &mut Vec<u8>) {
    assert_eq!(values.len() % format.block_len(), 0, "a whole number of blocks");
    out.reserve(format.bytes_for(values.len()));
    let mut push = |push: fn(&[f32], &mut Vec<u8>)| {
        values.chunks_exact(32).for_each(|block| push(block, out));
    };
    match format {
        BlockFormat::F64 => plain::push_f64(values, out),
        BlockFormat::F32 => plain::push_f32(values, out),
        BlockFormat::F16 => plain::push_f16(values, out),
        BlockFormat::BF16 => plain::push_bf16(values, out),
        BlockFormat::Q8_0 => push(classic::push_q8_0),
        BlockFormat::Q4_0 => push(classic::push_q4_0),
        BlockFormat::Q4_1 => push(classic::push_q4_1),
        other => panic!("{other} can be read, not written"),
    }
}

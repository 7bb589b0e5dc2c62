//! Number formats of weight files, and their widening to `f32`.
//!
//! Quantised formats are GGUF's: a row is cut into blocks of 32 or 256 numbers that share a scale
//! `d` (and an offset `m`), and each number is `d·q` or `d·q + m` for a small integer `q`.

use crate::simd;
use half::{bf16, f16};

/// How the bytes of a weight encode numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
pub enum BlockFormat {
    F64,
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4_K,
    Q5_K,
    Q6_K,
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
    (BlockFormat::Q4_K, 12, 256, 144),
    (BlockFormat::Q5_K, 13, 256, 176),
    (BlockFormat::Q6_K, 14, 256, 210),
    (BlockFormat::F64, 28, 1, 8),
    (BlockFormat::BF16, 30, 1, 2),
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

#[inline(always)]
pub(crate) fn half_at(bytes: &[u8], at: usize) -> f32 {
    widen_half(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

/// A half-precision number without a branch or a call, so that loops over it become vectors: the
/// exponent and mantissa moved into place and rescaled by 2¹¹², which also makes subnormals right.
#[inline(always)]
fn widen_half(bits: u16) -> f32 {
    const RESCALE: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits(u32::from(bits & 0x7FFF) << 13) * RESCALE;
    // Infinities and NaN have the exponent 31, which the rescaling takes for a finite one.
    let special = f32::from_bits(u32::from(bits & 0x7FFF) << 13 | 0x7F80_0000);
    let magnitude = if bits & 0x7C00 == 0x7C00 { special } else { magnitude };
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// Widens `bytes` into `out`.
///
/// # Panics
/// If `bytes` does not hold exactly `out.len()` numbers.
pub fn dequantize(format: BlockFormat, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(out.len() % format.block_len(), 0, "a whole number of blocks");
    assert_eq!(bytes.len(), format.bytes_for(out.len()), "bytes and numbers disagree");
    let blocks =
        bytes.chunks_exact(format.block_bytes()).zip(out.chunks_exact_mut(format.block_len()));
    simd::vectorize(
        #[inline(always)]
        || widen_blocks(format, blocks),
    );
}

#[inline(always)]
fn widen_blocks<'a>(format: BlockFormat, blocks: impl Iterator<Item = (&'a [u8], &'a mut [f32])>) {
    match format {
        BlockFormat::F32 => {
            for (b, y) in blocks {
                y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        BlockFormat::F64 => {
            for (b, y) in blocks {
                {
                    y[0] =
                        f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32;
                }
            }
        }
        BlockFormat::F16 => {
            for (b, y) in blocks {
                y[0] = half_at(b, 0);
            }
        }
        BlockFormat::BF16 => {
            for (b, y) in blocks {
                y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        BlockFormat::Q8_0 => {
            for (b, y) in blocks {
                {
                    let d = half_at(b, 0);
                    for (y, &q) in y.iter_mut().zip(&b[2..]) {
                        *y = d * f32::from(q as i8);
                    }
                }
            }
        }
        BlockFormat::Q4_0 => {
            for (b, y) in blocks {
                {
                    let d = half_at(b, 0);
                    nibbles(&b[2..], y, |q, _| d * (f32::from(q) - 8.0));
                }
            }
        }
        BlockFormat::Q4_1 => {
            for (b, y) in blocks {
                {
                    let (d, m) = (half_at(b, 0), half_at(b, 2));
                    nibbles(&b[4..], y, |q, _| d * f32::from(q) + m);
                }
            }
        }
        BlockFormat::Q5_0 => {
            for (b, y) in blocks {
                {
                    let (d, high) = (half_at(b, 0), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
                    nibbles(&b[6..], y, |q, i| d * (f32::from(q | fifth_bit(high, i)) - 16.0));
                }
            }
        }
        BlockFormat::Q5_1 => {
            for (b, y) in blocks {
                {
                    let (d, m) = (half_at(b, 0), half_at(b, 2));
                    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
                    nibbles(&b[8..], y, |q, i| d * f32::from(q | fifth_bit(high, i)) + m);
                }
            }
        }
        BlockFormat::Q4_K => {
            for (b, y) in blocks {
                {
                    for (part, y) in y.chunks_exact_mut(32).enumerate() {
                        let (d, m) = sub_scale(b, part);
                        let quants = &b[16 + part / 2 * 32..][..32];
                        for (y, &q) in y.iter_mut().zip(quants) {
                            *y = d * f32::from((q >> (part % 2 * 4)) & 15) - m;
                        }
                    }
                }
            }
        }
        BlockFormat::Q5_K => {
            for (b, y) in blocks {
                {
                    for (part, y) in y.chunks_exact_mut(32).enumerate() {
                        let (d, m) = sub_scale(b, part);
                        let quants = &b[48 + part / 2 * 32..][..32];
                        for ((y, &q), &high) in y.iter_mut().zip(quants).zip(&b[16..48]) {
                            let q = ((q >> (part % 2 * 4)) & 15) | (((high >> part) & 1) << 4);
                            *y = d * f32::from(q) - m;
                        }
                    }
                }
            }
        }
        BlockFormat::Q6_K => {
            for (b, y) in blocks {
                {
                    let (low, high, scales, d) =
                        (&b[..128], &b[128..192], &b[192..208], half_at(b, 208));
                    for (i, y) in y.iter_mut().enumerate() {
                        // Halves of 128; within one, four runs of 32 share the bytes of `high`.
                        let (half, run, l) = (i / 128, i % 128 / 32, i % 32);
                        let low = low[half * 64 + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
                        let high = high[half * 32 + l] >> (run * 2) & 3;
                        let scale = scales[half * 8 + run * 2 + l / 16] as i8;
                        *y = d * f32::from(scale) * (f32::from(low | high << 4) - 32.0);
                    }
                }
            }
        }
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

/// Bytes ahead of a product that reads a weight once, at which its memory is called for.
const AHEAD: usize = 2048;

/// `Σ w_i x_i` of a row of bfloat16 numbers.
#[inline(always)]
pub(crate) fn dot_bf16(row: &[u8], x: &[f32]) -> f32 {
    let wide = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    let mut many = [[0.0_f32; 16]; 2];
    let (blocks, rest) = row.as_chunks::<2>().0.as_chunks::<32>();
    let (x_blocks, x_rest) = x.as_chunks::<32>();
    for (block, x) in blocks.iter().zip(x_blocks) {
        simd::fetch_once(block, AHEAD);
        for (part, sums) in many.iter_mut().enumerate() {
            for i in 0..16 {
                let at = part * 16 + i;
                sums[i] = wide(&block[at]).mul_add(x[at], sums[i]);
            }
        }
    }
    let [mut sums, second] = many;
    for i in 0..16 {
        sums[i] += second[i];
    }
    let rest: f32 = rest.iter().zip(x_rest).map(|(w, x)| wide(w) * x).sum();
    simd::fold(sums) + rest
}

/// The low halves of 16 bytes, then their high halves, through `f(quant, index)`.
#[inline(always)]
fn nibbles(bytes: &[u8], out: &mut [f32], f: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for (i, &byte) in bytes.iter().enumerate() {
        low[i] = f(byte & 15, i);
        high[i] = f(byte >> 4, i + 16);
    }
}

#[inline(always)]
fn fifth_bit(high: u32, index: usize) -> u8 {
    (high >> index & 1) as u8 * 16
}

/// Scale and offset of sub-block `part` of a `K` block: six bits each, packed into 12 bytes.
#[inline(always)]
fn sub_scale(block: &[u8], part: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, offset) = if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        (
            packed[part + 4] & 15 | packed[part - 4] >> 6 << 4,
            packed[part + 4] >> 4 | packed[part] >> 6 << 4,
        )
    };
    (half_at(block, 0) * f32::from(scale), half_at(block, 2) * f32::from(offset))
}

/// Narrows `values` to `format` and appends the bytes to `out`. The quantised formats are rounded as
/// GGML's reference does: the number of largest magnitude (or the range) sets the scale.
///
/// # Panics
/// If `values` is no whole number of blocks, or the format can only be read (`Q5_0`, `Q5_1` and the
/// `K` formats).
pub fn quantize(format: BlockFormat, values: &[f32], out: &mut Vec<u8>) {
    assert_eq!(values.len() % format.block_len(), 0, "a whole number of blocks");
    out.reserve(format.bytes_for(values.len()));
    match format {
        BlockFormat::F64 => {
            values.iter().for_each(|&v| out.extend_from_slice(&f64::from(v).to_le_bytes()));
        }
        BlockFormat::F32 => values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
        BlockFormat::F16 => {
            values.iter().for_each(|&v| out.extend_from_slice(&f16::from_f32(v).to_le_bytes()));
        }
        BlockFormat::BF16 => {
            values.iter().for_each(|&v| out.extend_from_slice(&bf16::from_f32(v).to_le_bytes()));
        }
        BlockFormat::Q8_0 => values.chunks_exact(32).for_each(|block| {
            let largest = block.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
            let d = largest / 127.0;
            let inverse = inverse(d);
            out.extend_from_slice(&f16::from_f32(d).to_le_bytes());
            out.extend(block.iter().map(|&v| (v * inverse).round() as i8 as u8));
        }),
        BlockFormat::Q4_0 => values.chunks_exact(32).for_each(|block| {
            // The sign is kept: -8 exists and +8 does not.
            let extreme = block.iter().fold(0.0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
            let d = extreme / -8.0;
            let inverse = inverse(d);
            out.extend_from_slice(&f16::from_f32(d).to_le_bytes());
            push_nibbles(block, out, |v| v * inverse + 8.5);
        }),
        BlockFormat::Q4_1 => values.chunks_exact(32).for_each(|block| {
            let low = block.iter().copied().fold(f32::INFINITY, f32::min);
            let high = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let d = (high - low) / 15.0;
            let inverse = inverse(d);
            out.extend_from_slice(&f16::from_f32(d).to_le_bytes());
            out.extend_from_slice(&f16::from_f32(low).to_le_bytes());
            push_nibbles(block, out, |v| (v - low) * inverse + 0.5);
        }),
        BlockFormat::Q5_0
        | BlockFormat::Q5_1
        | BlockFormat::Q4_K
        | BlockFormat::Q5_K
        | BlockFormat::Q6_K => panic!("{format} can be read, not written"),
    }
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// 32 numbers as 16 bytes, the first half in the low four bits; `f` gives a quant to be cut off.
fn push_nibbles(block: &[f32], out: &mut Vec<u8>, f: impl Fn(f32) -> f32) {
    let quant = |v: f32| (f(v) as u8).min(15);
    let (low, high) = block.split_at(16);
    out.extend(low.iter().zip(high).map(|(&low, &high)| quant(low) | quant(high) << 4));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_a_row() {
        for &(format, id, len, bytes) in TABLE {
            assert_eq!(BlockFormat::from_ggml(id), Some(format));
            assert_eq!((format.block_len(), format.block_bytes()), (len, bytes));
        }
        assert_eq!(BlockFormat::from_ggml(4), None);
    }

    /// `tests/golden/blocks.py` makes the file with the `gguf` package's own widening.
    #[test]
    fn widening_matches_the_reference_bit_for_bit() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/blocks.json")).unwrap();
        let cases = golden.as_array().unwrap();
        assert_eq!(cases.len(), TABLE.len() - 1, "all formats but F64");
        for case in cases {
            let id = case["type"].as_u64().unwrap() as u32;
            let format = BlockFormat::from_ggml(id).unwrap();
            let numbers = |key: &str| -> Vec<f64> {
                case[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
            };
            let bytes: Vec<u8> = numbers("bytes").iter().map(|&v| v as u8).collect();
            let expected = numbers("values");
            let mut got = vec![0.0; expected.len()];
            dequantize(format, &bytes, &mut got);
            for (i, (&got, &expected)) in got.iter().zip(&expected).enumerate() {
                assert_eq!(got, expected as f32, "{format} element {i}");
            }
        }
    }

    #[test]
    fn narrowing_matches_the_reference_byte_for_byte() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../tests/golden/quantize.json")).unwrap();
        let numbers = |value: &serde_json::Value| -> Vec<f64> {
            value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let values: Vec<f32> = numbers(&golden["values"]).iter().map(|&v| v as f32).collect();
        let cases = golden["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 6);
        for case in cases {
            let format = BlockFormat::from_ggml(case["type"].as_u64().unwrap() as u32).unwrap();
            let mut bytes = Vec::new();
            quantize(format, &values, &mut bytes);
            let expected: Vec<u8> = numbers(&case["bytes"]).iter().map(|&v| v as u8).collect();
            assert_eq!(bytes, expected, "{format}");
        }
    }

    #[test]
    fn narrowed_numbers_come_back_within_a_rounding_step() {
        let values: Vec<f32> = (0..256).map(|i| ((i * 73 % 256) as f32 - 100.0) / 37.0).collect();
        let step = |format| match format {
            BlockFormat::F32 | BlockFormat::F64 => 0.0,
            BlockFormat::F16 => 5e-4,
            BlockFormat::BF16 => 4e-3,
            // Half a step of the widest block, and the scale's own rounding to 16 bits.
            BlockFormat::Q8_0 => 4.25 / 127.0 * 0.51 + 4.25 * 5e-4,
            BlockFormat::Q4_1 => 6.92 / 15.0 * 0.51 + 6.92 * 5e-4,
            _ => 4.25 / 8.0 * 1.01 + 4.25 * 5e-4,
        };
        for format in [
            BlockFormat::F64,
            BlockFormat::F32,
            BlockFormat::F16,
            BlockFormat::BF16,
            BlockFormat::Q8_0,
            BlockFormat::Q4_0,
            BlockFormat::Q4_1,
        ] {
            let mut bytes = Vec::new();
            quantize(format, &values, &mut bytes);
            assert_eq!(bytes.len(), format.bytes_for(values.len()));
            let mut back = vec![0.0; values.len()];
            dequantize(format, &bytes, &mut back);
            for (&found, &expected) in back.iter().zip(&values) {
                let scale = if matches!(format, BlockFormat::F16 | BlockFormat::BF16) {
                    expected.abs()
                } else {
                    1.0
                };
                assert!(
                    (found - expected).abs() <= step(format) * scale,
                    "{format}: {expected} {found}"
                );
            }
            let mut zeros = Vec::new();
            quantize(format, &[0.0; 32], &mut zeros);
            let mut back = vec![1.0; 32];
            dequantize(format, &zeros, &mut back);
            assert_eq!(back, [0.0; 32], "{format}");
        }
    }

    #[test]
    #[should_panic(expected = "can be read, not written")]
    fn formats_that_are_only_read_say_so() {
        quantize(BlockFormat::Q6_K, &[0.0; 256], &mut Vec::new());
    }
}

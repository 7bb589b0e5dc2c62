//! Numbers by themselves: no block, no scale.

use crate::simd;
use half::{bf16, f16};

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

#[inline(always)]
pub(super) fn from_f64(b: &[u8; 8], y: &mut [f32; 1]) {
    y[0] = f64::from_le_bytes(*b) as f32;
}

#[inline(always)]
pub(super) fn from_f32(b: &[u8; 4], y: &mut [f32; 1]) {
    y[0] = f32::from_le_bytes(*b);
}

#[inline(always)]
pub(super) fn from_f16(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = widen_half(u16::from_le_bytes(*b));
}

#[inline(always)]
pub(super) fn from_bf16(b: &[u8; 2], y: &mut [f32; 1]) {
    y[0] = widen_brain(*b);
}

#[inline(always)]
fn widen_brain(b: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
}

pub(super) fn push_f64(values: &[f32], out: &mut Vec<u8>) {
    values.iter().for_each(|&v| out.extend_from_slice(&f64::from(v).to_le_bytes()));
}

pub(super) fn push_f32(values: &[f32], out: &mut Vec<u8>) {
    values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
}

pub(super) fn push_f16(values: &[f32], out: &mut Vec<u8>) {
    values.iter().for_each(|&v| out.extend_from_slice(&f16::from_f32(v).to_le_bytes()));
}

pub(super) fn push_bf16(values: &[f32], out: &mut Vec<u8>) {
    values.iter().for_each(|&v| out.extend_from_slice(&bf16::from_f32(v).to_le_bytes()));
}

/// Bytes ahead of a product that reads a weight once, at which its memory is called for.
const AHEAD: usize = 2048;

/// `Σ w_i x_i` of a row of bfloat16 numbers.
#[inline(always)]
pub(crate) fn dot_bf16(row: &[u8], x: &[f32]) -> f32 {
    let mut many = [[0.0_f32; 16]; 2];
    let (blocks, rest) = row.as_chunks::<2>().0.as_chunks::<32>();
    let (x_blocks, x_rest) = x.as_chunks::<32>();
    for (block, x) in blocks.iter().zip(x_blocks) {
        simd::fetch_once(block, AHEAD);
        for (part, sums) in many.iter_mut().enumerate() {
            for i in 0..16 {
                let at = part * 16 + i;
                sums[i] = widen_brain(block[at]).mul_add(x[at], sums[i]);
            }
        }
    }
    let [mut sums, second] = many;
    for i in 0..16 {
        sums[i] += second[i];
    }
    let rest: f32 = rest.iter().zip(x_rest).map(|(w, x)| widen_brain(*w) * x).sum();
    simd::fold(sums) + rest
}

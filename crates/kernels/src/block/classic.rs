//! Blocks of 32 numbers with a scale, and for some an offset, of their own.
//!
//! Bytes of a block, in order (`d`, `m`, `s`: half precision):
//!
//! ```text
//! Q4_0  d, 16 × two quants             d (q − 8)
//! Q4_1  d, m, 16 × two quants          d q + m
//! Q5_0  d, 32 fifth bits, 16 × two     d (q − 16)
//! Q5_1  d, m, 32 fifth bits, 16 × two  d q + m
//! Q8_0  d, 32 signed quants            d q
//! Q8_1  d, s, 32 signed quants         d q; s is their sum times d, which products use
//! ```
//!
//! A byte of two quants holds one of the first sixteen numbers in its low half, and the one sixteen
//! further on in its high half.

use super::plain::half_at;
use half::f16;

#[inline(always)]
pub(super) fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(b, 0);
    nibbles(&b[2..2 + loop_of(16)], y, |q, _| d * (f32::from(q) - 8.0));
}

#[inline(always)]
pub(super) fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    nibbles(&b[4..4 + loop_of(16)], y, |q, _| d * f32::from(q) + m);
}

#[inline(always)]
pub(super) fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let (d, high) = (half_at(b, 0), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
    nibbles(&b[6..], y, |q, i| d * (f32::from(q | fifth_bit(high, i)) - 16.0));
}

#[inline(always)]
pub(super) fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    nibbles(&b[8..], y, |q, i| d * f32::from(q | fifth_bit(high, i)) + m);
}

#[inline(always)]
pub(super) fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    signed(half_at(b, 0), &b[2..], y);
}

#[inline(always)]
pub(super) fn q8_1(b: &[u8; 36], y: &mut [f32; 32]) {
    signed(half_at(b, 0), &b[4..], y);
}

/// `len`, without the compiler's knowing it: it would write out a short loop step by step, and find no
/// vectors in that.
#[inline(always)]
pub(super) fn loop_of(len: usize) -> usize {
    std::hint::black_box(len)
}

/// `d` times signed bytes.
#[inline(always)]
pub(super) fn signed(d: f32, quants: &[u8], y: &mut [f32]) {
    let len = loop_of(y.len());
    for (y, &q) in y[..len].iter_mut().zip(&quants[..len]) {
        *y = d * f32::from(q as i8);
    }
}

/// The low halves of 16 bytes, then their high halves, through `f(quant, index)`.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8], out: &mut [f32], f: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for (i, ((low, high), &byte)) in low.iter_mut().zip(high).zip(bytes).enumerate() {
        *low = f(byte & 15, i);
        *high = f(byte >> 4, i + 16);
    }
}

#[inline(always)]
fn fifth_bit(high: u32, index: usize) -> u8 {
    (high >> index & 1) as u8 * 16
}

pub(super) fn push_q8_0(block: &[f32], out: &mut Vec<u8>) {
    let largest = block.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
    let d = largest / 127.0;
    let inverse = inverse(d);
    out.extend_from_slice(&f16::from_f32(d).to_le_bytes());
    out.extend(block.iter().map(|&v| (v * inverse).round() as i8 as u8));
}

pub(super) fn push_q4_0(block: &[f32], out: &mut Vec<u8>) {
    // The sign is kept: -8 exists and +8 does not.
    let extreme = block.iter().fold(0.0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
    let d = extreme / -8.0;
    let inverse = inverse(d);
    out.extend_from_slice(&f16::from_f32(d).to_le_bytes());
    push_nibbles(block, out, |v| v * inverse + 8.5);
}

pub(super) fn push_q4_1(block: &[f32], out: &mut Vec<u8>) {
    let low = block.iter().copied().fold(f32::INFINITY, f32::min);
    let high = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let d = (high - low) / 15.0;
    let inverse = inverse(d);
    out.extend_from_slice(&f16::from_f32(d).to_le_bytes());
    out.extend_from_slice(&f16::from_f32(low).to_le_bytes());
    push_nibbles(block, out, |v| (v - low) * inverse + 0.5);
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

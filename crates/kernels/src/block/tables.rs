//! Quants of four bits that are not numbers but places in a table of sixteen.
//!
//! Bytes of a block, in order:
//!
//! ```text
//! MXFP4   exponent e, 16 × two quants                    32 numbers   2^(e − 128) E2M1[q]
//! IQ4_NL  d, 16 × two quants                             32 numbers   d UNEVEN[q]
//! IQ4_XS  d, 8 scales of 6 bits (upper two of all, then
//!         low four of all), 8 × 16 × two quants          256 numbers  d (s − 32) UNEVEN[q]
//! ```
//!
//! `d` is in half precision; bytes of two quants are as in [`classic`](super::classic).

use super::classic::signed;
use super::plain::half_at;

/// Twice the numbers of a sign, two bits of exponent and one of mantissa. The unit is halved with
/// the scale, `2^(e − 128)` instead of `2^(e − 127)`.
pub(super) const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Levels that lie closer together near zero, where most weights are.
pub(super) const UNEVEN: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// `d table[q]` for the quants of 16 bytes.
#[inline(always)]
fn entries(d: f32, table: &[i8; 16], bytes: &[u8], y: &mut [f32; 32]) {
    let mut found = [0; 32];
    for (i, &byte) in bytes[..16].iter().enumerate() {
        found[i] = entry(table, byte & 15);
        found[16 + i] = entry(table, byte >> 4);
    }
    signed(d, &found, y);
}

/// `table[q]` for `q < 16`, as a byte, by choosing halves of the table bit by bit: reading it from
/// memory would keep a loop from becoming vectors.
#[inline(always)]
fn entry(table: &[i8; 16], q: u8) -> u8 {
    let mask = |bit: u32| 0u8.wrapping_sub(q >> bit & 1);
    let choose = |mask: u8, low: u8, high: u8| low ^ (low ^ high) & mask;
    let two = |i: usize| choose(mask(0), table[i] as u8, table[i + 1] as u8);
    let four = |i: usize| choose(mask(1), two(i), two(i + 2));
    let eight = |i: usize| choose(mask(2), four(i), four(i + 4));
    choose(mask(3), eight(0), eight(8))
}

#[inline(always)]
pub(super) fn mxfp4(b: &[u8; 17], y: &mut [f32; 32]) {
    entries(power(b[0]), &E2M1, &b[1..], y);
}

/// `2^(exponent − 128)`. The largest exponent, which the format's specification keeps for what is no
/// number, is GGML's largest power.
#[inline(always)]
fn power(exponent: u8) -> f32 {
    // The two least are subnormal.
    let bits = if exponent < 2 { 1 << (21 + exponent) } else { u32::from(exponent - 1) << 23 };
    f32::from_bits(bits)
}

#[inline(always)]
pub(super) fn iq4_nl(b: &[u8; 18], y: &mut [f32; 32]) {
    entries(half_at(b, 0), &UNEVEN, &b[2..], y);
}

#[inline(always)]
pub(super) fn iq4_xs(b: &[u8; 136], y: &mut [f32; 256]) {
    let (d, upper) = (half_at(b, 0), u16::from_le_bytes([b[2], b[3]]));
    for (part, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = b[4 + part / 2] >> (part % 2 * 4) & 15 | ((upper >> (part * 2) & 3) as u8) << 4;
        entries(d * (f32::from(scale) - 32.0), &UNEVEN, &b[8 + part * 16..], y);
    }
}

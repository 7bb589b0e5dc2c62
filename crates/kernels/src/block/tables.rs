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

use super::classic::nibbles;
use super::plain::half_at;

/// Twice the numbers of a sign, two bits of exponent and one of mantissa. The unit is halved with
/// the scale, `2^(e − 128)` instead of `2^(e − 127)`.
pub(super) const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Levels that lie closer together near zero, where most weights are.
pub(super) const UNEVEN: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// `table[q]` for `q < 16`, by choosing halves of the table bit by bit: reading it from memory would
/// keep a loop from becoming vectors.
#[inline(always)]
fn entry(table: &[i8; 16], q: u8) -> f32 {
    #[inline(always)]
    fn choose<const N: usize, const HALF: usize>(of: [i8; N], q: u8, bit: u32) -> [i8; HALF] {
        let mask = 0u8.wrapping_sub(q >> bit & 1) as i8;
        std::array::from_fn(|i| of[2 * i] ^ (of[2 * i] ^ of[2 * i + 1]) & mask)
    }
    let eight: [i8; 8] = choose(*table, q, 0);
    let four: [i8; 4] = choose(eight, q, 1);
    let two: [i8; 2] = choose(four, q, 2);
    let [one]: [i8; 1] = choose(two, q, 3);
    f32::from(one)
}

#[inline(always)]
pub(super) fn mxfp4(b: &[u8; 17], y: &mut [f32; 32]) {
    let d = power(b[0]);
    nibbles(&b[1..], y, |q, _| d * entry(&E2M1, q));
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
    let d = half_at(b, 0);
    nibbles(&b[2..], y, |q, _| d * entry(&UNEVEN, q));
}

#[inline(always)]
pub(super) fn iq4_xs(b: &[u8; 136], y: &mut [f32; 256]) {
    let (d, upper) = (half_at(b, 0), u16::from_le_bytes([b[2], b[3]]));
    for (part, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = b[4 + part / 2] >> (part % 2 * 4) & 15 | ((upper >> (part * 2) & 3) as u8) << 4;
        let scale = d * (f32::from(scale) - 32.0);
        nibbles(&b[8 + part * 16..][..16], y, |q, _| scale * entry(&UNEVEN, q));
    }
}

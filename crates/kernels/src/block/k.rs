//! Blocks of 256 numbers, in parts of 16 or 32 with a small whole number each that scales the
//! block's scale, and for some another one that scales its offset.
//!
//! Bytes of a block, in order (`d`, `m`: half precision):
//!
//! ```text
//! Q2_K  16 × scale and offset of 4 bits, 64 × four quants, d, m         parts of 16   d s q − m o
//! Q3_K  256 third bits, 64 × four quants, 16 scales of 6 bits, d        parts of 16   d (s − 32)(q − 4)
//! Q4_K  d, m, 8 scales and offsets of 6 bits, 128 × two quants          parts of 32   d s q − m o
//! Q5_K  d, m, 8 scales and offsets of 6 bits, 256 fifth bits, 128 × two parts of 32   d s q − m o
//! Q6_K  128 × two quants, 64 × four upper pairs of bits, 16 scales, d   parts of 16   d s (q − 32)
//! Q8_K  d in single precision, 256 signed quants, 16 sums of 16 quants  one part      d q
//! ```
//!
//! A run is 32 numbers, one from each of 32 bytes: byte `l` of a group holds number `l` of several
//! runs, of the first one in its lowest bits.

use super::classic::signed;
use super::plain::half_at;

/// Numbers of a run.
const RUN: usize = 32;

/// The runs of a block, numbered.
#[inline(always)]
fn runs(y: &mut [f32; 256]) -> impl Iterator<Item = (usize, &mut [f32; RUN])> {
    y.as_chunks_mut::<RUN>().0.iter_mut().enumerate()
}

#[inline(always)]
pub(super) fn q2(b: &[u8; 84], y: &mut [f32; 256]) {
    let (d, m) = (half_at(b, 80), half_at(b, 82));
    for (run, y) in runs(y) {
        let quants = &b[16 + run / 4 * RUN..][..RUN];
        let shift = run % 4 * 2;
        for (part, (y, quants)) in y.chunks_exact_mut(16).zip(quants.chunks_exact(16)).enumerate() {
            let packed = b[run * 2 + part];
            let (scale, offset) = (d * f32::from(packed & 15), m * f32::from(packed >> 4));
            for (y, &q) in y.iter_mut().zip(quants) {
                *y = scale * f32::from(q >> shift & 3) - offset;
            }
        }
    }
}

#[inline(always)]
pub(super) fn q3(b: &[u8; 110], y: &mut [f32; 256]) {
    let d = half_at(b, 108);
    for (run, y) in runs(y) {
        let (low, high) = (&b[32 + run / 4 * RUN..][..RUN], &b[..RUN]);
        let shift = run % 4 * 2;
        for part in 0..2 {
            let scale = d * (f32::from(third_scale(b, run * 2 + part)) - 32.0);
            for l in part * 16..part * 16 + 16 {
                let q = low[l] >> shift & 3 | (high[l] >> run & 1) << 2;
                y[l] = scale * (f32::from(q) - 4.0);
            }
        }
    }
}

/// Scale `part` of a `Q3_K` block: its low four bits among eight bytes, the upper two in the four
/// after them.
#[inline(always)]
fn third_scale(block: &[u8; 110], part: usize) -> u8 {
    let packed = &block[96..108];
    packed[part % 8] >> (part / 8 * 4) & 15 | (packed[8 + part % 4] >> (part / 4 * 2) & 3) << 4
}

#[inline(always)]
pub(super) fn q4(b: &[u8; 144], y: &mut [f32; 256]) {
    for (run, y) in runs(y) {
        let (d, m) = scale_and_offset(b, run);
        let quants = &b[16 + run / 2 * RUN..][..RUN];
        let shift = run % 2 * 4;
        for (y, &q) in y.iter_mut().zip(quants) {
            *y = d * f32::from(q >> shift & 15) - m;
        }
    }
}

#[inline(always)]
pub(super) fn q5(b: &[u8; 176], y: &mut [f32; 256]) {
    for (run, y) in runs(y) {
        let (d, m) = scale_and_offset(b, run);
        let quants = &b[48 + run / 2 * RUN..][..RUN];
        let shift = run % 2 * 4;
        for ((y, &q), &high) in y.iter_mut().zip(quants).zip(&b[16..48]) {
            *y = d * f32::from(q >> shift & 15 | (high >> run & 1) << 4) - m;
        }
    }
}

/// Scale and offset of run `run` of a `Q4_K` or `Q5_K` block: six bits each, packed into 12 bytes.
#[inline(always)]
fn scale_and_offset(block: &[u8], run: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, offset) = if run < 4 {
        (packed[run] & 63, packed[run + 4] & 63)
    } else {
        (
            packed[run + 4] & 15 | packed[run - 4] >> 6 << 4,
            packed[run + 4] >> 4 | packed[run] >> 6 << 4,
        )
    };
    (half_at(block, 0) * f32::from(scale), half_at(block, 2) * f32::from(offset))
}

#[inline(always)]
pub(super) fn q6(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = half_at(b, 208);
    for (run, y) in runs(y) {
        // Four runs share the bytes of `high`, two of them those of `low`.
        let (half, run) = (run / 4, run % 4);
        let low = &b[half * 64 + run % 2 * RUN..][..RUN];
        let high = &b[128 + half * RUN..][..RUN];
        for part in 0..2 {
            let scale = d * f32::from(b[192 + half * 8 + run * 2 + part] as i8);
            for l in part * 16..part * 16 + 16 {
                let q = low[l] >> (run / 2 * 4) & 15 | (high[l] >> (run * 2) & 3) << 4;
                y[l] = scale * (f32::from(q) - 32.0);
            }
        }
    }
}

#[inline(always)]
pub(super) fn q8(b: &[u8; 292], y: &mut [f32; 256]) {
    signed(f32::from_le_bytes([b[0], b[1], b[2], b[3]]), &b[4..260], y);
}

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
//! runs, of the first one in its lowest bits. Runs that share bytes are widened in one loop, which is
//! then long enough for the compiler to leave it a loop and make vectors of it.

use super::classic::{loop_of, signed};
use super::plain::half_at;
use std::array::from_fn;

/// Numbers of a run.
const RUN: usize = 32;

#[inline(always)]
pub(super) fn q2(b: &[u8; 84], y: &mut [f32; 256]) {
    let (d, m) = (half_at(b, 80), half_at(b, 82));
    for (half, y) in y.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let quants = &b[16 + half * RUN..][..RUN];
        for part in 0..2 {
            let packed: [u8; 4] = from_fn(|run| b[half * 8 + run * 2 + part]);
            let scales = packed.map(|packed| d * f32::from(packed & 15));
            let offsets = packed.map(|packed| m * f32::from(packed >> 4));
            for l in part * 16..part * 16 + 16 {
                for run in 0..4 {
                    let q = quants[l] >> (run * 2) & 3;
                    y[run * RUN + l] = scales[run] * f32::from(q) - offsets[run];
                }
            }
        }
    }
}

#[inline(always)]
pub(super) fn q3(b: &[u8; 110], y: &mut [f32; 256]) {
    let d = half_at(b, 108);
    for (half, y) in y.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (low, high) = (&b[32 + half * RUN..][..RUN], &b[..RUN]);
        for part in 0..2 {
            let scales: [f32; 4] =
                from_fn(|run| d * (f32::from(third_scale(b, half * 8 + run * 2 + part)) - 32.0));
            for l in part * 16..part * 16 + 16 {
                let high = high[l] >> (half * 4);
                for run in 0..4 {
                    let q = low[l] >> (run * 2) & 3 | (high >> run & 1) << 2;
                    y[run * RUN + l] = scales[run] * (f32::from(q) - 4.0);
                }
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
    let scales: [(f32, f32); 8] = from_fn(|run| scale_and_offset(b, run));
    for (pair, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let [(d, m), (d_next, m_next)] = [scales[pair * 2], scales[pair * 2 + 1]];
        let quants = &b[16 + pair * RUN..][..loop_of(RUN)];
        let (y, y_next) = y.split_at_mut(RUN);
        for ((y, y_next), &q) in y.iter_mut().zip(y_next).zip(quants) {
            *y = d * f32::from(q & 15) - m;
            *y_next = d_next * f32::from(q >> 4) - m_next;
        }
    }
}

#[inline(always)]
pub(super) fn q5(b: &[u8; 176], y: &mut [f32; 256]) {
    let scales: [(f32, f32); 8] = from_fn(|run| scale_and_offset(b, run));
    for (pair, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let [(d, m), (d_next, m_next)] = [scales[pair * 2], scales[pair * 2 + 1]];
        let (low, high) = (&b[48 + pair * RUN..][..RUN], &b[16..48]);
        for l in 0..RUN {
            let high = high[l] >> (pair * 2);
            y[l] = d * f32::from(low[l] & 15 | (high & 1) << 4) - m;
            y[RUN + l] = d_next * f32::from(low[l] >> 4 | (high >> 1 & 1) << 4) - m_next;
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
    for (half, y) in y.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        // Four runs share the bytes of `high`, two of them those of `low`.
        let (low, high) = (&b[half * 64..][..2 * RUN], &b[128 + half * RUN..][..RUN]);
        for part in 0..2 {
            let scales: [f32; 4] =
                from_fn(|run| d * f32::from(b[192 + half * 8 + run * 2 + part] as i8));
            for l in part * 16..part * 16 + 16 {
                for run in 0..4 {
                    let low = low[run % 2 * RUN + l] >> (run / 2 * 4) & 15;
                    let q = low | (high[l] >> (run * 2) & 3) << 4;
                    y[run * RUN + l] = scales[run] * (f32::from(q) - 32.0);
                }
            }
        }
    }
}

#[inline(always)]
pub(super) fn q8(b: &[u8; 292], y: &mut [f32; 256]) {
    signed(f32::from_le_bytes([b[0], b[1], b[2], b[3]]), &b[4..260], y);
}

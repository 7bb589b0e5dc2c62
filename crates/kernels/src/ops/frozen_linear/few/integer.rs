//! Products of packed weights with a few rows of activations, in whole numbers.
//!
//! A packed weight is a scale times small whole numbers, block by block. Rounding the activations of
//! a block to 16 bits, with a scale of their own, makes the sum over the block one of whole numbers,
//! `Σ q_i x_i`, which a processor does sixteen or more at a time; widening every weight to `f32`
//! first takes three times as long. The rounding is `1/65278` of the largest activation of the block
//! at most.
//!
//! [`portable`] says what is computed; [`wide`] does the same with the wider instructions of x86, to
//! the last bit. Of weights of bytes it multiplies four rows together, each with partial sums of its
//! own; of weights of four bits eight, a lane of a vector each, so that what is done once for a block
//! (scales, widening, additions of `f32`) is done for eight at a time.

use super::{Rows, rows_ahead};
use crate::block::BlockFormat;
use crate::simd::{self, vectorize};
use std::ops::Range;

/// Numbers of a block.
const BLOCK: usize = 32;

/// Partial sums of a row of bytes.
const LANES: usize = 8;

/// Rows of bytes that are multiplied together.
const FOUR: usize = 4;

/// Rows of four bits that are multiplied together.
pub(super) const EIGHT: usize = 8;

/// Where in a block of a format its parts are.
#[derive(Clone, Copy)]
struct Layout {
    /// Bytes of a block.
    bytes: usize,
    /// Where the quants start; the scale is at 0.
    quants: usize,
    /// Two quants a byte, without a sign.
    nibbles: bool,
    /// Where the number is that is added to each, and what it is multiplied by.
    offset: Option<(usize, f32)>,
}

const fn layout(format: BlockFormat) -> Option<Layout> {
    Some(match format {
        BlockFormat::Q8_0 => Layout { bytes: 34, quants: 2, nibbles: false, offset: None },
        BlockFormat::Q4_0 => {
            Layout { bytes: 18, quants: 2, nibbles: true, offset: Some((0, -8.0)) }
        }
        BlockFormat::Q4_1 => Layout { bytes: 20, quants: 4, nibbles: true, offset: Some((2, 1.0)) },
        _ => return None,
    })
}

/// Rows of activations, rounded to 16 bits.
pub(crate) struct Rounded {
    layout: Layout,
    /// Blocks of a row.
    blocks: usize,
    /// For weights of bytes.
    values: Vec<[i16; BLOCK]>,
    /// For weights of four bits.
    bytes: Vec<Bytes>,
    factors: Vec<Factors>,
}

/// The two bytes of each value of a block, both with a sign: `256 · high + low`.
#[derive(Clone, Copy)]
struct Bytes {
    high: [i8; BLOCK],
    low: [i8; BLOCK],
}

/// What belongs to the values of a block.
#[derive(Clone, Copy)]
struct Factors {
    /// What they are multiplied by. Not finite where an activation is not, so that it is not lost.
    scale: f32,
    /// Their sum, times the scale.
    sum: f32,
}

impl Rounded {
    /// `x: [rows, inputs]` for weights of `format`; none if their products are not done this way.
    pub(crate) fn new(format: BlockFormat, x: &[f32], inputs: usize) -> Option<Self> {
        let layout = layout(format)?;
        let (blocks, _) = x.as_chunks::<BLOCK>();
        let of_bytes = if layout.nibbles { 0 } else { blocks.len() };
        let mut rounded = Self {
            layout,
            blocks: inputs / BLOCK,
            values: vec![[0; BLOCK]; of_bytes],
            bytes: vec![Bytes { high: [0; BLOCK], low: [0; BLOCK] }; blocks.len() - of_bytes],
            factors: vec![Factors { scale: 0.0, sum: 0.0 }; blocks.len()],
        };
        vectorize(
            #[inline(always)]
            || {
                let of_blocks = rounded.factors.iter_mut().zip(blocks);
                if !layout.nibbles {
                    for ((factors, block), rounded) in of_blocks.zip(&mut rounded.values) {
                        (*rounded, *factors) = round(block);
                    }
                    return;
                }
                for ((factors, block), bytes) in of_blocks.zip(&mut rounded.bytes) {
                    let (values, of_block) = round(block);
                    *factors = of_block;
                    for at in 0..BLOCK {
                        bytes.low[at] = values[at] as i8;
                        bytes.high[at] = ((values[at] - i16::from(bytes.low[at])) >> 8) as i8;
                    }
                }
            },
        );
        Some(rounded)
    }

    fn row(&self, row: usize) -> Row<'_> {
        let blocks = row * self.blocks..(row + 1) * self.blocks;
        Row {
            values: self.values.get(blocks.clone()).unwrap_or(&[]),
            bytes: self.bytes.get(blocks.clone()).unwrap_or(&[]),
            factors: &self.factors[blocks],
        }
    }

    /// Adds the products with rows `range` of a weight whose bytes are `weight` to
    /// `out: [range, rows]`.
    pub(crate) fn add_products(
        &self,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
    ) {
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        if wide::available() {
            // SAFETY: the processor has the instructions.
            return unsafe { wide::add_products(self, weight, range, rows, out) };
        }
        self.add_groups(weight, range, rows, out, portable::products::<FOUR>);
    }

    /// Calls `products(layout, rows of the weight, row of x)` for every `N` of rows `range` of
    /// `weight`, and adds what it gives to `out: [range, rows]`.
    #[inline(always)]
    fn add_groups<const N: usize>(
        &self,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
        products: impl Fn(Layout, [&[u8]; N], Row<'_>) -> [f32; N],
    ) {
        let weight = Rows::whole(weight, self.blocks * self.layout.bytes);
        for (first, out) in range.clone().step_by(N).zip(out.chunks_mut(N * rows)) {
            let group = weight.group(first, 1, range.end);
            for row in 0..rows {
                let sums = products(self.layout, group, self.row(row));
                for (out, sum) in out.chunks_mut(rows).zip(sums) {
                    out[row] += sum;
                }
            }
        }
    }
}

/// One row of activations.
#[derive(Clone, Copy)]
struct Row<'a> {
    values: &'a [[i16; BLOCK]],
    bytes: &'a [Bytes],
    factors: &'a [Factors],
}

/// Rounds a block.
#[inline(always)]
fn round(block: &[f32; BLOCK]) -> ([i16; BLOCK], Factors) {
    /// Added to a number below 2²² it leaves the nearest whole number in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    /// Whose bytes, both with a sign, are 127.
    const LARGEST: f32 = 32_639.0;
    // Without their signs numbers are in the order of their bits, infinity and what is no number last;
    // and the largest of whole numbers may be looked for in any order, several at a time.
    let mut peak = 0;
    for x in block {
        peak = x.abs().to_bits().max(peak);
    }
    let peak = f32::from_bits(peak);
    let inverse = if peak > f32::MIN_POSITIVE { LARGEST / peak } else { 0.0 };
    let (mut values, mut sum) = ([0; BLOCK], 0);
    for (value, x) in values.iter_mut().zip(block) {
        let whole = (x * inverse + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32;
        *value = whole as i16;
        sum += i32::from(*value);
    }
    let scale = peak / LARGEST;
    (values, Factors { scale, sum: sum as f32 * scale })
}

mod portable {
    use super::*;
    use crate::block::half_at;

    /// Products of rows of the weight with `x`.
    pub(super) fn products<const N: usize>(
        layout: Layout,
        weight: [&[u8]; N],
        x: Row<'_>,
    ) -> [f32; N] {
        weight
            .map(|row| if layout.nibbles { nibbles(layout, row, x) } else { bytes(layout, row, x) })
    }

    /// As [`wide::four_rows`], its sums in the same order.
    fn bytes(layout: Layout, row: &[u8], x: Row<'_>) -> f32 {
        let mut sums = [0.0_f32; LANES];
        let blocks = row.chunks_exact(layout.bytes);
        for ((block, x), factors) in blocks.zip(x.values).zip(x.factors) {
            let scale = half_at(block, 0) * factors.scale;
            let product = |at| i32::from(block[layout.quants + at] as i8) * i32::from(x[at]);
            for (lane, sum) in sums.iter_mut().enumerate() {
                let members = [2 * lane, 2 * lane + 1, 2 * lane + 16, 2 * lane + 17];
                let whole: i32 = members.map(product).iter().sum();
                *sum = scale.mul_add(whole as f32, *sum);
            }
        }
        let half = |s: &[f32]| (s[0] + s[1]) + (s[2] + s[3]);
        half(&sums[..4]) + half(&sums[4..])
    }

    /// A lane of [`wide::eight_rows`].
    fn nibbles(layout: Layout, row: &[u8], x: Row<'_>) -> f32 {
        let (mut sum, mut offset) = (0.0_f32, 0.0_f32);
        let blocks = row.chunks_exact(layout.bytes);
        for ((block, x), factors) in blocks.zip(x.bytes).zip(x.factors) {
            let quants = &block[layout.quants..][..BLOCK / 2];
            let value = |at: usize| 256 * i32::from(x.high[at]) + i32::from(x.low[at]);
            let mut whole = 0;
            for (at, quants) in quants.iter().enumerate() {
                whole += i32::from(quants & 15) * value(at);
                whole += i32::from(quants >> 4) * value(at + BLOCK / 2);
            }
            sum = (half_at(block, 0) * factors.scale).mul_add(whole as f32, sum);
            if let Some((at, factor)) = layout.offset {
                offset = half_at(block, at).mul_add(factor * factors.sum, offset);
            }
        }
        sum + offset
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod wide {
    use super::*;
    use std::arch::asm;
    use std::arch::x86_64::*;

    pub(super) fn available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }

    /// How products of bytes are added up by fours.
    pub(super) mod dot {
        /// By twos first, with AVX2.
        pub(in super::super) const BY_TWOS: u8 = 0;
        /// In one instruction of AVX-VNNI.
        pub(in super::super) const VEX: u8 = 1;
        /// In the same one as AVX-512 has it.
        pub(in super::super) const EVEX: u8 = 2;
    }

    /// Whether this processor can do it that way.
    pub(super) fn has(dot: u8) -> bool {
        match dot {
            dot::EVEX => {
                is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl")
            }
            dot::VEX => is_x86_feature_detected!("avxvnni"),
            _ => true,
        }
    }

    /// Shows that this processor [has](has) the way `DOT`.
    #[derive(Clone, Copy)]
    struct Dot<const DOT: u8>(());

    impl<const DOT: u8> Dot<DOT> {
        /// # Panics
        /// If it has not.
        fn new() -> Self {
            assert!(has(DOT), "this processor adds up in another way");
            Self(())
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn add_products(
        x: &Rounded,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
    ) {
        let best = [dot::EVEX, dot::VEX].into_iter().find(|&dot| has(dot));
        add_products_by(best.unwrap_or(dot::BY_TWOS), x, weight, range, rows, out);
    }

    /// # Panics
    /// If the processor [has](has) no such way.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn add_products_by(
        dot: u8,
        x: &Rounded,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
    ) {
        match (x.layout.bytes, dot) {
            (34, _) => x.add_groups(weight, range, rows, out, |_, weight, row| {
                four_rows::<34>(weight, row)
            }),
            (18, dot::EVEX) => {
                multiply::<18, 0, { dot::EVEX }>(Dot::new(), x, weight, range, rows, out)
            }
            (18, dot::VEX) => {
                multiply::<18, 0, { dot::VEX }>(Dot::new(), x, weight, range, rows, out)
            }
            (18, _) => multiply::<18, 0, { dot::BY_TWOS }>(Dot::new(), x, weight, range, rows, out),
            (_, dot::EVEX) => {
                multiply::<20, 2, { dot::EVEX }>(Dot::new(), x, weight, range, rows, out)
            }
            (_, dot::VEX) => {
                multiply::<20, 2, { dot::VEX }>(Dot::new(), x, weight, range, rows, out)
            }
            _ => multiply::<20, 2, { dot::BY_TWOS }>(Dot::new(), x, weight, range, rows, out),
        }
    }

    /// With the size of blocks of four bits known to the compiler, and where in them is the number
    /// that is added to each.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn multiply<const BYTES: usize, const OFFSET: usize, const DOT: u8>(
        dot: Dot<DOT>,
        x: &Rounded,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
    ) {
        x.add_groups(weight, range, rows, out, |layout, weight, row| {
            eight_rows::<BYTES, OFFSET, DOT>(dot, layout, weight, row)
        });
    }

    /// Rows of bytes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn four_rows<const BYTES: usize>(weight: [&[u8]; FOUR], x: Row<'_>) -> [f32; FOUR] {
        let ahead = rows_ahead(weight[0].len(), FOUR) * weight[0].len();
        let [first, second, third, fourth] = weight;
        let blocks = first.as_chunks::<BYTES>().0.iter().zip(second.as_chunks::<BYTES>().0);
        let blocks = blocks.zip(third.as_chunks::<BYTES>().0).zip(fourth.as_chunks::<BYTES>().0);
        let mut sums = [_mm256_setzero_ps(); FOUR];
        for ((((first, second), third), fourth), (values, factors)) in
            blocks.zip(x.values.iter().zip(x.factors))
        {
            let blocks = [first, second, third, fourth];
            let scales = _mm_mul_ps(_mm_cvtph_ps(halves(blocks, 0)), _mm_set1_ps(factors.scale));
            let scales = _mm256_set_m128(scales, scales);
            let scales = [
                _mm256_permute_ps::<0x00>(scales),
                _mm256_permute_ps::<0x55>(scales),
                _mm256_permute_ps::<0xAA>(scales),
                _mm256_permute_ps::<0xFF>(scales),
            ];
            for row in 0..FOUR {
                // The rows are read side by side: what lies as far into the next four.
                simd::fetch_once(blocks[row], ahead);
                let whole = byte_products(blocks[row], values);
                sums[row] = _mm256_fmadd_ps(scales[row], _mm256_cvtepi32_ps(whole), sums[row]);
            }
        }
        let front = _mm256_hadd_ps(sums[0], sums[1]);
        let back = _mm256_hadd_ps(sums[2], sums[3]);
        let both = _mm256_hadd_ps(front, back);
        pulp::cast(_mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both)))
    }

    /// Rows of four bits.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn eight_rows<const BYTES: usize, const OFFSET: usize, const DOT: u8>(
        dot: Dot<DOT>,
        layout: Layout,
        weight: [&[u8]; EIGHT],
        x: Row<'_>,
    ) -> [f32; EIGHT] {
        let factor = layout.offset.map_or(0.0, |(_, factor)| factor);
        let row_bytes = weight[0].len();
        let ahead = rows_ahead(row_bytes, EIGHT) * row_bytes;
        let count = row_bytes / BYTES;
        // `map` would be a function of its own, without the wide instructions.
        let mut blocks: [&[[u8; BYTES]]; EIGHT] = [&[]; EIGHT];
        for (blocks, row) in blocks.iter_mut().zip(weight) {
            *blocks = &row.as_chunks().0[..count];
        }
        let (mut sums, mut offsets) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for (at, (bytes, factors)) in x.bytes.iter().zip(x.factors).enumerate().take(count) {
            // The next eight rows lie one after the other: of all of them as much as of these is read.
            for line in (0..EIGHT * BYTES).step_by(simd::LINE_BYTES) {
                simd::fetch_once(weight[0], ahead + at * EIGHT * BYTES + line);
            }
            let front = [&blocks[0][at], &blocks[1][at], &blocks[2][at], &blocks[3][at]];
            let back = [&blocks[4][at], &blocks[5][at], &blocks[6][at], &blocks[7][at]];
            let scales = eight_halves(front, back, 0);
            let added = if OFFSET == 0 { scales } else { eight_halves(front, back, OFFSET) };
            offsets = _mm256_fmadd_ps(added, _mm256_set1_ps(factor * factors.sum), offsets);
            let whole = nibble_products(dot, by_fours(front, back), bytes);
            let scales = _mm256_mul_ps(scales, _mm256_set1_ps(factors.scale));
            sums = _mm256_fmadd_ps(scales, _mm256_cvtepi32_ps(whole), sums);
        }
        pulp::cast(_mm256_add_ps(sums, offsets))
    }

    /// The last sixteen bytes of eight blocks, four of each block side by side: first the first four.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn by_fours<const BYTES: usize>(
        front: [&[u8; BYTES]; 4],
        back: [&[u8; BYTES]; 4],
    ) -> [__m256i; 4] {
        let load = |row: usize| {
            _mm256_set_m128i(load_16(back[row], BYTES - 16), load_16(front[row], BYTES - 16))
        };
        let rows = [load(0), load(1), load(2), load(3)];
        let front =
            [_mm256_unpacklo_epi32(rows[0], rows[1]), _mm256_unpackhi_epi32(rows[0], rows[1])];
        let back =
            [_mm256_unpacklo_epi32(rows[2], rows[3]), _mm256_unpackhi_epi32(rows[2], rows[3])];
        [
            _mm256_unpacklo_epi64(front[0], back[0]),
            _mm256_unpackhi_epi64(front[0], back[0]),
            _mm256_unpacklo_epi64(front[1], back[1]),
            _mm256_unpackhi_epi64(front[1], back[1]),
        ]
    }

    /// Products of a block of each of eight rows with a block; of the rows' quants as [`by_fours`]
    /// lays them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn nibble_products<const DOT: u8>(dot: Dot<DOT>, quants: [__m256i; 4], x: &Bytes) -> __m256i {
        let (x_high, x_low) = (x.high.as_chunks::<4>().0, x.low.as_chunks::<4>().0);
        let of = |bytes: &[i8; 4]| _mm256_set1_epi32(pulp::cast(*bytes));
        let (mut high, mut low) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        for (at, quants) in quants.into_iter().enumerate() {
            let mask = _mm256_set1_epi8(15);
            let halves = [
                _mm256_and_si256(quants, mask),
                _mm256_and_si256(_mm256_srli_epi16::<4>(quants), mask),
            ];
            for (half, quants) in halves.into_iter().enumerate() {
                let at = 4 * half + at;
                high = add_dots(dot, high, quants, of(&x_high[at]));
                low = add_dots(dot, low, quants, of(&x_low[at]));
            }
        }
        if DOT != dot::BY_TWOS {
            return _mm256_add_epi32(_mm256_slli_epi32::<8>(high), low);
        }
        _mm256_add_epi32(
            _mm256_madd_epi16(high, _mm256_set1_epi16(256)),
            _mm256_madd_epi16(low, _mm256_set1_epi16(1)),
        )
    }

    /// Adds to each of `sums` the products of four bytes of `a`, without a sign, with those of `b`; by
    /// twos to each sixteen bits of it, which eight times two products of 15 with a byte do not leave.
    ///
    /// The one instruction is in assembly, so that functions for its processors need not be written
    /// twice.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_dots<const DOT: u8>(_: Dot<DOT>, mut sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
        if DOT == dot::BY_TWOS {
            return _mm256_add_epi16(sums, _mm256_maddubs_epi16(a, b));
        }
        // SAFETY: [`Dot`] shows that the processor has the instruction, which changes `sums` alone.
        unsafe {
            if DOT == dot::EVEX {
                asm!(
                    "vpdpbusd {sums}, {a}, {b}",
                    sums = inout(ymm_reg) sums, a = in(ymm_reg) a, b = in(ymm_reg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            } else {
                asm!(
                    "{{vex}} vpdpbusd {sums}, {a}, {b}",
                    sums = inout(ymm_reg) sums, a = in(ymm_reg) a, b = in(ymm_reg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
        sums
    }

    /// Products of a block of bytes with a sign with a block.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn byte_products<const BYTES: usize>(block: &[u8; BYTES], x: &[i16; BLOCK]) -> __m256i {
        let (x_low, x_high) = x.split_at(16);
        let low = _mm256_cvtepi8_epi16(load_16(block, BYTES - 32));
        let high = _mm256_cvtepi8_epi16(load_16(block, BYTES - 16));
        _mm256_add_epi32(
            _mm256_madd_epi16(low, load_32(x_low)),
            _mm256_madd_epi16(high, load_32(x_high)),
        )
    }

    /// The half-precision numbers at byte `at` of eight blocks.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn eight_halves<const BYTES: usize>(
        front: [&[u8; BYTES]; 4],
        back: [&[u8; BYTES]; 4],
        at: usize,
    ) -> __m256 {
        _mm256_cvtph_ps(_mm_unpacklo_epi64(halves(front, at), halves(back, at)))
    }

    /// The half-precision numbers at byte `at` of four blocks, below.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn halves<const BYTES: usize>(blocks: [&[u8; BYTES]; 4], at: usize) -> __m128i {
        let bits =
            |row: usize| i32::from(u16::from_le_bytes([blocks[row][at], blocks[row][at + 1]]));
        let halves = _mm_insert_epi16::<1>(_mm_cvtsi32_si128(bits(0)), bits(1));
        _mm_insert_epi16::<3>(_mm_insert_epi16::<2>(halves, bits(2)), bits(3))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_16<const BYTES: usize>(block: &[u8; BYTES], at: usize) -> __m128i {
        let bytes: &[u8; 16] = block[at..].first_chunk().unwrap_or(&[0; 16]);
        // SAFETY: sixteen bytes, at any address.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    /// 32 bytes of whole numbers.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load_32<T: bytemuck::Pod>(values: &[T]) -> __m256i {
        assert_eq!(size_of_val(values), 32);
        // SAFETY: 32 bytes, at any address.
        unsafe { _mm256_loadu_si256(values.as_ptr().cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{dequantize, quantize};

    const FORMATS: [BlockFormat; 3] = [BlockFormat::Q8_0, BlockFormat::Q4_0, BlockFormat::Q4_1];

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i + seed) * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    fn packed(format: BlockFormat, outputs: usize, inputs: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        quantize(format, &numbers(outputs * inputs, 5), &mut bytes);
        bytes
    }

    #[test]
    fn products_are_those_of_the_widened_weight_within_the_rounding() {
        for (format, (outputs, inputs, rows)) in
            FORMATS.into_iter().flat_map(|f| [(7, 96, 1), (4, 32, 3), (1, 64, 2)].map(|s| (f, s)))
        {
            let (weight, x) = (packed(format, outputs, inputs), numbers(rows * inputs, 77));
            let mut wide = vec![0.0; outputs * inputs];
            dequantize(format, &weight, &mut wide);
            let mut out = vec![0.0; outputs * rows];
            let rounded = Rounded::new(format, &x, inputs).unwrap();
            rounded.add_products(&weight, 0..outputs, rows, &mut out);
            for (at, &got) in out.iter().enumerate() {
                let (o, row) = (at / rows, at % rows);
                let terms = wide[o * inputs..][..inputs].iter().zip(&x[row * inputs..]);
                let terms: Vec<f64> = terms.map(|(w, x)| f64::from(w * x)).collect();
                let (sum, size) =
                    (terms.iter().sum::<f64>(), terms.iter().map(|t| t.abs()).sum::<f64>());
                assert!((f64::from(got) - sum).abs() < 3e-5 * size, "{format} {at}: {got} {sum}");
            }
        }
    }

    #[test]
    fn all_ways_give_the_same_bits() {
        // Of the largest quants, and of activations that round to the largest, too.
        let inputs = [numbers(576, 3), vec![1.0; 576], vec![-1.0; 576]];
        for (format, x) in FORMATS.into_iter().flat_map(|f| inputs.each_ref().map(|x| (f, x))) {
            let mut weight = packed(format, 11, 576);
            let layout = layout(format).unwrap();
            for block in weight[..4 * 576 / BLOCK * layout.bytes].chunks_exact_mut(layout.bytes) {
                block[layout.quants..].fill(0xFF);
            }
            let rounded = Rounded::new(format, x, 576).unwrap();
            let mut expected = [0.0; 11];
            rounded.add_groups(&weight, 0..11, 1, &mut expected, portable::products::<FOUR>);
            let same = |got: [f32; 11], way: u8| {
                assert_eq!(got.map(f32::to_bits), expected.map(f32::to_bits), "{format} {way}");
            };
            let mut got = [0.0; 11];
            rounded.add_products(&weight, 0..11, 1, &mut got);
            same(got, u8::MAX);
            #[cfg(target_arch = "x86_64")]
            for way in [wide::dot::BY_TWOS, wide::dot::VEX, wide::dot::EVEX] {
                if wide::available() && wide::has(way) {
                    let mut got = [0.0; 11];
                    // SAFETY: the processor has the instructions.
                    #[allow(unsafe_code)]
                    unsafe {
                        wide::add_products_by(way, &rounded, &weight, 0..11, 1, &mut got);
                    }
                    same(got, way);
                }
            }
        }
    }

    #[test]
    fn rounding_keeps_zeros_and_what_is_not_finite() {
        let mut x = numbers(96, 1);
        x[..32].fill(0.0);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[40] = bad;
            for format in FORMATS {
                let weight = packed(format, 1, 96);
                let rounded = Rounded::new(format, &x, 96).unwrap();
                assert_eq!((rounded.factors[0].scale, rounded.factors[0].sum), (0.0, 0.0));
                let mut out = [0.0];
                rounded.add_products(&weight, 0..1, 1, &mut out);
                assert!(!out[0].is_finite(), "{format} {bad}");
            }
        }
        for largest in [1e-30, 1.0, 1e30] {
            let x = numbers(32, 9).iter().map(|x| x * largest).collect::<Vec<_>>();
            let rounded = Rounded::new(BlockFormat::Q8_0, &x, 32).unwrap();
            let peak = x.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
            for (&value, x) in rounded.values[0].iter().zip(&x) {
                let back = f32::from(value) * rounded.factors[0].scale;
                assert!((back - x).abs() <= peak / 65_200.0, "{x} {back}");
            }
        }
    }
}

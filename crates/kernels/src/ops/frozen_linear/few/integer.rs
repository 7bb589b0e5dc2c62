//! Products of packed weights with a few rows of activations, in whole numbers.
//!
//! A packed weight is a scale times small whole numbers, block by block. Rounding the activations of
//! a block to 16 bits, with a scale of their own, makes the sum over the block one of whole numbers,
//! `Σ q_i x_i`, which a processor does sixteen or more at a time; widening every weight to `f32`
//! first takes three times as long. The rounding is `1/65278` of the largest activation of the block
//! at most.
//!
//! The sum over a block is exact, and blocks are added one after the other. So every way of
//! multiplying gives the same bits, and a row of activations gives the same whatever rows are beside
//! it. [`portable`] says what is computed; [`wide`] does it with the wider instructions of x86. It
//! multiplies eight rows of the weight, a lane of a vector each, so that what is done once for a block
//! (scales, additions of `f32`) is done for eight at a time, and lays the eight out once for up to
//! [`TOGETHER`] rows of activations.

use super::{Rows, rows_ahead};
use crate::block::BlockFormat;
use crate::simd::{self, vectorize};
use std::ops::Range;

/// Numbers of a block.
const BLOCK: usize = 32;

/// Rows of the weight that are multiplied together.
pub(super) const EIGHT: usize = 8;

/// Most rows of activations that are multiplied together.
const TOGETHER: usize = 16;

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
    /// `[blocks, rows]`, so that what is multiplied by a block of the weight lies together.
    values: Vec<Values>,
    /// As `values`.
    factors: Vec<Factors>,
}

/// The values of a block.
#[derive(Clone, Copy)]
struct Values {
    /// `256 · high + low`, both with a sign.
    high: [i8; BLOCK],
    low: [i8; BLOCK],
    /// The values; of every four first those at 0 and 2, then those at 1 and 3.
    whole: [i16; BLOCK],
}

/// What belongs to the values of a block.
#[derive(Clone, Copy)]
struct Factors {
    /// What they are multiplied by. Not finite where an activation is not, so that it is not lost.
    scale: f32,
    /// Their sum, times the scale.
    sum: f32,
    /// Their sum.
    whole: i32,
}

impl Rounded {
    /// `x: [rows, inputs]` for weights of `format`; none if their products are not done this way.
    pub(crate) fn new(format: BlockFormat, x: &[f32], inputs: usize) -> Option<Self> {
        let layout = layout(format)?;
        let (of_rows, _) = x.as_chunks::<BLOCK>();
        let blocks = inputs / BLOCK;
        let rows = of_rows.len() / blocks.max(1);
        let none = Values { high: [0; BLOCK], low: [0; BLOCK], whole: [0; BLOCK] };
        let mut rounded = Self {
            layout,
            blocks,
            values: vec![none; of_rows.len()],
            factors: vec![Factors { scale: 0.0, sum: 0.0, whole: 0 }; of_rows.len()],
        };
        vectorize(
            #[inline(always)]
            || {
                for (row, of_row) in of_rows.chunks_exact(blocks.max(1)).enumerate() {
                    for (at, block) in of_row.iter().enumerate() {
                        let (values, factors) = round(block);
                        rounded.values[at * rows + row] = Values::new(&values);
                        rounded.factors[at * rows + row] = factors;
                    }
                }
            },
        );
        Some(rounded)
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
        portable::add_products(self, weight, range, rows, out);
    }
}

impl Values {
    #[inline(always)]
    fn new(values: &[i16; BLOCK]) -> Self {
        let mut new = Self { high: [0; BLOCK], low: [0; BLOCK], whole: [0; BLOCK] };
        for at in 0..BLOCK {
            new.low[at] = values[at] as i8;
            new.high[at] = ((values[at] - i16::from(new.low[at])) >> 8) as i8;
        }
        for at in (0..BLOCK).step_by(4) {
            let of_four = [values[at], values[at + 2], values[at + 1], values[at + 3]];
            new.whole[at..at + 4].copy_from_slice(&of_four);
        }
        new
    }
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
    (values, Factors { scale, sum: sum as f32 * scale, whole: sum })
}

mod portable {
    use super::*;
    use crate::block::half_at;

    /// As [`Rounded::add_products`].
    pub(super) fn add_products(
        x: &Rounded,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
    ) {
        let weight = Rows::whole(weight, x.blocks * x.layout.bytes);
        for (at, out) in range.zip(out.chunks_exact_mut(rows)) {
            let [of_weight] = weight.group(at, 1, at + 1);
            for (row, out) in out.iter_mut().enumerate() {
                *out += product(x, of_weight, rows, row);
            }
        }
    }

    /// The product of a row of the weight with one of `rows` of `x`.
    fn product(x: &Rounded, weight: &[u8], rows: usize, row: usize) -> f32 {
        let layout = x.layout;
        let (mut sum, mut offset) = (0.0_f32, 0.0_f32);
        for (at, block) in weight.chunks_exact(layout.bytes).enumerate() {
            let (values, factors) = (&x.values[at * rows + row], &x.factors[at * rows + row]);
            let value = |at: usize| 256 * i32::from(values.high[at]) + i32::from(values.low[at]);
            let quants = &block[layout.quants..];
            let quant = |at: usize| match (layout.nibbles, at < BLOCK / 2) {
                (false, _) => i32::from(quants[at] as i8),
                (true, true) => i32::from(quants[at] & 15),
                (true, false) => i32::from(quants[at - BLOCK / 2] >> 4),
            };
            let whole: i32 = (0..BLOCK).map(|at| quant(at) * value(at)).sum();
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
            (34, dot::EVEX) => {
                multiply::<34, 0, { dot::EVEX }>(Dot::new(), x, weight, range, rows, out)
            }
            (34, dot::VEX) => {
                multiply::<34, 0, { dot::VEX }>(Dot::new(), x, weight, range, rows, out)
            }
            (34, _) => multiply::<34, 0, { dot::BY_TWOS }>(Dot::new(), x, weight, range, rows, out),
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

    /// With the size of blocks known to the compiler, and where in them is the number that is added
    /// to each.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn multiply<const BYTES: usize, const OFFSET: usize, const DOT: u8>(
        dot: Dot<DOT>,
        x: &Rounded,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
    ) {
        let weight = Rows::whole(weight, x.blocks * BYTES);
        for (first, out) in range.clone().step_by(EIGHT).zip(out.chunks_mut(EIGHT * rows)) {
            let group = weight.group(first, 1, range.end);
            for start in (0..rows).step_by(TOGETHER) {
                let of = start..(start + TOGETHER).min(rows);
                if of.len() == 1 {
                    eight_rows::<BYTES, OFFSET, DOT, 1>(dot, x, group, rows, of, out);
                } else {
                    eight_rows::<BYTES, OFFSET, DOT, TOGETHER>(dot, x, group, rows, of, out);
                }
            }
        }
    }

    /// Adds the products of eight rows of the weight with rows `of` of `x`, `MOST` at most, to
    /// `out: [eight, rows]`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn eight_rows<const BYTES: usize, const OFFSET: usize, const DOT: u8, const MOST: usize>(
        dot: Dot<DOT>,
        x: &Rounded,
        weight: [&[u8]; EIGHT],
        rows: usize,
        of: Range<usize>,
        out: &mut [f32],
    ) {
        let factor = x.layout.offset.map_or(0.0, |(_, factor)| factor);
        let row_bytes = weight[0].len();
        let ahead = rows_ahead(row_bytes, EIGHT) * row_bytes;
        let count = row_bytes / BYTES;
        // `map` would be a function of its own, without the wide instructions.
        let mut blocks: [&[[u8; BYTES]]; EIGHT] = [&[]; EIGHT];
        for (blocks, row) in blocks.iter_mut().zip(weight) {
            *blocks = &row.as_chunks().0[..count];
        }
        let zero = _mm256_setzero_ps();
        let (mut sums, mut offsets) = ([zero; MOST], [zero; MOST]);
        let of_blocks = x.values.chunks_exact(rows).zip(x.factors.chunks_exact(rows));
        for (at, (values, factors)) in of_blocks.enumerate().take(count) {
            // The next eight rows lie one after the other: of all of them as much as of these is read.
            if of.start == 0 {
                for line in (0..EIGHT * BYTES).step_by(simd::LINE_BYTES) {
                    simd::fetch_once(weight[0], ahead + at * EIGHT * BYTES + line);
                }
            }
            let front = [&blocks[0][at], &blocks[1][at], &blocks[2][at], &blocks[3][at]];
            let back = [&blocks[4][at], &blocks[5][at], &blocks[6][at], &blocks[7][at]];
            let scales = eight_halves(front, back, 0);
            let added = if OFFSET == 0 { scales } else { eight_halves(front, back, OFFSET) };
            let quants = Quants::<DOT>::new(front, back);
            let of_x = values[of.clone()].iter().zip(&factors[of.clone()]);
            for ((values, factors), (sum, offset)) in
                of_x.zip(sums.iter_mut().zip(&mut offsets).take(MOST))
            {
                let whole = quants.products::<BYTES>(dot, values, factors.whole);
                let scales = _mm256_mul_ps(scales, _mm256_set1_ps(factors.scale));
                *sum = _mm256_fmadd_ps(scales, _mm256_cvtepi32_ps(whole), *sum);
                if BYTES != BYTES_OF_Q8_0 {
                    *offset = _mm256_fmadd_ps(added, _mm256_set1_ps(factor * factors.sum), *offset);
                }
            }
        }
        for (row, (sum, offset)) in of.zip(sums.into_iter().zip(offsets)) {
            let sums: [f32; EIGHT] = pulp::cast(_mm256_add_ps(sum, offset));
            for (out, sum) in out.chunks_exact_mut(rows).zip(sums) {
                out[row] += sum;
            }
        }
    }

    /// Size of a block of bytes; the quants of others are of four bits.
    const BYTES_OF_Q8_0: usize = 34;

    /// The quants of a block of eight rows, four of each row side by side. Those of bytes without
    /// their sign: [`SIGN`] is added to them, but where they are added up by twos.
    struct Quants<const DOT: u8>([__m256i; 8]);

    /// What makes a byte with a sign one without.
    const SIGN: i32 = 128;

    impl<const DOT: u8> Quants<DOT> {
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn new<const BYTES: usize>(front: [&[u8; BYTES]; 4], back: [&[u8; BYTES]; 4]) -> Self {
            let [a, b, c, d] = by_fours(front, back, BYTES - 16);
            if BYTES == BYTES_OF_Q8_0 {
                let [e, f, g, h] = by_fours(front, back, BYTES - 32);
                let mut quants = [e, f, g, h, a, b, c, d];
                if DOT != dot::BY_TWOS {
                    for quants in &mut quants {
                        *quants = _mm256_xor_si256(*quants, _mm256_set1_epi8(SIGN as i8));
                    }
                }
                return Self(quants);
            }
            let mask = _mm256_set1_epi8(15);
            let mut quants = [a, b, c, d, a, b, c, d];
            for quants in &mut quants[4..] {
                *quants = _mm256_srli_epi16::<4>(*quants);
            }
            for quants in &mut quants {
                *quants = _mm256_and_si256(*quants, mask);
            }
            Self(quants)
        }

        /// Products with a block whose sum is `total`.
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn products<const BYTES: usize>(&self, dot: Dot<DOT>, x: &Values, total: i32) -> __m256i {
            if BYTES == BYTES_OF_Q8_0 && DOT == dot::BY_TWOS {
                return self.products_of_words(x);
            }
            let (x_high, x_low) = (x.high.as_chunks::<4>().0, x.low.as_chunks::<4>().0);
            let of = |bytes: &[i8; 4]| _mm256_set1_epi32(pulp::cast(*bytes));
            let excess = if BYTES == BYTES_OF_Q8_0 { SIGN * total } else { 0 };
            let (mut high, mut low) = (_mm256_setzero_si256(), _mm256_set1_epi32(-excess));
            for (at, &quants) in self.0.iter().enumerate() {
                high = add_dots(dot, high, quants, of(&x_high[at]));
                low = add_dots(dot, low, quants, of(&x_low[at]));
            }
            if DOT != dot::BY_TWOS {
                return _mm256_add_epi32(_mm256_slli_epi32::<8>(high), low);
            }
            _mm256_add_epi32(
                _mm256_madd_epi16(high, _mm256_set1_epi16(256)),
                _mm256_madd_epi16(low, _mm256_set1_epi16(1)),
            )
        }

        /// As [`products`](Self::products), for bytes with a sign: widened to 16 bits.
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn products_of_words(&self, x: &Values) -> __m256i {
            let of = |words: [i16; 2]| _mm256_set1_epi32(pulp::cast(words));
            let mut sums = [_mm256_setzero_si256(); 2];
            for (&quants, x) in self.0.iter().zip(x.whole.as_chunks::<4>().0) {
                let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(quants));
                let odd = _mm256_srai_epi16::<8>(quants);
                let products = [
                    _mm256_madd_epi16(even, of([x[0], x[1]])),
                    _mm256_madd_epi16(odd, of([x[2], x[3]])),
                ];
                for (sum, products) in sums.iter_mut().zip(products) {
                    *sum = _mm256_add_epi32(*sum, products);
                }
            }
            _mm256_add_epi32(sums[0], sums[1])
        }
    }

    /// Sixteen bytes from `at` of eight blocks, four of each block side by side: first the first four.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn by_fours<const BYTES: usize>(
        front: [&[u8; BYTES]; 4],
        back: [&[u8; BYTES]; 4],
        at: usize,
    ) -> [__m256i; 4] {
        let load = |row: usize| _mm256_set_m128i(load_16(back[row], at), load_16(front[row], at));
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
    fn all_ways_give_the_same_bits_and_rows_do_not_depend_on_others() {
        const OUTPUTS: usize = 11;
        const INPUTS: usize = 576;
        // Of the largest quants, and of activations that round to the largest, too.
        let rows_of_x = [1, 2, 15, TOGETHER, TOGETHER + 1, 3 * TOGETHER + 5];
        let inputs = |rows: usize| {
            let mut x = numbers(rows * INPUTS, 3);
            x[..INPUTS].fill(if rows.is_multiple_of(2) { 1.0 } else { -1.0 });
            x
        };
        for (format, (fill, rows)) in FORMATS
            .into_iter()
            .flat_map(|f| [0xFF, 0x80, 0x7F].map(|fill| (f, fill)))
            .flat_map(|(f, fill)| rows_of_x.map(|rows| (f, (fill, rows))))
        {
            let mut weight = packed(format, OUTPUTS, INPUTS);
            let layout = layout(format).unwrap();
            for block in weight[..4 * INPUTS / BLOCK * layout.bytes].chunks_exact_mut(layout.bytes)
            {
                block[layout.quants..].fill(fill);
            }
            let x = inputs(rows);
            let rounded = Rounded::new(format, &x, INPUTS).unwrap();
            let mut expected = vec![0.0; OUTPUTS * rows];
            portable::add_products(&rounded, &weight, 0..OUTPUTS, rows, &mut expected);
            let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            for (row, x) in x.chunks_exact(INPUTS).enumerate() {
                let alone = Rounded::new(format, x, INPUTS).unwrap();
                let mut got = [0.0; OUTPUTS];
                alone.add_products(&weight, 0..OUTPUTS, 1, &mut got);
                let beside: Vec<f32> = expected.iter().skip(row).step_by(rows).copied().collect();
                assert_eq!(bits(&got), bits(&beside), "{format} row {row} of {rows}");
            }
            #[cfg(target_arch = "x86_64")]
            for way in [wide::dot::BY_TWOS, wide::dot::VEX, wide::dot::EVEX] {
                if wide::available() && wide::has(way) {
                    let mut got = vec![0.0; OUTPUTS * rows];
                    // SAFETY: the processor has the instructions.
                    #[allow(unsafe_code)]
                    unsafe {
                        wide::add_products_by(way, &rounded, &weight, 0..OUTPUTS, rows, &mut got);
                    }
                    assert_eq!(bits(&got), bits(&expected), "{format} way {way} of {rows} rows");
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
            for (at, x) in x.iter().enumerate() {
                let Values { high, low, whole } = &rounded.values[0];
                let value = 256 * i16::from(high[at]) + i16::from(low[at]);
                assert_eq!(value, whole[at / 4 * 4 + [0, 2, 1, 3][at % 4]]);
                let back = f32::from(value) * rounded.factors[0].scale;
                assert!((back - x).abs() <= peak / 65_200.0, "{x} {back}");
            }
        }
    }
}

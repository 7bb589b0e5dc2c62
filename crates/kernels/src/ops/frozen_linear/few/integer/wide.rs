//! Whole numbers with the wider instructions of x86.

use super::*;
use std::arch::asm;
use std::arch::x86_64::*;

mod sixteen;

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
    /// With whole vectors of AVX-512, sixteen rows of the weight together, where there are several
    /// rows of activations.
    pub(in super::super) const SIXTEEN: u8 = 3;

    /// From the best one on.
    pub(in super::super) const ALL: [u8; 4] = [SIXTEEN, EVEX, VEX, BY_TWOS];
}

/// Whether this processor can do it that way.
pub(super) fn has(dot: u8) -> bool {
    match dot {
        dot::EVEX => is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vl"),
        dot::SIXTEEN => {
            has(dot::EVEX)
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
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
    let best = dot::ALL.into_iter().find(|&dot| has(dot));
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
    let dot = match dot {
        dot::SIXTEEN => {
            assert!(has(dot), "this processor has no such vectors");
            if rows > 1 {
                // SAFETY: the processor has the instructions.
                return unsafe { sixteen::add_products(x, weight, range, rows, out) };
            }
            dot::EVEX
        }
        dot => dot,
    };
    match (x.layout.bytes, dot) {
        (34, dot::EVEX) => {
            multiply::<34, 0, { dot::EVEX }>(Dot::new(), x, weight, range, rows, out)
        }
        (34, dot::VEX) => multiply::<34, 0, { dot::VEX }>(Dot::new(), x, weight, range, rows, out),
        (34, _) => multiply::<34, 0, { dot::BY_TWOS }>(Dot::new(), x, weight, range, rows, out),
        (18, dot::EVEX) => {
            multiply::<18, 0, { dot::EVEX }>(Dot::new(), x, weight, range, rows, out)
        }
        (18, dot::VEX) => multiply::<18, 0, { dot::VEX }>(Dot::new(), x, weight, range, rows, out),
        (18, _) => multiply::<18, 0, { dot::BY_TWOS }>(Dot::new(), x, weight, range, rows, out),
        (_, dot::EVEX) => multiply::<20, 2, { dot::EVEX }>(Dot::new(), x, weight, range, rows, out),
        (_, dot::VEX) => multiply::<20, 2, { dot::VEX }>(Dot::new(), x, weight, range, rows, out),
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
    let front = [_mm256_unpacklo_epi32(rows[0], rows[1]), _mm256_unpackhi_epi32(rows[0], rows[1])];
    let back = [_mm256_unpacklo_epi32(rows[2], rows[3]), _mm256_unpackhi_epi32(rows[2], rows[3])];
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
    let bits = |row: usize| i32::from(u16::from_le_bytes([blocks[row][at], blocks[row][at + 1]]));
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

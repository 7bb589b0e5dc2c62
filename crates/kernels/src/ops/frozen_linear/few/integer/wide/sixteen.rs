//! Sixteen rows of the weight together, with whole vectors of AVX-512.

use super::*;

/// Rows of the weight that are multiplied together.
const SIXTEEN: usize = 2 * EIGHT;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn add_products(
    x: &Rounded,
    weight: &[u8],
    range: Range<usize>,
    rows: usize,
    out: &mut [f32],
) {
    match x.layout.bytes {
        34 => multiply::<34, 0>(x, weight, range, rows, out),
        18 => multiply::<18, 0>(x, weight, range, rows, out),
        _ => multiply::<20, 2>(x, weight, range, rows, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn multiply<const BYTES: usize, const OFFSET: usize>(
    x: &Rounded,
    weight: &[u8],
    range: Range<usize>,
    rows: usize,
    out: &mut [f32],
) {
    let weight = Rows::whole(weight, x.blocks * BYTES);
    for (first, out) in range.clone().step_by(SIXTEEN).zip(out.chunks_mut(SIXTEEN * rows)) {
        let group = weight.group(first, 1, range.end);
        for start in (0..rows).step_by(TOGETHER) {
            let of = start..(start + TOGETHER).min(rows);
            rows_with::<BYTES, OFFSET>(x, group, rows, of, out);
        }
    }
}

/// Adds the products of sixteen rows of the weight with rows `of` of `x` to
/// `out: [sixteen, rows]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn rows_with<const BYTES: usize, const OFFSET: usize>(
    x: &Rounded,
    weight: [&[u8]; SIXTEEN],
    rows: usize,
    of: Range<usize>,
    out: &mut [f32],
) {
    let factor = x.layout.offset.map_or(0.0, |(_, factor)| factor);
    let row_bytes = weight[0].len();
    let ahead = rows_ahead(row_bytes, SIXTEEN) * row_bytes;
    let count = row_bytes / BYTES;
    let mut blocks: [&[[u8; BYTES]]; SIXTEEN] = [&[]; SIXTEEN];
    for (blocks, row) in blocks.iter_mut().zip(weight) {
        *blocks = &row.as_chunks().0[..count];
    }
    let zero = _mm512_setzero_ps();
    let (mut sums, mut offsets) = ([zero; TOGETHER], [zero; TOGETHER]);
    let of_blocks = x.values.chunks_exact(rows).zip(x.factors.chunks_exact(rows));
    for (at, (values, factors)) in of_blocks.enumerate().take(count) {
        if of.start == 0 {
            for line in (0..SIXTEEN * BYTES).step_by(simd::LINE_BYTES) {
                simd::fetch_once(weight[0], ahead + at * SIXTEEN * BYTES + line);
            }
        }
        let four = |first: usize| {
            [
                &blocks[first][at],
                &blocks[first + 1][at],
                &blocks[first + 2][at],
                &blocks[first + 3][at],
            ]
        };
        let (front, back) = ([four(0), four(4)], [four(8), four(12)]);
        let halves = |at: usize| {
            let front = eight_halves(front[0], front[1], at);
            let back = eight_halves(back[0], back[1], at);
            _mm512_insertf32x8::<1>(_mm512_castps256_ps512(front), back)
        };
        let scales = halves(0);
        let added = if OFFSET == 0 { scales } else { halves(OFFSET) };
        let front = Quants::<{ dot::EVEX }>::new(front[0], front[1]).0;
        let back = Quants::<{ dot::EVEX }>::new(back[0], back[1]).0;
        let mut quants = [_mm512_setzero_si512(); 8];
        for (quants, (front, back)) in quants.iter_mut().zip(front.into_iter().zip(back)) {
            *quants = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(front), back);
        }
        let of_x = values[of.clone()].iter().zip(&factors[of.clone()]);
        for ((values, factors), (sum, offset)) in of_x.zip(sums.iter_mut().zip(&mut offsets)) {
            let excess = if BYTES == BYTES_OF_Q8_0 { SIGN * factors.whole } else { 0 };
            let whole = products(&quants, values, -excess);
            let scales = _mm512_mul_ps(scales, _mm512_set1_ps(factors.scale));
            *sum = _mm512_fmadd_ps(scales, _mm512_cvtepi32_ps(whole), *sum);
            if BYTES != BYTES_OF_Q8_0 {
                let of_block = _mm512_set1_ps(factor * factors.sum);
                *offset = _mm512_fmadd_ps(added, of_block, *offset);
            }
        }
    }
    for (row, (sum, offset)) in of.zip(sums.into_iter().zip(offsets)) {
        let sums: [f32; SIXTEEN] = pulp::cast(_mm512_add_ps(sum, offset));
        for (out, sum) in out.chunks_exact_mut(rows).zip(sums) {
            out[row] += sum;
        }
    }
}

/// Products of quants without a sign with a block, and `start`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn products(quants: &[__m512i; 8], x: &Values, start: i32) -> __m512i {
    let (x_high, x_low) = (x.high.as_chunks::<4>().0, x.low.as_chunks::<4>().0);
    let of = |bytes: &[i8; 4]| _mm512_set1_epi32(pulp::cast(*bytes));
    let (mut high, mut low) = (_mm512_setzero_si512(), _mm512_set1_epi32(start));
    for (at, &quants) in quants.iter().enumerate() {
        high = _mm512_dpbusd_epi32(high, quants, of(&x_high[at]));
        low = _mm512_dpbusd_epi32(low, quants, of(&x_low[at]));
    }
    _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low)
}

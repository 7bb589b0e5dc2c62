//! Products of plain numbers with a few rows of activations. A long row of the weight is multiplied by
//! itself: one stream of memory is read faster than four side by side. Of short ones four are taken at a
//! time, so that a load of `x` serves four, and their sums are folded together.

use super::{Rows, TOGETHER, by_fours};
use crate::simd::{self, vectorize};
use std::ops::Range;

/// Fewest numbers of a long row.
const LONG: usize = 256;

/// Partial sums of a row.
const LANES: usize = 8;
/// Numbers of a step: two sets of sums, so that an addition need not wait for the one before.
const STEP: usize = 2 * LANES;

/// Adds the products of rows `range` of `weight` with `x`, as long as they, to `out: [range, rows]`.
pub(crate) fn add_products(
    weight: Rows<'_, f32>,
    x: &[f32],
    range: Range<usize>,
    rows: usize,
    out: &mut [f32],
) {
    if weight.len >= LONG {
        return row_by_row(weight, x, range, rows, out);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        let products = wide::Products { simd, weight, x, range, rows, out };
        return pulp::Simd::vectorize(simd, products);
    }
    by_fours(weight, range, rows, out, |weight, row| {
        portable::four_rows(weight, row_of(x, row, weight))
    });
}

/// Adds the products of long rows.
fn row_by_row(weight: Rows<'_, f32>, x: &[f32], range: Range<usize>, rows: usize, out: &mut [f32]) {
    let ahead = weight.bytes_ahead(1);
    vectorize(
        #[inline(always)]
        || {
            for (row, out) in range.zip(out.chunks_exact_mut(rows)) {
                let row = &weight.data[row * weight.stride..][..weight.len];
                let mut products = out.iter_mut().zip(x.chunks_exact(weight.len));
                // Once is enough.
                if let Some((out, x)) = products.next() {
                    *out += simd::dot_fetching(row, x, ahead);
                }
                // A closure for each would be a function of its own, without the wide instructions.
                for (out, x) in products {
                    *out += simd::dot(row, x);
                }
            }
        },
    );
}

/// Row `row` of `x`, whose rows are as long as the weight's.
#[inline(always)]
fn row_of<'a>(x: &'a [f32], row: usize, weight: [&[f32]; TOGETHER]) -> &'a [f32] {
    let inputs = weight[0].len();
    &x[row * inputs..(row + 1) * inputs]
}

/// What is left of a row after its whole steps.
#[inline(always)]
fn rest(row: &[f32], x: &[f32]) -> f32 {
    let whole = row.len() / STEP * STEP;
    let pairs = row[whole..].iter().zip(&x[whole..]);
    pairs.fold(0.0, |sum: f32, (w, x)| w.mul_add(*x, sum))
}

mod portable {
    use super::*;

    /// As [`wide::four_rows`], its sums in the same order.
    pub(super) fn four_rows(weight: [&[f32]; TOGETHER], x: &[f32]) -> [f32; TOGETHER] {
        weight.map(|row| {
            let mut sums = [[0.0_f32; LANES]; 2];
            for (row, x) in row.as_chunks::<STEP>().0.iter().zip(x.as_chunks::<STEP>().0) {
                for (at, (w, x)) in row.iter().zip(x).enumerate() {
                    let sum = &mut sums[at / LANES][at % LANES];
                    *sum = w.mul_add(*x, *sum);
                }
            }
            let [mut sums, second] = sums;
            sums.iter_mut().zip(second).for_each(|(sum, second)| *sum += second);
            let half = |s: &[f32]| (s[0] + s[1]) + (s[2] + s[3]);
            half(&sums[..4]) + half(&sums[4..]) + rest(row, x)
        })
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod wide {
    use super::*;
    use pulp::x86::V3;
    use std::arch::x86_64::{__m256, _mm256_loadu_ps};

    pub(super) struct Products<'a> {
        pub(super) simd: V3,
        pub(super) weight: Rows<'a, f32>,
        pub(super) x: &'a [f32],
        pub(super) range: Range<usize>,
        pub(super) rows: usize,
        pub(super) out: &'a mut [f32],
    }

    impl pulp::NullaryFnOnce for Products<'_> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            let Self { simd, weight, x, range, rows, out } = self;
            let ahead = weight.bytes_ahead(TOGETHER);
            by_fours(
                weight,
                range,
                rows,
                out,
                #[inline(always)]
                |weight, row| four_rows(simd, weight, row_of(x, row, weight), ahead),
            );
        }
    }

    #[inline(always)]
    fn four_rows(simd: V3, weight: [&[f32]; TOGETHER], x: &[f32], ahead: usize) -> [f32; TOGETHER] {
        // `map` would be a function of its own, without the wide instructions.
        let [first, second, third, fourth] = weight;
        let steps = first.as_chunks::<STEP>().0.iter().zip(second.as_chunks::<STEP>().0);
        let steps = steps.zip(third.as_chunks::<STEP>().0).zip(fourth.as_chunks::<STEP>().0);
        let steps = steps.zip(x.as_chunks::<STEP>().0);
        let mut sums = [[simd.avx._mm256_setzero_ps(); 2]; TOGETHER];
        for ((((first, second), third), fourth), x) in steps {
            let x = [load(simd, x, 0), load(simd, x, LANES)];
            let rows = [first, second, third, fourth];
            for row in 0..TOGETHER {
                crate::simd::fetch(rows[row], ahead);
                for part in 0..2 {
                    let weight = load(simd, rows[row], part * LANES);
                    sums[row][part] = simd.fma._mm256_fmadd_ps(weight, x[part], sums[row][part]);
                }
            }
        }
        let sums = [
            simd.avx._mm256_add_ps(sums[0][0], sums[0][1]),
            simd.avx._mm256_add_ps(sums[1][0], sums[1][1]),
            simd.avx._mm256_add_ps(sums[2][0], sums[2][1]),
            simd.avx._mm256_add_ps(sums[3][0], sums[3][1]),
        ];
        let mut sums = folded(simd, sums);
        if !weight[0].len().is_multiple_of(STEP) {
            for (sum, row) in sums.iter_mut().zip(weight) {
                *sum += rest(row, x);
            }
        }
        sums
    }

    /// The sum of each.
    #[inline(always)]
    fn folded(simd: V3, sums: [__m256; TOGETHER]) -> [f32; TOGETHER] {
        let front = simd.avx._mm256_hadd_ps(sums[0], sums[1]);
        let back = simd.avx._mm256_hadd_ps(sums[2], sums[3]);
        let halves = simd.avx._mm256_hadd_ps(front, back);
        let low = simd.avx._mm256_castps256_ps128(halves);
        let high = simd.avx._mm256_extractf128_ps::<1>(halves);
        pulp::cast(simd.sse._mm_add_ps(low, high))
    }

    #[inline(always)]
    fn load(_: V3, step: &[f32; STEP], at: usize) -> __m256 {
        let values: &[f32; LANES] = step[at..].first_chunk().unwrap_or(&[0.0; LANES]);
        // SAFETY: 32 bytes, at any address; `V3` is the proof that there is AVX.
        unsafe { _mm256_loadu_ps(values.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i + seed) * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    #[test]
    fn long_rows_give_the_right_sums() {
        for (outputs, inputs, rows) in [(7, 256, 1), (3, 577, 2), (5, 1536, 3)] {
            let (weight, x) = (numbers(outputs * inputs, 5), numbers(rows * inputs, 77));
            let mut got = vec![0.5; (outputs - 1) * rows];
            add_products(Rows::whole(&weight, inputs), &x, 1..outputs, rows, &mut got);
            check(&got, &weight[inputs..], &x, inputs, rows);
        }
    }

    /// That `got - 0.5` are the products.
    fn check(got: &[f32], weight: &[f32], x: &[f32], inputs: usize, rows: usize) {
        for (at, &got) in got.iter().enumerate() {
            let terms = weight[at / rows * inputs..][..inputs].iter();
            let terms = terms.zip(&x[at % rows * inputs..]).map(|(w, x)| f64::from(w * x));
            assert!((f64::from(got) - 0.5 - terms.sum::<f64>()).abs() < 1e-4, "{at}: {got}");
        }
    }

    #[test]
    fn both_ways_give_the_same_bits_and_the_right_sums() {
        for (outputs, inputs, rows) in [(7, 100, 1), (4, 16, 3), (1, 5, 2), (9, 240, 1)] {
            let (weight, x) = (numbers(outputs * inputs, 5), numbers(rows * inputs, 77));
            let (mut got, mut expected) = (vec![0.5; outputs * rows], vec![0.5; outputs * rows]);
            let weights = Rows::whole(&weight, inputs);
            add_products(weights, &x, 0..outputs, rows, &mut got);
            by_fours(weights, 0..outputs, rows, &mut expected, |weight, row| {
                portable::four_rows(weight, row_of(&x, row, weight))
            });
            assert_eq!(got, expected);
            check(&got, &weight, &x, inputs, rows);
        }
    }
}

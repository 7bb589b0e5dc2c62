//! Products of plain numbers with a few rows of activations. A long row of the weight is multiplied by
//! itself: one stream of memory is read faster than four side by side. Of short ones four are taken at a
//! time with up to three rows of activations, so that what is loaded serves several products, and their
//! sums are folded together.

use super::Rows;
use crate::simd::{self, vectorize};
use std::ops::Range;

/// Fewest numbers of a long row.
const LONG: usize = 256;

/// Short rows of a weight that are multiplied together.
const TOGETHER: usize = 4;
/// Partial sums of a short row.
const LANES: usize = 8;
/// Numbers of a step through short rows, a cache line.
const STEP: usize = 2 * LANES;
/// Most rows of activations that short rows are multiplied by at a time.
const SIDE_BY_SIDE: usize = 3;

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
    short_rows(weight, x, range, Sums { out, strides: [rows, 1] });
}

/// As [`add_products`] to `out: [rows, range]`.
pub(crate) fn add_products_by_row(
    weight: Rows<'_, f32>,
    x: &[f32],
    range: Range<usize>,
    out: &mut [f32],
) {
    let count = range.len();
    if weight.len < LONG {
        return short_rows(weight, x, range, Sums { out, strides: [1, count] });
    }
    for (x, out) in x.chunks_exact(weight.len).zip(out.chunks_exact_mut(count.max(1))) {
        row_by_row(weight, x, range.clone(), 1, out);
    }
}

/// Where products are added.
struct Sums<'a> {
    out: &'a mut [f32],
    /// From a row of the weight to the next, from a row of activations to the next.
    strides: [usize; 2],
}

impl Sums<'_> {
    /// Adds the sums of up to four rows of the weight from `weight_row` on.
    #[inline(always)]
    fn add(&mut self, weight_row: usize, x_row: usize, sums: &[f32]) {
        let [by_weight, by_x] = self.strides;
        let out = &mut self.out[weight_row * by_weight + x_row * by_x..];
        match (by_weight, out.first_chunk_mut(), sums.first_chunk()) {
            (1, Some(out), Some(sums)) => {
                let (out, sums): (&mut [f32; TOGETHER], &[f32; TOGETHER]) = (out, sums);
                for at in 0..TOGETHER {
                    out[at] += sums[at];
                }
            }
            _ => out.iter_mut().step_by(by_weight).zip(sums).for_each(|(out, sum)| *out += sum),
        }
    }
}

fn short_rows(weight: Rows<'_, f32>, x: &[f32], range: Range<usize>, sums: Sums<'_>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return pulp::Simd::vectorize(simd, wide::Products { simd, weight, x, range, sums });
    }
    by_fours(weight, x, range, sums, &Portable);
}

/// Products of four rows of a weight with some rows of activations.
trait FourRows {
    /// The sums, which do not depend on how many rows of activations there are.
    fn products<const N: usize>(
        &self,
        weight: [&[f32]; TOGETHER],
        x: [&[f32]; N],
        ahead: usize,
    ) -> [[f32; TOGETHER]; N];
}

/// All products of four rows at a time with up to three.
#[inline(always)]
fn by_fours(
    weight: Rows<'_, f32>,
    x: &[f32],
    range: Range<usize>,
    mut sums: Sums<'_>,
    four_rows: &impl FourRows,
) {
    let ahead = weight.bytes_ahead(TOGETHER);
    let rows = x.len() / weight.len.max(1);
    let x_row = |row: usize| &x[row * weight.len..(row + 1) * weight.len];
    for first in range.clone().step_by(TOGETHER) {
        let group = weight.group(first, range.end);
        let (at, inside) = (first - range.start, TOGETHER.min(range.end - first));
        let mut row = 0;
        while row + SIDE_BY_SIDE <= rows {
            let x = [x_row(row), x_row(row + 1), x_row(row + 2)];
            let three = four_rows.products(group, x, ahead);
            for (side, totals) in three.iter().enumerate() {
                sums.add(at, row + side, &totals[..inside]);
            }
            row += SIDE_BY_SIDE;
        }
        while row < rows {
            let [totals] = four_rows.products(group, [x_row(row)], ahead);
            sums.add(at, row, &totals[..inside]);
            row += 1;
        }
    }
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

/// What is left of a row after its whole steps.
#[inline(always)]
fn rest(row: &[f32], x: &[f32]) -> f32 {
    let whole = row.len() / STEP * STEP;
    let pairs = row[whole..].iter().zip(&x[whole..]);
    pairs.fold(0.0, |sum: f32, (w, x)| w.mul_add(*x, sum))
}

struct Portable;

impl FourRows for Portable {
    /// As [`wide`], the sums in the same order.
    fn products<const N: usize>(
        &self,
        weight: [&[f32]; TOGETHER],
        x: [&[f32]; N],
        _: usize,
    ) -> [[f32; TOGETHER]; N] {
        x.map(|x| {
            weight.map(|row| {
                let mut sums = [0.0_f32; LANES];
                for (row, x) in row.as_chunks::<STEP>().0.iter().zip(x.as_chunks::<STEP>().0) {
                    for (at, (w, x)) in row.iter().zip(x).enumerate() {
                        let sum = &mut sums[at % LANES];
                        *sum = w.mul_add(*x, *sum);
                    }
                }
                let half = |s: &[f32]| (s[0] + s[1]) + (s[2] + s[3]);
                half(&sums[..4]) + half(&sums[4..]) + rest(row, x)
            })
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
        pub(super) sums: Sums<'a>,
    }

    impl pulp::NullaryFnOnce for Products<'_> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            let Self { simd, weight, x, range, sums } = self;
            by_fours(weight, x, range, sums, &Wide(simd));
        }
    }

    struct Wide(V3);

    impl FourRows for Wide {
        // Loops rather than `map`, whose closure would be a function without the wide instructions.
        #[inline(always)]
        fn products<const N: usize>(
            &self,
            weight: [&[f32]; TOGETHER],
            x: [&[f32]; N],
            ahead: usize,
        ) -> [[f32; TOGETHER]; N] {
            let simd = self.0;
            let mut sums = [[simd.avx._mm256_setzero_ps(); TOGETHER]; N];
            let steps = weight[0].len() / STEP;
            for step in 0..steps {
                let line = step * STEP..(step + 1) * STEP;
                for part in 0..2 {
                    let from = line.start + part * LANES;
                    let mut side = [simd.avx._mm256_setzero_ps(); N];
                    for at in 0..N {
                        side[at] = load(simd, x[at], from);
                    }
                    for row in 0..TOGETHER {
                        if part == 0 {
                            crate::simd::fetch(&weight[row][line.clone()], ahead);
                        }
                        let numbers = load(simd, weight[row], from);
                        for at in 0..N {
                            let sum = sums[at][row];
                            sums[at][row] = simd.fma._mm256_fmadd_ps(numbers, side[at], sum);
                        }
                    }
                }
            }
            let mut totals = [[0.0; TOGETHER]; N];
            for at in 0..N {
                totals[at] = folded(simd, sums[at]);
                if !weight[0].len().is_multiple_of(STEP) {
                    for row in 0..TOGETHER {
                        totals[at][row] += rest(weight[row], x[at]);
                    }
                }
            }
            totals
        }
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
    fn load(_: V3, numbers: &[f32], from: usize) -> __m256 {
        let numbers = &numbers[from..from + LANES];
        // SAFETY: 32 bytes, at any address; `V3` is the proof that there is AVX.
        unsafe { _mm256_loadu_ps(numbers.as_ptr()) }
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
        for (outputs, inputs, rows) in [(7, 100, 1), (4, 16, 3), (1, 5, 2), (9, 240, 7)] {
            let (weight, x) = (numbers(outputs * inputs, 5), numbers(rows * inputs, 77));
            let [mut got, mut expected, mut by_row] = [(); 3].map(|()| vec![0.5; outputs * rows]);
            let weights = Rows::whole(&weight, inputs);
            add_products(weights, &x, 0..outputs, rows, &mut got);
            let sums = Sums { out: &mut expected, strides: [rows, 1] };
            by_fours(weights, &x, 0..outputs, sums, &Portable);
            assert_eq!(got, expected);
            check(&got, &weight, &x, inputs, rows);
            add_products_by_row(weights, &x, 0..outputs, &mut by_row);
            for (at, &sum) in got.iter().enumerate() {
                assert_eq!(by_row[at % rows * outputs + at / rows], sum);
            }
        }
    }
}

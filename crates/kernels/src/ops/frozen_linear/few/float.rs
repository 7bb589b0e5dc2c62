//! Products of plain numbers with a few rows of activations. Rows of the weight are taken four at a
//! time with up to three rows of activations, so that what is loaded serves several products, and their
//! sums are folded together: neighbours of short rows, and of long ones rows far apart, because
//! four streams of memory are read faster than one. With AVX-512 a long row is multiplied by itself,
//! its memory called for ahead.

use super::Rows;
use crate::simd::{self, vectorize};
use std::ops::Range;

/// Fewest numbers of a long row.
const LONG: usize = 256;

/// Rows of a weight that are multiplied together.
const TOGETHER: usize = 4;
/// Partial sums of a row.
const LANES: usize = 8;
/// Numbers of a step through rows, a cache line.
const STEP: usize = 2 * LANES;
/// Most rows of activations that rows of a weight are multiplied by at a time.
const SIDE_BY_SIDE: usize = 3;

/// Adds the products of rows `range` of `weight` with `x`, as long as they, to `out: [range, rows]`.
/// There may be fewer rows of `x` than `rows`: the others of `out` are left alone.
pub(crate) fn add_products(
    weight: Rows<'_, f32>,
    x: &[f32],
    range: Range<usize>,
    rows: usize,
    out: &mut [f32],
) {
    add_to(weight, x, range, Sums { out, strides: [rows, 1] });
}

/// As [`add_products`] to `out: [rows, range]`.
pub(crate) fn add_products_by_row(
    weight: Rows<'_, f32>,
    x: &[f32],
    range: Range<usize>,
    out: &mut [f32],
) {
    let strides = [1, range.len()];
    add_to(weight, x, range, Sums { out, strides });
}

/// Where products are added.
struct Sums<'a> {
    out: &'a mut [f32],
    /// From a row of the weight to the next, from a row of activations to the next.
    strides: [usize; 2],
}

impl Sums<'_> {
    /// Adds the sums of up to four rows of the weight, `apart` rows from each other, from `weight_row`
    /// on.
    #[inline(always)]
    fn add(&mut self, weight_row: usize, apart: usize, x_row: usize, sums: &[f32]) {
        let [by_weight, by_x] = self.strides;
        let out = &mut self.out[weight_row * by_weight + x_row * by_x..];
        match (apart * by_weight, out.first_chunk_mut(), sums.first_chunk()) {
            (1, Some(out), Some(sums)) => {
                let (out, sums): (&mut [f32; TOGETHER], &[f32; TOGETHER]) = (out, sums);
                for at in 0..TOGETHER {
                    out[at] += sums[at];
                }
            }
            (step, ..) => out.iter_mut().step_by(step).zip(sums).for_each(|(out, sum)| *out += sum),
        }
    }
}

fn add_to(weight: Rows<'_, f32>, x: &[f32], range: Range<usize>, sums: Sums<'_>) {
    let long = weight.len >= LONG;
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = pulp::x86::V3::try_new()
        && !(long && calls_ahead())
    {
        return pulp::Simd::vectorize(simd, wide::Products { simd, weight, x, range, sums });
    }
    if long {
        return row_by_row(weight, x, range, sums);
    }
    by_fours(weight, x, range, sums, &Portable);
}

/// Whether long rows are read one by one, called for ahead of time. On Zen 5 that was faster than four
/// neighbours at a time; rows far apart have not been measured there. On Zen 3 they are read a quarter
/// faster than single ones.
#[cfg(target_arch = "x86_64")]
fn calls_ahead() -> bool {
    is_x86_feature_detected!("avx512f")
}

/// Products of four rows of a weight with some rows of activations.
trait FourRows {
    /// The sums, which do not depend on how many rows of activations there are. Memory is called for
    /// `ahead` bytes ahead, if at all.
    fn products<const N: usize>(
        &self,
        weight: [&[f32]; TOGETHER],
        x: [&[f32]; N],
        ahead: Option<usize>,
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
    let groups = range.len().div_ceil(TOGETHER);
    let (next, apart, ahead) = match weight.len >= LONG {
        true => (1, groups, None),
        false => (TOGETHER, 1, Some(weight.bytes_ahead(TOGETHER))),
    };
    let rows = x.len() / weight.len.max(1);
    let x_row = |row: usize| &x[row * weight.len..(row + 1) * weight.len];
    for at in (0..groups).map(|group| group * next) {
        let group = weight.group(range.start + at, apart, range.end);
        let inside = TOGETHER.min((range.len() - at).div_ceil(apart));
        let mut row = 0;
        while row + SIDE_BY_SIDE <= rows {
            let x = [x_row(row), x_row(row + 1), x_row(row + 2)];
            let three = four_rows.products(group, x, ahead);
            for (side, totals) in three.iter().enumerate() {
                sums.add(at, apart, row + side, &totals[..inside]);
            }
            row += SIDE_BY_SIDE;
        }
        while row < rows {
            let [totals] = four_rows.products(group, [x_row(row)], ahead);
            sums.add(at, apart, row, &totals[..inside]);
            row += 1;
        }
    }
}

/// Adds the products of long rows, each by itself.
fn row_by_row(weight: Rows<'_, f32>, x: &[f32], range: Range<usize>, sums: Sums<'_>) {
    let ahead = weight.bytes_ahead(1);
    let Sums { out, strides: [by_weight, by_x] } = sums;
    vectorize(
        #[inline(always)]
        || {
            for (at, row) in range.enumerate() {
                let row = &weight.data[row * weight.stride..][..weight.len];
                let out = out[at * by_weight..].iter_mut().step_by(by_x);
                let mut products = out.zip(x.chunks_exact(weight.len));
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
        _: Option<usize>,
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
            ahead: Option<usize>,
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
                        if let (0, Some(ahead)) = (part, ahead) {
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
    fn rows_by_themselves_give_the_right_sums() {
        for (outputs, inputs, rows) in [(7, 256, 1), (3, 577, 2), (5, 1536, 3)] {
            let (weight, x) = (numbers(outputs * inputs, 5), numbers(rows * inputs, 77));
            let weights = Rows::whole(&weight, inputs);
            let [mut got, mut by_row] = [(); 2].map(|()| vec![0.5; (outputs - 1) * rows]);
            row_by_row(weights, &x, 1..outputs, Sums { out: &mut got, strides: [rows, 1] });
            check(&got, &weight[inputs..], &x, inputs, rows);
            let strides = [1, outputs - 1];
            row_by_row(weights, &x, 1..outputs, Sums { out: &mut by_row, strides });
            assert_eq!(turned(&by_row, outputs - 1), got);
        }
    }

    /// `[outputs, rows]` of `[rows, outputs]`.
    fn turned(by_row: &[f32], outputs: usize) -> Vec<f32> {
        (0..outputs).flat_map(|at| by_row[at..].iter().step_by(outputs).copied()).collect()
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
        let short = [(7, 100, 1), (4, 16, 3), (1, 5, 2), (9, 240, 7)];
        let long = [(2, 256, 1), (9, 576, 1), (14, 577, 5), (17, 1536, 3)];
        for (outputs, inputs, rows) in short.into_iter().chain(long) {
            let (weight, x) = (numbers(outputs * inputs, 5), numbers(rows * inputs, 77));
            let weights = Rows::whole(&weight, inputs);
            let by = |add: &dyn Fn(Range<usize>, Sums<'_>), strides| {
                let mut out = vec![0.5; (outputs - 1) * rows];
                add(1..outputs, Sums { out: &mut out, strides });
                out
            };
            let portable = |range, sums: Sums<'_>| by_fours(weights, &x, range, sums, &Portable);
            let expected = by(&portable, [rows, 1]);
            check(&expected, &weight[inputs..], &x, inputs, rows);
            assert_eq!(turned(&by(&portable, [1, outputs - 1]), outputs - 1), expected);
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                let wide = |range, sums: Sums<'_>| {
                    let products = wide::Products { simd, weight: weights, x: &x, range, sums };
                    pulp::Simd::vectorize(simd, products);
                };
                assert_eq!(by(&wide, [rows, 1]), expected);
            }
        }
    }

    #[test]
    fn both_orders_of_the_result_hold_the_right_sums() {
        let short = [(7, 100, 1), (4, 16, 3), (1, 5, 2), (9, 240, 7)];
        let long = [(7, 256, 1), (3, 577, 2), (5, 1536, 3)];
        for (outputs, inputs, rows) in short.into_iter().chain(long) {
            let (weight, x) = (numbers(outputs * inputs, 5), numbers(rows * inputs, 77));
            let weights = Rows::whole(&weight, inputs);
            for first in 0..outputs.min(2) {
                let count = outputs - first;
                let [mut got, mut by_row] = [(); 2].map(|()| vec![0.5; count * rows]);
                add_products(weights, &x, first..outputs, rows, &mut got);
                check(&got, &weight[first * inputs..], &x, inputs, rows);
                add_products_by_row(weights, &x, first..outputs, &mut by_row);
                assert_eq!(turned(&by_row, count), got);
                if inputs < LONG {
                    let mut portable = vec![0.5; count * rows];
                    let sums = Sums { out: &mut portable, strides: [rows, 1] };
                    by_fours(weights, &x, first..outputs, sums, &Portable);
                    assert_eq!(portable, got);
                }
            }
        }
    }
}

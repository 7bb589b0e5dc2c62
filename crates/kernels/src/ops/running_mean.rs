//! The mean of a sequence's rows so far, itself included:
//!
//! ```text
//! m_t = (S + Σ_{s ≤ t} x_s) / (c + t + 1)          S, c: sum and number of the rows before the first one here
//! ```
//!
//! Sums are kept in double precision and formed row by row, so that a sequence that comes in parts has the
//! means of one that comes whole, to the last bit.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::tensor::Tensor;
use std::ops::Range;

/// Neighbouring rows of a sequence.
#[derive(Clone, Debug)]
pub struct Run {
    /// Which rows of the input.
    pub rows: Range<usize>,
    /// The sum of the rows before them, a constant, and how many these are; nothing at a sequence's start.
    pub before: Option<(Vec<f64>, usize)>,
}

/// The means `[T, N]` of the rows of `x: [T, N]` so far, by the `runs` that tile them, and the sums that
/// they are of, row by row.
///
/// # Panics
/// If the runs do not tile the rows, or a sum before them has another width.
pub fn running_mean(x: &Var, runs: &[Run]) -> (Var, Vec<f64>) {
    let (rows, width, dtype) = (x.value().rows(), x.value().cols(), x.value().dtype());
    let mut next = 0;
    for run in runs {
        assert_eq!(run.rows.start, next, "runs tile the rows");
        next = run.rows.end;
    }
    assert_eq!(next, rows, "runs tile the rows");
    let mut sums = x.value().to_f64();
    // How many rows each row's mean is of.
    let mut counts = vec![0.0; rows];
    for run in runs {
        let (mut sum, before) = run.before.clone().unwrap_or_else(|| (vec![0.0; width], 0));
        assert_eq!(sum.len(), width, "the sum before is of rows like these");
        for (at, row) in run.rows.clone().enumerate() {
            for (value, sum) in sums[row * width..(row + 1) * width].iter_mut().zip(&mut sum) {
                *sum += *value;
                *value = *sum;
            }
            counts[row] = (before + at + 1) as f64;
        }
    }
    let mut means = Tensor::zeros(dtype, [rows, width]);
    dispatch!(dtype, |E| {
        let data = means.data_mut::<E>();
        for (at, (mean, sum)) in data.iter_mut().zip(&sums).enumerate() {
            *mean = E::from_f64(sum / counts[at / width]);
        }
    });
    let spans: Vec<Range<usize>> = runs.iter().map(|run| run.rows.clone()).collect();
    let means = Var::computed(means, &[x], move |gradient, parents| {
        // Every row has a part in its own mean and in all that follow.
        let mut slopes = gradient.to_f64();
        for span in &spans {
            let mut later = vec![0.0; width];
            for row in span.clone().rev() {
                let slopes = &mut slopes[row * width..(row + 1) * width];
                for (slope, later) in slopes.iter_mut().zip(&mut later) {
                    *later += *slope / counts[row];
                    *slope = *later;
                }
            }
        }
        parents.add(0, Tensor::from_f64(dtype, &slopes, [rows, width]));
    });
    (means, sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check;

    fn run(rows: Range<usize>) -> Run {
        Run { rows, before: None }
    }

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[6, 3]], |v| running_mean(&v[0], &[run(0..2), run(2..6)]).0);
        check::gradients(&[&[3, 2]], |v| {
            let behind = Run { rows: 1..3, before: Some((vec![0.5, -2.0], 4)) };
            running_mean(&v[0], &[run(0..1), behind]).0
        });
    }

    #[test]
    fn parts_have_the_means_of_the_whole_to_the_bit() {
        let numbers: Vec<f64> = (0..14).map(|i| (f64::from(i) * 1.7).sin() * 3.0).collect();
        let rows = |range: Range<usize>| {
            let (part, count) = (&numbers[range.start * 2..range.end * 2], range.len());
            Var::constant(Tensor::from_f64(DType::F32, part, [count, 2]))
        };
        let (whole, sums) = running_mean(&rows(0..7), &[run(0..7)]);
        let all = whole.value().to_f64();
        for cut in 1..7 {
            let (first, own) = running_mean(&rows(0..cut), &[run(0..cut)]);
            let last = own[(cut - 1) * 2..].to_vec();
            assert_eq!(last, sums[(cut - 1) * 2..cut * 2]);
            let behind = Run { rows: 0..7 - cut, before: Some((last, cut)) };
            let (second, _) = running_mean(&rows(cut..7), &[behind]);
            let parts = [first.value().to_f64(), second.value().to_f64()].concat();
            assert_eq!(parts, all, "cut at {cut}");
        }
        // The last is the mean of all.
        let mean =
            |k: usize| (0..7).map(|row| f64::from(numbers[row * 2 + k] as f32)).sum::<f64>() / 7.0;
        assert!((all[12] - mean(0)).abs() < 1e-7 && (all[13] - mean(1)).abs() < 1e-7);
    }
}

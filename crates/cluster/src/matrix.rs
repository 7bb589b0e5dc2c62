//! Dense rows of single-precision numbers and the few products the clustering is made of.
//!
//! Sums are taken in eight lanes in a fixed order, so they are fast without special instructions
//! and the same everywhere.

use rayon::prelude::*;

/// Rows a thread works on at a time. Fixed, so that sums over rows do not depend on the threads.
pub(crate) const CHUNK: usize = 2048;

/// Rows one after the other: `[rows, width]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Matrix {
    /// All numbers, row by row.
    pub data: Vec<f32>,
    /// Numbers of a row.
    pub width: usize,
}

impl Matrix {
    /// Makes `rows` rows of zeros.
    pub fn zeros(rows: usize, width: usize) -> Self {
        Self { data: vec![0.0; rows * width], width }
    }

    /// Counts the rows; none where they have no width.
    pub fn rows(&self) -> usize {
        self.data.len().checked_div(self.width).unwrap_or(0)
    }

    /// Returns a row.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.width..(index + 1) * self.width]
    }

    /// Returns a row to be written.
    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.data[index * self.width..(index + 1) * self.width]
    }

    /// Copies some rows, in the order given.
    pub fn select(&self, rows: &[usize]) -> Self {
        let data = rows.iter().flat_map(|&row| self.row(row).iter().copied()).collect();
        Self { data, width: self.width }
    }

    /// Takes the mean over all rows, in double precision.
    pub fn mean(&self) -> Vec<f32> {
        let sums: Vec<Vec<f64>> = self
            .data
            .par_chunks((CHUNK * self.width).max(1))
            .map(|chunk| {
                let mut sum = vec![0.0; self.width];
                for row in chunk.chunks_exact(self.width) {
                    add_to(&mut sum, row);
                }
                sum
            })
            .collect();
        let mut mean = vec![0.0_f64; self.width];
        for sum in sums {
            for (mean, sum) in mean.iter_mut().zip(sum) {
                *mean += sum;
            }
        }
        let rows = self.rows().max(1) as f64;
        mean.into_iter().map(|sum| (sum / rows) as f32).collect()
    }
}

/// Adds single-precision numbers to double-precision sums.
pub(crate) fn add_to(sum: &mut [f64], row: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += f64::from(*value);
    }
}

/// Computes the inner product.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (a_whole, a_rest) = a.as_chunks::<8>();
    let (b_whole, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for lane in 0..8 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Computes the squared Euclidean distance.
pub fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (a_whole, a_rest) = a.as_chunks::<8>();
    let (b_whole, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for lane in 0..8 {
            let difference = a[lane] - b[lane];
            lanes[lane] += difference * difference;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| (a - b) * (a - b)).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Scales a row to length 1; gives `false` and leaves it for a row of (nearly) no length.
pub fn normalize(row: &mut [f32]) -> bool {
    let length = dot(row, row).sqrt();
    // Not a plain comparison with zero: a row that is not finite has no direction either.
    if !(length.is_finite() && length > 1e-9) {
        return false;
    }
    row.iter_mut().for_each(|value| *value /= length);
    true
}

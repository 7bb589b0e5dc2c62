//! Fewer dimensions: the truncated singular value decomposition of the rows `X: [n, w]`.
//!
//! Subspace iteration from a random start finds the span of the leading right singular vectors
//! (`Ω ← orth(XᵀX Ω)`), and the eigenvectors of `(XΩ)ᵀ(XΩ)` turn it into the vectors themselves
//! (Halko, Martinsson, Tropp 2011). On TF-IDF rows this is latent semantic analysis; on centred
//! dense rows it is principal component analysis.

use crate::matrix::{CHUNK, Matrix, dot};
use crate::random::Random;
use crate::terms::SparseRows;
use rayon::prelude::*;

/// Random directions beyond those asked for.
const SURPLUS: usize = 8;
const ITERATIONS: usize = 4;
/// Pieces the rows are cut into, each with a `[w, d]` sum of its own.
const PIECES: usize = 8;

/// Rows that can be multiplied with a basis.
pub trait Rows: Sync {
    /// Counts the rows.
    fn rows(&self) -> usize;
    /// Counts the columns.
    fn width(&self) -> usize;
    /// Computes `out = row · basis` with `basis: [width, d]`.
    fn product(&self, row: usize, basis: &Matrix, out: &mut [f32]);
    /// Adds `sum += rowᵀ · y` with `sum: [width, d]`.
    fn add_outer(&self, row: usize, y: &[f32], sum: &mut Matrix);
}

fn add_scaled(out: &mut [f32], factor: f32, from: &[f32]) {
    for (out, from) in out.iter_mut().zip(from) {
        *out += factor * from;
    }
}

impl Rows for SparseRows {
    fn rows(&self) -> usize {
        SparseRows::rows(self)
    }

    fn width(&self) -> usize {
        self.width
    }

    fn product(&self, row: usize, basis: &Matrix, out: &mut [f32]) {
        out.fill(0.0);
        for &(term, weight) in self.row(row) {
            add_scaled(out, weight, basis.row(term as usize));
        }
    }

    fn add_outer(&self, row: usize, y: &[f32], sum: &mut Matrix) {
        for &(term, weight) in self.row(row) {
            add_scaled(sum.row_mut(term as usize), weight, y);
        }
    }
}

impl Rows for Matrix {
    fn rows(&self) -> usize {
        Matrix::rows(self)
    }

    fn width(&self) -> usize {
        self.width
    }

    fn product(&self, row: usize, basis: &Matrix, out: &mut [f32]) {
        out.fill(0.0);
        for (column, &value) in self.row(row).iter().enumerate() {
            add_scaled(out, value, basis.row(column));
        }
    }

    fn add_outer(&self, row: usize, y: &[f32], sum: &mut Matrix) {
        for (column, &value) in self.row(row).iter().enumerate() {
            add_scaled(sum.row_mut(column), value, y);
        }
    }
}

/// Finds the leading right singular vectors, `[w, d]`, largest singular value first; `d` is at most
/// `dimensions` and no more than rows or columns.
pub fn truncated_svd(rows: &dyn Rows, dimensions: usize, seed: u64) -> Matrix {
    let wanted = dimensions.min(rows.rows()).min(rows.width());
    let count = (wanted + SURPLUS).min(rows.rows()).min(rows.width());
    if count == 0 {
        return Matrix::default();
    }
    let mut random = Random::new(seed, 1);
    let mut basis = Matrix::zeros(rows.width(), count);
    basis.data.iter_mut().for_each(|value| *value = random.normal() as f32);
    for _ in 0..ITERATIONS {
        basis = orthonormal(normal_product(rows, &basis));
    }
    let gram = gram(rows, &basis);
    let (values, vectors) = eigen(gram, count);
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(wanted);
    let mut turned = Matrix::zeros(rows.width(), wanted);
    for term in 0..rows.width() {
        for (column, &from) in order.iter().enumerate() {
            let sum: f64 = (basis.row(term).iter().enumerate())
                .map(|(at, &value)| f64::from(value) * vectors[at * count + from])
                .sum();
            turned.row_mut(term)[column] = sum as f32;
        }
    }
    turned
}

/// Multiplies: `rows · basis`, `[n, d]`.
pub fn project(rows: &dyn Rows, basis: &Matrix) -> Matrix {
    let mut out = Matrix::zeros(rows.rows(), basis.width);
    if basis.width > 0 {
        out.data.par_chunks_mut(CHUNK * basis.width).enumerate().for_each(|(chunk, part)| {
            for (row, out) in part.chunks_exact_mut(basis.width).enumerate() {
                rows.product(chunk * CHUNK + row, basis, out);
            }
        });
    }
    out
}

fn pieces(rows: usize) -> Vec<std::ops::Range<usize>> {
    let size = rows.div_ceil(PIECES).max(1);
    (0..rows).step_by(size).map(|start| start..(start + size).min(rows)).collect()
}

/// `XᵀX Ω`.
fn normal_product(rows: &dyn Rows, basis: &Matrix) -> Matrix {
    let parts: Vec<Matrix> = pieces(rows.rows())
        .into_par_iter()
        .map(|piece| {
            let mut sum = Matrix::zeros(rows.width(), basis.width);
            let mut y = vec![0.0; basis.width];
            for row in piece {
                rows.product(row, basis, &mut y);
                rows.add_outer(row, &y, &mut sum);
            }
            sum
        })
        .collect();
    let mut total = Matrix::zeros(rows.width(), basis.width);
    for part in parts {
        add_scaled(&mut total.data, 1.0, &part.data);
    }
    total
}

/// `(XΩ)ᵀ(XΩ)`, row by row in double precision.
fn gram(rows: &dyn Rows, basis: &Matrix) -> Vec<f64> {
    let count = basis.width;
    let parts: Vec<Vec<f64>> = pieces(rows.rows())
        .into_par_iter()
        .map(|piece| {
            let mut sum = vec![0.0; count * count];
            let mut y = vec![0.0; count];
            for row in piece {
                rows.product(row, basis, &mut y);
                for (a, line) in y.iter().zip(sum.chunks_exact_mut(count)) {
                    for (b, sum) in y.iter().zip(line) {
                        *sum += f64::from(*a) * f64::from(*b);
                    }
                }
            }
            sum
        })
        .collect();
    let mut total = vec![0.0; count * count];
    for part in parts {
        for (total, part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
    total
}

/// The same span with orthonormal columns (Gram–Schmidt, twice for accuracy); columns that depend
/// on earlier ones become zero.
fn orthonormal(basis: Matrix) -> Matrix {
    let (height, count) = (basis.rows(), basis.width);
    let mut columns = Matrix::zeros(count, height);
    for row in 0..height {
        for column in 0..count {
            columns.data[column * height + row] = basis.data[row * count + column];
        }
    }
    for column in 0..count {
        let (done, rest) = columns.data.split_at_mut(column * height);
        let this = &mut rest[..height];
        let before = dot(this, this).sqrt();
        for _ in 0..2 {
            for earlier in done.chunks_exact(height) {
                let along = dot(earlier, this);
                add_scaled(this, -along, earlier);
            }
        }
        let length = dot(this, this).sqrt();
        let factor = if length > 1e-5 * before && length > 0.0 { 1.0 / length } else { 0.0 };
        this.iter_mut().for_each(|value| *value *= factor);
    }
    let mut out = Matrix::zeros(height, count);
    for row in 0..height {
        for column in 0..count {
            out.data[row * count + column] = columns.data[column * height + row];
        }
    }
    out
}

/// Eigenvalues and eigenvectors (in columns) of a symmetric matrix, by Jacobi's rotations.
fn eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; n * n];
    for i in 0..n {
        vectors[i * n + i] = 1.0;
    }
    let scale: f64 = (0..n).map(|i| a[i * n + i].abs()).sum::<f64>().max(f64::MIN_POSITIVE);
    for _ in 0..60 {
        let off: f64 =
            (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i * n + j].abs()).sum();
        if off <= 1e-13 * scale {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let apq = a[p * n + q];
                if apq.abs() <= 1e-300 {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for i in 0..n {
                    let (x, y) = (a[i * n + p], a[i * n + q]);
                    a[i * n + p] = c * x - s * y;
                    a[i * n + q] = s * x + c * y;
                }
                for i in 0..n {
                    let (x, y) = (a[p * n + i], a[q * n + i]);
                    a[p * n + i] = c * x - s * y;
                    a[q * n + i] = s * x + c * y;
                    let (x, y) = (vectors[i * n + p], vectors[i * n + q]);
                    vectors[i * n + p] = c * x - s * y;
                    vectors[i * n + q] = s * x + c * y;
                }
            }
        }
    }
    ((0..n).map(|i| a[i * n + i]).collect(), vectors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leading_directions_are_found() {
        // Rows spread 5, 2 and 0.1 along three orthogonal directions of a six-dimensional space.
        let mut random = Random::new(5, 0);
        let spreads = [(0, 5.0), (3, 2.0), (5, 0.1)];
        let mut rows = Matrix::zeros(500, 6);
        for row in 0..500 {
            for (column, spread) in spreads {
                rows.row_mut(row)[column] = (spread * random.normal()) as f32;
            }
        }
        let basis = truncated_svd(&rows, 2, 1);
        assert_eq!((basis.rows(), basis.width), (6, 2));
        assert!(basis.row(0)[0].abs() > 0.999, "{:?}", basis.row(0));
        assert!(basis.row(3)[1].abs() > 0.999, "{:?}", basis.row(3));
    }

    #[test]
    fn fewer_rows_than_dimensions_give_fewer_dimensions() {
        let rows = Matrix { data: vec![1.0, 0.0, 0.0, 0.0, 2.0, 0.0], width: 3 };
        let basis = truncated_svd(&rows, 64, 0);
        assert_eq!(basis.width, 2);
        assert!((basis.row(1)[0].abs() - 1.0).abs() < 1e-5);
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let mut random = Random::new(8, 0);
        let mut rows = Matrix::zeros(5000, 20);
        rows.data.iter_mut().for_each(|value| *value = random.normal() as f32);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| project(&rows, &truncated_svd(&rows, 4, 3)))
        };
        assert_eq!(with(1), with(3));
    }
}

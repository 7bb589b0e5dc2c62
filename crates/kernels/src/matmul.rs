//! Matrix products over strided views, on the `gemm` crate.

use crate::element::Element;
use std::ops::Range;

/// A read-only strided matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a, E> {
    data: &'a [E],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A writable strided matrix whose rows are contiguous.
pub struct MatMut<'a, E> {
    data: &'a mut [E],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

/// What happens to the old contents of the destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Write {
    /// They are replaced.
    Set,
    /// The product is added to them.
    Add,
}

/// Who computes a product.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Threads {
    /// All threads of the pool.
    All,
    /// The calling thread: for products inside a task that is already parallel.
    One,
}

fn extent(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 }
}

impl<'a, E: Element> Mat<'a, E> {
    /// A contiguous `[rows, cols]` matrix.
    pub fn new(data: &'a [E], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `[rows, cols]` whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the view reaches past `data`.
    pub fn strided(data: &'a [E], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(extent(rows, cols, row_stride, 1) <= data.len(), "matrix view out of bounds");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

impl<'a, E: Element> MatMut<'a, E> {
    /// A contiguous `[rows, cols]` matrix.
    pub fn new(data: &'a mut [E], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `[rows, cols]` whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the view reaches past `data`.
    pub fn strided(data: &'a mut [E], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(extent(rows, cols, row_stride, 1) <= data.len(), "matrix view out of bounds");
        Self { data, rows, cols, row_stride }
    }
}

/// `out = factor · lhs · rhs`, or `out += …`.
///
/// # Panics
/// If the inner or outer extents disagree.
pub fn gemm<E: Element>(
    out: MatMut<'_, E>,
    lhs: Mat<'_, E>,
    rhs: Mat<'_, E>,
    factor: E,
    write: Write,
    threads: Threads,
) {
    assert_eq!(lhs.cols, rhs.rows, "inner extents of a product differ");
    assert_eq!((out.rows, out.cols), (lhs.rows, rhs.cols), "extents of a product's result differ");
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    if threads == Threads::All {
        crate::profile::product(lhs.rows, lhs.cols, rhs.cols);
    }
    let whole = Destination { start: out.data.as_mut_ptr(), row_stride: out.row_stride };
    let (rows, cols) = (out.rows, out.cols);
    let product = |rows: Range<usize>, cols: Range<usize>| {
        // SAFETY: every view was checked against its slice when it was made, the destination is a
        // unique borrow of which this call alone writes the block, and the element type is the same
        // for all three pointers. An empty right-hand side has no elements to point past.
        unsafe {
            gemm::gemm(
                rows.len(),
                cols.len(),
                lhs.cols,
                whole.at(rows.start, cols.start),
                1,
                whole.row_stride as isize,
                write == Write::Add,
                lhs.data.as_ptr().wrapping_add(rows.start * lhs.row_stride),
                lhs.col_stride as isize,
                lhs.row_stride as isize,
                rhs.data.as_ptr().wrapping_add(cols.start * rhs.col_stride),
                rhs.col_stride as isize,
                rhs.row_stride as isize,
                E::ONE,
                factor,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    };
    let of_columns = cols.div_ceil(BLOCK_COLS);
    let blocks = rows.div_ceil(BLOCK_ROWS) * of_columns;
    if threads == Threads::One || blocks == 1 {
        return product(0..rows, 0..cols);
    }
    hydralora_runtime::for_each(0..blocks, |_, block| {
        let (first_row, first_col) =
            (block / of_columns * BLOCK_ROWS, block % of_columns * BLOCK_COLS);
        product(
            first_row..rows.min(first_row + BLOCK_ROWS),
            first_col..cols.min(first_col + BLOCK_COLS),
        );
    });
}

/// Rows and columns of the blocks that a product is cut into; fixed, so that results do not depend on the
/// number of threads.
const BLOCK_ROWS: usize = 128;
const BLOCK_COLS: usize = 256;

/// Where a product goes, for several threads that write different blocks of it.
struct Destination<E> {
    start: *mut E,
    row_stride: usize,
}

impl<E> Destination<E> {
    fn at(&self, row: usize, col: usize) -> *mut E {
        self.start.wrapping_add(row * self.row_stride + col)
    }
}

// SAFETY: the blocks that threads write do not overlap, and numbers may go anywhere.
unsafe impl<E: Element> Sync for Destination<E> {}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(a: &[f64], b: &[f64], m: usize, k: usize, n: usize) -> Vec<f64> {
        let mut out = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
            }
        }
        out
    }

    fn values(len: usize, seed: u64) -> Vec<f64> {
        (0..len as u64).map(|i| ((i * 7919 + seed * 104_729) % 1000) as f64 / 500.0 - 1.0).collect()
    }

    #[test]
    fn products_match_the_definition_in_every_layout() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (17, 64, 33), (65, 9, 130), (4, 0, 5)] {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let expected = naive(&a, &b, m, k, n);
            let at: Vec<f64> = (0..k * m).map(|i| a[(i % m.max(1)) * k + i / m.max(1)]).collect();
            for lhs in [Mat::new(&a, m, k), Mat::new(&at, k, m).t()] {
                let mut out = vec![1.0; m * n];
                gemm(
                    MatMut::new(&mut out, m, n),
                    lhs,
                    Mat::new(&b, k, n),
                    2.0,
                    Write::Add,
                    Threads::All,
                );
                for (got, want) in out.iter().zip(&expected) {
                    assert!((got - (1.0 + 2.0 * want)).abs() < 1e-9);
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let (m, k, n) = (190, 576, 1536);
        let a: Vec<f32> = values(m * k, 3).iter().map(|&x| x as f32).collect();
        let b: Vec<f32> = values(k * n, 4).iter().map(|&x| x as f32).collect();
        let run = |threads: usize| {
            let pool = hydralora_runtime::Pool::new(threads);
            let mut out = vec![0.0; m * n];
            pool.enter(|| {
                gemm(
                    MatMut::new(&mut out, m, n),
                    Mat::new(&a, m, k),
                    Mat::new(&b, k, n),
                    1.0,
                    Write::Set,
                    Threads::All,
                );
            });
            out
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(5));
    }
}

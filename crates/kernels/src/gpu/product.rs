//! Matrix products.

use super::{Device, DeviceBuffer, Kernel, bits};
use crate::tensor::Tensor;

const PRODUCT: Kernel = Kernel { source: include_str!("shaders/product.wgsl"), name: "product" };

/// Rows and columns of a tile of the result that a workgroup computes.
const TILE: usize = 64;

/// A strided matrix on a device.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    buffer: &'a DeviceBuffer,
    start: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows × cols` numbers without gaps.
    pub(super) fn new(buffer: &'a DeviceBuffer, rows: usize, cols: usize) -> Self {
        assert_eq!(buffer.0.len, rows * cols, "a matrix of another size");
        Self { buffer, start: 0, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Some of the columns.
    pub(super) fn columns(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.cols, "columns out of range");
        Self { start: self.start + first * self.col_stride, cols: count, ..self }
    }

    /// Some of the rows.
    pub(super) fn rows(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows out of range");
        Self { start: self.start + first * self.row_stride, rows: count, ..self }
    }

    pub(super) fn row_count(self) -> usize {
        self.rows
    }

    pub(super) fn col_count(self) -> usize {
        self.cols
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

impl Device {
    /// `scale · left · right`, added to `carried: [rows, cols]` if there is one.
    pub(super) fn product(
        &self,
        left: Matrix<'_>,
        right: Matrix<'_>,
        scale: f64,
        carried: Option<&Tensor>,
    ) -> DeviceBuffer {
        let out = self.sum_from(left.rows * right.cols, carried);
        self.product_into(&out, 0, right.cols, left, right, scale, carried.is_some());
        out
    }

    /// Room for a sum of so many elements that starts with `carried`.
    pub(super) fn sum_from(&self, len: usize, carried: Option<&Tensor>) -> DeviceBuffer {
        let out = DeviceBuffer::room(self, len);
        if let Some(carried) = carried {
            assert_eq!(carried.len(), len, "a carried sum of another size");
            self.copy(self.holding(carried).raw(), out.raw(), len);
        }
        out
    }

    /// `scale · left · right` into (or, if it `adds`, onto) rows of `out` that begin at `start` and
    /// lie `stride` apart. `out` must not have been given out yet.
    pub(super) fn product_into(
        &self,
        out: &DeviceBuffer,
        start: usize,
        stride: usize,
        left: Matrix<'_>,
        right: Matrix<'_>,
        scale: f64,
        adds: bool,
    ) {
        assert_eq!(left.cols, right.rows, "a product of matrices that do not match");
        let (rows, cols) = (left.rows, right.cols);
        assert!(start + (rows - 1) * stride + cols <= out.0.len, "a product that does not fit");
        crate::profile::product(rows, left.cols, cols);
        let sizes = [rows, cols, left.cols, usize::from(adds)];
        let strides = [left, right].map(|side| [side.start, side.row_stride, side.col_stride]);
        let numbers = sizes.iter().chain(strides.iter().flatten()).chain([&start, &stride]);
        let mut parameters: Vec<u32> = numbers.map(|&number| number as u32).collect();
        parameters.push(bits(scale));
        let grid = [cols.div_ceil(TILE) as u32, rows.div_ceil(TILE) as u32, 1];
        let inputs = [left.buffer.raw(), right.buffer.raw()];
        self.run(&PRODUCT, &parameters, &inputs, &[out.raw()], grid);
    }
}

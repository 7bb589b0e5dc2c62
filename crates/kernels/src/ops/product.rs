//! Products of whole tensors on [`gemm`], and their gradients, for operations that need no more.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::graph::ParentGradients;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::simd;
use crate::tensor::{Tensor, TensorElement};

/// Computes `x Mᵀ` for `x: [T, in]` and `m: [out, in]`.
///
/// # Panics
/// If the widths differ.
pub(crate) fn product(x: &Tensor, m: &Tensor) -> Tensor {
    let (rows, inner, cols) = (x.rows(), x.cols(), m.rows());
    assert_eq!(m.cols(), inner, "the weight has another input width");
    dispatch!(x.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(rows * cols);
        gemm(
            MatMut::new(&mut out, rows, cols),
            Mat::new(x.data::<E>(), rows, inner),
            Mat::new(m.data::<E>(), cols, inner).t(),
            1.0,
            Write::Set,
            Threads::All,
        );
        Tensor::new(out, [rows, cols])
    })
}

/// Sums all rows of `rows: [T, cols]`, giving `[cols]`.
pub(crate) fn column_sums<E: TensorElement>(rows: &[E], cols: usize) -> Tensor {
    let mut sums = Buffer::<E>::zeros(cols);
    for row in rows.chunks_exact(cols) {
        simd::add_scaled(E::ONE, row, &mut sums);
    }
    Tensor::new(sums, [cols])
}

/// Adds `lhs · rhs`, of shape `extent`, to the gradient of parent `index`, in place if it has one
/// already.
pub(crate) fn add_product<E: TensorElement>(
    parents: &mut ParentGradients<'_>,
    index: usize,
    extent: [usize; 2],
    lhs: Mat<'_, E>,
    rhs: Mat<'_, E>,
) {
    let carried = parents.take(index);
    let write = if carried.is_some() { Write::Add } else { Write::Set };
    let mut sum =
        carried.unwrap_or_else(|| Tensor::new(Buffer::<E>::scratch(extent[0] * extent[1]), extent));
    let out = MatMut::new(sum.data_mut::<E>(), extent[0], extent[1]);
    gemm(out, lhs, rhs, E::ONE, write, Threads::All);
    parents.add(index, sum);
}

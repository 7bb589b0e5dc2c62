//! How far the rows or columns of a matrix are from orthonormal: `‖M Mᵀ − I‖_F` or `‖MᵀM − I‖_F`.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::tensor::{Tensor, TensorElement};

/// Which vectors of a matrix should be orthonormal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its rows.
    Rows,
    /// Its columns.
    Columns,
}

/// The Frobenius norm (not squared) of the Gram matrix of `m: [n, d]` less the identity, a tensor
/// of shape `[1]`.
pub fn orthogonality(m: &Var, side: Side) -> Var {
    let saved = m.value().clone();
    let (value, excess) = dispatch!(saved.dtype(), |E| {
        let excess = gram_excess::<E>(&saved, side);
        let norm = excess.iter().map(|c| c.to_f64() * c.to_f64()).sum::<f64>().sqrt();
        let extent = excess.len().isqrt();
        (Tensor::scalar(saved.dtype(), norm), Tensor::new(excess, [extent, extent]))
    });
    let norm = value.item();
    Var::computed(value, &[m], move |gradient, parents| {
        let factor = if norm > 0.0 { 2.0 * gradient.item() / norm } else { 0.0 };
        let (rows, cols, extent) = (saved.rows(), saved.cols(), excess.rows());
        dispatch!(saved.dtype(), |E| {
            let mut out = vec![0.0 as E; saved.len()];
            let matrix = Mat::new(saved.data::<E>(), rows, cols);
            let excess = Mat::new(excess.data::<E>(), extent, extent);
            let (lhs, rhs) = match side {
                Side::Rows => (excess, matrix),
                Side::Columns => (matrix, excess),
            };
            let view = MatMut::new(&mut out, rows, cols);
            gemm(view, lhs, rhs, factor as E, Write::Set, Threads::All);
            parents.add(0, Tensor::new(out, saved.shape()));
        });
    })
}

fn gram_excess<E: TensorElement>(m: &Tensor, side: Side) -> Vec<E> {
    let matrix = Mat::new(m.data::<E>(), m.rows(), m.cols());
    let (extent, lhs, rhs) = match side {
        Side::Rows => (m.rows(), matrix, matrix.t()),
        Side::Columns => (m.cols(), matrix.t(), matrix),
    };
    let mut gram = vec![E::ZERO; extent * extent];
    gemm(MatMut::new(&mut gram, extent, extent), lhs, rhs, E::ONE, Write::Set, Threads::All);
    for i in 0..extent {
        gram[i * extent + i] -= E::ONE;
    }
    gram
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        for side in [Side::Rows, Side::Columns] {
            check::gradients(&[&[3, 5]], |v| orthogonality(&v[0], side));
            check::gradients(&[&[5, 2]], |v| orthogonality(&v[0], side));
        }
    }

    #[test]
    fn orthonormal_rows_are_at_distance_zero() {
        let m = Tensor::from_f64(DType::F64, &[0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [2, 3]);
        let found = orthogonality(&Var::leaf(m), Side::Rows);
        assert_eq!(found.value().item(), 0.0);
        assert!(found.backward().iter().all(Tensor::is_finite));
    }
}

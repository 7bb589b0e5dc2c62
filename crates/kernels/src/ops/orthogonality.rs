//! How far the rows or columns of a matrix are from orthonormal: `‖M Mᵀ − I‖_F` or `‖MᵀM − I‖_F`; and
//! the same for the columns of heads side by side, under weights.

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

/// What a head's columns should be: all of length `√length`, at right angles, where `weights` say how much
/// each counts.
pub struct Wanted {
    /// The squared length.
    pub length: f64,
    /// One weight for each column.
    pub weights: Vec<f64>,
}

/// The mean over heads of `Σ_kl [ω_k ω_l (BᵀB − length · I)_kl]²`, shape `[1]`, for `heads: [out, N·r]` side by
/// side. What is wanted of each head is a constant.
///
/// # Panics
/// If the heads are not as many as what is wanted, or have not as many columns as weights.
pub fn weighted_orthogonality(heads: &Var, wanted: &[Wanted]) -> Var {
    let value = heads.value();
    let (rows, width, dtype) = (value.rows(), value.cols(), value.dtype());
    assert_eq!(width, wanted.iter().map(|of| of.weights.len()).sum::<usize>(), "a weight a column");
    let count = wanted.len().max(1) as f64;
    let mut total = 0.0;
    let gradient_of_heads = dispatch!(dtype, |E| {
        let data = value.data::<E>();
        let mut slopes = vec![E::ZERO; value.len()];
        let mut first = 0;
        for of in wanted {
            let rank = of.weights.len();
            let head: Vec<E> = data
                .chunks_exact(width)
                .flat_map(|row| row[first..first + rank].iter().copied())
                .collect();
            let matrix = Mat::new(&head, rows, rank);
            let mut gram = vec![E::ZERO; rank * rank];
            let view = MatMut::new(&mut gram, rank, rank);
            gemm(view, matrix.t(), matrix, E::ONE, Write::Set, Threads::All);
            for k in 0..rank {
                for l in 0..rank {
                    let at = k * rank + l;
                    let excess = gram[at].to_f64() - if k == l { of.length } else { 0.0 };
                    let weight = (of.weights[k] * of.weights[l]).powi(2);
                    total += weight * excess * excess;
                    // Of the sum, d/dG; and G appears with its transpose.
                    gram[at] = E::from_f64(4.0 * weight * excess / count);
                }
            }
            let mut slope = vec![E::ZERO; rows * rank];
            let gram = Mat::new(&gram, rank, rank);
            let view = MatMut::new(&mut slope, rows, rank);
            gemm(view, matrix, gram, E::ONE, Write::Set, Threads::All);
            for (row, own) in slopes.chunks_exact_mut(width).zip(slope.chunks_exact(rank)) {
                row[first..first + rank].copy_from_slice(own);
            }
            first += rank;
        }
        Tensor::new(slopes, [rows, width])
    });
    Var::computed(Tensor::scalar(dtype, total / count), &[heads], move |gradient, parents| {
        let mut out = gradient_of_heads;
        out.scale(gradient.item());
        parents.add(0, out);
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
    fn weighted_heads_match_finite_differences() {
        let wanted = |lengths: [f64; 2]| {
            lengths.map(|length| Wanted { length, weights: vec![0.9, 0.4, 1.2] })
        };
        check::gradients(&[&[5, 6]], |v| weighted_orthogonality(&v[0], &wanted([0.3, 2.0])));
        // One head, one column: (ω² (b² − length))².
        let one = Tensor::from_f64(DType::F64, &[2.0, 1.0], [2, 1]);
        let wanted = [Wanted { length: 3.0, weights: vec![0.5] }];
        let found = weighted_orthogonality(&Var::constant(one), &wanted).value().item();
        assert!((found - (0.25_f64 * 2.0).powi(2)).abs() < 1e-12, "{found}");
    }

    #[test]
    fn orthonormal_rows_are_at_distance_zero() {
        let m = Tensor::from_f64(DType::F64, &[0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [2, 3]);
        let found = orthogonality(&Var::leaf(m), Side::Rows);
        assert_eq!(found.value().item(), 0.0);
        assert!(found.backward().iter().all(Tensor::is_finite));
    }
}

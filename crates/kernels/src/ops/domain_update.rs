//! Updates that are put together from trained parts: `a b`, and heads weighed into new ones.
//!
//! ```text
//! C = A B                                    A: [m, k], B: [k, n]
//! B'_t = Σ_i w_ti B_i        t = 1 … D       B: [out, N·r], w: [D, N], B': [out, D·r]
//! ```
//!
//! Both work on parameters and not on activations, so their cost does not depend on the batch.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::graph::Var;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::ops::product::add_product;
use crate::tensor::{Tensor, TensorElement};

/// `a b` for `a: [m, k]` and `b: [k, n]`.
///
/// # Panics
/// If the extents disagree.
pub fn matrix_product(a: &Var, b: &Var) -> Var {
    let (saved_a, saved_b) = (a.value().clone(), b.value().clone());
    let (rows, inner, cols) = (saved_a.rows(), saved_a.cols(), saved_b.cols());
    assert_eq!(saved_b.rows(), inner, "the inner extents differ");
    let c = dispatch!(saved_a.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(rows * cols);
        gemm(
            MatMut::new(&mut out, rows, cols),
            Mat::new(saved_a.data::<E>(), rows, inner),
            Mat::new(saved_b.data::<E>(), inner, cols),
            1.0,
            Write::Set,
            Threads::All,
        );
        Tensor::new(out, [rows, cols])
    });
    Var::computed(c, &[a, b], move |gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            let dc = Mat::new(gradient.data::<E>(), rows, cols);
            if parents.needs(1) {
                let a = Mat::new(saved_a.data::<E>(), rows, inner);
                add_product(parents, 1, [inner, cols], a.t(), dc);
            }
            if parents.needs(0) {
                let b = Mat::new(saved_b.data::<E>(), inner, cols);
                add_product(parents, 0, [rows, inner], dc, b.t());
            }
        });
    })
}

/// `[out, D·r]`: for each row of `weights: [D, N]` the sum of the heads side by side in
/// `heads: [out, N·r]`, weighed by it.
///
/// # Panics
/// If the heads are not as many as the weights of a row.
pub fn weighted_heads(heads: &Var, weights: &Var) -> Var {
    let (saved_heads, saved_weights) = (heads.value().clone(), weights.value().clone());
    let (groups, experts) = (saved_weights.rows(), saved_weights.cols());
    let (outputs, width) = (saved_heads.rows(), saved_heads.cols());
    assert_eq!(width % experts, 0, "the heads differ in rank");
    let rank = width / experts;
    let value = dispatch!(saved_heads.dtype(), |E| {
        let out = mixed::<E>(saved_heads.data::<E>(), saved_weights.data::<E>(), experts, rank);
        Tensor::new(out, [outputs, groups * rank])
    });
    Var::computed(value, &[heads, weights], move |gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            let d = gradient.data::<E>();
            if parents.needs(1) {
                let mut sums = vec![0.0 as E; groups * experts];
                let rows = d.chunks_exact(groups * rank);
                for (d, heads) in rows.zip(saved_heads.data::<E>().chunks_exact(width)) {
                    for (at, sum) in sums.iter_mut().enumerate() {
                        let (group, expert) = (at / experts, at % experts);
                        let d = &d[group * rank..(group + 1) * rank];
                        let head = &heads[expert * rank..(expert + 1) * rank];
                        *sum += d.iter().zip(head).map(|(d, h)| d * h).sum::<E>();
                    }
                }
                parents.add(1, Tensor::new(sums, [groups, experts]));
            }
            if parents.needs(0) {
                let weights = saved_weights.data::<E>();
                let transposed: Vec<E> = (0..experts * groups)
                    .map(|at| weights[at % groups * experts + at / groups])
                    .collect();
                let out = mixed::<E>(d, &transposed, groups, rank);
                parents.add(0, Tensor::new(out, [outputs, width]));
            }
        });
    })
}

/// Row by row of `heads: [out, N·r]`, `D` sums of its `N` pieces of length `r` under
/// `weights: [D, N]`.
fn mixed<E: TensorElement>(heads: &[E], weights: &[E], experts: usize, rank: usize) -> Vec<E> {
    let groups = weights.len() / experts;
    let mut out = vec![E::ZERO; heads.len() / experts * groups];
    let rows = out.chunks_exact_mut(groups * rank).zip(heads.chunks_exact(experts * rank));
    for (out, heads) in rows {
        for (out, weights) in out.chunks_exact_mut(rank).zip(weights.chunks_exact(experts)) {
            for (head, &weight) in heads.chunks_exact(rank).zip(weights) {
                out.iter_mut().zip(head).for_each(|(out, &head)| *out += weight * head);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[4, 3], &[3, 5]], |v| matrix_product(&v[0], &v[1]));
        check::gradients(&[&[1, 1], &[1, 2]], |v| matrix_product(&v[0], &v[1]));
        check::gradients(&[&[3, 3]], |v| matrix_product(&v[0], &v[0]));
        check::gradients(&[&[5, 6], &[2, 3]], |v| weighted_heads(&v[0], &v[1]));
        check::gradients(&[&[3, 4], &[3, 1]], |v| weighted_heads(&v[0], &v[1]));
        check::gradients(&[&[1, 2], &[1, 2]], |v| weighted_heads(&v[0], &v[1]));
    }

    #[test]
    fn heads_are_weighed_as_the_formula_says() {
        let v = check::inputs(&[&[2, 6], &[2, 3]]);
        let (heads, weights) = (v[0].value().to_f64(), v[1].value().to_f64());
        let found = weighted_heads(&v[0], &v[1]).value().to_f64();
        for (at, found) in found.iter().enumerate() {
            let (row, group, column) = (at / 4, at % 4 / 2, at % 2);
            let wanted: f64 =
                (0..3).map(|i| weights[group * 3 + i] * heads[row * 6 + i * 2 + column]).sum();
            assert!((found - wanted).abs() < 1e-14);
        }
    }
}

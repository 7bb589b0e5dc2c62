//! The softmax of routers, and a router as a value of its own.
//!
//! Without a graph, as when texts are written, scores are computed row by row, so that a token's gates are the
//! same to the last bit whatever other rows are computed with it.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::matmul::Mat;
use crate::ops::linear::linear;
use crate::ops::product::{add_product, column_sums, product};
use crate::simd::{self, rows_per_task, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks, chunks_mut, for_each};

/// Turns scores, rows of one for each expert, into `softmax(scores + bias)` in place.
pub(super) fn softmax<E: Element>(scores: &mut [E], bias: Option<&[E]>, experts: usize) {
    vectorize(
        #[inline(always)]
        || {
            for row in scores.chunks_exact_mut(experts) {
                if let Some(bias) = bias {
                    simd::axpy(E::ONE, bias, row);
                }
                let peak = row.iter().fold(E::NEG_INFINITY, |a, &b| if b > a { b } else { a });
                let mut sum = E::ZERO;
                for score in row.iter_mut() {
                    *score = Element::exp(*score - peak);
                    sum += *score;
                }
                for score in row.iter_mut() {
                    *score = *score / sum;
                }
            }
        },
    );
}

/// Turns the gradient of gates into that of their scores, `ds = w ⊙ (dw − Σ w dw)` row by row, in place.
pub(super) fn softmax_backward<E: Element>(dw: &mut [E], gates: &[E], experts: usize) {
    for (dw, gates) in dw.chunks_exact_mut(experts).zip(gates.chunks_exact(experts)) {
        let mean: E = dw.iter().zip(gates).map(|(&d, &w)| d * w).sum();
        for (d, &w) in dw.iter_mut().zip(gates) {
            *d = w * (*d - mean);
        }
    }
}

/// Computes `x Wᵀ`, of every row by itself.
fn row_by_row<E: TensorElement>(x: &[E], weight: &[E], inputs: usize, experts: usize) -> Buffer<E> {
    let mut out = Buffer::<E>::scratch(x.len() / inputs * experts);
    let rows = rows_per_task(inputs);
    for_each((chunks_mut(&mut out, rows * experts), chunks(x, rows * inputs)), |_, (out, x)| {
        vectorize(
            #[inline(always)]
            || {
                for (out, x) in out.chunks_exact_mut(experts).zip(x.chunks_exact(inputs)) {
                    for (score, row) in out.iter_mut().zip(weight.chunks_exact(inputs)) {
                        *score = simd::dot(x, row);
                    }
                }
            },
        );
    });
    out
}

/// Scores `x Wᵀ`, for a graph or without one.
fn scores_of(x: &Var, weight: &Var) -> Tensor {
    let (x_value, weight_value) = (x.value(), weight.value());
    if x.needs_grad() || weight.needs_grad() || x_value.is_empty() {
        return product(x_value, weight_value);
    }
    let (rows, inputs, experts) = (x_value.rows(), x_value.cols(), weight_value.rows());
    assert_eq!(weight_value.cols(), inputs, "the weight has another input width");
    dispatch!(x_value.dtype(), |E| {
        let out = row_by_row(x_value.data::<E>(), weight_value.data::<E>(), inputs, experts);
        Tensor::new(out, [rows, experts])
    })
}

/// Computes the scores `x Wᵀ + b` of a router: `x: [T, in]`, `weight: [N, in]`, `bias: [N]`, giving
/// `[T, N]`.
///
/// # Panics
/// If the widths disagree.
pub fn router_scores(x: &Var, weight: &Var, bias: Option<&Var>) -> Var {
    if [Some(x), Some(weight), bias].into_iter().flatten().any(Var::needs_grad) {
        return linear(x, weight, bias);
    }
    on_device!(low_rank::linear(x, weight, bias));
    let mut scores = scores_of(x, weight);
    if let Some(bias) = bias {
        let experts = scores.cols().max(1);
        dispatch!(scores.dtype(), |E| {
            for row in scores.data_mut::<E>().chunks_exact_mut(experts) {
                simd::add_scaled(1.0, bias.value().data::<E>(), row);
            }
        });
    }
    Var::constant(scores)
}

/// Computes the gates `softmax(s)` `[T, N]` of scores `s: [T, N]`, row by row, for a router whose scores are
/// wanted too.
pub fn gates_of(scores: &Var) -> Var {
    let mut gates = scores.value().clone();
    let experts = gates.cols();
    dispatch!(gates.dtype(), |E| {
        softmax(gates.data_mut::<E>(), None, experts);
    });
    let saved = gates.clone();
    Var::computed(gates, &[scores], move |mut gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            softmax_backward(gradient.data_mut::<E>(), saved.data::<E>(), experts);
        });
        parents.add(0, gradient);
    })
}

/// Computes `softmax(x Wᵀ + b)`, for a router that serves several layers: `x: [T, in]`,
/// `weight: [N, in]`, `bias: [N]`, giving `[T, N]`.
///
/// # Panics
/// If the widths disagree.
pub fn router_gates(x: &Var, weight: &Var, bias: Option<&Var>) -> Var {
    const X: usize = 0;
    const WEIGHT: usize = 1;
    const BIAS: usize = 2;
    on_device!(low_rank::router_gates(x, weight, bias));
    let mut gates = scores_of(x, weight);
    let experts = gates.cols();
    dispatch!(gates.dtype(), |E| {
        let bias = bias.map(|bias| bias.value().data::<E>());
        softmax(gates.data_mut::<E>(), bias, experts);
    });
    let (saved_x, saved_weight, saved_gates) = (x.save(), weight.value().clone(), gates.clone());
    let none = Var::constant(Tensor::empty(gates.dtype()));
    Var::computed(gates, &[x, weight, bias.unwrap_or(&none)], move |gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            let mut ds = gradient;
            softmax_backward(ds.data_mut::<E>(), saved_gates.data::<E>(), experts);
            let (tokens, inputs) = (ds.rows(), saved_weight.cols());
            if parents.needs(BIAS) {
                parents.add(BIAS, column_sums::<E>(ds.data::<E>(), experts));
            }
            let ds = Mat::new(ds.data::<E>(), tokens, experts);
            if parents.needs(WEIGHT) {
                let x = saved_x.get();
                let x = Mat::new(x.data::<E>(), tokens, inputs);
                add_product(parents, WEIGHT, [experts, inputs], ds.t(), x);
            }
            if parents.needs(X) {
                let weight = Mat::new(saved_weight.data::<E>(), experts, inputs);
                add_product(parents, X, [tokens, inputs], ds, weight);
            }
        });
    })
}

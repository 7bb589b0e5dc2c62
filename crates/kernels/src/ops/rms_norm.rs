//! `y = w ⊙ x / √(mean(x²) + ε)` over the last dimension, or over stretches of it.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::simd::{self, rows_per_task, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks, chunks_mut, for_each};

/// RMS normalisation of `x: [T, n · d]` with `weight: [d]`: of every row by itself, or, as of the heads
/// in a row of queries, of every `d` neighbouring numbers. Gradients for both.
///
/// The result can be recomputed from `x`, so operations that need it in their backward do not keep
/// a second copy.
pub fn rms_norm(x: &Var, weight: &Var, epsilon: f64) -> Var {
    shifted_rms_norm(x, weight, 0.0, epsilon)
}

/// [`rms_norm`] with the factors `weight + shift`: Gemma keeps the distance of every factor from 1.
pub fn shifted_rms_norm(x: &Var, weight: &Var, shift: f64, epsilon: f64) -> Var {
    let mut scale = weight.value().clone();
    if shift != 0.0 {
        dispatch!(scale.dtype(), |E| {
            scale.data_mut::<E>().iter_mut().for_each(|factor| *factor += shift as E);
        });
    }
    let shape = x.value().shape().to_vec();
    let width = scale.len().max(1);
    assert!(x.value().cols().is_multiple_of(width), "RMSNorm weight has another width");
    let by_width = move |tensor: Tensor| {
        let rows = tensor.len() / width;
        tensor.reshape([rows, width])
    };
    let input = by_width(x.value().clone());
    let value = forward(&input, &scale, epsilon).reshape(&shape);
    let (recompute_input, recompute_scale) = (input.clone(), scale.clone());
    let recompute_shape = shape.clone();
    Var::computed(value, &[x, weight], move |gradient, parents| {
        let gradient = by_width(gradient);
        if parents.needs(1) {
            parents.add(1, weight_gradient(&input, &scale, &gradient, epsilon));
        }
        if parents.needs(0) {
            let carried = parents.take(0).map(by_width);
            let sum = input_gradient(&input, &scale, &gradient, epsilon, carried);
            parents.add(0, sum.reshape(shape));
        }
    })
    .with_recipe(move || {
        forward(&recompute_input, &recompute_scale, epsilon).reshape(&recompute_shape)
    })
}

#[inline(always)]
fn inverse_rms<E: TensorElement>(row: &[E], epsilon: E) -> E {
    let mean = simd::sum_map(row, |x| x * x) / E::from_f64(row.len() as f64);
    E::ONE / (mean + epsilon).sqrt()
}

fn forward(x: &Tensor, weight: &Tensor, epsilon: f64) -> Tensor {
    let _part = crate::profile::part("rms_norm");
    on_device!(rows::rms_norm(x, weight, epsilon));
    dispatch!(x.dtype(), |E| {
        let (cols, weight, epsilon) = (x.cols(), weight.data::<E>(), E::from_f64(epsilon));
        let mut out = Buffer::<E>::scratch(x.len());
        let rows = rows_per_task(cols) * cols;
        for_each((chunks_mut(&mut out, rows), chunks(x.data::<E>(), rows)), |_, (out, x)| {
            vectorize(
                #[inline(always)]
                || {
                    for (out, x) in out.chunks_exact_mut(cols).zip(x.chunks_exact(cols)) {
                        let inverse = inverse_rms(x, epsilon);
                        for i in 0..cols {
                            out[i] = x[i] * inverse * weight[i];
                        }
                    }
                },
            );
        });
        Tensor::new(out, x.shape())
    })
}

/// With `n = x / rms`, `g = dy ⊙ w`: `dx = (g − n · mean(g ⊙ n)) / rms`, added to `carried`.
fn input_gradient(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    epsilon: f64,
    carried: Option<Tensor>,
) -> Tensor {
    let _part = crate::profile::part("rms_norm backward");
    on_device!(rows::rms_norm_backward(x, weight, gradient, epsilon, carried.as_ref()));
    let mut out = carried.unwrap_or_else(|| Tensor::zeros(x.dtype(), x.shape()));
    dispatch!(x.dtype(), |E| {
        let (cols, weight, epsilon) = (x.cols(), weight.data::<E>(), E::from_f64(epsilon));
        let rows = rows_per_task(cols) * cols;
        let (x, dy) = (chunks(x.data::<E>(), rows), chunks(gradient.data::<E>(), rows));
        for_each((chunks_mut(out.data_mut::<E>(), rows), x, dy), |_, (out, x, dy)| {
            vectorize(
                #[inline(always)]
                || {
                    let mut g = vec![E::ZERO; cols];
                    for ((out, x), dy) in out
                        .chunks_exact_mut(cols)
                        .zip(x.chunks_exact(cols))
                        .zip(dy.chunks_exact(cols))
                    {
                        let inverse = inverse_rms(x, epsilon);
                        for i in 0..cols {
                            g[i] = dy[i] * weight[i];
                        }
                        let along = simd::dot(&g, x) * inverse * inverse / E::from_f64(cols as f64);
                        for i in 0..cols {
                            out[i] += (g[i] - x[i] * along) * inverse;
                        }
                    }
                },
            );
        });
    });
    out
}

fn weight_gradient(x: &Tensor, weight: &Tensor, gradient: &Tensor, epsilon: f64) -> Tensor {
    on_device!(rows::rms_norm_weight_gradient(x, weight, gradient, epsilon));
    dispatch!(x.dtype(), |E| {
        let (cols, epsilon) = (x.cols(), E::from_f64(epsilon));
        let mut out = Buffer::<E>::zeros(cols);
        let rows = x.data::<E>().chunks_exact(cols).zip(gradient.data::<E>().chunks_exact(cols));
        vectorize(
            #[inline(always)]
            || {
                for (x, dy) in rows {
                    let inverse = inverse_rms(x, epsilon);
                    for i in 0..cols {
                        out[i] += x[i] * inverse * dy[i];
                    }
                }
            },
        );
        Tensor::new(out, weight.shape())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        for shape in [[1, 1], [3, 5], [2, 33]] {
            check::gradients(&[&shape, &[shape[1]]], |x| rms_norm(&x[0], &x[1], 1e-5));
        }
    }

    #[test]
    fn heads_in_a_row_are_normalised_by_themselves() {
        check::gradients(&[&[3, 12], &[4]], |x| rms_norm(&x[0], &x[1], 1e-5));
        // The input has a gradient from elsewhere already.
        check::gradients(&[&[2, 6], &[3]], |x| {
            crate::ops::elementwise::add(&x[0], rms_norm(&x[0], &x[1], 1e-5))
        });
        let v = check::inputs(&[&[3, 12], &[4]]);
        let rows = Var::constant(v[0].value().clone().reshape([9, 4]));
        let (heads, rows) = (rms_norm(&v[0], &v[1], 1e-5), rms_norm(&rows, &v[1], 1e-5));
        assert_eq!(heads.value().shape(), [3, 12]);
        assert_eq!(heads.value().to_f64(), rows.value().to_f64());
    }

    #[test]
    fn a_shift_is_added_to_the_weight() {
        check::gradients(&[&[3, 8], &[4]], |x| shifted_rms_norm(&x[0], &x[1], 1.0, 1e-5));
        let v = check::inputs(&[&[2, 4], &[4]]);
        let factors: Vec<f64> = v[1].value().to_f64().iter().map(|w| w + 1.0).collect();
        let plain = Var::constant(Tensor::from_f64(v[1].value().dtype(), &factors, [4]));
        let (shifted, plain) =
            (shifted_rms_norm(&v[0], &v[1], 1.0, 1e-5), rms_norm(&v[0], &plain, 1e-5));
        assert_eq!(shifted.value().to_f64(), plain.value().to_f64());
    }

    #[test]
    fn f32_agrees_with_f64() {
        check::f32_agrees(&[&[5, 577], &[577]], 1e-6, |x| rms_norm(&x[0], &x[1], 1e-5));
    }
}

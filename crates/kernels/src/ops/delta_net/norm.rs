//! `y = w ⊙ x / √(mean(x²) + ε) ⊙ silu(z)` over every head: the norm comes before the gate.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::Element;
use crate::graph::{ParentGradients, Var};
use crate::ops::activation::sigmoid;
use crate::simd::{self, rows_per_task, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks, chunks_mut, for_each, map};
use std::sync::Arc;

/// RMS normalisation of every head of `x: [T, heads · d]` with `weight: [d]`, times the SiLU of
/// `gate: [T, heads · d]`. Gradients for all three.
///
/// The result can be recomputed from `x` and `gate`, which are all that is kept.
///
/// # Panics
/// If the extents disagree.
pub fn gated_rms_norm(x: &Var, weight: &Var, gate: &Var, epsilon: f64) -> Var {
    let width = weight.value().len();
    assert_eq!(x.value().shape(), gate.value().shape(), "input and gate differ in shape");
    assert!(width > 0 && x.value().cols().is_multiple_of(width), "the weight has another width");
    let [x_value, weight_value, gate_value] = [x, weight, gate].map(|x| x.value().clone());
    let norm = Arc::new(Norm { x: x_value, weight: weight_value, gate: gate_value, epsilon });
    let recipe = norm.clone();
    Var::computed(norm.forward(), &[x, weight, gate], move |gradient, parents| {
        dispatch!(gradient.dtype(), |E| norm.backward::<E>(gradient, parents));
    })
    .with_recipe(move || recipe.forward())
}

struct Norm {
    x: Tensor,
    weight: Tensor,
    gate: Tensor,
    epsilon: f64,
}

#[inline(always)]
fn inverse_rms<E: Element>(head: &[E], epsilon: E) -> E {
    let mean = simd::dot(head, head) / E::from_f64(head.len() as f64);
    E::ONE / (mean + epsilon).sqrt()
}

impl Norm {
    fn forward(&self) -> Tensor {
        let _part = crate::profile::part("gated norm");
        let width = self.weight.len();
        dispatch!(self.x.dtype(), |E| {
            let (weight, epsilon) = (self.weight.data::<E>(), E::from_f64(self.epsilon));
            let mut out = Buffer::<E>::scratch(self.x.len());
            let task = rows_per_task(width) * width;
            let (x, gate) = (self.x.data::<E>(), self.gate.data::<E>());
            let parts = (chunks_mut(&mut out, task), chunks(x, task), chunks(gate, task));
            for_each(parts, |_, (out, x, gate)| {
                vectorize(
                    #[inline(always)]
                    || {
                        let heads = x.chunks_exact(width).zip(gate.chunks_exact(width));
                        for (out, (x, gate)) in out.chunks_exact_mut(width).zip(heads) {
                            let inverse = inverse_rms(x, epsilon);
                            for i in 0..width {
                                let z = gate[i];
                                out[i] = weight[i] * (x[i] * inverse) * (z * sigmoid(z));
                            }
                        }
                    },
                );
            });
            Tensor::new(out, self.x.shape())
        })
    }

    /// With `n = x / rms`, `s = silu(z)` and `h = dy ⊙ w ⊙ s`: `dx = (h − n · mean(h ⊙ n)) / rms`,
    /// `dz = dy ⊙ w ⊙ n ⊙ s'`, `dw = Σ dy ⊙ n ⊙ s`.
    fn backward<E: TensorElement>(&self, gradient: Tensor, parents: &mut ParentGradients<'_>) {
        let _part = crate::profile::part("gated norm backward");
        let width = self.weight.len();
        let (weight, epsilon) = (self.weight.data::<E>(), E::from_f64(self.epsilon));
        let task = rows_per_task(width) * width;
        let (x, gate) = (self.x.data::<E>(), self.gate.data::<E>());
        if parents.needs(1) {
            let dy = gradient.data::<E>();
            let parts = map((chunks(x, task), chunks(gate, task), chunks(dy, task)), |_, given| {
                let mut sum = vec![E::ZERO; width];
                vectorize(
                    #[inline(always)]
                    || {
                        let (x, gate, dy) = given;
                        let heads = x.chunks_exact(width).zip(gate.chunks_exact(width));
                        for ((x, gate), dy) in heads.zip(dy.chunks_exact(width)) {
                            let inverse = inverse_rms(x, epsilon);
                            for i in 0..width {
                                let z = gate[i];
                                sum[i] += dy[i] * (x[i] * inverse) * (z * sigmoid(z));
                            }
                        }
                    },
                );
                sum
            });
            let mut sum = vec![E::ZERO; width];
            parts.iter().for_each(|part| simd::add_scaled(E::ONE, part, &mut sum));
            parents.add(1, Tensor::new(sum, self.weight.shape()));
        }
        let (mut dx, mut dz) = (Buffer::<E>::scratch(self.x.len()), gradient);
        let written = (chunks_mut(&mut dx, task), chunks_mut(dz.data_mut::<E>(), task));
        for_each((written, chunks(x, task), chunks(gate, task)), |_, ((dx, dz), x, gate)| {
            vectorize(
                #[inline(always)]
                || {
                    let heads = x.chunks_exact(width).zip(gate.chunks_exact(width));
                    let written = dx.chunks_exact_mut(width).zip(dz.chunks_exact_mut(width));
                    for ((dx, dz), (x, gate)) in written.zip(heads) {
                        let inverse = inverse_rms(x, epsilon);
                        for i in 0..width {
                            let (z, n, along) = (gate[i], x[i] * inverse, dz[i] * weight[i]);
                            let s = sigmoid(z);
                            dx[i] = along * (z * s);
                            dz[i] = along * n * s * (E::ONE + z * (E::ONE - s));
                        }
                        let mean = simd::dot(dx, x) * inverse * inverse / E::from_f64(width as f64);
                        for i in 0..width {
                            dx[i] = (dx[i] - x[i] * mean) * inverse;
                        }
                    }
                },
            );
        });
        parents.add(0, Tensor::new(dx, self.x.shape()));
        parents.add(2, dz);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::ops::rms_norm::rms_norm;
    use crate::ops::swiglu::swiglu;

    fn norm(x: &[Var]) -> Var {
        gated_rms_norm(&x[0], &x[1], &x[2], 1e-5)
    }

    #[test]
    fn gradients_match_finite_differences() {
        for [rows, heads, width] in [[1, 1, 1], [3, 2, 5], [2, 3, 33], [0, 1, 2]] {
            let all = [rows, heads * width];
            check::gradients(&[&all, &[width], &all], norm);
        }
    }

    #[test]
    fn f32_agrees_with_f64() {
        check::f32_agrees(&[&[300, 256], &[128], &[300, 256]], 1e-6, norm);
    }

    #[test]
    fn it_is_the_norm_and_then_the_gate() {
        let x = check::inputs(&[&[3, 12], &[4], &[3, 12]]);
        let apart = swiglu(&x[2], &rms_norm(&x[0], &x[1], 1e-5)).value().to_f64();
        for (a, b) in norm(&x).value().to_f64().iter().zip(apart) {
            assert!((a - b).abs() < 1e-14);
        }
    }
}

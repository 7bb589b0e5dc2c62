//! `y = silu(g) ⊙ u`, `silu(g) = g · σ(g)` (the gated unit of Llama's feed-forward block).

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::simd::vectorize;
use crate::tensor::Tensor;
use hydralora_runtime::{chunks, chunks_mut, for_each};

const CHUNK: usize = 1 << 14;

#[inline(always)]
fn sigmoid<E: Element>(x: E) -> E {
    E::ONE / (E::ONE + (-x).exp())
}

/// SwiGLU of `gate` and `up`, both `[T, intermediate]`. The result can be recomputed from them.
pub fn swiglu(gate: &Var, up: &Var) -> Var {
    assert_eq!(gate.value().shape(), up.value().shape(), "gate and up differ in shape");
    let (g, u) = (gate.value().clone(), up.value().clone());
    let value = forward(&g, &u);
    let (recompute_g, recompute_u) = (g.clone(), u.clone());
    Var::computed(value, &[gate, up], move |gradient, parents| {
        let (dg, du) = backward(g, u, gradient);
        parents.add(0, dg);
        parents.add(1, du);
    })
    .with_recipe(move || forward(&recompute_g, &recompute_u))
}

fn forward(gate: &Tensor, up: &Tensor) -> Tensor {
    let _part = crate::profile::part("swiglu");
    on_device!(pointwise::swiglu(gate, up));
    dispatch!(gate.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(gate.len());
        let (g, u) = (gate.data::<E>(), up.data::<E>());
        let parts = (chunks_mut(&mut out, CHUNK), chunks(g, CHUNK), chunks(u, CHUNK));
        for_each(parts, |_, (out, g, u)| {
            vectorize(
                #[inline(always)]
                || {
                    for ((out, &g), &u) in out.iter_mut().zip(g).zip(u) {
                        *out = g * sigmoid(g) * u;
                    }
                },
            );
        });
        Tensor::new(out, gate.shape())
    })
}

/// `dg = dy ⊙ u ⊙ σ(g)(1 + g(1 − σ(g)))`, `du = dy ⊙ silu(g)`; reuses the storage of its arguments
/// where they are not shared.
fn backward(gate: Tensor, up: Tensor, gradient: Tensor) -> (Tensor, Tensor) {
    let _part = crate::profile::part("swiglu backward");
    on_device!(pointwise::swiglu_backward(&gate, &up, &gradient));
    let (mut dg, mut du) = (gradient, up);
    dispatch!(gate.dtype(), |E| {
        let (dg, du) = (dg.data_mut::<E>(), du.data_mut::<E>());
        let g = chunks(gate.data::<E>(), CHUNK);
        for_each((chunks_mut(dg, CHUNK), chunks_mut(du, CHUNK), g), |_, (dg, du, g)| {
            vectorize(
                #[inline(always)]
                || {
                    for ((dg, du), &g) in dg.iter_mut().zip(du).zip(g) {
                        let (dy, u, s) = (*dg, *du, sigmoid(g));
                        *dg = dy * u * s * (E::ONE + g * (E::ONE - s));
                        *du = dy * g * s;
                    }
                },
            );
        });
    });
    (dg, du)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        for shape in [[1, 1], [3, 7], [2, 64]] {
            check::gradients(&[&shape, &shape], |x| swiglu(&x[0], &x[1]));
        }
    }

    #[test]
    fn f32_agrees_with_f64() {
        check::f32_agrees(&[&[37, 1000], &[37, 1000]], 1e-6, |x| swiglu(&x[0], &x[1]));
    }

    #[test]
    fn extreme_gates_stay_finite() {
        let gate = Var::constant(Tensor::new(vec![-1e4_f32, -90.0, 0.0, 90.0, 1e4], [5]));
        let up = Var::constant(Tensor::new(vec![1.0_f32; 5], [5]));
        let y = swiglu(&gate, &up);
        assert!(y.value().is_finite());
        assert_eq!(y.value().to_f64()[4], 1e4);
    }
}

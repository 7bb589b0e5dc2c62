//! `y = f(g) ⊙ u`: the gated units of feed-forward blocks (`silu(g) = g · σ(g)` in Llama, GELU in
//! Gemma; arXiv 2002.05202), and a gate `σ(g)` on an attention's output.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::ops::activation::{Activation, Curve, GeluTanh, Sigmoid, sigmoid};
use crate::simd::vectorize;
use crate::tensor::Tensor;
use hydralora_runtime::{chunks, chunks_mut, for_each};

const CHUNK: usize = 1 << 14;

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

/// `activation(gate) ⊙ up` for equal shapes. The result can be recomputed from them.
///
/// # Panics
/// If the shapes differ.
pub fn gated(gate: &Var, up: &Var, activation: Activation) -> Var {
    match activation {
        Activation::Silu => swiglu(gate, up),
        Activation::GeluTanh => times_curve::<GeluTanh>(gate, up),
    }
}

/// `x ⊙ σ(gate)` for equal shapes (the gate on the attention's output in Qwen3-Next, arXiv
/// 2505.06708). The result can be recomputed from them.
///
/// # Panics
/// If the shapes differ.
pub fn sigmoid_gate(x: &Var, gate: &Var) -> Var {
    times_curve::<Sigmoid>(gate, x)
}

/// `f(gate) ⊙ up`, on the host.
fn times_curve<C: Curve>(gate: &Var, up: &Var) -> Var {
    assert_eq!(gate.value().shape(), up.value().shape(), "the gate has another shape");
    let (g, u) = (gate.value().clone(), up.value().clone());
    let value = curve_forward::<C>(&g, &u);
    let (recompute_g, recompute_u) = (g.clone(), u.clone());
    Var::computed(value, &[gate, up], move |gradient, parents| {
        let (dg, du) = curve_backward::<C>(&g, u, gradient);
        parents.add(0, dg);
        parents.add(1, du);
    })
    .with_recipe(move || curve_forward::<C>(&recompute_g, &recompute_u))
}

fn curve_forward<C: Curve>(gate: &Tensor, up: &Tensor) -> Tensor {
    let _part = crate::profile::part("gate");
    dispatch!(gate.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(gate.len());
        let (g, u) = (gate.data::<E>(), up.data::<E>());
        let parts = (chunks_mut(&mut out, CHUNK), chunks(g, CHUNK), chunks(u, CHUNK));
        for_each(parts, |_, (out, g, u)| {
            vectorize(
                #[inline(always)]
                || {
                    for ((out, &g), &u) in out.iter_mut().zip(g).zip(u) {
                        *out = C::at(g) * u;
                    }
                },
            );
        });
        Tensor::new(out, gate.shape())
    })
}

/// `dg = dy ⊙ u ⊙ f'(g)`, `du = dy ⊙ f(g)`; reuses the storage of its arguments where they are not
/// shared.
fn curve_backward<C: Curve>(gate: &Tensor, up: Tensor, gradient: Tensor) -> (Tensor, Tensor) {
    let _part = crate::profile::part("gate backward");
    let (mut dg, mut du) = (gradient, up);
    dispatch!(gate.dtype(), |E| {
        let (dg, du) = (dg.data_mut::<E>(), du.data_mut::<E>());
        let g = chunks(gate.data::<E>(), CHUNK);
        for_each((chunks_mut(dg, CHUNK), chunks_mut(du, CHUNK), g), |_, (dg, du, g)| {
            vectorize(
                #[inline(always)]
                || {
                    for ((dg, du), &g) in dg.iter_mut().zip(du).zip(g) {
                        let (dy, u, (value, slope)) = (*dg, *du, C::with_slope(g));
                        *dg = dy * u * slope;
                        *du = dy * value;
                    }
                },
            );
        });
    });
    (dg, du)
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
    use crate::ops::activation::activate;
    use crate::ops::elementwise::scale;

    #[test]
    fn gradients_match_finite_differences() {
        for shape in [[1, 1], [3, 7], [2, 64]] {
            check::gradients(&[&shape, &shape], |x| swiglu(&x[0], &x[1]));
        }
    }

    /// Every kind of gate, of inputs that reach where it bends.
    const KINDS: [fn(&[Var]) -> Var; 3] = [
        |x| gated(&scale(&x[0], 5.0), &x[1], Activation::Silu),
        |x| gated(&scale(&x[0], 5.0), &x[1], Activation::GeluTanh),
        |x| sigmoid_gate(&x[1], &scale(&x[0], 5.0)),
    ];

    #[test]
    fn gradients_of_every_gate_match_finite_differences() {
        for kind in KINDS {
            for shape in [&[1, 1][..], &[3, 7], &[0, 5], &[2, 64]] {
                check::gradients(&[shape, shape], kind);
            }
        }
    }

    #[test]
    fn every_gate_in_f32_agrees_with_f64() {
        for kind in KINDS {
            check::f32_agrees(&[&[37, 1000], &[37, 1000]], 1e-6, kind);
        }
    }

    #[test]
    fn every_gate_is_its_activation_times_the_rest() {
        let x = check::leaves(&[&[5, 9], &[5, 9]]);
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let y = gated(&x[0], &x[1], activation);
            let bent = activate(&x[0], activation).value().to_f64();
            for ((y, bent), u) in y.value().to_f64().iter().zip(bent).zip(x[1].value().to_f64()) {
                assert_eq!(*y, bent * u);
            }
            assert_eq!(y.save().get().to_f64(), y.value().to_f64());
        }
        let y = sigmoid_gate(&x[1], &x[0]);
        let [gates, values] = [0, 1].map(|i: usize| x[i].value().to_f64());
        for ((y, gate), value) in y.value().to_f64().iter().zip(gates).zip(values) {
            assert!((y - value / (1.0 + (-gate).exp())).abs() < 1e-15);
        }
        assert!(matches!(y.save(), crate::graph::Saved::Recipe(_)));
        assert_eq!(y.save().get().to_f64(), y.value().to_f64());
    }

    #[test]
    fn extreme_gates_of_every_kind_stay_finite() {
        let gates = [-1e30, -1e4, -90.0, 0.0, 90.0, 1e4, 1e30];
        for dtype in [crate::DType::F32, crate::DType::F64] {
            let x = [gates, [1.0; 7]].map(|x| Var::leaf(Tensor::from_f64(dtype, &x, [7])));
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let y = gated(&x[0], &x[1], activation);
                assert_eq!(y.value().to_f64()[4..], x[0].value().to_f64()[4..]);
                all_finite(&y, &x);
            }
            let y = sigmoid_gate(&x[1], &x[0]);
            assert_eq!(y.value().to_f64()[3..], [0.5, 1.0, 1.0, 1.0]);
            all_finite(&y, &x);
        }
    }

    fn all_finite(y: &Var, x: &[Var]) {
        let ones = Tensor::from_f64(y.value().dtype(), &[1.0; 7], [7]);
        let gradients = y.backward_from(ones);
        assert!(y.value().is_finite());
        assert!(x.iter().all(|x| gradients.get(x).unwrap().is_finite()));
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

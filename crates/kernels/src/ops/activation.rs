//! Pointwise functions: `relu(x) = max(x, 0)` and `tanh(x)` of small learned networks, and what
//! feed-forward blocks bend their gates with ([`Activation`]).

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::simd::for_each_chunk;
use crate::tensor::Tensor;

/// What a feed-forward block applies between its products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · σ(x)` (`silu` or `swish`; Llama).
    Silu,
    /// `x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2` (`gelu_pytorch_tanh`; Gemma; arXiv 1606.08415).
    GeluTanh,
}

/// `activation(x)` for any shape. The result can be recomputed from `x`.
pub fn activate(x: &Var, activation: Activation) -> Var {
    match activation {
        Activation::Silu => bend::<Silu>(x),
        Activation::GeluTanh => bend::<GeluTanh>(x),
    }
}

/// A function of one number, for use inside of vectorized loops.
pub(crate) trait Curve: 'static {
    /// `f(x)`.
    fn at<E: Element>(x: E) -> E;
    /// `f(x)` and `f'(x)`.
    fn with_slope<E: Element>(x: E) -> (E, E);
}

/// `σ(x) = 1 / (1 + e^−x)`.
pub(crate) struct Sigmoid;
/// [`Activation::Silu`].
struct Silu;
/// [`Activation::GeluTanh`].
pub(crate) struct GeluTanh;

#[inline(always)]
pub(crate) fn sigmoid<E: Element>(x: E) -> E {
    E::ONE / (E::ONE + (-x).exp())
}

impl Curve for Sigmoid {
    #[inline(always)]
    fn at<E: Element>(x: E) -> E {
        sigmoid(x)
    }
    #[inline(always)]
    fn with_slope<E: Element>(x: E) -> (E, E) {
        let s = sigmoid(x);
        (s, s * (E::ONE - s))
    }
}

impl Curve for Silu {
    #[inline(always)]
    fn at<E: Element>(x: E) -> E {
        x * sigmoid(x)
    }
    #[inline(always)]
    fn with_slope<E: Element>(x: E) -> (E, E) {
        let s = sigmoid(x);
        (x * s, s * (E::ONE + x * (E::ONE - s)))
    }
}

/// Written as `x · σ(z)`, `z = 2 √(2/π) (x + 0.044715 x³)`, in which nothing cancels for negative `x`.
impl Curve for GeluTanh {
    #[inline(always)]
    fn at<E: Element>(x: E) -> E {
        Self::with_slope(x).0
    }
    #[inline(always)]
    fn with_slope<E: Element>(x: E) -> (E, E) {
        // Beyond, the result is 0 or x to the last bit of a double; within, `e^-z` is no infinity.
        let end = E::from_f64(20.0);
        let x = if x < -end { -end } else { x };
        let bounded = if x > end { end } else { x };
        let factor = E::from_f64(2.0 * (2.0 * std::f64::consts::FRAC_1_PI).sqrt());
        let cubic = E::from_f64(0.044_715) * bounded * bounded;
        let inverse = (-(factor * bounded * (E::ONE + cubic))).exp();
        let s = E::ONE / (E::ONE + inverse);
        let slope_of_z = factor * (E::ONE + E::from_f64(3.0) * cubic);
        (x * s, s + bounded * s * (s * inverse) * slope_of_z)
    }
}

fn bend<C: Curve>(x: &Var) -> Var {
    let saved = x.value().clone();
    let recompute = saved.clone();
    let value = forward::<C>(&saved);
    Var::computed(value, &[x], move |mut gradient, parents| {
        let _part = crate::profile::part("activation backward");
        dispatch!(gradient.dtype(), |E| {
            for_each_chunk(
                gradient.data_mut::<E>(),
                saved.data::<E>(),
                #[inline(always)]
                |gradient, x| {
                    for (g, &x) in gradient.iter_mut().zip(x) {
                        *g *= C::with_slope(x).1;
                    }
                },
            );
        });
        parents.add(0, gradient);
    })
    .with_recipe(move || forward::<C>(&recompute))
}

fn forward<C: Curve>(x: &Tensor) -> Tensor {
    let _part = crate::profile::part("activation");
    dispatch!(x.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(x.len());
        for_each_chunk(
            &mut out,
            x.data::<E>(),
            #[inline(always)]
            |out, x| {
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = C::at(x);
                }
            },
        );
        Tensor::new(out, x.shape())
    })
}

/// `max(x, 0)`.
pub fn relu(x: &Var) -> Var {
    pointwise(x, |x| x.max(0.0), |y| if y > 0.0 { 1.0 } else { 0.0 })
}

/// `tanh(x)`.
pub fn tanh(x: &Var) -> Var {
    pointwise(x, f64::tanh, |y| 1.0 - y * y)
}

/// `y = f(x)`, where `derivative` gives `f'(x)` from `y`.
fn pointwise(x: &Var, f: fn(f64) -> f64, derivative: fn(f64) -> f64) -> Var {
    let y = x.value();
    let y = dispatch!(y.dtype(), |E| {
        let values: Vec<E> = y.data::<E>().iter().map(|&x| f(x.to_f64()) as E).collect();
        Tensor::new(values, y.shape())
    });
    let saved = y.clone();
    Var::computed(y, &[x], move |mut gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            for (g, &y) in gradient.data_mut::<E>().iter_mut().zip(saved.data::<E>()) {
                *g *= derivative(y.to_f64()) as E;
            }
        });
        parents.add(0, gradient);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[3, 4]], |x| relu(&x[0]));
        check::gradients(&[&[3, 4]], |x| tanh(&x[0]));
        check::gradients(&[&[0, 4]], |x| tanh(&relu(&x[0])));
    }

    const ALL: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

    #[test]
    fn gradients_of_activations_match_finite_differences() {
        for activation in ALL {
            for shape in [&[3, 7][..], &[0, 4], &[2, 64]] {
                check::gradients(&[shape], |x| {
                    activate(&crate::ops::elementwise::scale(&x[0], 5.0), activation)
                });
            }
        }
    }

    #[test]
    fn activations_in_f32_agree_with_f64() {
        for activation in ALL {
            check::f32_agrees(&[&[37, 1000]], 1e-6, |x| {
                activate(&crate::ops::elementwise::scale(&x[0], 6.0), activation)
            });
        }
    }

    #[test]
    fn activations_are_those_of_the_definition() {
        let x: Vec<f64> = (-300..300).map(|i| f64::from(i) / 37.0).collect();
        let given = Var::constant(Tensor::from_f64(crate::DType::F64, &x, [600]));
        let [silu, gelu] = ALL.map(|activation| activate(&given, activation).value().to_f64());
        for ((x, silu), gelu) in x.into_iter().zip(silu).zip(gelu) {
            assert!((silu - x / (1.0 + (-x).exp())).abs() < 1e-14);
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            assert!((gelu - 0.5 * x * (1.0 + inner.tanh())).abs() < 1e-14, "{x}");
        }
    }

    #[test]
    fn extreme_inputs_stay_finite() {
        let x: [f64; 9] = [-3e37, -1e20, -1e4, -90.0, 0.0, 90.0, 1e4, 1e20, 3e37];
        for dtype in [crate::DType::F32, crate::DType::F64] {
            let x = Var::leaf(Tensor::from_f64(dtype, &x, [9]));
            for activation in ALL {
                let y = activate(&x, activation);
                let ones = Tensor::from_f64(dtype, &[1.0; 9], [9]);
                let slope = y.backward_from(ones).get(&x).unwrap().to_f64();
                assert!(y.value().is_finite());
                assert_eq!(y.value().to_f64()[5..], x.value().to_f64()[5..]);
                assert_eq!(slope[4..], [0.5, 1.0, 1.0, 1.0, 1.0]);
                assert!(slope[1..4].iter().all(|slope| slope.abs() < 1e-10), "{slope:?}");
            }
        }
        let wrong = Var::constant(Tensor::new(vec![f32::NAN], [1]));
        assert!(ALL.iter().all(|&activation| activate(&wrong, activation).value().item().is_nan()));
    }

    #[test]
    fn activations_can_be_recomputed() {
        let x = &check::leaves(&[&[3, 5]])[0];
        for activation in ALL {
            let y = activate(x, activation);
            let crate::graph::Saved::Recipe(recipe) = y.save() else { panic!("a recipe") };
            assert_eq!(recipe().to_f64(), y.value().to_f64());
        }
    }

    #[test]
    fn values_are_those_of_the_definition() {
        let x = check::inputs(&[&[10]]);
        for ((x, relu), tanh) in x[0]
            .value()
            .to_f64()
            .into_iter()
            .zip(relu(&x[0]).value().to_f64())
            .zip(tanh(&x[0]).value().to_f64())
        {
            assert_eq!((relu, tanh), (if x > 0.0 { x } else { 0.0 }, x.tanh()));
        }
    }
}

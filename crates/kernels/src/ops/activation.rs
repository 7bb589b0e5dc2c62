//! Pointwise functions of small learned networks: `relu(x) = max(x, 0)` and `tanh(x)`.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::tensor::Tensor;

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

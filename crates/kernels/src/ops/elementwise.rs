//! `a + b` and `factor · a`.

use crate::graph::Var;
use crate::tensor::Tensor;

/// `a + b` for equal shapes. Works in the storage of `b` when nobody else holds it, so pass the
/// freshly computed operand second.
pub fn add(a: &Var, b: Var) -> Var {
    let (mut sum, b) = b.take();
    sum.add_assign(a.value());
    Var::computed(sum, &[a, &b], |gradient, parents| {
        parents.add(1, gradient.clone());
        parents.add(0, gradient);
    })
}

/// `factor · a`.
pub fn scale(a: &Var, factor: f64) -> Var {
    let scaled = |tensor: &Tensor| {
        let mut out = tensor.clone();
        out.scale(factor);
        out
    };
    Var::computed(scaled(a.value()), &[a], move |gradient, parents| {
        let mut gradient = gradient;
        gradient.scale(factor);
        parents.add(0, gradient);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[2, 3], &[2, 3]], |x| add(&scale(&x[0], -1.5), x[1].clone()));
        check::gradients(&[&[4]], |x| add(&x[0], x[0].clone()));
    }
}

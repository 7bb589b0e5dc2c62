//! `y = x Wᵀ + b` with gradients for all three, for the small networks that are trained whole.

use crate::dispatch;
use crate::graph::Var;
use crate::matmul::Mat;
use crate::ops::product::{add_product, column_sums, product};
use crate::simd;
use crate::tensor::Tensor;

/// `x: [T, in]`, `weight: [out, in]`, `bias: [out]`, giving `[T, out]`.
///
/// # Panics
/// If the widths disagree.
pub fn linear(x: &Var, weight: &Var, bias: Option<&Var>) -> Var {
    on_device!(low_rank::linear(x, weight, bias));
    let mut y = product(x.value(), weight.value());
    if let Some(bias) = bias {
        assert_eq!(bias.value().len(), y.cols(), "the bias has another width");
        let width = y.cols().max(1);
        dispatch!(y.dtype(), |E| {
            for row in y.data_mut::<E>().chunks_exact_mut(width) {
                simd::add_scaled(1.0, bias.value().data::<E>(), row);
            }
        });
    }
    let none = Var::constant(Tensor::zeros(y.dtype(), [0]));
    let (saved_x, saved_weight) = (x.save(), weight.value().clone());
    Var::computed(y, &[x, weight, bias.unwrap_or(&none)], move |gradient, parents| {
        let (rows, outputs, inputs) = (gradient.rows(), gradient.cols(), saved_weight.cols());
        dispatch!(gradient.dtype(), |E| {
            if parents.needs(2) {
                parents.add(2, column_sums::<E>(gradient.data::<E>(), outputs));
            }
            let dy = Mat::new(gradient.data::<E>(), rows, outputs);
            if parents.needs(1) {
                let x = saved_x.get();
                let x = Mat::new(x.data::<E>(), rows, inputs);
                add_product(parents, 1, [outputs, inputs], dy.t(), x);
            }
            if parents.needs(0) {
                let weight = Mat::new(saved_weight.data::<E>(), outputs, inputs);
                add_product(parents, 0, [rows, inputs], dy, weight);
            }
        });
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[4, 3], &[5, 3], &[5]], |v| linear(&v[0], &v[1], Some(&v[2])));
        check::gradients(&[&[4, 3], &[3, 3]], |v| linear(&linear(&v[0], &v[1], None), &v[1], None));
        check::gradients(&[&[1, 1], &[2, 1], &[2]], |v| linear(&v[0], &v[1], Some(&v[2])));
    }
}

//! `g = −e^A · softplus(a + b_dt)` and `β = σ(b)`: how much of its state a head keeps at a token, and how
//! much of the difference to the token's value it writes.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::ops::activation::sigmoid;
use crate::tensor::{Tensor, TensorElement};

/// Above it `softplus(x) = x`, as PyTorch has it; what is left out is below `2.1e-9`.
const LINEAR_FROM: f64 = 20.0;

/// The decay `g ≤ 0` (a logarithm) and the rate `β` in `(0, 1)`, both `[T, value_heads]`, from the
/// projections `a, b: [T, value_heads]` and the learned `a_log, dt_bias: [value_heads]`. Gradients for all
/// four.
///
/// # Panics
/// If the extents disagree.
pub fn decay_and_beta(a: &Var, b: &Var, a_log: &Var, dt_bias: &Var) -> (Var, Var) {
    assert_eq!(a.value().shape(), b.value().shape(), "the projections differ in shape");
    for learned in [a_log, dt_bias] {
        assert_eq!(learned.value().len(), a.value().cols(), "one learned number per value head");
    }
    (decay(a, a_log, dt_bias), beta(b))
}

fn softplus(x: f64) -> f64 {
    if x > LINEAR_FROM { x } else { x.exp().ln_1p() }
}

/// `e^A` rounded to the type that is computed in, as PyTorch has it: a file that holds `−e^A` in place of
/// `A` then means the very same.
fn rate<E: TensorElement>(a_log: f64) -> f64 {
    E::from_f64(a_log.exp()).to_f64()
}

/// `softplus'`.
fn softplus_slope(x: f64) -> f64 {
    if x > LINEAR_FROM { 1.0 } else { sigmoid(x) }
}

/// `f(a_th + b_h, A_h)` for every token `t` and head `h`. There are few numbers, so all are computed in
/// double precision.
fn of_heads<E: TensorElement>(
    a: &Tensor,
    a_log: &Tensor,
    dt_bias: &Tensor,
    f: fn(f64, f64) -> f64,
) -> Vec<E> {
    let (a_log, dt_bias) = (a_log.to_f64(), dt_bias.to_f64());
    let rows = a.data::<E>().chunks_exact(a.cols().max(1));
    rows.flat_map(|row| row.iter().zip(&dt_bias).zip(&a_log))
        .map(|((&a, bias), &a_log)| E::from_f64(f(a.to_f64() + bias, a_log)))
        .collect()
}

fn decay(a: &Var, a_log: &Var, dt_bias: &Var) -> Var {
    let [input, log, bias] = [a, a_log, dt_bias].map(|x| x.value().clone());
    let value = dispatch!(input.dtype(), |E| {
        let of = |x: f64, a_log: f64| -rate::<E>(a_log) * softplus(x);
        Tensor::new(of_heads::<E>(&input, &log, &bias, of), input.shape())
    });
    let decay = value.clone();
    Var::computed(value, &[a, a_log, dt_bias], move |mut gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            if parents.needs(1) {
                // dg/dA is g itself.
                let sums = sums_over_rows::<E>(&gradient, |i, dg| dg * decay.data::<E>()[i]);
                parents.add(1, Tensor::new(sums, log.shape()));
            }
            let slope = |x: f64, a_log: f64| -rate::<E>(a_log) * softplus_slope(x);
            let slopes = of_heads::<E>(&input, &log, &bias, slope);
            for (dg, slope) in gradient.data_mut::<E>().iter_mut().zip(slopes) {
                *dg *= slope;
            }
            if parents.needs(2) {
                let sums = sums_over_rows::<E>(&gradient, |_, da| da);
                parents.add(2, Tensor::new(sums, bias.shape()));
            }
        });
        parents.add(0, gradient);
    })
}

/// `Σ_t f(index, x_th)` of every column.
fn sums_over_rows<E: TensorElement>(x: &Tensor, f: impl Fn(usize, E) -> E) -> Vec<E> {
    let mut sums = vec![E::ZERO; x.cols()];
    for (index, &x) in x.data::<E>().iter().enumerate() {
        let column = index % sums.len();
        sums[column] += f(index, x);
    }
    sums
}

fn beta(b: &Var) -> Var {
    let value = dispatch!(b.value().dtype(), |E| {
        let values = b.value().data::<E>().iter();
        let values: Vec<E> = values.map(|&b| E::from_f64(sigmoid(b.to_f64()))).collect();
        Tensor::new(values, b.value().shape())
    });
    let beta = value.clone();
    Var::computed(value, &[b], move |mut gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            for (d, &beta) in gradient.data_mut::<E>().iter_mut().zip(beta.data::<E>()) {
                *d *= beta * (E::ONE - beta);
            }
        });
        parents.add(0, gradient);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::element::DType;
    use crate::ops::rows::join_columns;

    fn both(x: &[Var]) -> Var {
        let (decay, beta) = decay_and_beta(&x[0], &x[1], &x[2], &x[3]);
        join_columns(&decay, &beta)
    }

    #[test]
    fn gradients_match_finite_differences() {
        for [rows, heads] in [[1, 1], [5, 3], [0, 2]] {
            check::gradients(&[&[rows, heads], &[rows, heads], &[heads], &[heads]], both);
        }
    }

    #[test]
    fn f32_agrees_with_f64() {
        check::f32_agrees(&[&[70, 4], &[70, 4], &[4], &[4]], 1e-6, both);
    }

    #[test]
    fn large_and_small_inputs_give_the_limits() {
        let a = Tensor::new(vec![-1e4, -700.0, -50.0, 0.0, 20.5, 1e4], [6, 1]);
        for dtype in [DType::F64, DType::F32] {
            let a = Var::leaf(a.to_dtype(dtype));
            let zero = Var::constant(Tensor::zeros(dtype, [1]));
            let (decay, beta) = decay_and_beta(&a, &a, &zero, &zero);
            assert!(beta.value().is_finite());
            let g = decay.value().to_f64();
            assert_eq!((g[0], g[4], g[5]), (0.0, -20.5, -1e4));
            assert!((g[2] / -(-50.0_f64).exp() - 1.0).abs() < 1e-6);
            assert!((g[3] + std::f64::consts::LN_2).abs() < 1e-7);
            let ones = Tensor::from_f64(dtype, &[1.0; 6], [6, 1]);
            let gradient = decay.backward_from(ones).take(&a).unwrap();
            assert!(gradient.is_finite());
            assert_eq!(gradient.to_f64()[5], -1.0);
        }
    }
}

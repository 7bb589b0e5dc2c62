//! Sparse gates: the `k` largest of each token's, and the balance of the load they make.
//!
//! ```text
//! w_i = p_i / Σ_{j in K} p_j  for i in K, else 0       K: the k largest of p, p = softmax(s)
//! L = N Σ_i f_i P_i           f_i = mean_t 1[i in K_t],  P_i = mean_t p_ti
//! ```
//!
//! `w` is the softmax over the `k` largest scores alone (Shazeer et al., arXiv 1701.06538). `L` is
//! the balance of Fedus et al., arXiv 2101.03961, counted over `k` choices as Mixtral's published
//! code does; at even load it is `k`. `f` counts, so gradients go through `P`.
//!
//! Gates that are not kept get no gradient from `w`. With the straight-through estimator (Bengio et al.,
//! arXiv 1308.3432) the choice counts as the identity on the way back, so that they learn what they would
//! have been worth.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::tensor::{Tensor, TensorElement};

/// Whether gate `i` of `row` is among its `k` largest; of equal ones the earlier count as larger.
fn is_kept<E: TensorElement>(row: &[E], i: usize, k: usize) -> bool {
    let before = row.iter().enumerate().filter(|&(j, &p)| p > row[i] || (p == row[i] && j < i));
    before.count() < k
}

/// The `k` largest gates of every row of `gates: [T, N]`, rescaled to sum to 1; the others are zero.
///
/// # Panics
/// If `k` is zero.
pub fn keep_largest(gates: &Var, k: usize) -> Var {
    assert!(k > 0, "at least one gate is kept");
    let saved = gates.value().clone();
    let experts = saved.cols();
    let value = dispatch!(saved.dtype(), |E| {
        let mut out = saved.clone();
        let rows = out.data_mut::<E>().chunks_exact_mut(experts);
        for (out, row) in rows.zip(saved.data::<E>().chunks_exact(experts)) {
            let total: E = (0..experts).filter(|&i| is_kept(row, i, k)).map(|i| row[i]).sum();
            for i in 0..experts {
                out[i] = if is_kept(row, i, k) { row[i] / total } else { 0.0 };
            }
        }
        out
    });
    let kept = value.clone();
    Var::computed(value, &[gates], move |mut gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            let rows = gradient.data_mut::<E>().chunks_exact_mut(experts);
            let pairs =
                saved.data::<E>().chunks_exact(experts).zip(kept.data::<E>().chunks_exact(experts));
            for (d, (row, w)) in rows.zip(pairs) {
                let total: E = (0..experts).filter(|&i| is_kept(row, i, k)).map(|i| row[i]).sum();
                let mean: E = d.iter().zip(w).map(|(&d, &w)| d * w).sum();
                for i in 0..experts {
                    d[i] = if is_kept(row, i, k) { (d[i] - mean) / total } else { 0.0 };
                }
            }
        });
        parents.add(0, gradient);
    })
}

/// The same with gradients straight through: those of `w` are those of all gates.
///
/// # Panics
/// If `k` is zero.
pub fn keep_largest_straight_through(gates: &Var, k: usize) -> Var {
    let value = keep_largest(&gates.detach(), k).into_value();
    Var::computed(value, &[gates], |gradient, parents| parents.add(0, gradient))
}

/// `N Σ_i f_i P_i` over all rows of `gates: [T, N]`, shape `[1]`, where each row goes to its `k`
/// largest.
pub fn load_balance(gates: &Var, k: usize) -> Var {
    let saved = gates.value();
    let (tokens, experts, dtype) = (saved.rows(), saved.cols(), saved.dtype());
    let mut counts = vec![0.0_f64; experts];
    let mut means = vec![0.0_f64; experts];
    dispatch!(dtype, |E| {
        for row in saved.data::<E>().chunks_exact(experts) {
            for i in 0..experts {
                counts[i] += f64::from(u8::from(is_kept(row, i, k)));
                means[i] += row[i].to_f64();
            }
        }
    });
    let count = tokens.max(1) as f64;
    let total: f64 = counts.iter().zip(&means).map(|(f, p)| f / count * (p / count)).sum();
    let value = Tensor::scalar(dtype, experts as f64 * total);
    Var::computed(value, &[gates], move |gradient, parents| {
        let factor = gradient.item() * experts as f64 / (count * count);
        let row: Vec<f64> = counts.iter().map(|f| f * factor).collect();
        parents.add(0, Tensor::from_f64(dtype, &row.repeat(tokens), [tokens, experts]));
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check;
    use crate::ops::elementwise::add;
    use crate::ops::low_rank::router_gates;

    #[test]
    fn gradients_match_finite_differences() {
        for k in 1..=4 {
            check::gradients(&[&[6, 5], &[4, 5]], |v| {
                keep_largest(&router_gates(&v[0], &v[1], None), k)
            });
            check::gradients(&[&[6, 5], &[4, 5]], |v| {
                load_balance(&router_gates(&v[0], &v[1], None), k)
            });
        }
    }

    /// What is kept differs from the gates by a constant to the gradient.
    #[test]
    fn gradients_go_straight_through_the_choice() {
        let run = |straight: bool| {
            let v = check::leaves(&[&[6, 5], &[4, 5]]);
            let gates = router_gates(&v[0], &v[1], None);
            let kept = match straight {
                true => keep_largest_straight_through(&gates, 2),
                false => {
                    let mut apart = gates.value().clone();
                    apart.scale(-1.0);
                    apart.add_assign(keep_largest(&gates.detach(), 2).value());
                    add(&Var::constant(apart), gates.clone())
                }
            };
            let seed: Vec<f64> = (0..24).map(|i| (f64::from(i) * 0.7).sin()).collect();
            let gradients = kept.backward_from(Tensor::from_f64(DType::F64, &seed, [6, 4]));
            let of = |at: usize| gradients.get(&v[at]).unwrap().to_f64();
            (kept.value().to_f64(), of(0), of(1))
        };
        let (found, wanted) = (run(true), run(false));
        let pairs = [(found.0, wanted.0), (found.1, wanted.1), (found.2, wanted.2)];
        for (found, wanted) in pairs {
            assert_eq!(found.len(), wanted.len());
            assert!(found.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-12));
        }
    }

    #[test]
    fn the_largest_are_kept_and_sum_to_one() {
        let gates =
            Tensor::from_f64(DType::F64, &[0.1, 0.4, 0.2, 0.3, 0.25, 0.25, 0.25, 0.25], [2, 4]);
        let kept = keep_largest(&Var::constant(gates), 2).value().to_f64();
        let expected = [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0, 0.5, 0.5, 0.0, 0.0];
        for (got, want) in kept.iter().zip(expected) {
            assert!((got - want).abs() < 1e-15, "{kept:?}");
        }
    }

    #[test]
    fn even_load_costs_k_and_one_busy_expert_up_to_their_number() {
        let even = Tensor::from_f64(DType::F64, &[0.4, 0.3, 0.2, 0.1, 0.1, 0.2, 0.3, 0.4], [2, 4]);
        assert!((load_balance(&Var::constant(even), 2).value().item() - 2.0).abs() < 1e-12);
        let one = Tensor::from_f64(DType::F64, &[1.0, 0.0, 0.0, 0.0].repeat(3), [3, 4]);
        assert!((load_balance(&Var::constant(one), 1).value().item() - 4.0).abs() < 1e-12);
    }
}

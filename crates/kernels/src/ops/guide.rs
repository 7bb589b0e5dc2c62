//! How far gates are from the expert that a row was given, as a differentiable number:
//!
//! ```text
//! L = mean over guided rows t of −ln w_{t, c(t)}
//! ```
//!
//! the cross-entropy of a router's softmax `w` against the experts `c`.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::tensor::Tensor;

/// The smallest gate that counts, so that one that came out as zero costs much and not infinitely much.
const LEAST: f64 = f32::MIN_POSITIVE as f64;

/// The mean cross-entropy of `gates: [T, N]` against one expert for each row, shape `[1]`. A row
/// whose target is none of the `N` experts is left out; without any row it is 0.
///
/// # Panics
/// If there are not as many targets as rows.
pub fn cross_entropy_to(gates: &Var, targets: &[u32]) -> Var {
    let (rows, experts, dtype) =
        (gates.value().rows(), gates.value().cols(), gates.value().dtype());
    assert_eq!(targets.len(), rows, "one target per row");
    let guided: Vec<(usize, usize)> = (targets.iter().enumerate())
        .filter(|(_, target)| (**target as usize) < experts)
        .map(|(row, &target)| (row * experts + target as usize, row))
        .collect();
    let values = gates.value().to_f64();
    let count = guided.len().max(1) as f64;
    let gate = |at: usize| values[at].max(LEAST);
    let total: f64 = guided.iter().map(|&(at, _)| -gate(at).ln()).sum();
    let slopes: Vec<(usize, f64)> =
        guided.iter().map(|&(at, _)| (at, -1.0 / (gate(at) * count))).collect();
    Var::computed(Tensor::scalar(dtype, total / count), &[gates], move |gradient, parents| {
        let upstream = gradient.item();
        let mut out = Tensor::zeros(dtype, [rows, experts]);
        dispatch!(dtype, |E| {
            let data = out.data_mut::<E>();
            for (at, slope) in &slopes {
                data[*at] = E::from_f64(upstream * slope);
            }
        });
        parents.add(0, out);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check;
    use crate::ops::low_rank::router_gates;

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[5, 3], &[4, 3]], |v| {
            cross_entropy_to(&router_gates(&v[0], &v[1], None), &[3, 0, 7, 2, 0])
        });
        check::gradients(&[&[2, 3], &[1, 3]], |v| {
            cross_entropy_to(&router_gates(&v[0], &v[1], None), &[0, u32::MAX])
        });
    }

    #[test]
    fn it_is_the_mean_over_the_rows_that_have_an_expert() {
        let gates = Tensor::from_f64(DType::F64, &[0.5, 0.5, 0.25, 0.75, 1.0, 0.0], [3, 2]);
        let gates = Var::leaf(gates);
        let of = |targets: &[u32]| cross_entropy_to(&gates, targets).value().item();
        assert!((of(&[0, 1, 2]) - (0.5_f64.ln() + 0.75_f64.ln()) / -2.0).abs() < 1e-15);
        assert_eq!(of(&[9, 9, 0]), 0.0);
        assert_eq!(of(&[9, 9, 9]), 0.0);
        let shut = cross_entropy_to(&gates, &[9, 9, 1]);
        assert!(shut.value().item() > 80.0 && shut.value().is_finite());
        assert!(shut.backward().iter().all(Tensor::is_finite));
    }
}

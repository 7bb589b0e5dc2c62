//! How unevenly routers load their experts, as a differentiable number:
//!
//! ```text
//! z_se = c_se Σ_{t in sequence s} w_te          L = var(z) / (mean(z)² + 1e-10)
//! ```
//!
//! with the unbiased variance over all `S · N` entries. The constants `c` say which expert should
//! carry more of which sequence.

use crate::dispatch;
use crate::graph::Var;
use crate::tensor::Tensor;

/// Keeps the quotient finite when no gate is open.
const EPSILON: f64 = 1e-10;

/// The squared coefficient of variation of `gates: [T, N]` summed over each sequence, a tensor of
/// shape `[1]`. `offsets` has one entry more than there are sequences and ends at `T`; `constants`
/// is `[S · N]`, row-major. A single entry has no variation.
///
/// # Panics
/// If the extents disagree.
pub fn squared_variation(gates: &Var, offsets: &[usize], constants: &[f64]) -> Var {
    let (rows, experts, dtype) =
        (gates.value().rows(), gates.value().cols(), gates.value().dtype());
    let sequences = offsets.len() - 1;
    assert_eq!(offsets.last(), Some(&rows), "offsets end at the rows");
    assert_eq!(constants.len(), sequences * experts, "one constant per sequence and expert");
    let values = gates.value().to_f64();
    let mut z = vec![0.0; sequences * experts];
    for (sequence, w) in offsets.windows(2).enumerate() {
        let z = &mut z[sequence * experts..(sequence + 1) * experts];
        for row in values[w[0] * experts..w[1] * experts].chunks_exact(experts) {
            for (z, w) in z.iter_mut().zip(row) {
                *z += w;
            }
        }
    }
    for (z, c) in z.iter_mut().zip(constants) {
        *z *= c;
    }
    let count = z.len() as f64;
    let mean = z.iter().sum::<f64>() / count;
    let spread: f64 = z.iter().map(|z| (z - mean).powi(2)).sum();
    let variance = if z.len() > 1 { spread / (count - 1.0) } else { 0.0 };
    let scale = mean * mean + EPSILON;

    let (offsets, constants) = (offsets.to_vec(), constants.to_vec());
    Var::computed(Tensor::scalar(dtype, variance / scale), &[gates], move |gradient, parents| {
        let upstream = gradient.item();
        // dL/dz of sequence and expert, times the constant that leads to the sum of gates.
        let dz: Vec<f64> = z
            .iter()
            .zip(&constants)
            .map(|(z, c)| {
                let of_variance =
                    if count > 1.0 { 2.0 * (z - mean) / (count - 1.0) / scale } else { 0.0 };
                let of_mean = 2.0 * variance * mean / (count * scale * scale);
                upstream * c * (of_variance - of_mean)
            })
            .collect();
        let mut out = Tensor::zeros(dtype, [rows, experts]);
        dispatch!(dtype, |E| {
            let data = out.data_mut::<E>();
            for (sequence, w) in offsets.windows(2).enumerate() {
                let dz = &dz[sequence * experts..(sequence + 1) * experts];
                for row in data[w[0] * experts..w[1] * experts].chunks_exact_mut(experts) {
                    for (g, dz) in row.iter_mut().zip(dz) {
                        *g = *dz as E;
                    }
                }
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

    #[test]
    fn gradients_match_finite_differences() {
        // Positive sums, as gates have: the quotient is steep around a mean of zero.
        let positive = |x: &Var| {
            let ones = Tensor::from_f64(DType::F64, &[2.0; 15], [5, 3]);
            crate::ops::elementwise::add(&Var::constant(ones), x.clone())
        };
        let constants = [1.1, 0.9, 0.9, 0.9, 1.1, 1.0];
        check::gradients(&[&[5, 3]], |x| {
            squared_variation(&positive(&x[0]), &[0, 2, 5], &constants)
        });
        check::gradients(&[&[4, 1]], |x| squared_variation(&x[0], &[0, 4], &[1.0]));
    }

    #[test]
    fn even_loads_cost_nothing_and_uneven_ones_their_variation() {
        let even = Var::constant(Tensor::from_f64(DType::F64, &[0.5; 8], [4, 2]));
        assert_eq!(squared_variation(&even, &[0, 2, 4], &[1.0; 4]).value().item(), 0.0);
        let uneven = Var::constant(Tensor::from_f64(DType::F64, &[1.0, 0.0, 0.5, 0.5], [2, 2]));
        // z = 1, 0, 0.5, 0.5: mean 0.5, variance 0.5 / 3.
        let found = squared_variation(&uneven, &[0, 1, 2], &[1.0; 4]).value().item();
        assert!((found - 0.5 / 3.0 / 0.25).abs() < 1e-8, "{found}");
    }
}

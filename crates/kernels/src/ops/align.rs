//! How far apart groups of rows lie, as Gaussians with a variance for each column:
//!
//! ```text
//! L = mean over pairs p < q of  ¼ Σ_k [ v_p/v_q + v_q/v_p + (μ_p − μ_q)² (1/v_p + 1/v_q) − 2 ]
//! ```
//!
//! the mean of both Kullback-Leibler divergences, with `μ` and the unbiased `v + 1e-8` of a group's rows.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::tensor::Tensor;

/// Keeps the quotients finite.
const EPSILON: f64 = 1e-8;

/// Mean and variance of each column over a group's rows.
struct Group {
    rows: Vec<usize>,
    mean: Vec<f64>,
    variance: Vec<f64>,
}

impl Group {
    fn new(values: &[f64], width: usize, rows: Vec<usize>) -> Self {
        let count = rows.len() as f64;
        let mut mean = vec![0.0; width];
        let mut variance = vec![0.0; width];
        let row = |at: &usize| &values[at * width..(at + 1) * width];
        for at in &rows {
            mean.iter_mut().zip(row(at)).for_each(|(mean, value)| *mean += value / count);
        }
        for at in &rows {
            for ((variance, value), mean) in variance.iter_mut().zip(row(at)).zip(&mean) {
                *variance += (value - mean).powi(2) / (count - 1.0);
            }
        }
        variance.iter_mut().for_each(|variance| *variance += EPSILON);
        Self { rows, mean, variance }
    }
}

/// The mean divergence between every two groups of the rows of `z: [T, r]`, shape `[1]`; `groups` has the
/// group of each row. Groups of a single row count for nothing; without two groups it is 0.
///
/// # Panics
/// If there are not as many groups as rows.
pub fn divergence(z: &Var, groups: &[u32]) -> Var {
    let (rows, width, dtype) = (z.value().rows(), z.value().cols(), z.value().dtype());
    assert_eq!(groups.len(), rows, "one group per row");
    let values = z.value().to_f64();
    let mut names: Vec<u32> = groups.to_vec();
    names.sort_unstable();
    names.dedup();
    let members = |name: &u32| -> Vec<usize> {
        groups.iter().enumerate().filter(|(_, group)| *group == name).map(|(at, _)| at).collect()
    };
    let found: Vec<Group> = (names.iter().map(members))
        .filter(|rows| rows.len() > 1)
        .map(|rows| Group::new(&values, width, rows))
        .collect();
    let pairs = (found.len() * found.len().saturating_sub(1) / 2).max(1) as f64;
    let mut total = 0.0;
    // Of the means and of the variances of each group.
    let mut slopes = vec![(vec![0.0; width], vec![0.0; width]); found.len()];
    for (i, p) in found.iter().enumerate() {
        for (j, q) in found.iter().enumerate().skip(i + 1) {
            for k in 0..width {
                let (vp, vq, apart) = (p.variance[k], q.variance[k], p.mean[k] - q.mean[k]);
                let both = 1.0 / vp + 1.0 / vq;
                total += 0.25 * (vp / vq + vq / vp + apart * apart * both - 2.0);
                slopes[i].0[k] += 0.5 * apart * both;
                slopes[j].0[k] -= 0.5 * apart * both;
                slopes[i].1[k] += 0.25 * (1.0 / vq - (vq + apart * apart) / (vp * vp));
                slopes[j].1[k] += 0.25 * (1.0 / vp - (vp + apart * apart) / (vq * vq));
            }
        }
    }
    Var::computed(Tensor::scalar(dtype, total / pairs), &[z], move |gradient, parents| {
        let upstream = gradient.item() / pairs;
        let mut out = Tensor::zeros(dtype, [rows, width]);
        dispatch!(dtype, |E| {
            let data = out.data_mut::<E>();
            for (group, (of_mean, of_variance)) in found.iter().zip(&slopes) {
                let count = group.rows.len() as f64;
                for &row in &group.rows {
                    for k in 0..width {
                        let away = values[row * width + k] - group.mean[k];
                        let slope =
                            of_mean[k] / count + of_variance[k] * 2.0 * away / (count - 1.0);
                        data[row * width + k] = E::from_f64(upstream * slope);
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
        check::gradients(&[&[9, 3]], |v| divergence(&v[0], &[0, 1, 0, 2, 1, 2, 0, 7, 1]));
        check::gradients(&[&[4, 2]], |v| divergence(&v[0], &[5, 3, 5, 3]));
        check::gradients(&[&[3, 2]], |v| divergence(&v[0], &[5, 3, 5]));
    }

    #[test]
    fn it_is_the_mean_of_both_divergences() {
        // Group 0: 0, 2 (mean 1, variance 2); group 1: 3, 7 (mean 5, variance 8).
        let z = Tensor::from_f64(DType::F64, &[0.0, 3.0, 2.0, 7.0], [4, 1]);
        let found = divergence(&Var::constant(z.clone()), &[0, 1, 0, 1]).value().item();
        let one = |vp: f64, vq: f64| 0.5 * ((vq / vp).ln() + vp / vq + 16.0 / vq - 1.0);
        assert!((found - 0.5 * (one(2.0, 8.0) + one(8.0, 2.0))).abs() < 1e-6, "{found}");
        let same = Tensor::from_f64(DType::F64, &[1.0, 1.0, 4.0, 4.0], [4, 1]);
        assert!(divergence(&Var::constant(same), &[0, 1, 0, 1]).value().item().abs() < 1e-12);
        assert_eq!(divergence(&Var::constant(z), &[0; 4]).value().item(), 0.0);
    }
}

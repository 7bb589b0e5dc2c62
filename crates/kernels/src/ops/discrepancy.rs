//! How far apart groups of rows lie, as distributions seen through Gaussian kernels:
//!
//! ```text
//! L = mean over pairs p < q of  k̄(p, p) + k̄(q, q) − 2 k̄(p, q)
//! k(x, y) = Σ_σ exp(−‖x − y‖² / 2σ)
//! ```
//!
//! the squared maximum mean discrepancy (Gretton et al., 2012), with the biased means `k̄` over all pairs of
//! rows, a row with itself too. The variances `σ` are nineteen from 10⁻⁶ to 10⁶, those of Bousmalis et al.,
//! Domain Separation Networks, arXiv 1608.06019, which Align-LoRA's published code has.

use crate::graph::Var;
use crate::tensor::Tensor;

/// The variances of the kernels, the widest first.
const VARIANCES: [f64; 19] = [
    1e6, 1e5, 1e4, 1e3, 100.0, 35.0, 30.0, 25.0, 20.0, 15.0, 10.0, 5.0, 1.0, 1e-1, 1e-2, 1e-3,
    1e-4, 1e-5, 1e-6,
];

/// Beyond this an exponential of the negative number is zero.
const NOTHING_LEFT: f64 = 745.0;

/// A row that is looked at, and the group it belongs to.
struct Member {
    row: usize,
    group: usize,
}

/// `k` at a squared distance, and `Σ_σ exp(−d/2σ)/σ`, of which its slope is made.
fn kernel(distance: f64) -> (f64, f64) {
    let (mut value, mut slope) = (0.0, 0.0);
    for variance in VARIANCES {
        let exponent = distance / (2.0 * variance);
        if exponent > NOTHING_LEFT {
            break;
        }
        let one = (-exponent).exp();
        value += one;
        slope += one / variance;
    }
    (value, slope)
}

/// The mean discrepancy between every two groups of the rows of `z: [T, r]`, shape `[1]`; `groups` has the
/// group of each row. Of a group of more rows than `most`, that many are looked at, evenly spaced. Groups of
/// a single row count for nothing; without two groups it is 0.
///
/// # Panics
/// If there are not as many groups as rows.
pub fn mean_discrepancy(z: &Var, groups: &[u32], most: usize) -> Var {
    let (rows, width, dtype) = (z.value().rows(), z.value().cols(), z.value().dtype());
    assert_eq!(groups.len(), rows, "one group per row");
    let values = z.value().to_f64();
    let mut names: Vec<u32> = groups.to_vec();
    names.sort_unstable();
    names.dedup();
    let (mut members, mut sizes) = (Vec::new(), Vec::new());
    for name in names {
        let all: Vec<usize> = (0..rows).filter(|&row| groups[row] == name).collect();
        let size = all.len().min(most);
        if size < 2 {
            continue;
        }
        let group = sizes.len();
        members.extend((0..size).map(|i| Member { row: all[i * all.len() / size], group }));
        sizes.push(size as f64);
    }
    let count = sizes.len() as f64;
    // What a pair of rows counts, in either order: each group's own mean occurs in all of its pairs.
    let weight = |a: &Member, b: &Member| match a.group == b.group {
        true => 2.0 / (count * sizes[a.group] * sizes[a.group]),
        false => -2.0 / (count * (count - 1.0) * sizes[a.group] * sizes[b.group]),
    };
    let (mut total, mut slopes) = (0.0, vec![0.0; members.len() * width]);
    if sizes.len() > 1 {
        let row = |member: &Member| &values[member.row * width..(member.row + 1) * width];
        let mut apart = vec![0.0; width];
        for (i, a) in members.iter().enumerate() {
            total += weight(a, a) * VARIANCES.len() as f64;
            for (j, b) in members.iter().enumerate().skip(i + 1) {
                let differences = row(a).iter().zip(row(b)).map(|(a, b)| a - b);
                apart.iter_mut().zip(differences).for_each(|(to, difference)| *to = difference);
                let (value, slope) = kernel(apart.iter().map(|d| d * d).sum());
                let both = 2.0 * weight(a, b);
                total += both * value;
                for (k, difference) in apart.iter().enumerate() {
                    slopes[i * width + k] -= both * slope * difference;
                    slopes[j * width + k] += both * slope * difference;
                }
            }
        }
    }
    let at: Vec<usize> = members.iter().map(|member| member.row).collect();
    Var::computed(Tensor::scalar(dtype, total), &[z], move |gradient, parents| {
        let upstream = gradient.item();
        let mut out = vec![0.0; rows * width];
        for (&row, slopes) in at.iter().zip(slopes.chunks_exact(width)) {
            let out = &mut out[row * width..(row + 1) * width];
            out.iter_mut().zip(slopes).for_each(|(out, slope)| *out = upstream * slope);
        }
        parents.add(0, Tensor::from_f64(dtype, &out, [rows, width]));
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        let groups = [0, 1, 0, 2, 1, 2, 0, 7, 1];
        check::gradients(&[&[9, 3]], |v| mean_discrepancy(&v[0], &groups, 9));
        check::gradients(&[&[9, 3]], |v| mean_discrepancy(&v[0], &groups, 2));
        check::gradients(&[&[4, 1]], |v| mean_discrepancy(&v[0], &[5, 3, 5, 3], 9));
        check::gradients(&[&[3, 2]], |v| mean_discrepancy(&v[0], &[5, 3, 5], 9));
    }

    /// The formula as it is written.
    fn plain(z: &[Vec<f64>], groups: &[u32]) -> f64 {
        let of = |name: u32| -> Vec<&Vec<f64>> {
            z.iter().zip(groups).filter(|(_, group)| **group == name).map(|(row, _)| row).collect()
        };
        let k = |x: &[f64], y: &[f64]| -> f64 {
            let distance: f64 = x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum();
            VARIANCES.iter().map(|variance| (-distance / (2.0 * variance)).exp()).sum()
        };
        let mean = |p: u32, q: u32| -> f64 {
            let (p, q) = (of(p), of(q));
            let all: f64 = p.iter().flat_map(|x| q.iter().map(|y| k(x, y))).sum();
            all / (p.len() * q.len()) as f64
        };
        let pairs = [(0, 1), (0, 2), (1, 2)];
        pairs.iter().map(|&(p, q)| mean(p, p) + mean(q, q) - 2.0 * mean(p, q)).sum::<f64>() / 3.0
    }

    #[test]
    fn it_is_the_formula() {
        let groups = [0, 1, 0, 2, 1, 2, 0];
        let z = check::inputs(&[&[7, 2]]).remove(0);
        let rows: Vec<Vec<f64>> = z.value().to_f64().chunks(2).map(<[f64]>::to_vec).collect();
        let found = mean_discrepancy(&z, &groups, 9).value().item();
        assert!((found - plain(&rows, &groups)).abs() < 1e-12, "{found}");
    }

    #[test]
    fn equal_groups_are_not_apart_and_far_ones_as_far_as_can_be() {
        let of = |values: &[f64], groups: &[u32]| {
            let z = Tensor::from_f64(DType::F64, values, [values.len(), 1]);
            mean_discrepancy(&Var::constant(z), groups, 64).value().item()
        };
        assert!(of(&[1.0, 1.0, 4.0, 4.0], &[0, 1, 0, 1]).abs() < 1e-12);
        // Each group a point: no kernel reaches from one to the other.
        assert!((of(&[0.0, 1e9, 0.0, 1e9], &[0, 1, 0, 1]) - 38.0).abs() < 1e-9);
        assert_eq!(of(&[1.0, 2.0, 3.0], &[0, 0, 1]), 0.0);
    }

    #[test]
    fn of_long_groups_rows_from_all_over_are_looked_at() {
        let values: Vec<f64> = (0..40).map(f64::from).collect();
        let z = Var::leaf(Tensor::from_f64(DType::F64, &values, [40, 1]));
        let groups: Vec<u32> = (0..40).map(|row| u32::from(row >= 20)).collect();
        let gradients = mean_discrepancy(&z, &groups, 4).backward();
        let gradient = gradients.get(&z).unwrap().to_f64();
        let looked_at: Vec<usize> = (0..40).filter(|&row| gradient[row] != 0.0).collect();
        assert_eq!(looked_at, [0, 5, 10, 15, 20, 25, 30, 35]);
    }
}

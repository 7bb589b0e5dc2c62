//! Matrices as points.

use faer::{Mat, Side};
use hydralora_kernels::Tensor;

/// Gives matrices coordinates `[n, n]`, the leading ones first, in which the distance of two points is
/// that of the flattened matrices, each scaled to length 1. Matrices of different shapes, or of different
/// kinds (the number beside each), share no coordinate: they count as orthogonal. A matrix of zeros lies
/// at the origin. Empty if the coordinates cannot be found.
pub fn coordinates(matrices: &[(usize, &Tensor)]) -> Vec<f32> {
    let count = matrices.len();
    if count == 0 {
        return Vec::new();
    }
    let mut products = Mat::<f64>::zeros(count, count);
    let mut left: Vec<usize> = (0..count).collect();
    while let Some(&first) = left.first() {
        let alike = |at: usize| {
            matrices[at].0 == matrices[first].0
                && matrices[at].1.shape() == matrices[first].1.shape()
        };
        let (group, rest): (Vec<usize>, Vec<usize>) = left.into_iter().partition(|&at| alike(at));
        left = rest;
        let rows: Vec<Vec<f64>> = group
            .iter()
            .map(|&at| {
                let mut values = matrices[at].1.to_f64();
                let norm = values.iter().map(|v| v * v).sum::<f64>().sqrt();
                if norm > 0.0 {
                    values.iter_mut().for_each(|v| *v /= norm);
                }
                values
            })
            .collect();
        let flat = Mat::from_fn(group.len(), matrices[first].1.len(), |i, j| rows[i][j]);
        let within = &flat * flat.transpose();
        for (i, &row) in group.iter().enumerate() {
            for (j, &column) in group.iter().enumerate() {
                products[(row, column)] = within[(i, j)];
            }
        }
    }
    // Rows of U √Λ have the same inner products as the matrices.
    let Ok(found) = products.self_adjoint_eigen(Side::Lower) else { return Vec::new() };
    let (vectors, values) = (found.U(), found.S().column_vector());
    let at = |row: usize, k: usize| {
        // Eigenvalues ascend.
        let from = count - 1 - k;
        (vectors[(row, from)] * values[from].max(0.0).sqrt()) as f32
    };
    (0..count)
        .flat_map(|row| (0..count).map(move |k| (row, k)))
        .map(|(row, k)| at(row, k))
        .collect()
}

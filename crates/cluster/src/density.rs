//! A second opinion from methods that are told no number of clusters: DBSCAN (Ester et al. 1996)
//! and HDBSCAN (Campello et al. 2013), on a sample and on the leading dimensions.

use crate::matrix::{Matrix, normalize, squared_distance};
use crate::random::Random;
use ndarray::Array2;
use petal_clustering::{Dbscan, Fit, HDbscan};
use petal_neighbors::distance::Euclidean;
use serde::Serialize;

const MOST_ROWS: usize = 2_000;
/// Distances say little in many dimensions, and density less.
const DIMENSIONS: usize = 10;
/// Neighbours, itself included, that make a row the core of a cluster.
const MIN_SAMPLES: usize = 10;
/// The smallest share of rows that counts as a cluster.
const SMALLEST_SHARE: f64 = 0.02;

/// What a density-based method found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DensityClusters {
    /// Number of clusters of at least 2 % of the rows.
    pub clusters: usize,
    /// Share of rows in none of them.
    pub noise: f64,
    /// DBSCAN's radius.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub radius: Option<f64>,
}

/// Asks DBSCAN and HDBSCAN; none where there are too few rows to speak of density.
pub fn second_opinion(rows: &Matrix, seed: u64) -> Option<(DensityClusters, DensityClusters)> {
    let sample = Random::new(seed, 3).sample(rows.rows(), MOST_ROWS);
    let width = rows.width.min(DIMENSIONS);
    if sample.len() < 4 * MIN_SAMPLES || width == 0 {
        return None;
    }
    let mut leading = Matrix::zeros(sample.len(), width);
    for (at, &row) in sample.iter().enumerate() {
        leading.row_mut(at).copy_from_slice(&rows.row(row)[..width]);
        normalize(leading.row_mut(at));
    }
    let radius = radius(&leading);
    let count = leading.rows();
    let points = Array2::from_shape_vec((count, width), leading.data).ok()?;
    let smallest = ((SMALLEST_SHARE * count as f64) as usize).max(MIN_SAMPLES);
    let answer = |sizes: Vec<usize>, radius: Option<f64>| {
        let large: Vec<usize> = sizes.into_iter().filter(|size| *size >= smallest).collect();
        let inside: usize = large.iter().sum();
        DensityClusters { clusters: large.len(), noise: 1.0 - inside as f64 / count as f64, radius }
    };
    let (found, _) = Dbscan::new(radius, MIN_SAMPLES, Euclidean::default()).fit(&points, None);
    let dbscan = answer(found.values().map(Vec::len).collect(), Some(f64::from(radius)));
    let mut method = HDbscan {
        alpha: 1.0,
        min_samples: MIN_SAMPLES,
        min_cluster_size: smallest,
        metric: Euclidean::default(),
        boruvka: false,
    };
    let (found, _, _) = method.fit(&points, None);
    let hdbscan = answer(found.values().map(Vec::len).collect(), None);
    Some((dbscan, hdbscan))
}

/// The distance to the tenth neighbour at the knee of its sorted curve: farthest below the line
/// between the curve's ends.
fn radius(rows: &Matrix) -> f32 {
    let count = rows.rows();
    let mut reach: Vec<f32> = (0..count)
        .map(|row| {
            let mut to: Vec<f32> =
                (0..count).map(|other| squared_distance(rows.row(row), rows.row(other))).collect();
            let (_, tenth, _) = to.select_nth_unstable_by(MIN_SAMPLES - 1, f32::total_cmp);
            tenth.sqrt()
        })
        .collect();
    reach.sort_unstable_by(f32::total_cmp);
    let (low, high) = (reach[0], reach[count - 1]);
    let below = |at: usize| {
        let x = at as f32 / (count - 1) as f32;
        x - (reach[at] - low) / (high - low).max(1e-9)
    };
    let knee = (0..count).max_by(|&a, &b| below(a).total_cmp(&below(b))).unwrap_or(0);
    reach[knee].max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_count_clear_groups() {
        let mut random = Random::new(6, 0);
        let mut rows = Matrix::zeros(600, 8);
        for row in 0..600 {
            rows.row_mut(row).iter_mut().for_each(|v| *v = 0.05 * random.normal() as f32);
            rows.row_mut(row)[row % 3] += 1.0;
        }
        let (dbscan, hdbscan) = second_opinion(&rows, 0).unwrap();
        assert_eq!((dbscan.clusters, hdbscan.clusters), (3, 3));
        assert!(dbscan.noise < 0.1 && hdbscan.noise < 0.3, "{dbscan:?} {hdbscan:?}");
        assert!(second_opinion(&Matrix::zeros(5, 3), 0).is_none());
    }

    #[test]
    fn equal_rows_do_no_harm() {
        let rows = Matrix { data: vec![1.0; 200], width: 2 };
        let (dbscan, _) = second_opinion(&rows, 0).unwrap();
        assert_eq!(dbscan.clusters, 1);
    }
}

//! A map of the rows: two dimensions in which neighbours stay neighbours, by t-SNE (van der Maaten,
//! Hinton 2008) from the two leading dimensions.

use crate::kmeans::Clustering;
use crate::matrix::{Matrix, dot, squared_distance};
use crate::random::Random;

/// Rows on the map.
const MOST_ROWS: usize = 800;
const EPOCHS: usize = 400;
/// Of rows that are nearly all equally far from each other, which take longer to settle.
const EPOCHS_APART: usize = 1500;
const PERPLEXITY: f32 = 30.0;

/// A row's place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// Its number.
    pub row: usize,
    /// Its cluster.
    pub cluster: u32,
    /// Its place from left to right.
    pub x: f32,
    /// Its place from bottom to top.
    pub y: f32,
}

/// Places a sample of rows on a map.
pub fn map(rows: &Matrix, clustering: &Clustering, seed: u64) -> Vec<Place> {
    let sample = Random::new(seed, 8).sample(rows.rows(), MOST_ROWS);
    let points: Vec<&[f32]> = sample.iter().map(|&row| rows.row(row)).collect();
    // The first dimension of uncentred rows is what all have in common, so the map starts from the
    // next two.
    let leading = |row: &[f32], at: usize| row.get(at).copied().unwrap_or(0.0);
    let start: Vec<f32> =
        points.iter().flat_map(|row| [1e-2 * leading(row, 1), 1e-2 * leading(row, 2)]).collect();
    let place = |(&row, [x, y]): (&usize, [f32; 2])| Place {
        row,
        cluster: clustering.assignment[row],
        x,
        y,
    };
    sample.iter().zip(embedded(&points, start, PERPLEXITY, EPOCHS)).map(place).collect()
}

/// Gives every row of `width` numbers a place in two dimensions in which about `neighbours` neighbours stay
/// neighbours. The time grows with the rows' square.
///
/// The rows may be nearly as far from each other as all others, so that no dimension leads; the map then
/// starts from what two random directions show of them.
pub fn places(rows: &[f32], width: usize, neighbours: usize, seed: u64) -> Vec<[f32; 2]> {
    let points: Vec<&[f32]> = rows.chunks_exact(width.max(1)).collect();
    let mut random = Random::new(seed, 9);
    let directions =
        [0, 1].map(|_| (0..width).map(|_| random.normal() as f32).collect::<Vec<f32>>());
    let seen = |row: &[f32], direction: &Vec<f32>| 1e-2 * dot(row, direction);
    let start = points.iter().flat_map(|row| directions.iter().map(|d| seen(row, d))).collect();
    embedded(&points, start, PERPLEXITY.min(neighbours as f32), EPOCHS_APART)
}

/// The places of `points`, from `start` on.
fn embedded(points: &[&[f32]], start: Vec<f32>, perplexity: f32, epochs: usize) -> Vec<[f32; 2]> {
    let perplexity = perplexity.min((points.len() as f32 - 1.0) / 3.0 - 1.0);
    let places = if perplexity < 2.0 {
        start
    } else {
        let embed = || {
            bhtsne::tSNE::<f32, &[f32], 2>::new(points)
                .perplexity(perplexity)
                .epochs(epochs)
                .initial_embedding(start.as_slice())
                .exact(|a, b| squared_distance(a, b).sqrt())
                .embedding()
        };
        // Its sums depend on the number of threads, so it gets one.
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        alone.map_or_else(|_| start.clone(), |pool| pool.install(embed))
    };
    places.chunks_exact(2).map(|at| [at[0], at[1]]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster;

    fn groups() -> Matrix {
        let mut random = Random::new(6, 0);
        let mut rows = Matrix::zeros(200, 4);
        for row in 0..200 {
            rows.row_mut(row).iter_mut().for_each(|v| *v = 0.1 * random.normal() as f32);
            rows.row_mut(row)[row % 4] += 1.0;
        }
        rows
    }

    #[test]
    fn groups_lie_apart_and_threads_change_nothing() {
        let rows = groups();
        let clustering = cluster(&rows, 4, 1);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| map(&rows, &clustering, 1))
        };
        let places = with(1);
        assert!(places == with(3), "the places differ");
        let distance = |a: &Place, b: &Place| (a.x - b.x).hypot(a.y - b.y);
        let mean = |same: bool| {
            let pairs = places.iter().flat_map(|a| places.iter().map(move |b| (a, b)));
            let found: Vec<f32> = pairs
                .filter(|(a, b)| a.row != b.row && (a.cluster == b.cluster) == same)
                .map(|(a, b)| distance(a, b))
                .collect();
            found.iter().sum::<f32>() / found.len() as f32
        };
        assert!(mean(false) > 3.0 * mean(true), "{} {}", mean(false), mean(true));
    }

    #[test]
    fn a_handful_of_rows_is_placed_too() {
        let rows = Matrix { data: vec![1.0, 0.0, 0.0, 1.0], width: 2 };
        let places = map(&rows, &cluster(&rows, 2, 0), 0);
        assert_eq!(places.len(), 2);
        assert!(places.iter().all(|place| place.x.is_finite() && place.y.is_finite()));
    }
}

//! Clusters of rows of numbers, and of texts made into such rows.
//!
//! | to | see |
//! | --- | --- |
//! | turn texts into sparse rows of stemmed words | [`Vocabulary`] |
//! | turn rows into fewer dimensions | [`truncated_svd`], [`project`] |
//! | find `k` clusters | [`kmeans`] on a sample, [`refine`] on all rows, [`cluster`] for both |
//! | choose `k` | [`measure`] and [`Rule`] |
//! | ask methods that are told no number | [`second_opinion`] |
//! | compare two groupings | [`Agreement`] |
//! | place rows on a map | [`map`], [`places`] |
//!
//! Every random number follows from a seed, and sums are taken over pieces of fixed size: the number of threads
//! changes nothing.
//!
//! ```
//! use hydralora_cluster::{Matrix, cluster};
//!
//! let rows = Matrix { data: vec![0.0, 0.1, 5.0, 5.1, 5.2], width: 1 };
//! assert_eq!(cluster(&rows, 2, 1).assignment, [1, 1, 0, 0, 0]);
//! ```

#![forbid(unsafe_code)]

mod agreement;
mod density;
mod kmeans;
mod map;
mod matrix;
mod project;
mod random;
mod rules;
mod terms;

pub use agreement::Agreement;
pub use density::{DensityClusters, second_opinion};
pub use kmeans::{Centres, Clustering, kmeans, refine};
pub use map::{Place, map, places};
pub use matrix::{Matrix, dot, normalize, squared_distance};
pub use project::{project, truncated_svd};
pub use random::Random;
pub use rules::{Measured, Rule, measure};
pub use terms::{SparseRows, Vocabulary};

/// Rows that [`cluster`] starts from.
const START_ROWS: usize = 20_000;
/// Starts of its k-means run.
const RESTARTS: usize = 10;

/// Puts all rows into `k` clusters, the largest first. There are at least `k` rows, and `k` is at least 1.
pub fn cluster(rows: &Matrix, k: usize, seed: u64) -> Clustering {
    let mut random = Random::new(seed, 7);
    let sample = rows.select(&random.sample(rows.rows(), START_ROWS));
    let start = kmeans(&sample, k, RESTARTS, &mut random);
    let mut found = refine(rows, start.centres, seed);
    let order = found.largest_first();
    let mut place = vec![0_u32; k];
    for (at, &centre) in order.iter().enumerate() {
        place[centre] = at as u32;
    }
    found.centres = found.centres.select(&order);
    found.assignment.iter_mut().for_each(|centre| *centre = place[*centre as usize]);
    found
}

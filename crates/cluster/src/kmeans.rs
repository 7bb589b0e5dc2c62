//! k-means: centres that make `SSE = Σ_i ‖x_i − c(x_i)‖²` small.
//!
//! Starts are drawn by k-means++ (Arthur & Vassilvitskii 2007), Lloyd's steps follow until the
//! error falls by less than a thousandth or nothing moves; of several starts the best stays.
//! [`refine`] takes centres found on a sample to all rows: by Lloyd's steps, or, where there are
//! many rows, by mini-batches (Sculley 2010), whose centres move by the mean of all rows they were
//! ever given.

use crate::matrix::{CHUNK, Matrix, add_to, dot, squared_distance};
use crate::random::Random;
use rayon::prelude::*;

const MOST_STEPS: usize = 60;
const LEAST_GAIN: f64 = 1e-3;
/// Rows above which [`refine`] works in mini-batches.
const MINI_BATCH_ABOVE: usize = 100_000;
const MINI_BATCH: usize = 8_192;

/// Centres and what belongs to them.
#[derive(Debug, Clone)]
pub struct Clustering {
    /// One a row, `[k, width]`.
    pub centres: Matrix,
    /// The centre of each row.
    pub assignment: Vec<u32>,
    /// Squared distance of each row to its centre.
    pub distances: Vec<f32>,
    /// Sum of `distances`.
    pub error: f64,
}

impl Clustering {
    /// Counts the rows of each centre.
    pub fn sizes(&self) -> Vec<usize> {
        let mut sizes = vec![0; self.centres.rows()];
        for &centre in &self.assignment {
            sizes[centre as usize] += 1;
        }
        sizes
    }

    /// Sorts the centres by their rows, the largest first.
    pub fn largest_first(&self) -> Vec<usize> {
        let sizes = self.sizes();
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by(|&a, &b| sizes[b].cmp(&sizes[a]).then(a.cmp(&b)));
        order
    }
}

/// Finds `k` centres of `rows`: the best of `restarts` runs. `k` is at least 1 and there is at least one row.
/// Runs on one thread: the caller has many of these to run.
pub fn kmeans(rows: &Matrix, k: usize, restarts: usize, random: &mut Random) -> Clustering {
    let mut best: Option<Clustering> = None;
    for _ in 0..restarts.max(1) {
        let found = lloyd(rows, plus_plus(rows, k, random));
        if best.as_ref().is_none_or(|best| found.error < best.error) {
            best = Some(found);
        }
        if k == 1 {
            break;
        }
    }
    best.unwrap_or_else(|| lloyd(rows, rows.select(&[0])))
}

/// k-means++: each next centre is a row drawn with probability proportional to its squared
/// distance from the centres so far; of several drawn, the one that lowers the error most.
fn plus_plus(rows: &Matrix, k: usize, random: &mut Random) -> Matrix {
    let count = rows.rows();
    let mut chosen = vec![random.below(count)];
    let to = |centre: usize| -> Vec<f32> {
        (0..count).map(|row| squared_distance(rows.row(row), rows.row(centre))).collect()
    };
    let mut nearest = to(chosen[0]);
    let candidates = 2 + (k as f64).ln() as usize;
    while chosen.len() < k {
        let total: f64 = nearest.iter().map(|&d| f64::from(d)).sum();
        let mut best: Option<(f64, usize, Vec<f32>)> = None;
        for _ in 0..candidates {
            let mut left = random.unit() * total;
            let drawn = nearest.iter().position(|&distance| {
                left -= f64::from(distance);
                left < 0.0
            });
            let candidate = drawn.unwrap_or_else(|| random.below(count));
            let mut closer = to(candidate);
            for (closer, nearest) in closer.iter_mut().zip(&nearest) {
                *closer = closer.min(*nearest);
            }
            let error = closer.iter().map(|&d| f64::from(d)).sum();
            if best.as_ref().is_none_or(|best| error < best.0) {
                best = Some((error, candidate, closer));
            }
        }
        if let Some((_, candidate, closer)) = best {
            chosen.push(candidate);
            nearest = closer;
        }
    }
    rows.select(&chosen)
}

/// Centres that rows are put to one by one.
pub struct Centres<'a> {
    centres: &'a Matrix,
    half: Vec<f32>,
}

impl<'a> Centres<'a> {
    /// Prepares `centres: [k, width]`.
    pub fn new(centres: &'a Matrix) -> Self {
        Self { centres, half: half_lengths(centres) }
    }

    /// Finds the nearest centre of a row, and the squared distance to it.
    pub fn nearest(&self, row: &[f32]) -> (u32, f32) {
        nearest(row, self.centres, &self.half)
    }
}

/// The nearest centre of a row and the squared distance to it. `half` is half the squared length
/// of each centre.
fn nearest(row: &[f32], centres: &Matrix, half: &[f32]) -> (u32, f32) {
    let (mut best, mut least) = (0, f32::INFINITY);
    for (centre, half) in half.iter().enumerate() {
        let distance = half - dot(row, centres.row(centre));
        if distance < least {
            (best, least) = (centre, distance);
        }
    }
    (best as u32, squared_distance(row, centres.row(best)))
}

fn half_lengths(centres: &Matrix) -> Vec<f32> {
    (0..centres.rows()).map(|c| 0.5 * dot(centres.row(c), centres.row(c))).collect()
}

/// Finds the nearest centre of every row, on this thread.
pub(crate) fn assign(rows: &Matrix, centres: &Matrix) -> Vec<u32> {
    let centres = Centres::new(centres);
    (0..rows.rows()).map(|row| centres.nearest(rows.row(row)).0).collect()
}

/// What a piece of rows adds to a step.
struct Part {
    assignment: Vec<u32>,
    distances: Vec<f32>,
    sums: Vec<f64>,
    counts: Vec<usize>,
    error: f64,
}

fn part(rows: &[f32], centres: &Matrix, half: &[f32]) -> Part {
    let (width, k) = (centres.width, centres.rows());
    let mut part = Part {
        assignment: Vec::with_capacity(rows.len() / width),
        distances: Vec::with_capacity(rows.len() / width),
        sums: vec![0.0; k * width],
        counts: vec![0; k],
        error: 0.0,
    };
    for row in rows.chunks_exact(width) {
        let (centre, distance) = nearest(row, centres, half);
        let at = centre as usize;
        part.counts[at] += 1;
        part.error += f64::from(distance);
        add_to(&mut part.sums[at * width..(at + 1) * width], row);
        part.assignment.push(centre);
        part.distances.push(distance);
    }
    part
}

/// Puts the pieces of a step together, in order.
fn join(parts: Vec<Part>, centres: &Matrix) -> Part {
    let mut parts = parts.into_iter();
    let mut all = parts.next().unwrap_or_else(|| part(&[], centres, &[]));
    for part in parts {
        all.assignment.extend(part.assignment);
        all.distances.extend(part.distances);
        all.sums.iter_mut().zip(part.sums).for_each(|(all, part)| *all += part);
        all.counts.iter_mut().zip(part.counts).for_each(|(all, part)| *all += part);
        all.error += part.error;
    }
    all
}

/// Means of the rows assigned; a centre that lost all of its rows moves to the row that is worst
/// served.
fn moved(rows: &Matrix, step: &Part, centres: &Matrix) -> Matrix {
    let width = centres.width;
    let mut out = centres.clone();
    let mut worst: Option<Vec<usize>> = None;
    for (centre, &count) in step.counts.iter().enumerate() {
        if count == 0 {
            let order = worst.get_or_insert_with(|| {
                let mut order: Vec<usize> = (0..rows.rows()).collect();
                let key = |row: &usize| step.distances[*row];
                order.sort_by(|a, b| key(a).total_cmp(&key(b)).then(b.cmp(a)));
                order
            });
            if let Some(row) = order.pop() {
                out.row_mut(centre).copy_from_slice(rows.row(row));
            }
            continue;
        }
        let sums = &step.sums[centre * width..(centre + 1) * width];
        for (out, sum) in out.row_mut(centre).iter_mut().zip(sums) {
            *out = (sum / count as f64) as f32;
        }
    }
    out
}

fn iterate(
    rows: &Matrix,
    mut centres: Matrix,
    most: usize,
    step: impl Fn(&Matrix, &[f32]) -> Part,
) -> Clustering {
    let mut found = step(&centres, &half_lengths(&centres));
    for _ in 0..most {
        let next = moved(rows, &found, &centres);
        let better = step(&next, &half_lengths(&next));
        let still = better.assignment == found.assignment;
        let little = found.error - better.error <= LEAST_GAIN * found.error;
        (centres, found) = (next, better);
        if still || (little && !found.counts.contains(&0)) {
            break;
        }
    }
    let Part { assignment, distances, error, .. } = found;
    Clustering { centres, assignment, distances, error }
}

fn lloyd(rows: &Matrix, centres: Matrix) -> Clustering {
    iterate(rows, centres, MOST_STEPS, |centres, half| part(&rows.data, centres, half))
}

/// Takes centres found on a sample to all rows, on all threads; the result does not depend on how
/// many there are.
pub fn refine(rows: &Matrix, centres: Matrix, seed: u64) -> Clustering {
    let on_all = |centres: &Matrix, half: &[f32]| {
        let size = (CHUNK * rows.width).max(1);
        let parts = rows.data.par_chunks(size).map(|chunk| part(chunk, centres, half)).collect();
        join(parts, centres)
    };
    if rows.rows() <= MINI_BATCH_ABOVE {
        return iterate(rows, centres, MOST_STEPS, on_all);
    }
    let mut order: Vec<usize> = (0..rows.rows()).collect();
    Random::new(seed, 5).shuffle(&mut order);
    let mut centres = centres;
    let mut given = vec![0.0_f64; centres.rows()];
    for batch in order.chunks(MINI_BATCH) {
        let batch = rows.select(batch);
        let half = half_lengths(&centres);
        let size = (CHUNK * rows.width).max(1);
        let parts = batch.data.par_chunks(size).map(|chunk| part(chunk, &centres, &half)).collect();
        let step = join(parts, &centres);
        for (centre, &count) in step.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            given[centre] += count as f64;
            let sums = &step.sums[centre * rows.width..(centre + 1) * rows.width];
            for (value, sum) in centres.row_mut(centre).iter_mut().zip(sums) {
                let towards = sum - count as f64 * f64::from(*value);
                *value += (towards / given[centre]) as f32;
            }
        }
    }
    iterate(rows, centres, 0, on_all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `k` tight groups of `each` rows, one on each axis.
    fn groups(k: usize, each: usize) -> Matrix {
        let mut random = Random::new(1, 0);
        let mut rows = Matrix::zeros(k * each, k);
        for row in 0..k * each {
            rows.row_mut(row).iter_mut().for_each(|v| *v = 0.05 * random.normal() as f32);
            rows.row_mut(row)[row / each] += 1.0;
        }
        rows
    }

    #[test]
    fn clear_groups_are_found() {
        let rows = groups(5, 40);
        let found = kmeans(&rows, 5, 3, &mut Random::new(2, 0));
        let mut sizes = found.sizes();
        sizes.sort_unstable();
        assert_eq!(sizes, [40; 5]);
        for group in found.assignment.chunks(40) {
            assert!(group.iter().all(|centre| centre == &group[0]));
        }
        let worse = kmeans(&rows, 4, 3, &mut Random::new(2, 0));
        assert!(worse.error > 2.0 * found.error);
        let refined = refine(&rows, found.centres.clone(), 0);
        assert_eq!(refined.assignment, found.assignment);
    }

    #[test]
    fn one_cluster_has_the_mean_as_its_centre() {
        let rows = Matrix { data: vec![0.0, 0.0, 2.0, 4.0], width: 2 };
        let found = kmeans(&rows, 1, 5, &mut Random::new(0, 0));
        assert_eq!(found.centres.data, [1.0, 2.0]);
        assert!((found.error - 10.0).abs() < 1e-6);
    }

    #[test]
    fn equal_rows_and_too_many_centres_do_no_harm() {
        let rows = Matrix { data: vec![1.0; 12], width: 2 };
        let found = kmeans(&rows, 4, 2, &mut Random::new(0, 0));
        assert_eq!(found.error, 0.0);
        assert_eq!(found.assignment.len(), 6);
    }

    #[test]
    fn mini_batches_find_the_same_groups() {
        let each = MINI_BATCH_ABOVE / 4 + 100;
        let rows = groups(4, each);
        let sample: Vec<usize> = (0..rows.rows()).step_by(100).collect();
        let start = kmeans(&rows.select(&sample), 4, 2, &mut Random::new(3, 0));
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| refine(&rows, start.centres.clone(), 7))
        };
        let found = with(1);
        assert!(found.sizes().iter().all(|&size| size == each), "{:?}", found.sizes());
        let again = with(3);
        assert_eq!(again.centres, found.centres);
        assert_eq!(again.assignment, found.assignment);
    }
}

//! What says how many clusters there are: the elbow, the silhouette, the gap, and whether clusters
//! found on one half of the data exist in the other.

use crate::kmeans::{assign, kmeans};
use crate::matrix::{Matrix, squared_distance};
use crate::random::Random;
use serde::Serialize;

/// A rule that picks a number of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// The knee of the squared error by Kneedle (Satopää et al. 2011): with both axes scaled to
    /// 0…1, the `k` at which the falling curve is farthest below the straight line between its ends.
    Elbow,
    /// The `k` of the largest mean silhouette (Rousseeuw 1987); one cluster has none.
    Silhouette,
    /// The smallest `k` with `Gap(k) ≥ Gap(k + 1) − s(k + 1)` (Tibshirani, Walther, Hastie 2001).
    Gap,
    /// The largest `k` whose clusters, found on one half of the rows, hold together in the other:
    /// prediction strength of at least 0.8 (Tibshirani, Walther 2005).
    Stability,
}

/// Prediction strength from which clusters count as real.
const STRONG: f64 = 0.8;
/// Least height of the knee, both axes scaled to 0…1, for Kneedle to see one.
const LEAST_KNEE: f64 = 0.05;
/// Rows of the samples that pairs of rows, and reference data, are computed on.
const SILHOUETTE_ROWS: usize = 1_000;
const GAP_ROWS: usize = 1_000;
const GAP_REFERENCES: usize = 5;

impl Rule {
    /// All rules.
    pub const ALL: [Rule; 4] = [Rule::Elbow, Rule::Silhouette, Rule::Gap, Rule::Stability];

    /// Names it as the command line and files do.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Elbow => "elbow",
            Rule::Silhouette => "silhouette",
            Rule::Gap => "gap",
            Rule::Stability => "stability",
        }
    }

    /// Picks the number of clusters from what was measured at increasing `k`; none where
    /// the rule sees no reason to prefer one.
    pub fn choose(self, measured: &[Measured]) -> Option<usize> {
        match self {
            Rule::Elbow => kneedle(measured),
            Rule::Silhouette => {
                let with = measured.iter().filter_map(|m| Some((m.k, m.silhouette?)));
                let better = |best: Option<(usize, f64)>, next: (usize, f64)| match best {
                    Some(best) if best.1 >= next.1 => Some(best),
                    _ => Some(next),
                };
                with.fold(None, better).map(|best| best.0)
            }
            Rule::Gap => measured
                .windows(2)
                .find(|pair| pair[0].gap >= pair[1].gap - pair[1].gap_error)
                .or(measured.len().checked_sub(2).and_then(|at| measured.get(at..)))
                .map(|pair| {
                    let stopped = pair[0].gap >= pair[1].gap - pair[1].gap_error;
                    if stopped { pair[0].k } else { pair[1].k }
                }),
            Rule::Stability => {
                let strong = |m: &&Measured| m.strength.is_some_and(|s| s >= STRONG);
                measured.iter().rev().find(strong).map(|m| m.k)
            }
        }
    }
}

/// What one repetition measured at one number of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// The number of clusters.
    pub k: usize,
    /// Squared error per row.
    pub error: f64,
    /// Mean silhouette of a sample; none for one cluster.
    pub silhouette: Option<f64>,
    /// Gap statistic: how far the error's logarithm lies below that of structureless data.
    pub gap: f64,
    /// Its simulation error.
    pub gap_error: f64,
    /// Prediction strength between two halves; none where a half is too small.
    pub strength: Option<f64>,
}

/// Kneedle's knee of the error, offline, for a convex falling curve.
fn kneedle(measured: &[Measured]) -> Option<usize> {
    let (first, last) = (measured.first()?, measured.last()?);
    let (width, height) = ((last.k - first.k) as f64, first.error - last.error);
    if measured.len() < 3 || height <= 1e-12 {
        return None;
    }
    let below = |m: &Measured| {
        let x = (m.k - first.k) as f64 / width;
        let y = (m.error - last.error) / height;
        1.0 - x - y
    };
    let knee = measured.iter().max_by(|a, b| below(a).total_cmp(&below(b)).then(b.k.cmp(&a.k)))?;
    (below(knee) >= LEAST_KNEE).then_some(knee.k)
}

/// Measures every `k` of `ks` on `rows`.
pub fn measure(rows: &Matrix, ks: &[usize], restarts: usize, seed: u64) -> Vec<Measured> {
    let mut random = Random::new(seed, 2);
    let pairs = Pairs::new(rows, &random.sample(rows.rows(), SILHOUETTE_ROWS));
    let references = References::new(rows, &mut random);
    let halves = halves(rows, &mut random);
    ks.iter()
        .map(|&k| {
            let found = kmeans(rows, k, restarts, &mut random);
            let (gap, gap_error) = references.gap(k, &mut random);
            Measured {
                k,
                error: found.error / rows.rows() as f64,
                silhouette: pairs.silhouette(&found.assignment, k),
                gap,
                gap_error,
                strength: prediction_strength(&halves, k, restarts, &mut random),
            }
        })
        .collect()
}

/// Distances between the rows of a sample.
struct Pairs {
    rows: Vec<usize>,
    distances: Vec<f32>,
}

impl Pairs {
    fn new(rows: &Matrix, sample: &[usize]) -> Self {
        let mut distances = Vec::with_capacity(sample.len() * sample.len());
        for &a in sample {
            let to = sample.iter().map(|&b| squared_distance(rows.row(a), rows.row(b)).sqrt());
            distances.extend(to);
        }
        Self { rows: sample.to_vec(), distances }
    }

    /// Mean of `(b − a) / max(a, b)`: `a` a row's mean distance to its own cluster, `b` to the
    /// nearest other one. A row alone in its cluster counts 0.
    fn silhouette(&self, assignment: &[u32], k: usize) -> Option<f64> {
        if k < 2 || self.rows.is_empty() {
            return None;
        }
        let own: Vec<usize> = self.rows.iter().map(|&row| assignment[row] as usize).collect();
        let mut sizes = vec![0_usize; k];
        own.iter().for_each(|&centre| sizes[centre] += 1);
        if sizes.iter().filter(|size| **size > 0).count() < 2 {
            return None;
        }
        let mut total = 0.0;
        for (row, line) in self.distances.chunks_exact(own.len()).enumerate() {
            let mut sums = vec![0.0_f64; k];
            for (distance, &centre) in line.iter().zip(&own) {
                sums[centre] += f64::from(*distance);
            }
            let mine = own[row];
            if sizes[mine] < 2 {
                continue;
            }
            let a = sums[mine] / (sizes[mine] - 1) as f64;
            let b = (0..k)
                .filter(|&centre| centre != mine && sizes[centre] > 0)
                .map(|centre| sums[centre] / sizes[centre] as f64)
                .fold(f64::INFINITY, f64::min);
            let largest = a.max(b);
            if largest > 0.0 {
                total += (b - a) / largest;
            }
        }
        Some(total / own.len() as f64)
    }
}

/// Data of the same spread as the rows without any clusters: uniform in the box the rows fill. The
/// columns are principal directions, as the second of the paper's two references asks.
struct References {
    rows: Matrix,
    drawn: Vec<Matrix>,
}

impl References {
    fn new(rows: &Matrix, random: &mut Random) -> Self {
        let rows = rows.select(&random.sample(rows.rows(), GAP_ROWS));
        let column = |at: usize| (0..rows.rows()).map(move |row| (row, at));
        let bounds: Vec<(f32, f32)> = (0..rows.width)
            .map(|at| {
                column(at).fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), (row, at)| {
                    (low.min(rows.row(row)[at]), high.max(rows.row(row)[at]))
                })
            })
            .collect();
        let drawn = (0..GAP_REFERENCES)
            .map(|_| {
                let mut drawn = Matrix::zeros(rows.rows(), rows.width);
                for row in 0..rows.rows() {
                    for (value, (low, high)) in drawn.row_mut(row).iter_mut().zip(&bounds) {
                        *value = low + (high - low) * random.unit() as f32;
                    }
                }
                drawn
            })
            .collect();
        Self { rows, drawn }
    }

    /// `mean_b ln W*_b − ln W` and `sd(ln W*_b) √(1 + 1/B)`.
    fn gap(&self, k: usize, random: &mut Random) -> (f64, f64) {
        let mut log_error =
            |rows: &Matrix| kmeans(rows, k.min(rows.rows()), 1, random).error.max(1e-12).ln();
        let own = log_error(&self.rows);
        let drawn: Vec<f64> = self.drawn.iter().map(log_error).collect();
        let count = drawn.len() as f64;
        let mean = drawn.iter().sum::<f64>() / count;
        let variance = drawn.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        (mean - own, variance.sqrt() * (1.0 + 1.0 / count).sqrt())
    }
}

fn halves(rows: &Matrix, random: &mut Random) -> (Matrix, Matrix) {
    let mut order: Vec<usize> = (0..rows.rows()).collect();
    random.shuffle(&mut order);
    let (a, b) = order.split_at(order.len() / 2);
    (rows.select(a), rows.select(b))
}

/// The smallest share, over the clusters of one half, of pairs that the centres of the other half
/// put together too.
fn prediction_strength(
    (train, test): &(Matrix, Matrix),
    k: usize,
    restarts: usize,
    random: &mut Random,
) -> Option<f64> {
    if k == 1 {
        return Some(1.0);
    }
    if train.rows() < 2 * k {
        return None;
    }
    let centres = kmeans(train, k, restarts, random).centres;
    let own = kmeans(test, k, restarts, random);
    let predicted = assign(test, &centres);
    let mut together = vec![0_usize; k * k];
    for (own, predicted) in own.assignment.iter().zip(&predicted) {
        together[*own as usize * k + *predicted as usize] += 1;
    }
    let pairs = |n: usize| (n * n.saturating_sub(1)) as f64;
    let share = |counts: &[usize]| {
        let total = pairs(counts.iter().sum());
        if total > 0.0 { counts.iter().map(|&n| pairs(n)).sum::<f64>() / total } else { 0.0 }
    };
    Some(together.chunks_exact(k).map(share).fold(1.0, f64::min))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Measurements whose only interesting part is `fill`.
    fn curve(values: &[f64], fill: impl Fn(&mut Measured, f64)) -> Vec<Measured> {
        let blank = Measured {
            k: 0,
            error: 0.0,
            silhouette: None,
            gap: 0.0,
            gap_error: 0.0,
            strength: None,
        };
        let measure = |(at, &value): (usize, &f64)| {
            let mut measured = Measured { k: at + 1, ..blank };
            fill(&mut measured, value);
            measured
        };
        values.iter().enumerate().map(measure).collect()
    }

    #[test]
    fn the_elbow_is_where_the_curve_bends() {
        let choose = |errors: &[f64]| Rule::Elbow.choose(&curve(errors, |m, v| m.error = v));
        assert_eq!(choose(&[100.0, 60.0, 22.0, 20.0, 18.0, 16.0]), Some(3));
        assert_eq!(choose(&[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), None, "a straight line has no knee");
        assert_eq!(choose(&[1.0, 1.0, 1.0]), None);
        assert_eq!(choose(&[3.0, 1.0]), None);
        assert_eq!(choose(&[]), None);
    }

    #[test]
    fn the_other_rules_follow_their_definitions() {
        let silhouettes =
            curve(&[0.0, 0.2, 0.5, 0.5, 0.1], |m, v| m.silhouette = (m.k > 1).then_some(v));
        assert_eq!(Rule::Silhouette.choose(&silhouettes), Some(3));
        let gaps = |values: &[f64]| {
            Rule::Gap.choose(&curve(values, |m, v| (m.gap, m.gap_error) = (v, 0.05)))
        };
        assert_eq!(gaps(&[0.5, 0.4, 0.3]), Some(1));
        assert_eq!(gaps(&[0.1, 0.5, 0.52, 0.9]), Some(2));
        assert_eq!(gaps(&[0.1, 0.5, 0.9]), Some(3), "it rises to the end");
        let strengths = curve(&[1.0, 0.95, 0.5, 0.85, 0.2], |m, v| m.strength = Some(v));
        assert_eq!(Rule::Stability.choose(&strengths), Some(4));
    }

    #[test]
    fn a_known_silhouette() {
        // Two pairs on a line: 0, 1 and 10, 11.
        let rows = Matrix { data: vec![0.0, 1.0, 10.0, 11.0], width: 1 };
        let pairs = Pairs::new(&rows, &[0, 1, 2, 3]);
        let wanted = (2.0 * (1.0 - 1.0 / 10.5) + 2.0 * (1.0 - 1.0 / 9.5)) / 4.0;
        let found = pairs.silhouette(&[0, 0, 1, 1], 2).unwrap();
        assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
        assert_eq!(pairs.silhouette(&[0; 4], 2), None);
        assert_eq!(pairs.silhouette(&[0; 4], 1), None);
    }

    #[test]
    fn every_rule_finds_four_clear_groups() {
        let mut random = Random::new(1, 0);
        let mut rows = Matrix::zeros(400, 6);
        for row in 0..400 {
            rows.row_mut(row).iter_mut().for_each(|v| *v = 0.03 * random.normal() as f32);
            rows.row_mut(row)[row % 4] += 1.0;
        }
        let ks: Vec<usize> = (1..=8).collect();
        let measured = measure(&rows, &ks, 3, 9);
        for rule in Rule::ALL {
            assert_eq!(rule.choose(&measured), Some(4), "{}", rule.name());
        }
    }

    #[test]
    fn one_group_has_no_gap() {
        let mut random = Random::new(4, 0);
        let mut rows = Matrix::zeros(300, 3);
        rows.data.iter_mut().for_each(|v| *v = random.unit() as f32);
        let ks: Vec<usize> = (1..=5).collect();
        let measured = measure(&rows, &ks, 3, 2);
        assert_eq!(Rule::Gap.choose(&measured), Some(1));
        assert_eq!(measured[0].strength, Some(1.0));
    }
}

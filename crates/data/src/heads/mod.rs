//! Finding the heads: how many experts a data set needs.
//!
//! The paper (section 3.4, appendix B) clusters TF-IDF vectors of the corpus by k-means for a range
//! of k, takes the elbow of the squared error for the number `N` of B heads, and repeats that 15
//! times. This is that, with what it leaves open filled in and other rules beside the elbow:
//!
//! 1. [`Features`]: texts → TF-IDF of stemmed words → latent semantic analysis → rows of length 1;
//!    or rows from a model.
//! 2. For each seed, a sample of the rows; for each k, k-means on it, and what the four rules
//!    ([`Rule`]) look at.
//! 3. The rule's choice from the means over the seeds; the clustering of all rows with that k.
//!
//! A corpus larger than memory is held as a uniform sample ([`Room`]), on which all of this works;
//! then all rows are read once more and counted into the clusters.
//!
//! Work per seed is on a sample of fixed size, so only the features and the last clustering grow
//! with the rows, both linearly. Every random number follows from the seed, and sums are taken over
//! pieces of fixed size: the number of threads changes nothing.

mod corpus;
mod features;
mod picture;
mod report;
mod whole;

pub use corpus::{Corpus, Room};
pub use features::Features;
pub use hydralora_cluster::{Agreement, DensityClusters, Measured, Rule, places};
pub use picture::{elbow_svg, map_svg, page};
pub use report::{
    Assignment, Cluster, DomainCount, FeatureReport, HeadsReport, KSummary, MapPoint, RuleChoice,
};

use crate::error::{Error, Result};
use hydralora_cluster::{Matrix, Random, cluster, kmeans, map, measure, squared_distance};
use rayon::prelude::*;
use serde::Serialize;

/// Rows a repetition works on, at most.
const SAMPLE_ROWS: usize = 5_000;
/// The share of all rows it works on where there are fewer.
const SAMPLE_SHARE: f64 = 0.8;
/// Starts of each k-means run of a repetition.
const RESTARTS: usize = 5;

/// How to look for heads.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadsOptions {
    /// The smallest number of clusters to try.
    pub k_min: usize,
    /// The largest; lowered where there are too few rows for it.
    pub k_max: usize,
    /// How often the choice is repeated, each time on another sample from other starts.
    pub seeds: usize,
    /// What all randomness follows from.
    pub seed: u64,
    /// Whose choice counts.
    pub rule: Rule,
}

impl Default for HeadsOptions {
    fn default() -> Self {
        Self { k_min: 1, k_max: 10, seeds: 15, seed: 41, rule: Rule::Stability }
    }
}

/// Dimensions of the features by default.
pub const DIMENSIONS: usize = 8;

impl HeadsOptions {
    fn check(&self, rows: usize) -> Result<usize> {
        let wrong = |message: String| Err(Error::HeadsOptions(message));
        if self.k_min == 0 {
            return wrong("k_min is 0; expected at least 1".to_owned());
        }
        if self.k_max < self.k_min {
            return wrong(format!("k_max is {}, below k_min, which is {}", self.k_max, self.k_min));
        }
        if self.seeds == 0 {
            return wrong("seeds is 0; expected at least 1".to_owned());
        }
        if rows < self.k_min.max(2) {
            return Err(Error::TooFewRows { rows, needed: self.k_min.max(2) });
        }
        Ok(self.k_max.min(sample_size(rows)).max(self.k_min))
    }
}

fn sample_size(rows: usize) -> usize {
    let share = (SAMPLE_SHARE * rows as f64).ceil() as usize;
    share.max(rows.min(50)).min(SAMPLE_ROWS)
}

/// How many clusters, and what was measured to say so.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Choice {
    /// The number of clusters.
    pub num_experts: usize,
    /// The largest number tried.
    pub k_max: usize,
    /// What each rule chose.
    pub rules: Vec<RuleChoice>,
    /// Means over the repetitions for every number tried; empty where all rows are alike.
    pub curve: Vec<KSummary>,
}

/// Chooses the number of clusters of `features`.
///
/// # Errors
/// If an option makes no sense, or there are fewer rows than `k_min`.
pub fn choose(features: &Features, options: &HeadsOptions) -> Result<Choice> {
    let rows = &features.rows;
    let k_max = options.check(rows.rows())?;
    let ks: Vec<usize> = (options.k_min..=k_max).collect();
    let repetitions = if alike(rows) { Vec::new() } else { repeat(rows, &ks, options) };
    let rules: Vec<RuleChoice> =
        Rule::ALL.into_iter().map(|rule| RuleChoice::of(rule, &repetitions)).collect();
    let chosen = rules.iter().find(|choice| choice.rule == options.rule);
    let num_experts = chosen.and_then(|choice| choice.chosen).unwrap_or(options.k_min);
    Ok(Choice { num_experts, k_max, rules, curve: report::curve(&repetitions) })
}

/// Finds how many heads the texts behind `features` call for, and describes the clusters; `corpus`
/// is what the features were made of.
///
/// # Errors
/// As [`choose`]; and if `corpus` is a sample and its files cannot be read again.
pub fn find_heads(
    features: &Features,
    corpus: &Corpus,
    options: &HeadsOptions,
) -> Result<HeadsReport> {
    let choice = choose(features, options)?;
    let clustering = cluster(&features.rows, choice.num_experts, options.seed);
    // Rows that are all alike have no neighbours to keep, and the map would take longest of all.
    let map = match choice.curve.is_empty() {
        true => Vec::new(),
        false => map(&features.rows, &clustering, options.seed),
    };
    let totals = match (&corpus.origin, &features.terms) {
        (Some(origin), Some(terms)) => {
            Some(whole::count(origin, corpus, terms, &clustering.centres)?)
        }
        _ => None,
    };
    Ok(report::build(features, corpus, options, choice, clustering, map, totals))
}

/// The cluster of every text of `corpus`, which `features` were made of, when the rows fall into `k`
/// clusters.
///
/// # Errors
/// If there are fewer rows than clusters.
pub fn partition(features: &Features, corpus: &Corpus, k: usize, seed: u64) -> Result<Assignment> {
    let options = HeadsOptions { k_min: k, k_max: k, seed, ..HeadsOptions::default() };
    options.check(features.rows.rows())?;
    let clustering = cluster(&features.rows, k, seed);
    Ok(Assignment::new(features, corpus, &clustering))
}

/// Starts of the k-means run behind [`centroids`].
const CENTROID_RESTARTS: usize = 3;

/// Finds the centres `[k, width]` of `k` clusters of the rows of `values: [rows, width]` by k-means, the
/// largest cluster first.
///
/// # Errors
/// If there are fewer rows than clusters.
pub fn centroids(values: Vec<f32>, width: usize, k: usize, seed: u64) -> Result<Vec<f64>> {
    let rows = Matrix { data: values, width };
    if rows.rows() < k.max(1) {
        return Err(Error::TooFewRows { rows: rows.rows(), needed: k.max(1) });
    }
    let found = kmeans(&rows, k, CENTROID_RESTARTS, &mut Random::new(seed, 8));
    let centres = found.largest_first().into_iter().flat_map(|centre| found.centres.row(centre));
    Ok(centres.map(|&value| f64::from(value)).collect())
}

/// Whether all rows are the same: then there is nothing to divide.
fn alike(rows: &Matrix) -> bool {
    (1..rows.rows()).all(|row| squared_distance(rows.row(0), rows.row(row)) < 1e-9)
}

fn repeat(rows: &Matrix, ks: &[usize], options: &HeadsOptions) -> Vec<Vec<Measured>> {
    let size = sample_size(rows.rows());
    (0..options.seeds as u64)
        .into_par_iter()
        .map(|repetition| {
            let seed = options.seed.wrapping_add(repetition);
            let sample = Random::new(seed, 6).sample(rows.rows(), size);
            measure(&rows.select(&sample), ks, RESTARTS, seed)
        })
        .collect()
}

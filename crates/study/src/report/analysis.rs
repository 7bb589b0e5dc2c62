//! What a study's results say: choices, means, paired comparisons.

use super::weights::Weights;
use crate::choose::{Choice, Progress, choices};
use crate::error::Result;
use crate::plan::{Plan, Planned};
use crate::result::CellResult;
use crate::stats::{Paired, SIGNIFICANCE, Summary, holm, paired, summarise};
use crate::store::{Failure, Kind, Store};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Metrics shown where a study names none.
const MOST_METRICS: usize = 8;

/// A study with all it gave so far.
pub struct Analysis {
    /// The plan.
    pub plan: Plan,
    /// Results by cell.
    pub results: HashMap<String, CellResult>,
    /// Failures by cell.
    pub failures: HashMap<String, Failure>,
    /// The choice of every combination of labels.
    pub choices: Vec<Choice>,
    /// Labels of the compared axis.
    pub labels: Vec<String>,
    /// Combinations of the other axes, the tuned one left out; one empty one if there is none.
    pub slices: Vec<BTreeMap<String, String>>,
    /// Keys of what is shown, the first before all.
    pub metrics: Vec<String>,
    /// Paired comparisons with the reference.
    pub comparisons: Vec<Comparison>,
    /// Cells that lie in the folder and not in the plan.
    pub unplanned: usize,
    /// How alike the adapters are, if that was looked at.
    pub weights: Option<Weights>,
    by_group: HashMap<BTreeMap<String, String>, usize>,
}

/// A label against the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The metric's key.
    pub metric: String,
    /// Index of the slice; none for the mean over all of them.
    pub slice: Option<usize>,
    /// The compared label.
    pub label: String,
    /// Seeds with both values: the label's and the reference's.
    pub pairs: Vec<(u64, f64, f64)>,
    /// What the differences, label minus reference, say.
    pub paired: Paired,
    /// The t-test's p after Holm's correction over all comparisons of the metric.
    pub corrected_p: Option<f64>,
}

impl Comparison {
    /// Whether a difference was found.
    pub fn found(&self) -> bool {
        self.corrected_p.is_some_and(|p| p < SIGNIFICANCE)
    }
}

impl Analysis {
    /// Reads a study's results, whole or partial.
    ///
    /// # Errors
    /// If a cell was changed by hand, or a result is damaged or of an unknown version.
    pub fn read(store: &Store) -> Result<Self> {
        let plan = store.plan()?;
        let mut results = HashMap::new();
        let mut failures = HashMap::new();
        let distinct: BTreeSet<&str> = plan.cells.iter().map(|cell| cell.id.as_str()).collect();
        for id in distinct {
            store.check_cell(id)?;
            if let Some(result) = store.result(id)? {
                results.insert(id.to_owned(), result);
            }
            if let Some(failure) = store.failure(id)? {
                failures.insert(id.to_owned(), failure);
            }
        }
        let unplanned = store.unplanned(&plan)?;
        let weights = Weights::read(store)?;
        Ok(Self { weights, ..Self::of(plan, results, failures, unplanned) })
    }

    pub(crate) fn of(
        plan: Plan,
        results: HashMap<String, CellResult>,
        failures: HashMap<String, Failure>,
        unplanned: usize,
    ) -> Self {
        let progress = |index: usize| {
            let cell: &Planned = &plan.cells[index];
            match results.get(&cell.id) {
                Some(result) => Progress::Done(result.metric(&plan.select)),
                None if failures.contains_key(&cell.id) => Progress::Failed,
                None => Progress::Open,
            }
        };
        let choices = choices(&plan, &progress);
        let labels = plan
            .axes
            .iter()
            .find(|(axis, _)| *axis == plan.compare)
            .map(|(_, labels)| labels.clone())
            .unwrap_or_default();
        let mut slices: Vec<BTreeMap<String, String>> = Vec::new();
        for choice in &choices {
            let mut slice = choice.group.clone();
            slice.remove(&plan.compare);
            if !slices.contains(&slice) {
                slices.push(slice);
            }
        }
        let by_group =
            choices.iter().enumerate().map(|(at, choice)| (choice.group.clone(), at)).collect();
        let mut analysis = Self {
            metrics: plan.metrics.clone(),
            plan,
            results,
            failures,
            choices,
            labels,
            slices,
            comparisons: Vec::new(),
            unplanned,
            weights: None,
            by_group,
        };
        if analysis.metrics.is_empty() {
            analysis.metrics = analysis.metrics_found();
        }
        analysis.comparisons = analysis.compare();
        analysis
    }

    /// The test metrics that occur, without those of single domains; the validation loss if there are none.
    fn metrics_found(&self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for result in self.results.values() {
            for key in result.test_metrics().into_keys() {
                let of_domain = key.starts_with("loss/");
                if !of_domain && !found.contains(&key) {
                    found.push(key);
                }
            }
        }
        found.sort_by_key(|key| (key != "loss", key.clone()));
        found.truncate(MOST_METRICS);
        if found.is_empty() {
            found.push("valid_loss".to_owned());
        }
        found
    }

    /// The choice of a label in a slice.
    pub fn choice(&self, label: &str, slice: usize) -> Option<&Choice> {
        let mut group = self.slices.get(slice)?.clone();
        group.insert(self.plan.compare.clone(), label.to_owned());
        self.by_group.get(&group).map(|at| &self.choices[*at])
    }

    /// The results of the chosen cells of a label in a slice, by seed.
    pub fn chosen(&self, label: &str, slice: usize) -> Vec<(Option<u64>, &CellResult)> {
        let Some(tried) = self.choice(label, slice).and_then(Choice::chosen) else {
            return Vec::new();
        };
        let result = |index: &usize| {
            let cell = &self.plan.cells[*index];
            Some((cell.seed, self.results.get(&cell.id)?))
        };
        tried.cells.iter().filter_map(result).collect()
    }

    /// A metric of the chosen cells, by seed.
    pub fn values(&self, label: &str, slice: usize, metric: &str) -> Vec<(Option<u64>, f64)> {
        let chosen = self.chosen(label, slice);
        chosen.iter().filter_map(|(seed, result)| Some((*seed, result.metric(metric)?))).collect()
    }

    /// Mean and interval over seeds.
    pub fn summary(&self, label: &str, slice: usize, metric: &str) -> Option<Summary> {
        let values: Vec<f64> =
            self.values(label, slice, metric).into_iter().map(|(_, value)| value).collect();
        summarise(&values)
    }

    /// Whether more of a metric is better.
    pub fn higher_is_better(&self, metric: &str) -> bool {
        let scored = self.results.values().find(|result| result.metric(metric).is_some());
        scored.map_or(!crate::result::is_cost(metric), |result| result.higher_is_better(metric))
    }

    fn compare(&self) -> Vec<Comparison> {
        let Some(reference) = &self.plan.reference else { return Vec::new() };
        let mut all = Vec::new();
        for metric in &self.metrics {
            let mut found = Vec::new();
            for label in self.labels.iter().filter(|label| *label != reference) {
                let per_slice: Vec<Vec<(u64, f64, f64)>> = (0..self.slices.len())
                    .map(|slice| {
                        pairs(
                            &self.values(label, slice, metric),
                            &self.values(reference, slice, metric),
                        )
                    })
                    .collect();
                if self.slices.len() > 1 {
                    found.extend(comparison(metric, None, label, over_slices(&per_slice)));
                }
                for (slice, pairs) in per_slice.into_iter().enumerate() {
                    found.extend(comparison(metric, Some(slice), label, pairs));
                }
            }
            let tested: Vec<usize> =
                (0..found.len()).filter(|index| found[*index].paired.t_p.is_some()).collect();
            let raw: Vec<f64> =
                tested.iter().filter_map(|index| found[*index].paired.t_p).collect();
            for (index, p) in tested.into_iter().zip(holm(&raw)) {
                found[index].corrected_p = Some(p);
            }
            all.extend(found);
        }
        all
    }

    /// Cells that are done, and all.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        let mut seen = BTreeSet::new();
        for cell in &self.plan.cells {
            if !seen.insert(&cell.id) {
                continue;
            }
            counts.cells += 1;
            match self.results.get(&cell.id) {
                Some(result) => {
                    counts.trained += usize::from(result.trained.is_some());
                    counts.scored += usize::from(result.test.is_some());
                    counts.seconds += result.trained.as_ref().map_or(0.0, |trained| trained.wall_s);
                    counts.seconds += result.test.as_ref().map_or(0.0, |test| test.wall_s);
                }
                None if self.failures.contains_key(&cell.id) => {}
                None if cell.kind == Kind::Trained => counts.open += 1,
                None => counts.unscored += 1,
            }
            counts.failed += usize::from(self.failures.contains_key(&cell.id));
        }
        counts
    }

    /// A slice in words; empty for the only one.
    pub fn slice_name(&self, slice: usize) -> String {
        self.slices[slice].values().cloned().collect::<Vec<_>>().join(", ")
    }
}

/// How far a study is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// All cells.
    pub cells: usize,
    /// Those that are trained.
    pub trained: usize,
    /// Those that are scored on the test split.
    pub scored: usize,
    /// Those that failed.
    pub failed: usize,
    /// Those still to be trained.
    pub open: usize,
    /// Those without training that are still to be scored.
    pub unscored: usize,
    /// Seconds of training and scoring.
    pub seconds: f64,
}

fn pairs(ours: &[(Option<u64>, f64)], reference: &[(Option<u64>, f64)]) -> Vec<(u64, f64, f64)> {
    // What has no seed, an untrained model, stands beside every seed.
    let alone = |values: &[(Option<u64>, f64)]| match values {
        [(None, value)] => Some(*value),
        _ => None,
    };
    if let Some(value) = alone(reference) {
        return ours.iter().filter_map(|(seed, our)| Some(((*seed)?, *our, value))).collect();
    }
    if let Some(value) = alone(ours) {
        return reference
            .iter()
            .filter_map(|(seed, other)| Some(((*seed)?, value, *other)))
            .collect();
    }
    let of = |seed: &Option<u64>| reference.iter().find(|(other, _)| other == seed);
    ours.iter().filter_map(|(seed, our)| Some(((*seed)?, *our, of(seed)?.1))).collect()
}

/// The mean over slices of each seed that all slices have: seeds are what is drawn anew, not slices.
fn over_slices(slices: &[Vec<(u64, f64, f64)>]) -> Vec<(u64, f64, f64)> {
    let Some(first) = slices.first() else { return Vec::new() };
    let at =
        |slice: &[(u64, f64, f64)], seed: u64| slice.iter().find(|pair| pair.0 == seed).copied();
    first
        .iter()
        .filter_map(|(seed, ..)| {
            let all: Option<Vec<_>> = slices.iter().map(|slice| at(slice, *seed)).collect();
            let all = all?;
            let mean = |pick: fn(&(u64, f64, f64)) -> f64| {
                all.iter().map(pick).sum::<f64>() / all.len() as f64
            };
            Some((*seed, mean(|pair| pair.1), mean(|pair| pair.2)))
        })
        .collect()
}

fn comparison(
    metric: &str,
    slice: Option<usize>,
    label: &str,
    pairs: Vec<(u64, f64, f64)>,
) -> Option<Comparison> {
    let differences: Vec<f64> = pairs.iter().map(|(_, ours, reference)| ours - reference).collect();
    let paired = paired(&differences)?;
    let (metric, label) = (metric.to_owned(), label.to_owned());
    Some(Comparison { metric, slice, label, pairs, paired, corrected_p: None })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::plan::tests::{cell, plan};
    use crate::result::tests::result;

    /// Two methods, two rates, five seeds; the second method's test loss is lower by `gain` and a little
    /// noise.
    pub(crate) fn example(gain: f64) -> Analysis {
        let mut cells = Vec::new();
        let mut results = HashMap::new();
        for (method, shift) in [("lora", 0.0), ("hydralora", gain)] {
            for (rate, off) in [("1e-4", 0.3), ("1e-3", 0.0)] {
                for seed in 1..=5_u64 {
                    let cell = cell(method, rate, seed);
                    let noise = 0.01 * ((seed * 7 + u64::from(method == "lora")) % 5) as f64;
                    let loss = 2.0 + off - shift + noise;
                    let test = (off == 0.0).then_some(loss);
                    results.insert(cell.id.clone(), result(&cell.id, loss, test));
                    cells.push(cell);
                }
            }
        }
        let mut plan = plan(cells);
        plan.reference = Some("lora".to_owned());
        Analysis::of(plan, results, HashMap::new(), 0)
    }

    #[test]
    fn each_is_compared_at_its_own_best_value_by_seed() {
        let analysis = example(0.1);
        assert_eq!(analysis.metrics, ["loss", "macro_loss", "mmlu/acc,none"]);
        let choice = analysis.choice("hydralora", 0).unwrap();
        assert!(choice.complete && choice.chosen().unwrap().value == "1e-3");
        let loss = &analysis.comparisons[0];
        assert_eq!(
            (loss.metric.as_str(), loss.label.as_str(), loss.pairs.len()),
            ("loss", "hydralora", 5)
        );
        assert!((loss.paired.difference.mean + 0.1).abs() < 0.02);
        assert!(loss.found() && loss.paired.pairs_needed.unwrap() <= 5);
        assert!(!example(0.0).comparisons[0].found());
        assert_eq!(analysis.counts().trained, 20);
        assert_eq!(analysis.counts().scored, 10);
    }

    #[test]
    fn slices_are_averaged_within_a_seed() {
        let slices = [vec![(1, 1.0, 2.0), (2, 3.0, 3.0)], vec![(1, 3.0, 2.0)]];
        assert_eq!(over_slices(&slices), [(1, 2.0, 2.0)]);
        let seeds = [(Some(1), 1.0), (Some(2), 2.0)];
        assert_eq!(pairs(&seeds, &[(None, 5.0)]), [(1, 1.0, 5.0), (2, 2.0, 5.0)]);
        assert_eq!(pairs(&seeds, &[(Some(2), 5.0)]), [(2, 2.0, 5.0)]);
    }
}

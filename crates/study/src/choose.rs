//! Which value of the tuned axis is each variant's best, by the validation split alone.

use crate::plan::Plan;
use std::collections::BTreeMap;

/// How far a cell is, as far as choosing goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Progress {
    /// Not done.
    Open,
    /// It failed: a rate that is too high, for one.
    Failed,
    /// Trained, with this number on the validation split.
    Done(Option<f64>),
}

/// One value that was tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    /// Its label; empty where nothing is tuned.
    pub value: String,
    /// Indices into the plan's cells.
    pub cells: Vec<usize>,
    /// Mean over the seeds that are done.
    pub mean: Option<f64>,
    /// Seeds that are done.
    pub done: usize,
    /// Seeds that failed.
    pub failed: usize,
}

/// The choice for one combination of the other labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Axis → label, without the tuned one.
    pub group: BTreeMap<String, String>,
    /// What was tried, in the order of the axis.
    pub tried: Vec<Tried>,
    /// Index of the best so far.
    pub best: Option<usize>,
    /// Whether nothing that is still open can change it.
    pub complete: bool,
}

impl Choice {
    /// What was tried and found best so far.
    pub fn chosen(&self) -> Option<&Tried> {
        self.best.map(|best| &self.tried[best])
    }

    /// Whether the best lies at an end of what was tried, so that a better one may lie outside.
    pub fn at_edge(&self) -> bool {
        let ends = [0, self.tried.len().saturating_sub(1)];
        self.tried.len() > 1 && self.best.is_some_and(|best| ends.contains(&best))
    }
}

/// The choices of a plan, in the order of its cells.
///
/// The least mean over seeds is the best. A value of which a seed failed is chosen only if there is none
/// without.
pub fn choices(plan: &Plan, progress: &dyn Fn(usize) -> Progress) -> Vec<Choice> {
    let mut ordered: Vec<_> = groups(plan).into_iter().collect();
    ordered.sort_by_key(|(_, cells)| cells[0]);
    ordered.into_iter().map(|(group, cells)| choose(plan, group, &cells, progress)).collect()
}

/// The cells of each combination of labels without the tuned one.
pub(crate) fn groups(plan: &Plan) -> BTreeMap<BTreeMap<String, String>, Vec<usize>> {
    let mut groups: BTreeMap<BTreeMap<String, String>, Vec<usize>> = BTreeMap::new();
    for (index, cell) in plan.cells.iter().enumerate() {
        groups.entry(cell.group(plan.tune.as_deref())).or_default().push(index);
    }
    groups
}

/// The choice of one group.
pub(crate) fn choose(
    plan: &Plan,
    group: BTreeMap<String, String>,
    cells: &[usize],
    progress: &dyn Fn(usize) -> Progress,
) -> Choice {
    let order = plan.tune.as_ref().and_then(|tune| {
        plan.axes.iter().find(|(axis, _)| axis == tune).map(|(_, labels)| (tune, labels))
    });
    let mut by_value: BTreeMap<(usize, String), Vec<usize>> = BTreeMap::new();
    for &index in cells {
        let key = match order {
            Some((tune, labels)) => {
                let value = plan.cells[index].labels.get(tune).cloned().unwrap_or_default();
                (labels.iter().position(|label| *label == value).unwrap_or(usize::MAX), value)
            }
            None => (0, String::new()),
        };
        by_value.entry(key).or_default().push(index);
    }
    let tried: Vec<Tried> = by_value
        .into_iter()
        .map(|((_, value), cells)| {
            let found: Vec<f64> = cells
                .iter()
                .filter_map(|index| match progress(*index) {
                    Progress::Done(Some(value)) if value.is_finite() => Some(value),
                    _ => None,
                })
                .collect();
            let failed = |index: &&usize| match progress(**index) {
                Progress::Failed => true,
                Progress::Done(value) => value.is_some_and(|value| !value.is_finite()),
                Progress::Open => false,
            };
            let failed = cells.iter().filter(failed).count();
            let mean = crate::stats::mean(&found);
            Tried { value, cells, mean, done: found.len(), failed }
        })
        .collect();
    let better = |a: &usize, b: &usize| {
        let key = |index: usize| (tried[index].failed > 0, tried[index].mean);
        let ((failed_a, mean_a), (failed_b, mean_b)) = (key(*a), key(*b));
        let by_mean = mean_a.unwrap_or(f64::INFINITY).total_cmp(&mean_b.unwrap_or(f64::INFINITY));
        failed_a.cmp(&failed_b).then(by_mean)
    };
    let known = (0..tried.len()).filter(|index| tried[*index].mean.is_some());
    let best = if tried.len() == 1 { Some(0) } else { known.min_by(better) };
    let complete = cells.iter().all(|index| progress(*index) != Progress::Open);
    Choice { group, tried, best, complete: complete || order.is_none() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{cell, plan};

    #[test]
    fn the_least_mean_without_failures_is_best() {
        let rates = ["1e-4", "1e-3", "1e-2"];
        let cells = rates.iter().flat_map(|rate| (1..=2).map(|seed| cell("lora", rate, seed)));
        let plan = plan(cells.collect());
        let choice = |values: [Progress; 6]| choices(&plan, &|index| values[index]).remove(0);
        let (done, open) = (|v| Progress::Done(Some(v)), Progress::Open);
        let found =
            choice([done(2.0), done(2.2), done(1.0), done(1.2), done(0.5), Progress::Failed]);
        assert_eq!(found.chosen().unwrap().value, "1e-3");
        assert!(found.complete && !found.at_edge());
        let found = choice([done(2.0), done(2.2), open, open, done(0.5), done(f64::NAN)]);
        assert_eq!(found.chosen().unwrap().value, "1e-4");
        assert!(!found.complete && found.at_edge());
        assert_eq!(choice([open; 6]).best, None);
        let failed = choice([Progress::Failed; 6]);
        assert!(failed.complete && failed.best.is_none());
    }
}

//! Paired differences between two results files.
//!
//! Records are paired by task and number. The interval is the bootstrap's: records are drawn with
//! replacement [`RESAMPLES`] times, within their tasks, and the middle 95 % of the mean differences
//! reported.

use super::error::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// Times that records are drawn anew.
const RESAMPLES: usize = 10_000;

/// Two results, compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Name of the first model.
    pub first: String,
    /// Name of the second.
    pub second: String,
    /// Groups, then tasks.
    pub differences: Vec<Difference>,
    /// What makes the two files less comparable than they look.
    pub warnings: Vec<String>,
}

/// One metric of one task or group in both.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Task or group.
    pub task: String,
    /// `acc,none` and the like.
    pub metric: String,
    /// Mean of the first.
    pub first: f64,
    /// Mean of the second.
    pub second: f64,
    /// Second minus first.
    pub difference: f64,
    /// The middle 95 % of resampled differences.
    pub interval: [f64; 2],
    /// Records that both answered.
    pub records: usize,
    /// Records where the second scored higher, and lower.
    pub higher_lower: [usize; 2],
}

/// A record's two scores and their weight.
#[derive(Clone, Copy)]
struct Pair {
    first: f64,
    second: f64,
    weight: f64,
}

/// Compares two results files.
///
/// # Errors
/// If one is not a results file, or they have no record in common.
pub fn compare(first: &Path, second: &Path) -> Result<Comparison> {
    let (a, b) = (read(first)?, read(second)?);
    let mut warnings = Vec::new();
    let mut tasks: Vec<(String, String, Vec<Pair>)> = Vec::new();
    for (task, scores) in members(&a["scores"]) {
        let other = &b["scores"][task];
        if other.is_null() {
            continue;
        }
        for key in ["num_fewshot", "data_sha256", "first_prompt", "generation_kwargs"] {
            let (left, right) = (&a["configs"][task][key], &b["configs"][task][key]);
            if left != right {
                warnings.push(format!("{task}: `{key}` differs between the two files"));
            }
        }
        for (metric, values) in members(scores) {
            if metric == "doc_id" || metric == "weight" || other[metric].is_null() {
                continue;
            }
            let pairs = pairs(scores, values, other, &other[metric]);
            if !pairs.is_empty() {
                tasks.push((task.to_owned(), metric.to_owned(), pairs));
            }
        }
    }
    if tasks.is_empty() {
        let message = format!("has no record in common with {}", first.display());
        return Err(Error::malformed(second, None, message));
    }
    let mut asked: Vec<(&str, &str, Vec<&[Pair]>)> = Vec::new();
    for (group, names) in members(&a["group_subtasks"]) {
        let names: HashSet<&str> =
            names.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let start = asked.len();
        for (task, metric, pairs) in &tasks {
            if !names.contains(task.as_str()) {
                continue;
            }
            match asked[start..].iter_mut().find(|(_, of, _)| of == metric) {
                Some((.., strata)) => strata.push(pairs),
                None => asked.push((group, metric, vec![pairs])),
            }
        }
    }
    asked.extend(
        tasks.iter().map(|(task, metric, pairs)| (&**task, &**metric, vec![pairs.as_slice()])),
    );
    let differences = asked
        .into_par_iter()
        .map(|(task, metric, strata)| difference(task, metric, &strata))
        .collect();
    let name = |file: &Value| file["config"]["model"].as_str().unwrap_or("?").to_owned();
    Ok(Comparison { first: name(&a), second: name(&b), differences, warnings })
}

fn read(path: &Path) -> Result<Value> {
    let text = hydralora_files::read(path)?;
    let value: Value = serde_json::from_slice(&text)
        .map_err(|error| Error::malformed(path, Some(error.line()), error.to_string()))?;
    if !value["scores"].is_object() {
        let message = "has no `scores`; expected a file that `eval --out` wrote";
        return Err(Error::malformed(path, None, message));
    }
    Ok(value)
}

fn members(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(key, value)| (key.as_str(), value))
}

fn pairs(scores: &Value, values: &Value, other: &Value, others: &Value) -> Vec<Pair> {
    let ids = |scores: &Value| -> Vec<u64> {
        scores["doc_id"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
    };
    let at = |values: &Value, index: usize| values[index].as_f64();
    let of_other: HashMap<u64, usize> =
        ids(other).into_iter().enumerate().map(|(index, id)| (id, index)).collect();
    (ids(scores).into_iter().enumerate())
        .filter_map(|(index, id)| {
            let weight = at(&scores["weight"], index).unwrap_or(1.0);
            let second = at(others, *of_other.get(&id)?)?;
            Some(Pair { first: at(values, index)?, second, weight })
        })
        .collect()
}

fn difference(task: &str, metric: &str, strata: &[&[Pair]]) -> Difference {
    let all: Vec<Pair> = strata.iter().flat_map(|pairs| pairs.iter().copied()).collect();
    let total: f64 = all.iter().map(|pair| pair.weight).sum();
    let mean = |of: fn(&Pair) -> f64| {
        all.iter().map(|pair| pair.weight * of(pair)).sum::<f64>() / total.max(f64::MIN_POSITIVE)
    };
    let (first, second) = (mean(|pair| pair.first), mean(|pair| pair.second));
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let mut drawn: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let (mut sum, mut weights) = (0.0, 0.0);
            for pairs in strata {
                for _ in 0..pairs.len() {
                    let at = (random.next_u64() as u128 * pairs.len() as u128) >> 64;
                    let pair = pairs[at as usize];
                    sum += pair.weight * (pair.second - pair.first);
                    weights += pair.weight;
                }
            }
            sum / f64::max(weights, f64::MIN_POSITIVE)
        })
        .collect();
    drawn.sort_by(f64::total_cmp);
    let quantile = |q: f64| drawn[((drawn.len() - 1) as f64 * q).round() as usize];
    let count = |of: fn(&&Pair) -> bool| all.iter().filter(of).count();
    Difference {
        task: task.to_owned(),
        metric: metric.to_owned(),
        first,
        second,
        difference: second - first,
        interval: [quantile(0.025), quantile(0.975)],
        records: all.len(),
        higher_lower: [
            count(|pair| pair.second > pair.first),
            count(|pair| pair.second < pair.first),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(values: &[(f64, f64)]) -> Vec<Pair> {
        values.iter().map(|&(first, second)| Pair { first, second, weight: 1.0 }).collect()
    }

    #[test]
    fn the_interval_covers_what_the_differences_say() {
        let better: Vec<(f64, f64)> =
            (0..200).map(|i| (f64::from(i % 4 == 0), f64::from(i % 2 == 0))).collect();
        let found = difference("t", "acc,none", &[&pairs(&better)]);
        assert!((found.difference - 0.25).abs() < 1e-12);
        // The standard error is √(0.25·0.75/200) = 0.0306.
        let [low, high] = found.interval;
        assert!((low - 0.19).abs() < 0.015 && (high - 0.31).abs() < 0.015, "{low} {high}");
        assert_eq!(found.higher_lower, [50, 0]);
        let same = difference("t", "acc,none", &[&pairs(&[(1.0, 1.0), (0.0, 0.0)])]);
        assert_eq!((same.difference, same.interval), (0.0, [0.0, 0.0]));
    }
}

//! Means, intervals and paired tests. Distributions are `statrs`'s; what it lacks (Wilcoxon's exact test,
//! the power of a t-test) is computed here and compared with SciPy's values in the tests.

use statrs::distribution::{ChiSquared, Continuous, ContinuousCDF, Normal, StudentsT};
use statrs::function::erf::erf;

/// Share of intervals that hold the true value.
pub const CONFIDENCE: f64 = 0.95;
/// Probability of finding a difference that is not there.
pub const SIGNIFICANCE: f64 = 0.05;
/// Wanted probability of finding one that is there.
pub const POWER: f64 = 0.8;
/// Pairs up to which Wilcoxon's test counts every assignment of signs.
const EXACT_PAIRS: usize = 60;
/// Most seeds that are proposed.
const MOST_SEEDS: usize = 10_000;

/// The mean; none of nothing.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The standard deviation of a sample (n - 1); none for fewer than two values.
pub fn standard_deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values).filter(|_| values.len() > 1)?;
    let sum: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    Some((sum / (values.len() - 1) as f64).sqrt())
}

/// A mean with what is known of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation, for two values or more.
    pub deviation: Option<f64>,
    /// The 95 % interval of the mean by Student's t, for two values or more.
    pub interval: Option<[f64; 2]>,
}

/// Summarises values; none for nothing.
pub fn summarise(values: &[f64]) -> Option<Summary> {
    let mean = mean(values)?;
    let deviation = standard_deviation(values);
    let interval = deviation.map(|deviation| {
        let half = critical_t(values.len() - 1) * deviation / (values.len() as f64).sqrt();
        [mean - half, mean + half]
    });
    Some(Summary { n: values.len(), mean, deviation, interval })
}

/// Student's t that is passed on either side with the probability of an error.
fn critical_t(freedom: usize) -> f64 {
    StudentsT::new(0.0, 1.0, freedom as f64)
        .map_or(f64::NAN, |t| t.inverse_cdf(1.0 - (1.0 - CONFIDENCE) / 2.0))
}

/// A paired comparison.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paired {
    /// The differences' summary.
    pub difference: Summary,
    /// Two-sided p of the paired t-test; none for fewer than two pairs or equal differences.
    pub t_p: Option<f64>,
    /// Two-sided p of Wilcoxon's signed-rank test; none if all differences are 0.
    pub wilcoxon_p: Option<f64>,
    /// Cohen's d_z: the mean difference over the differences' standard deviation.
    pub effect: Option<f64>,
    /// Pairs that a difference of this size would need to be found with a probability of 80 %.
    pub pairs_needed: Option<usize>,
    /// The probability of finding it with as many pairs as there are.
    pub power: Option<f64>,
}

/// Compares pairs by their differences; none for no pair.
pub fn paired(differences: &[f64]) -> Option<Paired> {
    let difference = summarise(differences)?;
    let n = differences.len();
    let effect = difference
        .deviation
        .filter(|deviation| *deviation > 0.0)
        .map(|deviation| difference.mean / deviation);
    let t_p = effect.and_then(|effect| {
        let t = StudentsT::new(0.0, 1.0, (n - 1) as f64).ok()?;
        Some(2.0 * t.cdf(-(effect * (n as f64).sqrt()).abs()))
    });
    Some(Paired {
        difference,
        t_p,
        wilcoxon_p: wilcoxon(differences),
        effect,
        pairs_needed: effect.and_then(pairs_needed),
        power: effect.map(|effect| power(effect, n)),
    })
}

/// Two-sided p of Wilcoxon's signed-rank test, zeros left out, ties by mean ranks. Exact, over all
/// assignments of signs, for up to 60 pairs; by the normal distribution beyond.
pub fn wilcoxon(differences: &[f64]) -> Option<f64> {
    let mut sizes: Vec<(f64, bool)> = differences
        .iter()
        .filter(|difference| **difference != 0.0 && difference.is_finite())
        .map(|difference| (difference.abs(), *difference > 0.0))
        .collect();
    if sizes.is_empty() {
        return None;
    }
    sizes.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n = sizes.len();
    // Twice the mean rank, a whole number.
    let mut ranks = vec![0_usize; n];
    let mut ties = 0.0;
    let mut from = 0;
    while from < n {
        let to = from + sizes[from..].iter().take_while(|size| size.0 == sizes[from].0).count();
        ranks[from..to].fill(from + 1 + to);
        let equal = (to - from) as f64;
        ties += equal * equal * equal - equal;
        from = to;
    }
    let positive: usize = ranks.iter().zip(&sizes).filter(|(_, size)| size.1).map(|(r, _)| r).sum();
    let all: usize = ranks.iter().sum();
    let smaller = positive.min(all - positive);
    if n <= EXACT_PAIRS {
        // How many assignments give each sum of positive ranks.
        let mut ways = vec![0.0; all + 1];
        ways[0] = 1.0;
        for &rank in &ranks {
            for sum in (rank..=all).rev() {
                ways[sum] += ways[sum - rank];
            }
        }
        let tail: f64 = ways[..=smaller].iter().sum();
        return Some((2.0 * tail / 2.0_f64.powi(n as i32)).min(1.0));
    }
    let count = n as f64;
    let middle = all as f64 / 2.0;
    // In twice the ranks; the variance is four times the usual one.
    let variance = 4.0 * (count * (count + 1.0) * (2.0 * count + 1.0) / 24.0 - ties / 48.0);
    let z = (smaller as f64 - middle) / variance.sqrt();
    Some((1.0 + erf(z / std::f64::consts::SQRT_2)).min(1.0))
}

/// Holm's correction: for each p, the least level at which it is still rejected among all.
pub fn holm(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut corrected = vec![0.0; values.len()];
    let mut so_far = 0.0_f64;
    for (at, index) in order.into_iter().enumerate() {
        so_far = so_far.max((values.len() - at) as f64 * values[index]).min(1.0);
        corrected[index] = so_far;
    }
    corrected
}

/// The probability that a two-sided paired t-test finds an effect `d_z` with `n` pairs.
///
/// With V of χ²(ν), the statistic is (Z + d_z √n) / √(V / ν); given V its tails are normal, and they are
/// integrated over V.
pub fn power(effect: f64, n: usize) -> f64 {
    if n < 2 || !effect.is_finite() {
        return f64::NAN;
    }
    /// Pieces of Simpson's rule.
    const PIECES: usize = 2000;
    let freedom = (n - 1) as f64;
    let (Ok(spread), Ok(normal)) = (ChiSquared::new(freedom), Normal::new(0.0, 1.0)) else {
        return f64::NAN;
    };
    let critical = critical_t(n - 1);
    let shift = effect.abs() * (n as f64).sqrt();
    // Over the root of V, whose density has no pole at 0.
    let found = |root: f64| {
        let bound = critical * root / freedom.sqrt();
        let tails = normal.sf(bound - shift) + normal.cdf(-bound - shift);
        tails * spread.pdf(root * root) * 2.0 * root
    };
    let last = (freedom + 12.0 * (2.0 * freedom).sqrt() + 60.0).sqrt();
    let step = last / PIECES as f64;
    let weighed = |at: usize| {
        // At 0 the density of one degree of freedom has a limit that the formula cannot give.
        let root = (at as f64 * step).max(1e-9);
        let weight = match at {
            0 | PIECES => 1.0,
            odd if odd % 2 == 1 => 4.0,
            _ => 2.0,
        };
        weight * found(root)
    };
    ((0..=PIECES).map(weighed).sum::<f64>() * step / 3.0).clamp(0.0, 1.0)
}

/// The fewest pairs with which an effect is found with a probability of 80 %; none if it takes more than
/// ten thousand.
pub fn pairs_needed(effect: f64) -> Option<usize> {
    if !effect.is_finite() || effect == 0.0 || power(effect, MOST_SEEDS) < POWER {
        return None;
    }
    let (mut few, mut enough) = (1, 2);
    while power(effect, enough) < POWER {
        (few, enough) = (enough, 2 * enough);
    }
    while enough - few > 1 {
        let middle = few.midpoint(enough);
        if power(effect, middle) < POWER { few = middle } else { enough = middle }
    }
    Some(enough)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn near(found: f64, expected: f64, what: &str) {
        assert!(
            (found - expected).abs() <= 1e-8 + 1e-6 * expected.abs(),
            "{what}: {found} {expected}"
        );
    }

    /// `tests/fixtures/statistics_reference.py` made the values.
    #[test]
    fn values_are_those_of_scipy() {
        let text = include_str!("../tests/fixtures/statistics_reference.json");
        let fixture: Value = serde_json::from_str(text).unwrap();
        let numbers = |value: &Value| -> Vec<f64> {
            value.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
        };
        let cases = fixture["paired"].as_array().unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let differences = numbers(&case["differences"]);
            let name = format!("{differences:?}");
            let found = paired(&differences).unwrap();
            near(found.difference.mean, case["mean"].as_f64().unwrap(), &name);
            let interval = numbers(&case["interval"]);
            let own = found.difference.interval.unwrap();
            near(own[0], interval[0], &name);
            near(own[1], interval[1], &name);
            near(found.t_p.unwrap(), case["t_p"].as_f64().unwrap(), &name);
            near(found.effect.unwrap(), case["effect"].as_f64().unwrap(), &name);
            near(found.wilcoxon_p.unwrap(), case["wilcoxon_p"].as_f64().unwrap(), &name);
        }
        for case in fixture["power"].as_array().unwrap() {
            let (effect, n) = (case["effect"].as_f64().unwrap(), case["n"].as_u64().unwrap());
            let expected = case["power"].as_f64().unwrap();
            let found = power(effect, n as usize);
            assert!((found - expected).abs() < 1e-5, "{effect} {n}: {found} {expected}");
        }
        for case in fixture["pairs_needed"].as_array().unwrap() {
            let effect = case["effect"].as_f64().unwrap();
            assert_eq!(
                pairs_needed(effect),
                Some(case["n"].as_u64().unwrap() as usize),
                "{effect}"
            );
        }
        for case in fixture["holm"].as_array().unwrap() {
            let expected = numbers(&case["corrected"]);
            for (found, expected) in holm(&numbers(&case["p"])).iter().zip(expected) {
                near(*found, expected, "holm");
            }
        }
    }

    #[test]
    fn what_cannot_be_said_is_not_said() {
        assert_eq!(summarise(&[]), None);
        let one = paired(&[0.5]).unwrap();
        assert_eq!((one.difference.interval, one.t_p, one.effect), (None, None, None));
        let same = paired(&[0.0, 0.0, 0.0]).unwrap();
        assert_eq!((same.t_p, same.wilcoxon_p, same.pairs_needed), (None, None, None));
        assert_eq!(pairs_needed(1e-4), None);
    }
}

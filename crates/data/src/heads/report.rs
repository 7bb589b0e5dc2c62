//! What was found, and why that number.

use super::corpus::Corpus;
use super::features::{Features, Terms};
use super::whole::Totals;
use super::{Choice, HeadsOptions};
use hydralora_cluster::{
    Agreement, Clustering, DensityClusters, Measured, Place, Rule, second_opinion,
};
use serde::Serialize;
use std::collections::BTreeMap;

/// Terms named per cluster.
const TOP_TERMS: usize = 10;
/// Characters of a cluster's example.
const EXAMPLE: usize = 160;

/// The suggested number of heads with everything that speaks for and against it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadsReport {
    /// The suggested number of experts.
    pub num_experts: usize,
    /// The rule that chose it.
    pub rule: Rule,
    /// Why that number, in sentences.
    pub reasons: Vec<String>,
    /// What to be careful about.
    pub notes: Vec<String>,
    /// What the rows are.
    pub features: FeatureReport,
    /// Rows each repetition worked on.
    pub sample_rows: usize,
    /// Repetitions.
    pub seeds: usize,
    /// The seed everything follows from.
    pub seed: u64,
    /// What each rule chose.
    pub rules: Vec<RuleChoice>,
    /// Means over the repetitions for every number of clusters tried.
    pub curve: Vec<KSummary>,
    /// DBSCAN on a sample; none where there are too few rows.
    pub dbscan: Option<DensityClusters>,
    /// HDBSCAN on the same sample.
    pub hdbscan: Option<DensityClusters>,
    /// The clusters of all rows, the largest first.
    pub clusters: Vec<Cluster>,
    /// Agreement with the domains, where there are several.
    pub agreement: Option<Agreement>,
    /// Names of the domains.
    pub domains: Vec<String>,
    /// A sample of rows in two dimensions.
    pub map: Vec<MapPoint>,
    /// The cluster of every text held.
    #[serde(skip)]
    pub assignment: Assignment,
}

/// The clusters of a corpus's texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    clusters: Vec<Option<u32>>,
    /// The row of each text, in increasing order, where not all rows are held.
    rows: Option<Vec<u64>>,
}

impl Assignment {
    pub(super) fn new(features: &Features, corpus: &Corpus, clustering: &Clustering) -> Self {
        let mut clusters = vec![None; corpus.len().max(features.len() + features.blank)];
        for (&text, &cluster) in features.origin.iter().zip(&clustering.assignment) {
            clusters[text] = Some(cluster);
        }
        Self { clusters, rows: corpus.sampled_rows() }
    }

    /// The cluster of a row, counted over all sources; none for one that holds no word that counts
    /// or is not in the sample.
    pub fn of(&self, row: usize) -> Option<u32> {
        let text = match &self.rows {
            Some(rows) => rows.binary_search(&(row as u64)).ok()?,
            None => row,
        };
        self.clusters.get(text).copied().flatten()
    }

    /// The cluster of every text held, in order; none for one without a word that counts.
    pub fn clusters(&self) -> &[Option<u32>] {
        &self.clusters
    }
}

/// What the rows are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FeatureReport {
    /// `tfidf` or `model`.
    pub kind: &'static str,
    /// Rows clustered.
    pub rows: usize,
    /// Texts of the uniform sample that features, curves and centres are from, where there are more
    /// than are held.
    pub sample: Option<usize>,
    /// Texts left out because they are empty or hold no word that counts.
    pub blank: usize,
    /// Texts of which only the first 20,000 bytes were read.
    pub shortened: usize,
    /// Terms of the vocabulary, for `tfidf`.
    pub vocabulary: Option<usize>,
    /// Dimensions of a row.
    pub dimensions: usize,
}

/// What a rule chose.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RuleChoice {
    /// The rule.
    pub rule: Rule,
    /// The choice from the means over all repetitions; none where the rule sees no reason to prefer
    /// a number.
    pub chosen: Option<usize>,
    /// How many repetitions by themselves choose the same.
    pub votes: usize,
    /// The choice of each repetition.
    pub repetitions: Vec<Option<usize>>,
}

impl RuleChoice {
    pub(super) fn of(rule: Rule, repetitions: &[Vec<Measured>]) -> Self {
        let chosen = rule.choose(&means(repetitions));
        let repetitions: Vec<Option<usize>> =
            repetitions.iter().map(|measured| rule.choose(measured)).collect();
        let votes = repetitions.iter().filter(|choice| **choice == chosen).count();
        Self { rule, chosen, votes, repetitions }
    }

    /// Each choice with the number of repetitions that made it, as `4 (12), 5 (3)`.
    pub fn spread(&self) -> String {
        let mut votes: BTreeMap<Option<usize>, usize> = BTreeMap::new();
        for choice in &self.repetitions {
            *votes.entry(*choice).or_default() += 1;
        }
        let mut votes: Vec<(Option<usize>, usize)> = votes.into_iter().collect();
        votes.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let name = |k: Option<usize>| k.map_or_else(|| "none".to_owned(), |k| k.to_string());
        votes.iter().map(|(k, n)| format!("{} ({n})", name(*k))).collect::<Vec<_>>().join(", ")
    }
}

/// Means and standard deviations over the repetitions at one number of clusters.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KSummary {
    /// The number of clusters.
    pub k: usize,
    /// Squared error per row.
    pub error: f64,
    /// Its standard deviation over the repetitions.
    pub error_deviation: f64,
    /// Mean silhouette; none for one cluster.
    pub silhouette: Option<f64>,
    /// Its standard deviation over the repetitions.
    pub silhouette_deviation: Option<f64>,
    /// Gap statistic.
    pub gap: f64,
    /// Its standard deviation over the repetitions.
    pub gap_deviation: f64,
    /// Prediction strength.
    pub strength: Option<f64>,
    /// Its standard deviation over the repetitions.
    pub strength_deviation: Option<f64>,
}

/// One cluster of all rows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cluster {
    /// Rows in it.
    pub size: usize,
    /// Its share of all rows.
    pub share: f64,
    /// The terms that are more frequent in it than elsewhere, foremost first.
    pub terms: Vec<String>,
    /// The start of the row nearest to its centre.
    pub example: String,
    /// Where its rows come from, the largest part first.
    pub domains: Vec<DomainCount>,
}

/// Rows of a cluster that come from one domain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DomainCount {
    /// The domain.
    pub domain: String,
    /// Rows.
    pub rows: usize,
}

/// A row on the map.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MapPoint {
    /// Place.
    pub x: f32,
    /// Place.
    pub y: f32,
    /// Its cluster, a number of `clusters`.
    pub cluster: u32,
    /// Its domain, a number of `domains`.
    pub domain: u32,
}

pub(super) fn build(
    features: &Features,
    corpus: &Corpus,
    options: &HeadsOptions,
    choice: Choice,
    clustering: Clustering,
    map: Vec<Place>,
    totals: Option<Totals>,
) -> HeadsReport {
    let Choice { k_max, rules, curve, .. } = choice;
    let domain_of = |row: usize| corpus.domains.get(features.origin[row]).copied().unwrap_or(0);
    let domains: Vec<u32> = (0..features.len()).map(domain_of).collect();
    // How many rows of each domain are in each cluster: of all rows, or of those held.
    let sampled = totals.is_some();
    let blank = totals.as_ref().map_or(features.blank, |totals| totals.blank);
    let table =
        totals.map_or_else(|| held_table(&clustering, &domains, corpus), |totals| totals.table);
    let rows = table.iter().flatten().sum();
    let agreement = (corpus.domain_names.len() > 1).then(|| Agreement::in_table(&table));
    let (dbscan, hdbscan) = match curve.is_empty() {
        true => (None, None),
        false => second_opinion(&features.rows, options.seed).unzip(),
    };
    let clusters = clusters(features, corpus, &table, &clustering);
    let num_experts = clusters.len();
    let report = FeatureReport {
        kind: features.kind,
        rows,
        sample: corpus.is_sample().then_some(corpus.len()),
        blank,
        shortened: corpus.shortened,
        vocabulary: features.terms.as_ref().map(|terms| terms.vocabulary.terms.len()),
        dimensions: features.dimensions(),
    };
    let assignment = Assignment::new(features, corpus, &clustering);
    let mut found = HeadsReport {
        num_experts,
        rule: options.rule,
        reasons: Vec::new(),
        notes: Vec::new(),
        features: report,
        sample_rows: super::sample_size(features.len()),
        seeds: options.seeds,
        seed: options.seed,
        rules,
        curve,
        dbscan,
        hdbscan,
        clusters,
        agreement,
        domains: corpus.domain_names.clone(),
        map: map
            .iter()
            .map(|place| {
                let Place { row, cluster, x, y } = *place;
                MapPoint { x, y, cluster, domain: domains[row] }
            })
            .collect(),
        assignment,
    };
    found.reasons = reasons(&found, options);
    if let Some(sample) = found.features.sample {
        let counted = match sampled {
            true => "sizes and agreement with the domains count all rows",
            false => "sizes and agreement with the domains are the sample's",
        };
        found.notes.push(format!(
            "{} texts are more than are held: features, curves and centres are those of a uniform \
             sample of {sample}; {counted}",
            corpus.total()
        ));
    }
    found.notes.extend(notes(&found, options, k_max));
    found
}

/// What the repetitions measured, on average.
fn means(repetitions: &[Vec<Measured>]) -> Vec<Measured> {
    let summaries = curve(repetitions).into_iter();
    summaries
        .enumerate()
        .map(|(at, summary)| {
            let errors = repetitions.iter().map(|measured| measured[at].gap_error);
            Measured {
                k: summary.k,
                error: summary.error,
                silhouette: summary.silhouette,
                gap: summary.gap,
                gap_error: errors.sum::<f64>() / repetitions.len() as f64,
                strength: summary.strength,
            }
        })
        .collect()
}

fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

pub(super) fn curve(repetitions: &[Vec<Measured>]) -> Vec<KSummary> {
    let count = repetitions.first().map_or(0, Vec::len);
    (0..count)
        .map(|at| {
            let of = |pick: fn(&Measured) -> Option<f64>| -> Vec<f64> {
                repetitions.iter().filter_map(|measured| pick(&measured[at])).collect()
            };
            let some = |values: Vec<f64>| {
                (!values.is_empty()).then(|| mean_and_deviation(&values)).unzip()
            };
            let (error, error_deviation) = mean_and_deviation(&of(|m| Some(m.error)));
            let (gap, gap_deviation) = mean_and_deviation(&of(|m| Some(m.gap)));
            let (silhouette, silhouette_deviation) = some(of(|m| m.silhouette));
            let (strength, strength_deviation) = some(of(|m| m.strength));
            KSummary {
                k: repetitions[0][at].k,
                error,
                error_deviation,
                silhouette,
                silhouette_deviation,
                gap,
                gap_deviation,
                strength,
                strength_deviation,
            }
        })
        .collect()
}

/// Rows of each cluster and domain among those held: `[clusters][domains]`.
fn held_table(clustering: &Clustering, domains: &[u32], corpus: &Corpus) -> Vec<Vec<usize>> {
    let mut table = vec![vec![0; corpus.domain_names.len().max(1)]; clustering.centres.rows()];
    for (&cluster, &domain) in clustering.assignment.iter().zip(domains) {
        table[cluster as usize][domain as usize] += 1;
    }
    table
}

fn clusters(
    features: &Features,
    corpus: &Corpus,
    table: &[Vec<usize>],
    clustering: &Clustering,
) -> Vec<Cluster> {
    let sizes: Vec<usize> = table.iter().map(|row| row.iter().sum()).collect();
    let terms = features.terms.as_ref();
    let terms = terms.map(|terms| top_terms(terms, &clustering.assignment, sizes.len()));
    let mut nearest: Vec<Option<usize>> = vec![None; sizes.len()];
    for (row, &centre) in clustering.assignment.iter().enumerate() {
        let best = &mut nearest[centre as usize];
        let closer = |&best: &usize| clustering.distances[row] < clustering.distances[best];
        if best.as_ref().is_none_or(closer) {
            *best = Some(row);
        }
    }
    let rows = sizes.iter().sum::<usize>().max(1) as f64;
    (0..sizes.len())
        .map(|cluster| {
            let mut domains: Vec<DomainCount> = (table[cluster].iter().zip(&corpus.domain_names))
                .filter(|(rows, _)| **rows > 0)
                .map(|(&rows, domain)| DomainCount { domain: domain.clone(), rows })
                .collect();
            domains.sort_by_key(|count| std::cmp::Reverse(count.rows));
            let text = nearest[cluster].and_then(|row| corpus.texts.get(features.origin[row]));
            let text = text.map_or("", String::as_str).split_whitespace().collect::<Vec<_>>();
            let mut example: String = text.join(" ");
            if let Some((end, _)) = example.char_indices().nth(EXAMPLE) {
                example.truncate(end);
                example.push('…');
            }
            Cluster {
                size: sizes[cluster],
                share: sizes[cluster] as f64 / rows,
                terms: terms.as_ref().map_or_else(Vec::new, |terms| terms[cluster].clone()),
                example,
                domains,
            }
        })
        .collect()
}

/// The terms whose mean weight in a cluster exceeds their mean elsewhere by most.
fn top_terms(terms: &Terms, assignment: &[u32], k: usize) -> Vec<Vec<String>> {
    let width = terms.sparse.width;
    let mut sums = vec![0.0_f64; k * width];
    let mut counts = vec![0.0_f64; k];
    for (at, &row) in terms.sample.iter().enumerate() {
        let cluster = assignment[row] as usize;
        counts[cluster] += 1.0;
        for &(term, weight) in terms.sparse.row(at) {
            sums[cluster * width + term as usize] += f64::from(weight);
        }
    }
    let all: f64 = counts.iter().sum();
    let totals: Vec<f64> =
        (0..width).map(|term| (0..k).map(|c| sums[c * width + term]).sum()).collect();
    (0..k)
        .map(|cluster| {
            let inside = counts[cluster].max(1.0);
            let outside = (all - counts[cluster]).max(1.0);
            let score = |term: usize| {
                let own = sums[cluster * width + term];
                own / inside - (totals[term] - own) / outside
            };
            let mut scored: Vec<(usize, f64)> = (0..width).map(|t| (t, score(t))).collect();
            scored.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let best = scored.iter().take(TOP_TERMS).filter(|(_, score)| *score > 0.0);
            best.map(|(term, _)| terms.vocabulary.terms[*term].clone()).collect()
        })
        .collect()
}

fn reasons(report: &HeadsReport, options: &HeadsOptions) -> Vec<String> {
    let mut reasons = Vec::new();
    let n = report.num_experts;
    if report.curve.is_empty() {
        let least = match n {
            1 => "so there is one cluster and nothing to divide".to_owned(),
            n => format!("so there is nothing to divide; {n} is the fewest asked for"),
        };
        reasons.push(format!("all rows are alike to these features, {least}"));
        return reasons;
    }
    if let Some(choice) = report.rules.iter().find(|choice| choice.rule == options.rule) {
        let name = choice.rule.name();
        reasons.push(match choice.chosen {
            Some(k) => format!(
                "the rule `{name}` chooses {k} from the mean of {} repetitions; each by itself: {}",
                choice.repetitions.len(),
                choice.spread()
            ),
            None => format!("the rule `{name}` sees no reason to divide the data"),
        });
    }
    if let Some(at) = report.curve.iter().position(|summary| summary.k == n) {
        let here = &report.curve[at];
        let first = report.curve[0].error.max(1e-12);
        let next = report.curve.get(at + 1);
        let gain = next.map(|next| 100.0 * (here.error - next.error) / first);
        let left = 100.0 * here.error / first;
        let from = report.curve[0].k;
        match gain {
            Some(gain) if at == 0 => reasons
                .push(format!("one cluster more would take off {gain:.1} % of the squared error")),
            Some(gain) => reasons.push(format!(
                "{n} clusters leave {left:.0} % of the squared error of {from}, one more would \
                 take off another {gain:.1} %"
            )),
            None if at == 0 => {}
            None => reasons
                .push(format!("{n} clusters leave {left:.0} % of the squared error of {from}")),
        }
        if let Some(silhouette) = here.silhouette {
            reasons.push(format!(
                "their mean silhouette is {silhouette:.2} (1: far apart, 0: touching)"
            ));
        }
    }
    let others: Vec<String> = report
        .rules
        .iter()
        .filter(|choice| choice.rule != options.rule)
        .map(|choice| {
            let chosen = choice.chosen.map_or_else(|| "none".to_owned(), |k| k.to_string());
            format!("{} {chosen}", choice.rule.name())
        })
        .collect();
    reasons.push(format!("the other rules: {}", others.join(", ")));
    if let (Some(dbscan), Some(hdbscan)) = (&report.dbscan, &report.hdbscan) {
        let clusters =
            |n: usize| if n == 1 { "1 cluster".to_owned() } else { format!("{n} clusters") };
        reasons.push(format!(
            "DBSCAN finds {} ({:.0} % of the rows in none), HDBSCAN {} ({:.0} %)",
            clusters(dbscan.clusters),
            100.0 * dbscan.noise,
            clusters(hdbscan.clusters),
            100.0 * hdbscan.noise
        ));
    }
    reasons
}

fn notes(report: &HeadsReport, options: &HeadsOptions, k_max: usize) -> Vec<String> {
    let mut notes = Vec::new();
    let features = &report.features;
    let rows = |n: usize| if n == 1 { "1 text".to_owned() } else { format!("{n} texts") };
    if features.blank > 0 {
        notes.push(format!(
            "{} left out: empty, or without a word that counts",
            rows(features.blank)
        ));
    }
    if features.shortened > 0 {
        notes
            .push(format!("of {} only the first 20,000 bytes were read", rows(features.shortened)));
    }
    if k_max < options.k_max {
        notes.push(format!("{} rows allow no more than {k_max} clusters", features.rows));
    }
    if features.rows < 50 {
        notes.push(format!(
            "{} rows are few: the number is hardly more than a guess",
            features.rows
        ));
    }
    let only_elbow_or_silhouette = matches!(options.rule, Rule::Elbow | Rule::Silhouette);
    if only_elbow_or_silhouette && options.k_min == 1 && report.num_experts > 1 {
        let single: Vec<&str> = report
            .rules
            .iter()
            .filter(|choice| choice.chosen == Some(1))
            .map(|choice| choice.rule.name())
            .collect();
        if !single.is_empty() {
            notes.push(format!(
                "the data may be one cluster: {} would not divide them, and `{}` cannot say so",
                single.join(" and "),
                options.rule.name()
            ));
        }
    }
    if report.num_experts == k_max && k_max > 1 && !report.curve.is_empty() {
        notes.push(format!("{k_max} is the largest number tried; try more with a larger k_max"));
    }
    notes
}

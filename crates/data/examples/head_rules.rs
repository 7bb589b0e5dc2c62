//! How often each rule finds the right number of clusters in mixtures of `k` sources, `k = 1 … 8`.
//!
//! ```sh
//! cargo run --release -p hydralora-data --example head_rules -- FOLDER [trials] [dimensions] [out.jsonl]
//! ```
//!
//! Every file of `FOLDER` (JSON, JSON lines, or text) is one source. A trial draws `k` files and 60
//! to 400 rows of each. The last argument keeps every trial's curve, one JSON object a line.

use hydralora_data::heads::{Corpus, Features, HeadsOptions, Rule, choose};
use hydralora_data::{Error, SourceConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

const MOST_SOURCES: usize = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = arguments.first().ok_or("expected a folder of files, one source each")?;
    let number = |at: usize, default: usize| {
        arguments.get(at).map_or(Ok(default), |text| text.parse::<usize>())
    };
    let (trials, dimensions) = (number(1, 20)?, number(2, hydralora_data::heads::DIMENSIONS)?);
    let mut out = arguments.get(3).map(fs_err::File::create).transpose()?;

    let sources = read(Path::new(folder))?;
    if sources.len() < MOST_SOURCES {
        return Err(format!("{folder} holds {} files; expected 8 or more", sources.len()).into());
    }
    eprintln!("{} sources of {} texts", sources.len(), sources.iter().map(Corpus::len).sum::<usize>());
    println!("| sources | {} |", Rule::ALL.map(Rule::name).join(" | "));
    println!("| ---: |{}", " ---: |".repeat(Rule::ALL.len()));
    let mut random = ChaCha8Rng::seed_from_u64(2024);
    let mut below = |count: usize| random.next_u64() as usize % count;
    let mut totals: BTreeMap<Rule, (usize, usize)> = BTreeMap::new();
    for k in 1..=MOST_SOURCES {
        let mut hits: BTreeMap<Rule, usize> = BTreeMap::new();
        let mut all: BTreeMap<Rule, Vec<Option<usize>>> = BTreeMap::new();
        for trial in 0..trials {
            let mut left: Vec<usize> = (0..sources.len()).collect();
            let mut corpus = Corpus::default();
            for _ in 0..k {
                let source = &sources[left.swap_remove(below(left.len()))];
                let rows = (60 + below(341)).min(source.len());
                let mut texts: Vec<usize> = (0..source.len()).collect();
                for _ in 0..rows {
                    let text = texts.swap_remove(below(texts.len()));
                    corpus.push(source.texts()[text].clone(), &source.domain_names()[0]);
                }
            }
            let options = HeadsOptions { seed: trial as u64, seeds: 5, ..HeadsOptions::default() };
            let features = Features::tfidf(&corpus, dimensions, trial as u64)?;
            let choice = choose(&features, &options)?;
            for rule in &choice.rules {
                *hits.entry(rule.rule).or_default() += usize::from(rule.chosen == Some(k));
                all.entry(rule.rule).or_default().push(rule.chosen);
            }
            if let Some(out) = &mut out {
                let line = serde_json::json!({
                    "k": k, "sources": corpus.domain_names(), "choice": choice,
                });
                writeln!(out, "{line}")?;
            }
        }
        let cells = Rule::ALL.map(|rule| {
            let hits = hits.get(&rule).copied().unwrap_or(0);
            let total = totals.entry(rule).or_default();
            total.0 += hits;
            total.1 += trials;
            format!("{hits}/{trials}")
        });
        println!("| {k} | {} |", cells.join(" | "));
        for (rule, mut chosen) in all {
            chosen.sort();
            let shown: Vec<String> =
                chosen.iter().map(|k| k.map_or("-".to_owned(), |k| k.to_string())).collect();
            eprintln!("  {k} {:10} {}", rule.name(), shown.join(" "));
        }
    }
    let cells = Rule::ALL.map(|rule| {
        let (hits, trials) = totals[&rule];
        format!("{:.0} %", 100.0 * hits as f64 / trials as f64)
    });
    println!("| all | {} |", cells.join(" | "));
    Ok(())
}

/// Every readable file of a folder, by name.
fn read(folder: &Path) -> Result<Vec<Corpus>, Error> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        paths.push(entry?.path());
    }
    paths.sort();
    let source = |path: PathBuf| Corpus::read(&[SourceConfig::new(path)], Path::new(""));
    paths.into_iter().map(source).collect()
}

//! How often each rule finds the right number of clusters in mixtures of `k` sources, `k = 1 … 8`.
//!
//! ```sh
//! cargo run --release -p hydralora-data --example head_rules -- FOLDER [trials] [dimensions] [out.jsonl]
//! ```
//!
//! Every file of `FOLDER` (JSON, JSON lines, or text) is one source. A trial draws `k` files, and of
//! each 200 rows, in a second round 60 to 400. A cell is the share of right answers, in parentheses
//! that of answers off by one at most and the mean error. The last argument keeps every trial's
//! curves, one JSON object a line.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it prints its numbers")]

use hydralora_data::heads::{Choice, Corpus, Features, HeadsOptions, Rule, choose};
use hydralora_data::{Error, SourceConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
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
    eprintln!(
        "{} sources of {} texts",
        sources.len(),
        sources.iter().map(Corpus::len).sum::<usize>()
    );
    for even in [true, false] {
        println!(
            "\n{}\n",
            if even { "200 rows of each source:" } else { "60 to 400 rows of each:" }
        );
        println!("| sources | {} |", Rule::ALL.map(Rule::name).join(" | "));
        println!("| ---: |{}", " ---: |".repeat(Rule::ALL.len()));
        let mut all: Vec<(usize, Choice)> = Vec::new();
        for k in 1..=MOST_SOURCES {
            for trial in 0..trials {
                let (corpus, choice) = trial_of(&sources, k, trial, dimensions, even)?;
                if let Some(out) = &mut out {
                    let line = serde_json::json!({
                        "k": k, "even": even, "sources": corpus.domain_names(), "choice": choice,
                    });
                    writeln!(out, "{line}")?;
                }
                all.push((k, choice));
            }
            println!("| {k} | {} |", cells(&all[all.len() - trials..]).join(" | "));
        }
        println!("| all | {} |", cells(&all).join(" | "));
    }
    Ok(())
}

/// A mixture of `k` sources and what is chosen for it.
fn trial_of(
    sources: &[Corpus],
    k: usize,
    trial: usize,
    dimensions: usize,
    even: bool,
) -> Result<(Corpus, Choice), Error> {
    let mut random = ChaCha8Rng::seed_from_u64((1000 * k + trial) as u64);
    let mut below = |count: usize| random.next_u64() as usize % count;
    let mut left: Vec<usize> = (0..sources.len()).collect();
    let mut corpus = Corpus::default();
    for _ in 0..k {
        let source = &sources[left.swap_remove(below(left.len()))];
        let wanted = if even { 200 } else { 60 + below(341) };
        let mut texts: Vec<usize> = (0..source.len()).collect();
        for _ in 0..wanted.min(source.len()) {
            let text = texts.swap_remove(below(texts.len()));
            corpus.push(source.texts()[text].clone(), &source.domain_names()[0]);
        }
    }
    let options = HeadsOptions { seed: trial as u64, ..HeadsOptions::default() };
    let features = Features::tfidf(&corpus, dimensions, trial as u64)?;
    let choice = choose(&features, &options)?;
    Ok((corpus, choice))
}

/// For each rule, the share of right choices, of those off by no more than one, and the mean error.
fn cells(choices: &[(usize, Choice)]) -> Vec<String> {
    (0..Rule::ALL.len())
        .map(|rule| {
            let off =
                |(k, choice): &(usize, Choice)| choice.rules[rule].chosen.unwrap_or(1).abs_diff(*k);
            let off: Vec<usize> = choices.iter().map(off).collect();
            let percent = |most: usize| {
                100 * off.iter().filter(|off| **off <= most).count() / off.len().max(1)
            };
            let mean = off.iter().sum::<usize>() as f64 / off.len().max(1) as f64;
            format!("{} % ({} %, {mean:.1})", percent(0), percent(1))
        })
        .collect()
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

//! Time and memory of finding heads over the number of rows.
//!
//! ```sh
//! cargo run --release -p hydralora-data --example head_scale -- ROWS FILE…
//! ```
//!
//! Repeats the records of the files up to `ROWS`, each with other words mixed in so that no two rows
//! and no two vocabularies are alike, writes them to a temporary file, and times what
//! `hydralora heads` does with it: reading, features, the choice over 15 repetitions, the clustering
//! of all rows, and the report.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it prints its numbers")]

use hydralora_data::SourceConfig;
use hydralora_data::heads::{Corpus, DIMENSIONS, Features, HeadsOptions, find_heads};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [rows, files @ ..] = arguments.as_slice() else {
        return Err("expected ROWS FILE…".into());
    };
    let rows: usize = rows.parse()?;
    let file = tempfile::Builder::new().suffix(".jsonl").tempfile()?;
    let mut bytes = 0;
    {
        let sources: Vec<SourceConfig> = files.iter().map(SourceConfig::new).collect();
        let corpus = Corpus::read(&sources, Path::new(""))?;
        let mut out = std::io::BufWriter::new(file.as_file());
        for row in 0..rows {
            let mut text = corpus.texts()[row % corpus.len()].clone();
            for word in 0..5 {
                let _ = write!(text, " {}", invented(row * 5 + word));
            }
            let line = serde_json::json!({ "text": text }).to_string();
            bytes += line.len();
            writeln!(out, "{line}")?;
        }
        out.flush()?;
    }
    let started = Instant::now();
    let corpus = Corpus::read(&[SourceConfig::new(file.path())], Path::new(""))?;
    let read = started.elapsed().as_secs_f64();
    let features = Features::tfidf(&corpus, DIMENSIONS, 41)?;
    let featured = started.elapsed().as_secs_f64();
    let report = find_heads(&features, &corpus, &HeadsOptions::default())?;
    let total = started.elapsed().as_secs_f64();
    println!(
        "{rows} rows, {} MB: reading {read:.1} s, features {:.1} s, choice and clusters {:.1} s, \
         together {total:.1} s; peak {} MB; {} heads",
        bytes >> 20,
        featured - read,
        total - featured,
        peak_megabytes(),
        report.num_experts
    );
    Ok(())
}

/// A word that no language has, one of about 130,000.
fn invented(number: usize) -> String {
    let mut left = number.wrapping_mul(2_654_435_761) % 130_000;
    let mut word = String::from("qz");
    for _ in 0..5 {
        word.push(char::from(b'a' + (left % 26) as u8));
        left /= 26;
    }
    word
}

/// The process's largest resident memory; 0 where the system does not say.
fn peak_megabytes() -> usize {
    let status = fs_err::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or("");
    let kilobytes = line.split_whitespace().nth(1).and_then(|text| text.parse::<usize>().ok());
    kilobytes.unwrap_or(0) >> 10
}

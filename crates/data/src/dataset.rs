//! All files of a recipe, encoded and split.

use std::collections::HashSet;
use std::path::Path;

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::config::{DataConfig, SourceConfig};
use crate::encode::{EncodeOptions, Encoded, Example, TextEncoder, encode_record};
use crate::error::{Error, Result};
use crate::report::{DataReport, Dropped, SourceReport, Split};
use crate::source::read_source;
use crate::template::ChatTemplate;

/// Everything to train and validate on.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The domains' names, in order of first appearance; `Example::domain` indexes them.
    pub domains: Vec<String>,
    /// What is trained on, file by file in file order.
    pub train: Vec<Example>,
    /// What is validated on, file by file in file order.
    pub valid: Vec<Example>,
    /// The template that conversations were rendered with: the configuration's, or the model's.
    pub template: Option<ChatTemplate>,
    /// Counts.
    pub report: DataReport,
}

impl Dataset {
    /// Reads, encodes and splits all files. `template` is the model's own; `config.template` comes
    /// before it. Paths are relative to `base_dir`.
    ///
    /// Without `config.valid`, `valid_fraction` of each file's records (rounded, at least one of
    /// two or more, never all) are kept for validation. Which ones follows from `seed`, the file's
    /// name and its number of records alone: other files, the template, the tokenizer and
    /// `max_seq_len` do not change it, and a file listed twice is split the same way both times.
    ///
    /// # Errors
    /// [`Error::Config`] with all faults of the configuration; otherwise the first error met, with
    /// its file and record.
    pub fn load(
        config: &DataConfig,
        base_dir: &Path,
        encoder: &dyn TextEncoder,
        template: Option<&ChatTemplate>,
        seed: u64,
    ) -> Result<Self> {
        let faults = config.validate(base_dir);
        if !faults.is_empty() {
            return Err(Error::Config(faults));
        }
        let template = config.resolve_template(base_dir)?.or_else(|| template.cloned());
        let options = EncodeOptions {
            encoder,
            template: template.as_ref(),
            max_seq_len: config.max_seq_len,
            train_on_prompt: config.train_on_prompt,
            overlong: config.overlong,
        };
        let mut loader = Loader::default();
        let fraction = if config.valid.is_empty() { config.valid_fraction } else { 0.0 };
        for source in &config.train {
            loader.add(source, Split::Train, fraction, seed, base_dir, &options)?;
        }
        for source in &config.valid {
            loader.add(source, Split::Valid, 0.0, seed, base_dir, &options)?;
        }
        Ok(loader.finish(template))
    }
}

#[derive(Default)]
struct Loader {
    domains: Vec<String>,
    train: Vec<Example>,
    valid: Vec<Example>,
    sources: Vec<SourceReport>,
}

impl Loader {
    fn add(
        &mut self,
        source: &SourceConfig,
        split: Split,
        valid_fraction: f64,
        seed: u64,
        base_dir: &Path,
        options: &EncodeOptions<'_>,
    ) -> Result<()> {
        let read = read_source(source, base_dir)?;
        let encoded: Vec<Result<Encoded>> =
            read.records.par_iter().map(|record| encode_record(record, options)).collect();
        let in_valid = valid_rows(&source.path, read.records.len(), valid_fraction, seed);
        let source_index = self.sources.len() as u32;
        let mut report = SourceReport {
            path: source.path.clone(),
            split,
            domain: source.domain_name(),
            format: read.format,
            records: read.records.len(),
            train_examples: 0,
            valid_examples: 0,
            tokens: 0,
            label_tokens: 0,
            longest: 0,
            truncated: 0,
            tokens_lost: 0,
            untrained_turns: 0,
            endless: 0,
            dropped: Dropped::default(),
        };
        for ((record, encoded), in_valid) in read.records.iter().zip(encoded).zip(in_valid) {
            let (tokens, labels) = match encoded? {
                Encoded::Dropped { reason, lost } => {
                    report.dropped.count(reason);
                    report.truncated += usize::from(lost > 0);
                    report.tokens_lost += lost;
                    continue;
                }
                Encoded::Kept { tokens, labels, lost, untrained_turns, endless } => {
                    report.truncated += usize::from(lost > 0);
                    report.tokens_lost += lost;
                    report.untrained_turns += untrained_turns;
                    report.endless += usize::from(endless);
                    (tokens, labels)
                }
            };
            let domain = self.domain(record.domain.as_deref().unwrap_or(&report.domain));
            let example = Example { tokens, labels, domain, source: source_index, row: record.row };
            report.tokens += example.tokens.len();
            report.label_tokens += example.label_tokens();
            report.longest = report.longest.max(example.tokens.len());
            if split == Split::Valid || in_valid {
                report.valid_examples += 1;
                self.valid.push(example);
            } else {
                report.train_examples += 1;
                self.train.push(example);
            }
        }
        if report.train_examples + report.valid_examples == 0 {
            return Err(Error::AllDropped {
                path: base_dir.join(&source.path),
                records: report.records,
                reasons: report.dropped.to_string(),
            });
        }
        self.sources.push(report);
        Ok(())
    }

    fn domain(&mut self, name: &str) -> u32 {
        let index = self.domains.iter().position(|known| known == name).unwrap_or_else(|| {
            self.domains.push(name.to_owned());
            self.domains.len() - 1
        });
        index as u32
    }

    fn finish(self, template: Option<ChatTemplate>) -> Dataset {
        let tokens = |examples: &[Example]| examples.iter().map(|e| e.tokens.len()).sum();
        let labels = |examples: &[Example]| examples.iter().map(Example::label_tokens).sum();
        let seen: HashSet<&[u32]> =
            self.train.iter().map(|example| example.tokens.as_slice()).collect();
        let mut report = DataReport {
            sources: self.sources,
            train_examples: self.train.len(),
            train_tokens: tokens(&self.train),
            train_label_tokens: labels(&self.train),
            valid_examples: self.valid.len(),
            valid_tokens: tokens(&self.valid),
            valid_label_tokens: labels(&self.valid),
            duplicates: self
                .valid
                .iter()
                .filter(|example| seen.contains(example.tokens.as_slice()))
                .count(),
            notes: Vec::new(),
        };
        report.take_notes();
        Dataset { domains: self.domains, train: self.train, valid: self.valid, template, report }
    }
}

/// For each of a file's records, whether it is kept for validation.
fn valid_rows(path: &Path, records: usize, fraction: f64, seed: u64) -> Vec<bool> {
    let mut chosen = vec![false; records];
    if fraction == 0.0 || records < 2 {
        return chosen;
    }
    let count = ((fraction * records as f64).round() as usize).clamp(1, records - 1);
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    // FNV-1a of the name: a hash whose value never changes between versions or machines.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&hash.to_le_bytes());
    key[16..24].copy_from_slice(b"validset");
    let mut random = ChaCha8Rng::from_seed(key);
    for row in index::sample(&mut random, records, count) {
        chosen[row] = true;
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(name: &str, records: usize, fraction: f64, seed: u64) -> Vec<usize> {
        let chosen = valid_rows(Path::new(name), records, fraction, seed);
        (0..records).filter(|&row| chosen[row]).collect()
    }

    #[test]
    fn the_split_has_the_asked_size_and_follows_seed_and_name() {
        for (records, fraction, expected) in
            [(100, 0.05, 5), (10, 0.05, 1), (2, 0.9, 1), (3, 0.99, 2), (1, 0.5, 0), (50, 0.0, 0)]
        {
            assert_eq!(rows("a", records, fraction, 1).len(), expected, "{records} {fraction}");
        }
        assert_eq!(rows("x/a", 1000, 0.1, 1), rows("y/a", 1000, 0.1, 1));
        assert_ne!(rows("a", 1000, 0.1, 1), rows("a", 1000, 0.1, 2));
        assert_ne!(rows("a", 1000, 0.1, 1), rows("b", 1000, 0.1, 1));
    }
}

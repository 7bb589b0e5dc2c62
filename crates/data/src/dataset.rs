//! All sources of a recipe, encoded and split.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde_json::json;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::config::{DataConfig, Dedup, SourceConfig, SpecialTokens};
use crate::dedup::{Seen, Signatures, exact_hash, signature, text_of, words};
use crate::encode::{EncodeOptions, Encoded, Sequence, TextEncoder, encode_record};
use crate::error::{Error, Result};
use crate::overlap::Questions;
use crate::report::{DataReport, FileReport, SourceReport, Split};
use crate::source::read_chunks;
use crate::splits::Meant;
use crate::store::{Counts, Entry, Examples, NewExample, Part, PartWriter, hash_file};
use crate::template::ChatTemplate;

/// Changes whenever the same input could give other tokens than before.
const CACHE_VERSION: u32 = 3;

/// Everything to train and validate on.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The domains' names, in order of first appearance; `Example::domain` indexes them.
    pub domains: Vec<String>,
    /// What is trained on, source by source in file order.
    pub train: Examples,
    /// What is validated on, source by source in file order.
    pub valid: Examples,
    /// The template that conversations were rendered with: the configuration's, or the model's.
    pub template: Option<ChatTemplate>,
    /// Counts.
    pub report: DataReport,
}

/// How a data set is loaded; what it holds does not depend on any of it but the seed.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Decides which records are kept for validation.
    pub seed: u64,
    /// Where token ids lie that are not held in memory.
    pub cache: PathBuf,
    /// What tells the tokenizer from any other, as a hash of its files.
    pub tokenizer: String,
    /// Bytes of data files above which token ids are not held in memory, unless the configuration
    /// says so itself. A compressed file counts four times.
    pub streaming_above: u64,
}

impl LoadOptions {
    /// The usual options: a cache in the folder for temporary files, streaming above 1 GiB.
    pub fn new(seed: u64) -> Self {
        let cache = std::env::temp_dir().join("hydralora-data");
        Self { seed, cache, tokenizer: String::new(), streaming_above: 1 << 30 }
    }
}

impl Dataset {
    /// [`Dataset::load_with`] the usual options.
    ///
    /// # Errors
    /// As [`Dataset::load_with`].
    pub fn load(
        config: &DataConfig,
        base_dir: &Path,
        encoder: &dyn TextEncoder,
        template: Option<&ChatTemplate>,
        seed: u64,
    ) -> Result<Self> {
        Self::load_with(config, base_dir, encoder, template, &LoadOptions::new(seed))
    }

    /// Reads, encodes and splits all sources. `template` is the model's own; `config.template`
    /// comes before it. Paths are relative to `base_dir`; named sources must have been
    /// [located](crate::locate).
    ///
    /// Without `config.valid`, `valid_fraction` of each source's records (rounded, at least one of
    /// two or more, never all) are kept for validation. Which ones follows from the seed, the
    /// source's name and its number of records alone: other sources, the template, the tokenizer
    /// and `max_seq_len` do not change it, and a source listed twice is split the same way both
    /// times.
    ///
    /// # Errors
    /// [`Error::Config`] with all faults of the configuration; otherwise the first error met, with
    /// its file and record.
    pub fn load_with(
        config: &DataConfig,
        base_dir: &Path,
        encoder: &dyn TextEncoder,
        template: Option<&ChatTemplate>,
        options: &LoadOptions,
    ) -> Result<Self> {
        let faults = config.validate(base_dir);
        if !faults.is_empty() {
            return Err(Error::Config(faults));
        }
        let template = config.resolve_template(base_dir)?.or_else(|| template.cloned());
        let template = template.map(|template| {
            let arguments = config.all_template_arguments(&template);
            template.with_arguments(&arguments)
        });
        let encode = EncodeOptions {
            encoder,
            template: template.as_ref(),
            max_seq_len: config.max_seq_len,
            train_on_prompt: config.train_on_prompt,
            overlong: config.overlong,
            turns: config.turns,
            special_tokens: config.special_tokens,
        };
        let held_out = |source: &SourceConfig| SourceConfig { held_out: true, ..source.clone() };
        let valid: Vec<SourceConfig> = config.valid.iter().map(held_out).collect();
        let listed = config.train.iter().map(|source| (source, Split::Train));
        let listed: Vec<_> =
            listed.chain(valid.iter().map(|source| (source, Split::Valid))).collect();
        let files: Vec<Vec<FileReport>> = listed
            .iter()
            .map(|(source, _)| file_reports(source, base_dir))
            .collect::<Result<_>>()?;
        let weighed = |file: &FileReport| file.bytes * if file.compressed() { 4 } else { 1 };
        let bytes: u64 = files.iter().flatten().map(weighed).sum();
        let streaming = config.streaming.unwrap_or(bytes > options.streaming_above);
        let mut loaded = Vec::new();
        let mut unkept = Vec::new();
        for ((source, split), files) in listed.into_iter().zip(files) {
            let part = if streaming {
                let key = cache_key(source, &files, &encode, options);
                let path = options.cache.join(format!("{}.tokens", &key[..32]));
                let kept = Part::open(&path, &key).and_then(|found| match found {
                    Some(part) => Ok(part),
                    None => build(source, base_dir, &encode, PartWriter::disk(&path)?, &key),
                });
                match kept {
                    // A cache saves memory and time; without one the token ids are held.
                    Err(error @ Error::Cache { .. }) => {
                        unkept.push(format!("token ids are held in memory: {error}"));
                        build(source, base_dir, &encode, PartWriter::memory(), "")?
                    }
                    other => other?,
                }
            } else {
                build(source, base_dir, &encode, PartWriter::memory(), "")?
            };
            let part = Arc::new(part);
            let meant = source.meant_files(base_dir)?;
            loaded.push(Loaded { source, split, files, meant, part, repeats: Vec::new() });
        }
        let on_disk = streaming && unkept.is_empty();
        let scratch = on_disk.then_some(options.cache.as_path());
        let overlap = compare(config, base_dir, &mut loaded, scratch)?;
        let mut dataset = assemble(config, &loaded, options.seed)?;
        dataset.template = template;
        dataset.report.streamed_bytes = loaded.iter().map(|l| l.part.disk_bytes()).sum();
        dataset.report.overlap = overlap;
        dataset.report.take_notes();
        dataset.report.notes.extend(unkept);
        Ok(dataset)
    }

    /// A hash of all that is trained and validated on, in order: tokens, labels and domains.
    /// It is the same whether they are held in memory or on disk.
    pub fn fingerprint(&self) -> &str {
        &self.report.fingerprint
    }
}

/// Why an example repeats an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Not,
    Exact,
    Near,
}

/// A source that has been read.
struct Loaded<'a> {
    source: &'a SourceConfig,
    split: Split,
    files: Vec<FileReport>,
    /// What the names of its files say of splits.
    meant: Meant,
    part: Arc<Part>,
    /// One for each example, or none where nothing was compared.
    repeats: Vec<Repeat>,
}

impl Loaded<'_> {
    fn repeat(&self, number: usize) -> Repeat {
        self.repeats.get(number).copied().unwrap_or(Repeat::Not)
    }
}

fn file_reports(source: &SourceConfig, base_dir: &Path) -> Result<Vec<FileReport>> {
    let files = source.files(base_dir)?;
    let known = source.named().map(|named| named.known);
    files
        .into_par_iter()
        .map(|path| {
            let (sha256, bytes) = hash_file(&path)?;
            let pinned = known.map(|known| known.contains(&sha256.as_str()));
            Ok(FileReport { path, bytes, sha256, known: pinned })
        })
        .collect()
}

/// Hash of everything that decides about the tokens of a source.
fn cache_key(
    source: &SourceConfig,
    files: &[FileReport],
    encode: &EncodeOptions<'_>,
    options: &LoadOptions,
) -> String {
    let template = encode.template.map(ChatTemplate::source);
    // A template that writes the date writes another one tomorrow.
    let dated = template.is_some_and(|source| source.contains("strftime_now"));
    let today =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() / 86_400);
    // A few texts that most tokenizers tell apart, for callers that name none.
    let probe = "The 1st naïve Öl-tank: 3.14 «día» 数字\n\tdef f(x): return x**2 🙂";
    let probe = encode.encoder.encode(probe).unwrap_or_default();
    let probe: Vec<u32> = probe.into_iter().map(|(token, _)| token).collect();
    let all = json!({
        "version": CACHE_VERSION,
        "files": files.iter().map(|file| &file.sha256).collect::<Vec<_>>(),
        // The files' names decide about layouts, and about tasks.
        "names": files.iter().map(|file| file.path.file_name().map(|n| n.to_string_lossy().into_owned()))
            .collect::<Vec<_>>(),
        "folders": files.iter().map(|file| {
            file.path.parent().and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned())
        }).collect::<Vec<_>>(),
        "named": source.source, "format": source.format, "fields": source.fields,
        "limit": source.limit, "system": source.system, "domain": source.domain_name(),
        "template": template, "arguments": encode.template.map(ChatTemplate::arguments),
        "date": dated.then_some(today),
        "tokenizer": options.tokenizer, "probe": probe,
        "bos": encode.encoder.bos_token(), "eos": encode.encoder.eos_token(),
        "add_bos": encode.encoder.add_bos(), "max_seq_len": encode.max_seq_len,
        "train_on_prompt": encode.train_on_prompt, "overlong": encode.overlong,
        "turns": encode.turns, "special_tokens": encode.special_tokens,
    });
    hex(&Sha256::digest(all.to_string()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads and encodes a source.
fn build(
    source: &SourceConfig,
    base_dir: &Path,
    encode: &EncodeOptions<'_>,
    mut writer: PartWriter,
    key: &str,
) -> Result<Part> {
    let mut counts = Counts::default();
    let domain = source.domain_name();
    let format = read_chunks(source, base_dir, &mut |chunk| {
        let encoded: Vec<Result<(Encoded, u128)>> = chunk
            .par_iter()
            .map(|record| Ok((encode_record(record, encode)?, exact_hash(&text_of(record)))))
            .collect();
        counts.records += chunk.len();
        for (record, encoded) in chunk.iter().zip(encoded) {
            let (encoded, text_hash) = encoded?;
            match encoded {
                Encoded::Dropped { reason, lost } => {
                    counts.dropped.count(reason);
                    counts.truncated += usize::from(lost > 0);
                    counts.tokens_lost += lost;
                }
                Encoded::Kept { sequences, seen } => {
                    counts.see(record, &seen);
                    let lost: usize = sequences.iter().map(|sequence| sequence.lost).sum();
                    counts.truncated += usize::from(lost > 0);
                    counts.tokens_lost += lost;
                    let domain = record.domain.as_deref().unwrap_or(&domain);
                    let row = record.row;
                    for Sequence { tokens, labels, .. } in &sequences {
                        writer.push(&NewExample { tokens, labels, domain, row, text_hash })?;
                    }
                }
            }
        }
        Ok(())
    })?;
    counts.format = format.to_owned();
    let part = writer.finish(counts, key)?;
    if part.examples == 0 {
        return Err(Error::AllDropped {
            path: base_dir.join(source.label()),
            records: part.counts.records,
            reasons: part.counts.dropped.to_string(),
        });
    }
    Ok(part)
}

/// Marks repeated examples, and looks for benchmark questions in training records.
fn compare(
    config: &DataConfig,
    base_dir: &Path,
    loaded: &mut [Loaded<'_>],
    scratch: Option<&Path>,
) -> Result<Option<crate::OverlapReport>> {
    if config.dedup != Dedup::None {
        let mut seen = Seen::default();
        for part in in_precedence(loaded) {
            let mut repeats = vec![Repeat::Not; part.part.examples];
            // Several sequences may come from one record; they share its fate.
            let mut before: Option<(u32, Repeat)> = None;
            part.part.for_each(&mut |number, entry| {
                let repeat = match before {
                    Some((row, repeat)) if row == entry.row => repeat,
                    _ if seen.insert(entry.text_hash) => Repeat::Not,
                    _ => Repeat::Exact,
                };
                repeats[number] = repeat;
                before = Some((entry.row, repeat));
            })?;
            part.repeats = repeats;
        }
    }
    let questions = match config.overlap_check.is_empty() {
        true => None,
        false => Some(Questions::read(&config.overlap_check, base_dir, config.overlap_words)?),
    };
    let near = config.dedup == Dedup::Near;
    if !near && questions.is_none() {
        return Ok(None);
    }
    let mut signatures = Signatures::new(scratch)?;
    let mut finds = Vec::new();
    for part in in_precedence(loaded) {
        // Rows that became examples and are not repeated word for word; the others are passed by.
        let mut rows: Vec<u32> = Vec::new();
        let repeats = &part.repeats;
        part.part.for_each(&mut |number, entry| {
            let first = rows.last() != Some(&entry.row);
            if first && repeats.get(number).is_none_or(|repeat| *repeat == Repeat::Not) {
                rows.push(entry.row);
            }
        })?;
        let mut rows = rows.into_iter().peekable();
        let asked = questions.as_ref().filter(|_| part.split == Split::Train);
        read_chunks(part.source, base_dir, &mut |chunk| {
            let kept: Vec<_> =
                chunk.iter().filter(|record| rows.next_if_eq(&record.row).is_some()).collect();
            let compared: Vec<_> = kept
                .par_iter()
                .map(|record| {
                    let words = words(&text_of(record));
                    let found = asked.and_then(|questions| questions.find(&words));
                    (near.then(|| signature(&words)), found)
                })
                .collect();
            for (record, (signature, found)) in kept.iter().zip(compared) {
                if let Some(signature) = signature {
                    signatures.push(&signature)?;
                }
                finds.extend(found.map(|question| (record.location.to_string(), question)));
            }
            Ok(())
        })?;
    }
    if near {
        let groups = signatures.groups(config.dedup_threshold)?;
        let mut numbered = groups.into_iter().enumerate();
        for part in in_precedence(loaded) {
            let repeats = &mut part.repeats;
            let mut before: Option<(u32, Repeat)> = None;
            part.part.for_each(&mut |number, entry| {
                if repeats[number] != Repeat::Not {
                    return;
                }
                let repeat = match before {
                    Some((row, repeat)) if row == entry.row => repeat,
                    _ => match numbered.next() {
                        Some((number, first)) if first as usize != number => Repeat::Near,
                        _ => Repeat::Not,
                    },
                };
                repeats[number] = repeat;
                before = Some((entry.row, repeat));
            })?;
        }
    }
    Ok(questions.map(|questions| questions.report(&finds)))
}

/// Validation sources first: what is repeated is left out of the training sources.
fn in_precedence<'a, 'b>(loaded: &'a mut [Loaded<'b>]) -> Vec<&'a mut Loaded<'b>> {
    let (mut first, second): (Vec<_>, Vec<_>) =
        loaded.iter_mut().partition(|part| part.split == Split::Valid);
    first.extend(second);
    first
}

/// Splits the sources into training and validation lists and counts what is in them.
fn assemble(config: &DataConfig, loaded: &[Loaded<'_>], seed: u64) -> Result<Dataset> {
    let fraction = if config.valid.is_empty() { config.valid_fraction } else { 0.0 };
    let mut domains: Vec<String> = Vec::new();
    let (mut train, mut valid) = (Examples::default(), Examples::default());
    let mut report = DataReport::default();
    let mut valid_hashes = std::collections::HashMap::new();
    let mut hashes = [Xxh3::new(), Xxh3::new()];
    for (number, part) in loaded.iter().enumerate() {
        let records = part.part.counts.records;
        let fraction = if part.split == Split::Train { fraction } else { 0.0 };
        let in_valid = valid_rows(&part.source.label(), records, fraction, seed);
        let mut source = SourceReport::new(part.source, part.split, &part.part.counts);
        source.files = part.files.clone();
        source.other_splits = part.meant.others.clone();
        source.held_out_alone = part.meant.held_out_alone;
        source.special_kept_text = config.special_tokens == SpecialTokens::Text;
        let mut of_domain: Vec<Option<u32>> = vec![None; part.part.domains.len()];
        let (mut for_train, mut for_valid) = (Vec::new(), Vec::new());
        part.part.for_each(&mut |example, entry: &Entry| {
            match part.repeat(example) {
                Repeat::Not => {}
                Repeat::Exact => return source.dropped.duplicate += 1,
                Repeat::Near => return source.dropped.near_duplicate += 1,
            }
            let domain = *of_domain[entry.domain as usize].get_or_insert_with(|| {
                let name = &part.part.domains[entry.domain as usize];
                domains.iter().position(|known| known == name).unwrap_or_else(|| {
                    domains.push(name.clone());
                    domains.len() - 1
                }) as u32
            });
            source.tokens += entry.length as usize;
            source.label_tokens += entry.label_tokens as usize;
            source.longest = source.longest.max(entry.length as usize);
            let held_out = part.split == Split::Valid || in_valid[entry.row as usize];
            let (tokens, labels) = (entry.length as usize, entry.label_tokens as usize);
            let hash = &mut hashes[usize::from(held_out)];
            hash.update(&entry.labels_hash.to_le_bytes());
            hash.update(&domain.to_le_bytes());
            if held_out {
                for_valid.push((example as u32, entry.length));
                report.valid_tokens += tokens;
                report.valid_label_tokens += labels;
                *valid_hashes.entry(entry.tokens_hash).or_insert(0_usize) += 1;
            } else {
                for_train.push((example as u32, entry.length));
                report.train_tokens += tokens;
                report.train_label_tokens += labels;
            }
        })?;
        source.train_examples = for_train.len();
        source.valid_examples = for_valid.len();
        let of_domain: Vec<u32> = of_domain.into_iter().map(Option::unwrap_or_default).collect();
        train.add(&part.part, of_domain.clone(), number as u32, &for_train);
        valid.add(&part.part, of_domain, number as u32, &for_valid);
        report.sources.push(source);
    }
    // A second pass, as the held-out examples are known only now.
    for part in loaded {
        if valid_hashes.is_empty() {
            break;
        }
        let fraction = if part.split == Split::Train { fraction } else { 0.0 };
        let in_valid = valid_rows(&part.source.label(), part.part.counts.records, fraction, seed);
        part.part.for_each(&mut |example, entry| {
            let trained = part.split == Split::Train
                && !in_valid[entry.row as usize]
                && part.repeat(example) == Repeat::Not;
            if trained && let Some(count) = valid_hashes.remove(&entry.tokens_hash) {
                report.duplicates += count;
            }
        })?;
    }
    report.train_examples = train.len();
    report.valid_examples = valid.len();
    let names: Vec<u8> =
        domains.iter().flat_map(|name| [name.as_bytes(), b"\n"].concat()).collect();
    let [train_hash, valid_hash] = hashes.map(|hash| hash.digest128());
    let parts = [&train_hash.to_le_bytes()[..], &valid_hash.to_le_bytes(), &names];
    report.fingerprint = hex(&Sha256::digest(parts.concat()));
    let counts: Vec<usize> = report.sources.iter().map(|source| source.train_examples).collect();
    let weights = config.mixed_weights(&counts[..config.train.len()]);
    let draws: f64 = weights.iter().zip(&counts).map(|(w, &n)| w * n as f64).sum();
    let most = MOST_DRAWS * train.len().max(1 << 20) as f64;
    if draws > most {
        let heaviest = weights.iter().copied().fold(0.0, f64::max);
        return Err(Error::Batching(format!(
            "data: an epoch would draw {draws:.3e} examples by the weights of the sources (up to \
             {heaviest}); expected at most {most:.1e}"
        )));
    }
    for (source, weight) in report.sources.iter_mut().zip(weights) {
        source.weight = weight;
        source.share =
            if draws > 0.0 { weight * source.train_examples as f64 / draws } else { 0.0 };
    }
    Ok(Dataset { domains, train, valid, template: None, report })
}

/// How often an epoch may draw the examples there are, or a million; each draw takes memory.
const MOST_DRAWS: f64 = 100.0;

/// For each of a source's records, whether it is kept for validation.
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

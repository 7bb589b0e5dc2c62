//! Leaving out repeated records.
//!
//! **Exact.** Two records are the same if their texts are, once white space runs are single spaces
//! and letters are lower case. The texts are told apart by 128-bit hashes (XXH3).
//!
//! **Near.** The similarity of two records is the Jaccard similarity
//! `J(A, B) = |A ∩ B| / |A ∪ B|` of their sets of runs of five words (of all their words, if they
//! have fewer). It is estimated by MinHash: with `K` hash functions,
//! `P(min h(A) = min h(B)) = J(A, B)`, so the part of `K` minima that agree estimates `J` with a
//! standard error of `sqrt(J (1 − J) / K)`. Candidates are found by locality-sensitive hashing: the
//! minima are cut into `b` bands of `r`; two records meet if any band agrees, which has probability
//! `1 − (1 − J^r)^b`. `b` and `r` are those for which the mean of missed and needless meetings over
//! all `J` is smallest at the threshold. Meeting records are compared by all `K` minima; groups of
//! similar records are joined, and the first record of each group stays.
//!
//! What comes first: files of `data.valid` before those of `data.train`, then their order in the
//! recipe, then their rows. So a training record that repeats a validation record is left out, and
//! the result depends on nothing but the data.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Seek, SeekFrom, Write};

use serde_json::Value;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed, xxh3_128};

use crate::error::{Error, Result};
use crate::record::{Body, Record};

/// Minima of a signature.
const MINIMA: usize = 128;
/// Words of a run.
const RUN: usize = 5;
/// Bytes of band hashes held at a time.
const BAND_BUDGET: usize = 256 << 20;
const SIGNATURE_BYTES: usize = MINIMA * 4;

/// All that a record says, in one text.
pub(crate) fn text_of(record: &Record) -> String {
    match &record.body {
        Body::Chat(messages) => {
            let mut text = String::new();
            for message in messages {
                for said in [message.reasoning().unwrap_or_default(), &message.content] {
                    text.push_str(said);
                    text.push('\n');
                }
                if let Some(calls) = message.fields.get("tool_calls").and_then(Value::as_array) {
                    calls.iter().for_each(|call| text.push_str(&call.to_string()));
                }
            }
            for (name, value) in &record.variables {
                text.push_str(&format!("{name} {value}\n"));
            }
            text
        }
        Body::Completion { prompt, completion } => format!("{prompt}{completion}"),
        Body::Text(text) => text.clone(),
    }
}

/// The hash that tells whether two records say the same.
pub(crate) fn exact_hash(text: &str) -> u128 {
    let mut plain = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !plain.is_empty() {
            plain.push(' ');
        }
        if word.is_ascii() {
            plain.extend(word.bytes().map(|byte| char::from(byte.to_ascii_lowercase())));
        } else {
            plain.push_str(&word.to_lowercase());
        }
    }
    xxh3_128(plain.as_bytes())
}

/// Hashes of a text's words: runs of letters and digits, in lower case.
pub(crate) fn words(text: &str) -> Vec<u64> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words
        .map(|word| match word.bytes().any(|byte| byte.is_ascii_uppercase() || byte >= 0x80) {
            true => xxh3_64(word.to_lowercase().as_bytes()),
            false => xxh3_64(word.as_bytes()),
        })
        .collect()
}

/// The minima of a record's runs of words.
pub(crate) fn signature(words: &[u64]) -> [u32; MINIMA] {
    let mut minima = [u32::MAX; MINIMA];
    let mut seen = HashSet::new();
    for run in words.windows(RUN.min(words.len().max(1))) {
        let run = run.iter().fold(0x9e37_79b9_7f4a_7c15_u64, |hash, word| {
            (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29)
        });
        if !seen.insert(run) {
            continue;
        }
        // Hash functions `h_i(x) = mix(x) + i · mix'(x)`, spread once more so that the minima are
        // independent enough; one multiplication each.
        let (first, step) = (mix(run), mix(run ^ 0x5851_f42d_4c95_7f2d) | 1);
        let mut value = first;
        for minimum in &mut minima {
            value = value.wrapping_add(step);
            let hash = ((value ^ (value >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32;
            *minimum = (*minimum).min(hash);
        }
    }
    minima
}

/// Spreads the bits of `value` (the end of SplitMix64; Steele, Lea, Flood 2014).
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The number of bands and the minima of each for a threshold.
pub(crate) fn bands(threshold: f64) -> (usize, usize) {
    let mut best = (f64::INFINITY, (1, 1));
    for rows in 1..=MINIMA {
        for bands in 1..=MINIMA / rows {
            let meets = |j: f64| 1.0 - (1.0 - j.powi(rows as i32)).powi(bands as i32);
            let steps = 200;
            let mut wrong = 0.0;
            for step in 0..steps {
                let j = (f64::from(step) + 0.5) / f64::from(steps);
                // Missing a pair costs it; a needless meeting costs only the comparison.
                wrong += if j < threshold { 0.1 * meets(j) } else { 0.9 * (1.0 - meets(j)) };
            }
            if wrong < best.0 {
                best = (wrong, (bands, rows));
            }
        }
    }
    best.1
}

/// Signatures of many records, in memory or in a file without a name.
pub(crate) struct Signatures {
    count: usize,
    place: Place,
}

enum Place {
    Memory(Vec<u8>),
    Disk(std::io::BufWriter<std::fs::File>),
}

impl Signatures {
    /// In memory, or in a file of `folder`.
    ///
    /// # Errors
    /// When no file can be made there.
    pub(crate) fn new(folder: Option<&std::path::Path>) -> Result<Self> {
        let place = match folder {
            None => Place::Memory(Vec::new()),
            Some(folder) => {
                std::fs::create_dir_all(folder)?;
                Place::Disk(std::io::BufWriter::new(tempfile::tempfile_in(folder)?))
            }
        };
        Ok(Self { count: 0, place })
    }

    /// Adds the next record's.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn push(&mut self, signature: &[u32; MINIMA]) -> Result<()> {
        let mut bytes = [0; SIGNATURE_BYTES];
        for (place, minimum) in bytes.chunks_exact_mut(4).zip(signature) {
            place.copy_from_slice(&minimum.to_le_bytes());
        }
        match &mut self.place {
            Place::Memory(all) => all.extend_from_slice(&bytes),
            Place::Disk(file) => file.write_all(&bytes)?,
        }
        self.count += 1;
        Ok(())
    }

    /// For each record, the number of the first record of its group.
    ///
    /// # Errors
    /// When the file cannot be read back.
    pub(crate) fn groups(mut self, threshold: f64) -> Result<Vec<u32>> {
        if u32::try_from(self.count).is_err() {
            return Err(Error::Batching("more than 2^32 records to compare".to_owned()));
        }
        let (bands, rows) = bands(threshold);
        let per_pass = (BAND_BUDGET / (16 * self.count.max(1))).clamp(1, bands);
        let mut groups = Groups((0..self.count as u32).collect());
        for first in (0..bands).step_by(per_pass) {
            let pass = first..(first + per_pass).min(bands);
            let mut buckets: Vec<Vec<(u64, u32)>> = vec![Vec::new(); pass.len()];
            self.scan(&mut |number, bytes| {
                for (bucket, band) in buckets.iter_mut().zip(pass.clone()) {
                    let part = &bytes[band * rows * 4..(band + 1) * rows * 4];
                    bucket.push((xxh3_64_with_seed(part, band as u64), number));
                }
            })?;
            for mut bucket in buckets {
                bucket.sort_unstable();
                for meeting in bucket.chunk_by(|a, b| a.0 == b.0).filter(|m| m.len() > 1) {
                    self.join(meeting, threshold, &mut groups)?;
                }
            }
        }
        Ok((0..self.count as u32).map(|number| groups.first(number)).collect())
    }

    /// Joins the records of a bucket that are similar: each with the first of a group that it
    /// resembles, so that a large bucket costs its size times its number of groups.
    fn join(&mut self, meeting: &[(u64, u32)], threshold: f64, groups: &mut Groups) -> Result<()> {
        const MOST_LEADERS: usize = 64;
        let mut leaders: Vec<(u32, Vec<u8>)> = Vec::new();
        for &(_, number) in meeting {
            let own = groups.first(number);
            if leaders.iter().any(|(leader, _)| groups.first(*leader) == own) {
                continue;
            }
            let signature = self.read(number)?;
            let similar =
                leaders.iter().find(|(_, other)| similarity(&signature, other) >= threshold);
            match similar {
                Some((leader, _)) => groups.join(*leader, number),
                None if leaders.len() < MOST_LEADERS => leaders.push((number, signature)),
                None => {}
            }
        }
        Ok(())
    }

    fn read(&mut self, number: u32) -> Result<Vec<u8>> {
        let start = number as usize * SIGNATURE_BYTES;
        match &mut self.place {
            Place::Memory(all) => Ok(all[start..start + SIGNATURE_BYTES].to_vec()),
            Place::Disk(file) => {
                let mut bytes = vec![0; SIGNATURE_BYTES];
                let file = file.get_mut();
                file.seek(SeekFrom::Start(start as u64))?;
                file.read_exact(&mut bytes)?;
                Ok(bytes)
            }
        }
    }

    fn scan(&mut self, visit: &mut dyn FnMut(u32, &[u8])) -> Result<()> {
        let mut number = 0;
        match &mut self.place {
            Place::Memory(all) => {
                for bytes in all.chunks_exact(SIGNATURE_BYTES) {
                    visit(number, bytes);
                    number += 1;
                }
            }
            Place::Disk(file) => {
                file.flush()?;
                let file = file.get_mut();
                file.seek(SeekFrom::Start(0))?;
                let mut reader = std::io::BufReader::with_capacity(1 << 20, file);
                let mut bytes = [0; SIGNATURE_BYTES];
                for number in 0..self.count as u32 {
                    reader.read_exact(&mut bytes)?;
                    visit(number, &bytes);
                }
            }
        }
        Ok(())
    }
}

/// The part of the minima that agree.
fn similarity(a: &[u8], b: &[u8]) -> f64 {
    let equal = a.chunks_exact(4).zip(b.chunks_exact(4)).filter(|(a, b)| a == b).count();
    equal as f64 / MINIMA as f64
}

/// Disjoint groups, each known by its smallest member.
struct Groups(Vec<u32>);

impl Groups {
    fn first(&mut self, number: u32) -> u32 {
        let mut first = number;
        while self.0[first as usize] != first {
            // Halving the path keeps it short.
            let above = self.0[first as usize];
            self.0[first as usize] = self.0[above as usize];
            first = self.0[first as usize];
        }
        first
    }

    fn join(&mut self, a: u32, b: u32) {
        let (a, b) = (self.first(a), self.first(b));
        let (small, large) = (a.min(b), a.max(b));
        self.0[large as usize] = small;
    }
}

/// Remembers texts by their hashes.
#[derive(Default)]
pub(crate) struct Seen(HashMap<u128, (), std::hash::BuildHasherDefault<Folded>>);

impl Seen {
    /// Whether this text is new.
    pub(crate) fn insert(&mut self, hash: u128) -> bool {
        self.0.insert(hash, ()).is_none()
    }
}

/// The hasher of what is a hash already.
#[derive(Default)]
pub(crate) struct Folded(u64);

impl std::hash::Hasher for Folded {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64(bytes);
    }

    fn write_u128(&mut self, value: u128) {
        self.0 = value as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(texts: &[String], threshold: f64) -> Vec<u32> {
        let run = |folder: Option<&std::path::Path>| {
            let mut signatures = Signatures::new(folder).unwrap();
            for text in texts {
                signatures.push(&signature(&words(text))).unwrap();
            }
            signatures.groups(threshold).unwrap()
        };
        let folder = tempfile::tempdir().unwrap();
        let (memory, disk) = (run(None), run(Some(folder.path())));
        assert_eq!(memory, disk);
        memory
    }

    fn sentence(seed: usize, words: usize) -> Vec<String> {
        (0..words).map(|at| format!("w{}", mix((seed * 1000 + at) as u64) % 5000)).collect()
    }

    #[test]
    fn white_space_and_case_do_not_count() {
        assert_eq!(exact_hash(" What IS\n1 + 1?"), exact_hash("what is 1 + 1?"));
        assert_ne!(exact_hash("1 + 1"), exact_hash("1 - 1"));
        assert_ne!(exact_hash("ab"), exact_hash("a b"));
        assert_eq!(exact_hash("ÄÖ"), exact_hash("äö"));
    }

    #[test]
    fn minima_estimate_the_similarity() {
        for shared in [20, 100, 180] {
            let common = sentence(1, shared);
            let (a, b) = (
                [common.clone(), sentence(2, 200 - shared)].concat(),
                [common, sentence(3, 200 - shared)].concat(),
            );
            let runs = |words: &[String]| -> HashSet<Vec<String>> {
                words.windows(RUN).map(<[String]>::to_vec).collect()
            };
            let (first, second) = (runs(&a), runs(&b));
            let both = first.intersection(&second).count() as f64;
            let jaccard = both / first.union(&second).count() as f64;
            let bytes = |words: &[String]| -> Vec<u8> {
                let found = super::words(&words.join(" "));
                signature(&found).iter().flat_map(|m| m.to_le_bytes()).collect()
            };
            let estimate = similarity(&bytes(&a), &bytes(&b));
            let error = (jaccard * (1.0 - jaccard) / MINIMA as f64).sqrt();
            assert!((estimate - jaccard).abs() < 3.5 * error + 0.01, "{estimate} for {jaccard}");
        }
    }

    #[test]
    fn near_duplicates_are_grouped_and_strangers_are_not() {
        let mut texts: Vec<String> = (0..300).map(|seed| sentence(seed, 80).join(" ")).collect();
        let mut near = sentence(7, 80);
        near[40] = "changed".to_owned();
        texts.push(near.join(", "));
        texts.push(texts[11].to_uppercase());
        texts.push("short".to_owned());
        texts.push("Short!".to_owned());
        let found = groups(&texts, 0.8);
        for number in 0..300 {
            assert_eq!(found[number], number as u32);
        }
        assert_eq!(found[300..], [7, 11, 302, 302]);
    }

    #[test]
    fn bands_cut_near_the_threshold() {
        for threshold in [0.5, 0.7, 0.8, 0.9] {
            let (bands, rows) = bands(threshold);
            assert!(bands * rows <= MINIMA);
            let meets = |j: f64| 1.0 - (1.0 - j.powi(rows as i32)).powi(bands as i32);
            assert!(meets(threshold + 0.05) > 0.9, "{threshold}: {bands} x {rows}");
            assert!(meets(threshold - 0.3) < 0.25, "{threshold}: {bands} x {rows}");
        }
    }
}

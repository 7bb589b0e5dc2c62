//! TF-IDF: texts as sparse rows of stemmed words.
//!
//! A term's weight in a text is `(1 + ln tf) · (1 + ln((1 + n) / (1 + df)))`, with `tf` its count in
//! the text, `df` the number of texts it occurs in and `n` the number of texts; rows are scaled to
//! length 1. Words are runs of letters, lower-cased, without English stop words, stemmed by the
//! Snowball English stemmer; every ideograph is a word of its own and every number the same word.

use crate::matrix::Matrix;
use crate::project::Rows as _;
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;
use waken_snowball::Algorithm;

/// Texts a thread works on at a time.
const CHUNK: usize = 1024;
/// When a table of terms is larger than this, those seen once are forgotten.
const MOST_COUNTED: usize = 1_000_000;
/// Letters of a word that count; what is longer is data, not language.
const LONGEST_WORD: usize = 32;
/// The word that stands for every number.
const NUMBER: &str = "‹number›";

static STOP_WORDS: LazyLock<HashSet<&'static str>> =
    LazyLock::new(|| stop_words::lookup("en").unwrap_or_default().iter().copied().collect());

/// The terms that count, the most frequent first.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary {
    /// Each stem with the commonest word it stands for.
    pub terms: Vec<String>,
    inverse_frequency: Vec<f32>,
    index: HashMap<String, u32>,
}

/// Sparse rows: term and weight, by increasing term.
#[derive(Debug, Clone, Default)]
pub struct SparseRows {
    starts: Vec<usize>,
    entries: Vec<(u32, f32)>,
    /// Number of terms.
    pub width: usize,
}

impl SparseRows {
    /// Counts the rows.
    pub fn rows(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Returns a row: terms and weights.
    pub fn row(&self, index: usize) -> &[(u32, f32)] {
        &self.entries[self.starts[index]..self.starts[index + 1]]
    }

    /// Appends a row.
    pub fn push(&mut self, row: &[(u32, f32)]) {
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.entries.extend_from_slice(row);
        self.starts.push(self.entries.len());
    }
}

/// Calls `visit` with every word of `text`, lower-cased.
fn words(text: &str, word: &mut String, mut visit: impl FnMut(&str)) {
    let mut digits = false;
    word.clear();
    let mut flush = |word: &mut String, digits: &mut bool| {
        if *digits {
            visit(NUMBER);
        } else if word.len() > 1 {
            visit(word);
        }
        word.clear();
        *digits = false;
    };
    for character in text.chars() {
        if is_ideograph(character) {
            flush(word, &mut digits);
            word.push(character);
            flush(word, &mut digits);
        } else if character.is_alphabetic() {
            if digits {
                flush(word, &mut digits);
            }
            if word.len() < LONGEST_WORD {
                word.extend(character.to_lowercase());
            }
        } else if character.is_numeric() {
            if !digits {
                flush(word, &mut digits);
                digits = true;
            }
        } else if character != '\'' && character != '’' {
            // An apostrophe neither ends a word nor belongs to it: `don't` is a stop word without it.
            flush(word, &mut digits);
        }
    }
    flush(word, &mut digits);
}

fn is_ideograph(character: char) -> bool {
    matches!(character as u32, 0x2E80..=0x9FFF | 0xAC00..=0xD7AF | 0xF900..=0xFAFF | 0x20000..=0x3FFFF)
}

/// The term a word counts as; none for a stop word.
fn stem(word: &str) -> Option<String> {
    if word == NUMBER {
        return Some(word.to_owned());
    }
    if STOP_WORDS.contains(word) {
        return None;
    }
    let stem = Algorithm::English.stemmer().stem(word).to_string();
    (!stem.is_empty()).then_some(stem)
}

/// What a table of terms holds about a stem.
#[derive(Debug, Clone, Default)]
struct Count {
    texts: u32,
    /// The commonest word among the first chunks that had the stem, and how often it came.
    word: String,
    word_count: u32,
}

/// Counts of one chunk.
fn count_chunk(texts: &[String]) -> Vec<(String, Count)> {
    struct Seen {
        count: Count,
        last: u32,
    }
    let mut known: HashMap<String, (Option<u32>, u32)> = HashMap::new();
    let mut numbers: HashMap<String, u32> = HashMap::new();
    let mut stems: Vec<(String, Seen)> = Vec::new();
    let mut buffer = String::new();
    for (row, text) in texts.iter().enumerate() {
        words(text, &mut buffer, |word| {
            if !known.contains_key(word) {
                let number = stem(word).map(|stem| {
                    *numbers.entry(stem).or_insert_with_key(|stem| {
                        let count = Count::default();
                        stems.push((stem.clone(), Seen { count, last: u32::MAX }));
                        stems.len() as u32 - 1
                    })
                });
                known.insert(word.to_owned(), (number, 0));
            }
            if let Some((Some(number), uses)) = known.get_mut(word) {
                *uses += 1;
                let seen = &mut stems[*number as usize].1;
                if seen.last != row as u32 {
                    seen.last = row as u32;
                    seen.count.texts += 1;
                }
            }
        });
    }
    for (word, (number, uses)) in known {
        let Some(number) = number else { continue };
        let count = &mut stems[number as usize].1.count;
        if uses > count.word_count || (uses == count.word_count && word < count.word) {
            count.word_count = uses;
            count.word = word;
        }
    }
    stems.into_iter().map(|(stem, seen)| (stem, seen.count)).collect()
}

impl Vocabulary {
    /// Chooses the `most` terms that occur in most texts, of those in at least two texts (in a corpus of
    /// fifty or more). Ties go by the alphabet.
    pub fn build(texts: &[String], most: usize) -> Self {
        let mut table: HashMap<String, Count> = HashMap::new();
        // Sixteen chunks at a time, so that their tables do not all lie in memory at once.
        for group in texts.chunks(16 * CHUNK) {
            let counted: Vec<_> = group.par_chunks(CHUNK).map(count_chunk).collect();
            for (stem, found) in counted.into_iter().flatten() {
                let count = table.entry(stem).or_default();
                count.texts += found.texts;
                if found.word_count > count.word_count {
                    count.word = found.word;
                    count.word_count = found.word_count;
                }
            }
            if table.len() > MOST_COUNTED {
                table.retain(|_, count| count.texts > 1);
            }
        }
        let fewest = if texts.len() < 50 { 1 } else { 2 };
        let mut kept: Vec<(String, Count)> =
            table.into_iter().filter(|(_, count)| count.texts >= fewest).collect();
        kept.sort_unstable_by(|a, b| b.1.texts.cmp(&a.1.texts).then_with(|| a.0.cmp(&b.0)));
        kept.truncate(most);
        let texts = texts.len() as f64;
        let weight =
            |count: &Count| (1.0 + ((1.0 + texts) / (1.0 + f64::from(count.texts))).ln()) as f32;
        Self {
            inverse_frequency: kept.iter().map(|(_, count)| weight(count)).collect(),
            index: (0_u32..).zip(&kept).map(|(at, (stem, _))| (stem.clone(), at)).collect(),
            terms: kept.into_iter().map(|(_, count)| count.word).collect(),
        }
    }

    /// Writes `texts` as rows; a text without a known term gives an empty row.
    pub fn rows(&self, texts: &[&str]) -> SparseRows {
        let chunks: Vec<SparseRows> =
            texts.par_chunks(CHUNK).map(|chunk| self.chunk_rows(chunk)).collect();
        let mut all = SparseRows { starts: vec![0], width: self.terms.len(), ..Default::default() };
        all.entries.reserve_exact(chunks.iter().map(|chunk| chunk.entries.len()).sum());
        for chunk in chunks {
            for row in 0..chunk.rows() {
                all.push(chunk.row(row));
            }
        }
        all
    }

    /// Writes `texts` as rows in the dimensions of `basis: [terms, dimensions]`, without holding the
    /// terms of all of them; zero for a text without a known term.
    pub fn project<T: AsRef<str> + Sync>(&self, texts: &[T], basis: &Matrix) -> Matrix {
        let mut out = Matrix::zeros(texts.len(), basis.width);
        if basis.width == 0 {
            return out;
        }
        let piece = texts.len().div_ceil(16).clamp(64, CHUNK);
        let parts = out.data.par_chunks_mut(piece * basis.width).zip(texts.par_chunks(piece));
        parts.for_each(|(out, texts)| {
            let rows = self.chunk_rows(texts);
            for (row, out) in out.chunks_exact_mut(basis.width).enumerate() {
                rows.product(row, basis, out);
            }
        });
        out
    }

    fn chunk_rows<T: AsRef<str>>(&self, texts: &[T]) -> SparseRows {
        let mut rows = SparseRows { width: self.terms.len(), ..Default::default() };
        let mut known: HashMap<String, Option<u32>> = HashMap::new();
        let mut counts: HashMap<u32, u32> = HashMap::new();
        let mut buffer = String::new();
        let mut row: Vec<(u32, f32)> = Vec::new();
        for text in texts {
            counts.clear();
            words(text.as_ref(), &mut buffer, |word| {
                let number = match known.get(word) {
                    Some(number) => *number,
                    None => {
                        let number = stem(word).and_then(|stem| self.index.get(&stem).copied());
                        known.insert(word.to_owned(), number);
                        number
                    }
                };
                if let Some(number) = number {
                    *counts.entry(number).or_default() += 1;
                }
            });
            row.clear();
            row.extend(counts.iter().map(|(&term, &count)| {
                let weight = (1.0 + (count as f32).ln()) * self.inverse_frequency[term as usize];
                (term, weight)
            }));
            row.sort_unstable_by_key(|entry| entry.0);
            let length = row.iter().map(|entry| entry.1 * entry.1).sum::<f32>().sqrt();
            row.iter_mut().for_each(|entry| entry.1 /= length);
            rows.push(&row);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        words(text, &mut String::new(), |word| found.push(word.to_owned()));
        found
    }

    #[test]
    fn words_are_letters_numbers_or_ideographs() {
        assert_eq!(split("Don't stop-me NOW!"), ["dont", "stop", "me", "now"]);
        assert_eq!(split("3.5kg of x"), [NUMBER, NUMBER, "kg", "of"]);
        assert_eq!(split("日本 ok"), ["日", "本", "ok"]);
        assert_eq!(split(&"a".repeat(100_000)), ["a".repeat(LONGEST_WORD)]);
        assert!(split("").is_empty());
    }

    #[test]
    fn stems_meet_and_stop_words_vanish() {
        assert_eq!(stem("running"), stem("runs"));
        assert_eq!(stem("the"), None);
        assert_eq!(stem(NUMBER).as_deref(), Some(NUMBER));
    }

    #[test]
    fn weights_follow_the_formula() {
        let texts = ["cats cats dog", "dog"].map(str::to_owned);
        let vocabulary = Vocabulary::build(&texts, 10);
        assert_eq!(vocabulary.terms, ["dog", "cats"]);
        let rows = vocabulary.rows(&[&texts[0], &texts[1]]);
        let dog = 1.0_f64 + (3.0_f64 / 3.0).ln();
        let cat = (1.0 + 2.0_f64.ln()) * (1.0 + (3.0_f64 / 2.0).ln());
        let length = (dog * dog + cat * cat).sqrt();
        for (found, wanted) in rows.row(0).iter().zip([dog / length, cat / length]) {
            assert!((f64::from(found.1) - wanted).abs() < 1e-6);
        }
        assert_eq!(rows.row(1), [(0, 1.0)]);
    }

    #[test]
    fn rare_and_surplus_terms_are_left_out() {
        let mut texts: Vec<String> = (0..60).map(|_| "common word here often".to_owned()).collect();
        texts[0].push_str(" singular");
        assert!(!Vocabulary::build(&texts, 100).terms.contains(&"singular".to_owned()));
        assert_eq!(Vocabulary::build(&texts, 1).terms.len(), 1);
        assert!(Vocabulary::build(&[], 5).terms.is_empty());
    }
}

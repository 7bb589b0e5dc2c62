//! Whether training records hold questions of a benchmark.
//!
//! As in GPT-3's appendix C: a training record overlaps a question if they share a run of `n`
//! words, 13 by default, counted over letters and digits in lower case. A question of fewer words
//! is searched as a whole if it has at least [`SHORTEST_OVERLAP`]; shorter ones cannot be told from
//! chance and are only counted. A question is every string of a row, so that answers count too.
//! Runs that stand in more than ten questions (shared instructions) are not held against anyone.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::dedup::words;
use crate::error::Result;
use crate::source::read_texts;

/// The fewest words that are compared.
pub(crate) const SHORTEST_OVERLAP: usize = 8;
/// Questions a run may stand in before it counts as common.
const COMMON: u32 = 10;
/// Overlaps that are shown.
const SHOWN: usize = 5;

/// What a comparison of training records with benchmark questions found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OverlapReport {
    /// Words of a run.
    pub words: usize,
    /// Questions compared.
    pub questions: usize,
    /// Questions of too few words to be compared.
    pub too_short: usize,
    /// Questions found in training records.
    pub questions_found: usize,
    /// Training records that hold one.
    pub records: usize,
    /// The first few.
    pub examples: Vec<Overlap>,
}

/// A training record and a question that share a run of words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Overlap {
    /// File and place of the training record.
    pub record: String,
    /// File and place of the question.
    pub question: String,
    /// The beginning of the question.
    pub text: String,
}

/// Benchmark questions, ready to be found.
pub(crate) struct Questions {
    words: usize,
    /// For each length, from the hash of a run to the first question with it and how many have it.
    runs: BTreeMap<usize, HashMap<u64, (u32, u32)>>,
    places: Vec<(String, String)>,
    too_short: usize,
}

impl Questions {
    /// Reads the questions of files.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(crate) fn read(files: &[PathBuf], base_dir: &Path, most: usize) -> Result<Self> {
        let mut questions =
            Self { words: most, runs: BTreeMap::new(), places: Vec::new(), too_short: 0 };
        for file in files {
            read_texts(&base_dir.join(file), &mut |location, text| {
                let found = words(text);
                if found.len() < SHORTEST_OVERLAP {
                    questions.too_short += 1;
                    return;
                }
                let number = questions.places.len() as u32;
                questions.places.push((location.to_string(), crate::error::excerpt(text)));
                let length = most.min(found.len());
                let runs = questions.runs.entry(length).or_default();
                for_runs(&found, length, |hash| {
                    let (first, count) = runs.entry(hash).or_insert((number, 0));
                    // A run twice in one question is one question's.
                    if *count == 0 || *first != number {
                        *count += 1;
                    }
                    true
                });
            })?;
        }
        Ok(questions)
    }

    /// The first question that shares a run with a text of these words.
    pub(crate) fn find(&self, words: &[u64]) -> Option<u32> {
        let mut found = None;
        for (&length, runs) in &self.runs {
            for_runs(words, length, |hash| {
                if let Some(&(question, count)) = runs.get(&hash)
                    && count <= COMMON
                {
                    found = Some(question);
                }
                found.is_none()
            });
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// The report on these finds: the record's place and the question's number, in order.
    pub(crate) fn report(&self, finds: &[(String, u32)]) -> OverlapReport {
        let mut questions: Vec<u32> = finds.iter().map(|(_, question)| *question).collect();
        questions.sort_unstable();
        questions.dedup();
        let example = |(record, question): &(String, u32)| {
            let (place, text) = &self.places[*question as usize];
            Overlap { record: record.clone(), question: place.clone(), text: text.clone() }
        };
        OverlapReport {
            words: self.words,
            questions: self.places.len(),
            too_short: self.too_short,
            questions_found: questions.len(),
            records: finds.len(),
            examples: finds.iter().take(SHOWN).map(example).collect(),
        }
    }
}

/// Hashes of all runs of `length` words, each from the last by one step:
/// `h = Σ word_i · B^(length − 1 − i)` modulo 2^64.
fn for_runs(words: &[u64], length: usize, mut visit: impl FnMut(u64) -> bool) {
    const BASE: u64 = 0x9e37_79b9_7f4a_7c15;
    if words.len() < length || length == 0 {
        return;
    }
    let leading = BASE.wrapping_pow(length as u32 - 1);
    let step = |hash: u64, word: &u64| hash.wrapping_mul(BASE).wrapping_add(*word);
    let mut hash = words[..length].iter().fold(0, step);
    if !visit(hash) {
        return;
    }
    for (gone, new) in words.iter().zip(&words[length..]) {
        hash = step(hash.wrapping_sub(gone.wrapping_mul(leading)), new);
        if !visit(hash) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_wherever_they_stand() {
        let folder = tempfile::tempdir().unwrap();
        let long = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.";
        let lines = format!(
            "{{\"question\": \"{long}\", \"n\": 3}}\n{{\"question\": \"Two plus two is?\"}}\n\
             {{\"question\": \"one two three four five six seven eight nine\"}}\n"
        );
        fs_err::write(folder.path().join("q.jsonl"), lines).unwrap();
        let questions = Questions::read(&["q.jsonl".into()], folder.path(), 13).unwrap();
        assert_eq!((questions.places.len(), questions.too_short), (2, 1));
        let find = |text: &str| questions.find(&words(text));
        assert_eq!(find(&format!("Tell me. {} Thanks", long.to_uppercase())), Some(0));
        assert_eq!(
            find("sold clips to 48 of her friends in April; and then she sold others"),
            Some(0)
        );
        assert_eq!(find("sold clips to 48 of her friends in April; and then he sold others"), None);
        assert_eq!(find("zero one two three four five six seven eight nine ten"), Some(1));
        assert_eq!(find("two plus two is?"), None);
        let report = questions.report(&[("a line 1".to_owned(), 1), ("a line 9".to_owned(), 1)]);
        assert_eq!((report.records, report.questions_found), (2, 1));
        assert!(report.examples[0].question.ends_with("q.jsonl: line 3"));
    }

    #[test]
    fn one_object_with_a_list_is_read_too() {
        let folder = tempfile::tempdir().unwrap();
        let text =
            r#"{"canary": "x", "examples": [{"input": "a b c d e f g h i", "target": "j"}]}"#;
        fs_err::write(folder.path().join("task.json"), text).unwrap();
        let questions = Questions::read(&["task.json".into()], folder.path(), 13).unwrap();
        assert_eq!(questions.find(&words("x a b c d e f g h i j y")), Some(0));
    }

    #[test]
    fn shared_instructions_do_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let line = |n: usize| {
            format!(
                "{{\"q\": \"Answer the following question with one word only and nothing else at all please: number{n}\"}}\n"
            )
        };
        let lines: String = (0..20).map(line).collect();
        fs_err::write(folder.path().join("q.jsonl"), lines).unwrap();
        let questions = Questions::read(&["q.jsonl".into()], folder.path(), 13).unwrap();
        let text =
            "Answer the following question with one word only and nothing else at all, or not";
        assert_eq!(questions.find(&words(text)), None);
        let text = "following question with one word only and nothing else at all please number7";
        assert_eq!(questions.find(&words(text)), Some(7));
    }
}

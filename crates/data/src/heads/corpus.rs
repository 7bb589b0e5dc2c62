//! The texts to cluster.
//!
//! A corpus of any size is read in the memory of [`Room`]: what does not fit is thinned to a uniform
//! sample. A row is drawn by a number that follows from its place alone; when the texts outgrow the
//! room, the bound on that number falls and the texts above it go. So the sample is the same however
//! many threads read, and it needs no count of the rows beforehand.

use super::whole::Origin;
use crate::config::SourceConfig;
use crate::dedup::mix;
use crate::error::Result;
use crate::record::{Body, Record};
use crate::source::read_chunks;
use std::collections::HashMap;
use std::path::Path;

/// Bytes of a text that count; what comes after says nothing new about what the text is.
const LONGEST_TEXT: usize = 20_000;
/// Bytes that a text takes beside its own.
const OVERHEAD: usize = 64;

/// The most that a corpus holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Texts.
    pub texts: usize,
    /// Bytes of all texts together.
    pub bytes: usize,
}

impl Default for Room {
    /// 500,000 texts of together 128 MiB.
    fn default() -> Self {
        Self { texts: 500_000, bytes: 128 << 20 }
    }
}

/// Texts with the domains they came from: all of them, or a uniform sample of more than fit.
#[derive(Debug, Clone, Default)]
pub struct Corpus {
    pub(super) texts: Vec<String>,
    pub(super) domains: Vec<u32>,
    pub(super) domain_names: Vec<String>,
    pub(super) shortened: usize,
    /// Where all rows are, once only some of them are held.
    pub(super) origin: Option<Origin>,
    numbers: HashMap<String, u32>,
    /// The row of each text, counted over all sources.
    rows: Vec<u64>,
    /// Rows seen, and what the draw of a row that stays may be at most.
    seen: u64,
    highest: Option<u64>,
    bytes: usize,
    room: Room,
}

impl Corpus {
    /// The records of `sources`, whose relative paths are those of `base_dir`, in the default
    /// [`Room`]. A conversation's text is that of its turns, without the system prompt; of a
    /// completion, prompt and continuation.
    ///
    /// # Errors
    /// As [`read_source`](crate::read_source).
    pub fn read(sources: &[SourceConfig], base_dir: &Path) -> Result<Self> {
        Self::read_within(sources, base_dir, Room::default())
    }

    /// As [`read`](Self::read), holding no more than fits `room`.
    ///
    /// # Errors
    /// As [`read_source`](crate::read_source).
    pub fn read_within(sources: &[SourceConfig], base_dir: &Path, room: Room) -> Result<Self> {
        let mut corpus = Self::within(room);
        read_texts(sources, base_dir, &mut |text, domain| {
            corpus.push(text, domain);
            Ok(())
        })?;
        corpus.origin = corpus
            .is_sample()
            .then(|| Origin { sources: sources.to_vec(), base_dir: base_dir.to_path_buf() });
        Ok(corpus)
    }

    /// An empty corpus that never holds more than fits `room`.
    pub fn within(room: Room) -> Self {
        Self { room, ..Self::default() }
    }

    /// Adds a text; one longer than 20,000 bytes is cut off there.
    pub fn push(&mut self, text: String, domain: &str) {
        self.shortened += usize::from(text.len() > LONGEST_TEXT);
        let domain = self.numbers.get(domain).copied().unwrap_or_else(|| {
            let number = self.domain_names.len() as u32;
            self.domain_names.push(domain.to_owned());
            self.numbers.insert(domain.to_owned(), number);
            number
        });
        let row = self.seen;
        self.seen += 1;
        if self.highest.is_some_and(|highest| draw(row) > highest) {
            return;
        }
        let text = cut(text);
        self.bytes += text.len() + OVERHEAD;
        self.texts.push(text);
        self.domains.push(domain);
        self.rows.push(row);
        while self.texts.len() > self.room.texts.max(1) || self.bytes > self.room.bytes {
            if self.texts.len() == 1 {
                break;
            }
            self.thin();
        }
    }

    /// Keeps three texts of four.
    fn thin(&mut self) {
        let highest = self.highest.unwrap_or(u64::MAX) / 4 * 3;
        self.highest = Some(highest);
        let stays: Vec<bool> = self.rows.iter().map(|&row| draw(row) <= highest).collect();
        keep(&mut self.texts, &stays);
        keep(&mut self.domains, &stays);
        keep(&mut self.rows, &stays);
        self.bytes = self.texts.iter().map(|text| text.len() + OVERHEAD).sum();
    }

    /// How many texts are held.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// How many texts there are, held or not.
    pub fn total(&self) -> usize {
        self.seen as usize
    }

    /// Whether the texts held are only some of all.
    pub fn is_sample(&self) -> bool {
        self.texts.len() < self.total()
    }

    /// The texts held, in order.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The domain of every text held, a number of [`domain_names`](Self::domain_names).
    pub fn domains(&self) -> &[u32] {
        &self.domains
    }

    /// The domains' names, in order of first appearance among all texts.
    pub fn domain_names(&self) -> &[String] {
        &self.domain_names
    }

    /// The number of a domain that has been seen.
    pub(super) fn domain_number(&self, name: &str) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    /// The rows of the texts held, where they are a sample.
    pub(super) fn sampled_rows(&self) -> Option<Vec<u64>> {
        self.is_sample().then(|| self.rows.clone())
    }
}

fn keep<T>(items: &mut Vec<T>, stays: &[bool]) {
    let mut stays = stays.iter();
    items.retain(|_| stays.next().copied().unwrap_or(false));
}

/// A number that looks random and follows from the row alone: SplitMix64's of that place.
fn draw(row: u64) -> u64 {
    mix(row.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// A text without what is beyond the bytes that count.
pub(super) fn cut(mut text: String) -> String {
    if text.len() > LONGEST_TEXT {
        text.truncate(text.floor_char_boundary(LONGEST_TEXT));
        text.shrink_to_fit();
    }
    text
}

/// Hands out the text and the domain of every record.
///
/// # Errors
/// As [`read_source`](crate::read_source), and whatever `handle` returns.
pub(super) fn read_texts(
    sources: &[SourceConfig],
    base_dir: &Path,
    handle: &mut dyn FnMut(String, &str) -> Result<()>,
) -> Result<()> {
    for source in sources {
        let domain = source.domain_name();
        read_chunks(source, base_dir, &mut |chunk| {
            for record in chunk {
                handle(text(&record), record.domain.as_deref().unwrap_or(&domain))?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What a record says.
fn text(record: &Record) -> String {
    match &record.body {
        Body::Text(text) => text.clone(),
        Body::Completion { prompt, completion } => format!("{prompt}\n{completion}"),
        Body::Chat(messages) => {
            let turns = messages.iter().filter(|message| message.role != "system");
            turns.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurdly_long_texts_are_cut_between_characters() {
        let mut corpus = Corpus::default();
        corpus.push("€".repeat(1_000_000), "a");
        corpus.push("short".to_owned(), "b");
        assert_eq!(corpus.texts[0].len(), LONGEST_TEXT - LONGEST_TEXT % 3);
        assert_eq!((corpus.shortened, corpus.len()), (1, 2));
        assert_eq!(corpus.domains(), [0, 1]);
        assert!(!corpus.is_sample());
    }

    #[test]
    fn what_does_not_fit_is_thinned_evenly() {
        let mut corpus = Corpus::within(Room { texts: 1000, bytes: 1 << 30 });
        for row in 0..50_000 {
            corpus.push(row.to_string(), if row % 5 == 0 { "fifth" } else { "rest" });
        }
        assert_eq!(corpus.total(), 50_000);
        assert!((700..=1000).contains(&corpus.len()), "{}", corpus.len());
        let rows: Vec<usize> = corpus.texts().iter().map(|text| text.parse().unwrap()).collect();
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "the order stays");
        assert_eq!(corpus.rows, rows.iter().map(|&row| row as u64).collect::<Vec<_>>());
        // Expected means of a uniform sample, within four standard deviations.
        let (count, half) = (rows.len() as f64, rows.iter().filter(|row| **row < 25_000).count());
        assert!((half as f64 - count / 2.0).abs() < 2.0 * count.sqrt(), "{half} of {count}");
        let fifth = corpus.domains().iter().filter(|domain| **domain == 0).count() as f64;
        assert!((fifth - count / 5.0).abs() < 1.6 * count.sqrt(), "{fifth} of {count}");
    }

    #[test]
    fn bytes_are_bounded_too_and_one_text_always_stays() {
        let mut corpus = Corpus::within(Room { texts: usize::MAX, bytes: 100_000 });
        for _ in 0..500 {
            corpus.push("word ".repeat(200), "a");
        }
        assert!((60..=94).contains(&corpus.len()), "{}", corpus.len());
        let mut tiny = Corpus::within(Room { texts: 0, bytes: 0 });
        for text in ["a", "b", "c"] {
            tiny.push(text.to_owned(), text);
        }
        assert!(tiny.len() <= 1 && tiny.total() == 3);
        assert_eq!(tiny.domain_names(), ["a", "b", "c"]);
    }
}

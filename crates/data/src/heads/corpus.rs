//! The texts to cluster.

use crate::config::SourceConfig;
use crate::error::Result;
use crate::record::{Body, Record};
use crate::source::read_chunks;
use std::path::Path;

/// Bytes of a text that count; what comes after says nothing new about what the text is.
const LONGEST_TEXT: usize = 20_000;

/// Texts with the domains they came from.
#[derive(Debug, Clone, Default)]
pub struct Corpus {
    pub(super) texts: Vec<String>,
    pub(super) domains: Vec<u32>,
    pub(super) domain_names: Vec<String>,
    pub(super) shortened: usize,
}

impl Corpus {
    /// The records of `sources`, whose relative paths are those of `base_dir`. A conversation's text
    /// is that of its turns, without the system prompt; of a completion, prompt and continuation.
    ///
    /// # Errors
    /// As [`read_source`](crate::read_source).
    pub fn read(sources: &[SourceConfig], base_dir: &Path) -> Result<Self> {
        let mut corpus = Self::default();
        for source in sources {
            let domain = source.domain_name();
            read_chunks(source, base_dir, &mut |chunk| {
                for record in chunk {
                    corpus.push(text(&record), record.domain.as_deref().unwrap_or(&domain));
                }
                Ok(())
            })?;
        }
        Ok(corpus)
    }

    /// Adds a text; one longer than 20,000 bytes is cut off there.
    pub fn push(&mut self, mut text: String, domain: &str) {
        if text.len() > LONGEST_TEXT {
            text.truncate(text.floor_char_boundary(LONGEST_TEXT));
            text.shrink_to_fit();
            self.shortened += 1;
        }
        let known = self.domain_names.iter().position(|name| name == domain);
        let number = known.unwrap_or_else(|| {
            self.domain_names.push(domain.to_owned());
            self.domain_names.len() - 1
        });
        self.texts.push(text);
        self.domains.push(number as u32);
    }

    /// How many texts there are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The texts, in order.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// The domain of every text, a number of [`domain_names`](Self::domain_names).
    pub fn domains(&self) -> &[u32] {
        &self.domains
    }

    /// The domains' names, in order of first appearance.
    pub fn domain_names(&self) -> &[String] {
        &self.domain_names
    }
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
    }
}

//! The one error type of the crate.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::Fault;
use crate::shown::shown;

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// A place in a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub path: PathBuf,
    /// The line the record starts on, from 1; 0 in files that have no lines.
    pub line: usize,
    /// For JSON arrays, CSV and Parquet, the record's number, from 1; JSON lines and text have
    /// none beside the line.
    pub record: Option<usize>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.record {
            // Parquet has rows, but no lines.
            Some(record) if self.line == 0 => write!(f, "{path}: row {record}"),
            Some(record) => write!(f, "{path}: record {record} (line {})", self.line),
            None => write!(f, "{path}: line {}", self.line),
        }
    }
}

/// Everything that can be wrong with data and their configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration has faults; all of them are listed.
    #[error("the data configuration has {} fault(s):{}", .0.len(), list(.0))]
    Config(Vec<Fault>),
    /// A file cannot be opened or read; the message names it.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A file is not UTF-8.
    #[error(
        "{}: line {line}, byte {column} of the line: not valid UTF-8 (found 0x{byte:02x}); save the file as UTF-8", path.display()
    )]
    Utf8 {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The first bad byte's place in the line, from 1.
        column: usize,
        /// The bad byte.
        byte: u8,
    },
    /// A file's bytes cannot be read or decompressed to their end.
    #[error("{}: the {what} is damaged after line {line}: {message}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is damaged.
        what: String,
        /// How many whole lines could be read.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A Parquet file cannot be read.
    #[error("{}: the Parquet file is damaged after row {row}: {message}", path.display())]
    DamagedParquet {
        /// The file.
        path: PathBuf,
        /// How many rows could be read.
        row: usize,
        /// What is wrong.
        message: String,
    },
    /// A cache of token ids cannot be written or read.
    #[error("{}: {message}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A named source cannot be had.
    #[error("data source `{name}` cannot be had:{}", tried.iter().map(|line| format!("\n  {line}")).collect::<String>())]
    Unavailable {
        /// Its name.
        name: String,
        /// What was tried, and what came of it.
        tried: Vec<String>,
    },
    /// A record is not JSON.
    #[error(
        "{location}: not valid JSON at line {line}, column {column}: {message}\n  in: {excerpt}"
    )]
    Json {
        /// The record.
        location: Location,
        /// The line of the fault in the file, from 1.
        line: usize,
        /// The column of the fault in that line, from 1.
        column: usize,
        /// What the parser expected.
        message: String,
        /// The start of the record.
        excerpt: String,
    },
    /// A record lacks a field, or a field holds the wrong thing.
    #[error("{location}: field `{field}`: expected {expected}, found {found}\n  in: {excerpt}")]
    Field {
        /// The record.
        location: Box<Location>,
        /// The field's name in the file, with indices where it is inside a list.
        field: String,
        /// What should be there.
        expected: String,
        /// What is there.
        found: String,
        /// The start of the record.
        excerpt: String,
    },
    /// A file is of a kind that is not read, or its format cannot be told.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A file holds no record.
    #[error("{}: the file holds no record", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Every record of a file was dropped.
    #[error("{}: none of the {records} record(s) can be trained on: {reasons}", path.display())]
    AllDropped {
        /// The file.
        path: PathBuf,
        /// How many records it holds.
        records: usize,
        /// How many were dropped for which reason.
        reasons: String,
    },
    /// The data hold conversations and nothing says how the model writes them.
    #[error(
        "{}: the records are conversations and the model brings no chat template; set `data.template` to a jinja file or one of: {}", path.display(), crate::template::builtin_template_names().join(", ")
    )]
    NoTemplate {
        /// The file.
        path: PathBuf,
    },
    /// There is no built-in template of that name.
    #[error("{message}")]
    UnknownTemplate {
        /// The name and its nearest neighbours.
        message: String,
    },
    /// A template is not valid jinja.
    #[error("chat template {name}{}: {message}", at_line(*line))]
    TemplateSyntax {
        /// The template's name or file.
        name: String,
        /// The line of the template, from 1.
        line: Option<usize>,
        /// What the parser says.
        message: String,
    },
    /// A template refuses a conversation.
    #[error("chat template {name}{}: {message}", at_line(*line))]
    TemplateRender {
        /// The template's name or file.
        name: String,
        /// The line of the template, from 1.
        line: Option<usize>,
        /// What the template or its engine says.
        message: String,
    },
    /// A record cannot become tokens.
    #[error("{location}: {message}")]
    Encode {
        /// The record.
        location: Location,
        /// Why not.
        message: String,
    },
    /// Batches cannot be formed with these settings.
    #[error("{0}")]
    Batching(String),
    /// There is no row to cluster.
    #[error("there is nothing to cluster: every text is empty or holds no word that counts")]
    NoFeatures,
    /// Rows given for clustering are not rows of finite numbers.
    #[error("the features cannot be clustered: {0}")]
    Features(String),
    /// There are fewer rows than clusters asked for.
    #[error("too few rows to cluster: {rows} with a word that counts, {needed} or more are needed")]
    TooFewRows {
        /// The rows there are.
        rows: usize,
        /// The rows needed.
        needed: usize,
    },
    /// Options of the search for heads make no sense.
    #[error("{0}")]
    HeadsOptions(String),
}

impl Error {
    /// A [`Error::Format`] about `path`.
    pub(crate) fn format(path: &Path, message: impl Into<String>) -> Self {
        Self::Format { path: path.to_path_buf(), message: message.into() }
    }
}

fn list(faults: &[Fault]) -> String {
    faults.iter().map(|fault| format!("\n  {fault}")).collect()
}

fn at_line(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(", line {line}"))
}

/// The first characters of a text, on one line.
pub(crate) fn excerpt(text: &str) -> String {
    const LENGTH: usize = 100;
    let text = text.trim_start();
    let mut short = String::new();
    for (count, character) in text.chars().enumerate() {
        if count == LENGTH {
            short.push('…');
            break;
        }
        match character {
            '\n' | '\r' | '\t' => short.push(' '),
            c => short.push_str(&shown(c.encode_utf8(&mut [0; 4]))),
        }
    }
    short.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_are_short_and_printable() {
        assert_eq!(excerpt("  a\nb\u{7}"), "a b\\u{7}");
        let long = "é".repeat(500);
        assert_eq!(excerpt(&long).chars().count(), 101);
        assert!(excerpt(&long).ends_with('…'));
    }

    #[test]
    fn faults_are_all_listed() {
        let error = Error::Config(vec![
            Fault::new("data.a", "is wrong"),
            Fault::new("data.b", "is wrong too"),
        ]);
        assert_eq!(
            error.to_string(),
            "the data configuration has 2 fault(s):\n  data.a: is wrong\n  data.b: is wrong too"
        );
    }
}

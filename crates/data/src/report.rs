//! What loading found, for people and for files.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::SourceConfig;
use crate::encode::Seen;
use crate::overlap::OverlapReport;
use crate::store::Counts;

/// Whether a file is trained on or validated on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Listed under `data.train`.
    Train,
    /// Listed under `data.valid`.
    Valid,
}

/// Why a record is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// There is no answer, or one of them is empty or blank.
    EmptyAnswer,
    /// The text is empty or blank.
    EmptyText,
    /// It is longer than `max_seq_len`, and `overlong` is `drop`.
    TooLong,
    /// Nothing to train is left: after truncation, or in a single token.
    NoLabel,
    /// The record says that none of its answers is to be trained.
    Masked,
}

/// Answers that are not trained as the template writes them in the whole conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TurnCounts {
    /// Answers that could not be located in the rendered conversation.
    pub untrained_turns: usize,
    /// Answers that their records say are not to be trained.
    pub masked_turns: usize,
    /// Answers that follow the prompt as it is asked, where the template writes another before them.
    pub moved_turns: usize,
    /// Answers whose reasoning the template leaves out; it was put back.
    pub restored_reasoning: usize,
    /// Answers whose reasoning is not trained, as the template has no place for it.
    pub left_out_reasoning: usize,
    /// Sequences that records became beyond one each.
    pub further_sequences: usize,
    /// Sequences that did not fit into `max_seq_len`, of records of which others did.
    pub lost_sequences: usize,
}

impl TurnCounts {
    pub(crate) fn add(&mut self, seen: &Seen) {
        self.untrained_turns += seen.untrained_turns;
        self.masked_turns += seen.masked_turns;
        self.moved_turns += seen.moved_turns;
        self.restored_reasoning += seen.restored_reasoning;
        self.left_out_reasoning += seen.left_out_reasoning;
        self.further_sequences += seen.further_sequences;
        self.lost_sequences += seen.lost_sequences;
    }

    /// A sentence for each that is not zero.
    fn sentences(&self) -> Vec<String> {
        let each = [
            (
                self.untrained_turns,
                "answer(s) are not trained, because the chat template has no place for them",
            ),
            (self.masked_turns, "answer(s) are not trained, as their records say"),
            (
                self.moved_turns,
                "answer(s) are trained behind the prompt as it will be asked; the chat template writes \
                 another one before them (it moves the system prompt, or opens reasoning)",
            ),
            (
                self.restored_reasoning,
                "answer(s) have reasoning that the chat template cuts out; it is trained before their text",
            ),
            (
                self.left_out_reasoning,
                "answer(s) have reasoning that is not trained: the chat template has no place for it",
            ),
            (
                self.further_sequences,
                "sequence(s) more than records, because the chat template writes earlier turns \
                 differently once later ones follow; `turns: last` trains the last answers alone",
            ),
            (
                self.lost_sequences,
                "sequence(s) of earlier or later turns have nothing to train within max_seq_len",
            ),
        ];
        let some = each.into_iter().filter(|(count, _)| *count > 0);
        some.map(|(count, what)| format!("{count} {what}")).collect()
    }
}

/// How many records were dropped for which reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Dropped {
    /// There is no answer, or one of them is empty or blank.
    pub empty_answer: usize,
    /// The text is empty or blank.
    pub empty_text: usize,
    /// Longer than `max_seq_len` with `overlong: drop`.
    pub too_long: usize,
    /// Nothing to train is left.
    pub no_label: usize,
    /// The record says that none of its answers is to be trained.
    #[serde(default)]
    pub masked: usize,
    /// The text of an earlier record, with `dedup`.
    pub duplicate: usize,
    /// Nearly the text of an earlier record, with `dedup: near`.
    pub near_duplicate: usize,
}

impl Dropped {
    /// All of them.
    pub fn total(&self) -> usize {
        self.reasons().iter().map(|(count, _)| count).sum()
    }

    pub(crate) fn count(&mut self, reason: DropReason) {
        *match reason {
            DropReason::EmptyAnswer => &mut self.empty_answer,
            DropReason::EmptyText => &mut self.empty_text,
            DropReason::TooLong => &mut self.too_long,
            DropReason::NoLabel => &mut self.no_label,
            DropReason::Masked => &mut self.masked,
        } += 1;
    }

    fn reasons(&self) -> [(usize, &'static str); 7] {
        [
            (self.empty_answer, "with an empty answer"),
            (self.empty_text, "with an empty text"),
            (self.too_long, "longer than max_seq_len"),
            (self.no_label, "with nothing to train within max_seq_len"),
            (self.masked, "with no answer that is to be trained"),
            (self.duplicate, "repeating an earlier record"),
            (self.near_duplicate, "nearly repeating an earlier record"),
        ]
    }
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (count, reason) in self.reasons() {
            if count > 0 {
                write!(f, "{separator}{count} {reason}")?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// Where it lies.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
    /// For files of a named source, whether the checksum is one that is known for it.
    pub known: Option<bool>,
}

impl FileReport {
    /// Whether its name says that it is compressed.
    pub(crate) fn compressed(&self) -> bool {
        let ending = self.path.extension().and_then(|ending| ending.to_str()).unwrap_or("");
        ["gz", "gzip", "zst", "zstd", "parquet"].contains(&ending)
    }
}

/// What became of one source.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceReport {
    /// The file or folder as the recipe names it, or the named source's name.
    pub path: PathBuf,
    /// The licence of a named source.
    pub licence: Option<&'static str>,
    /// The files it was read from.
    pub files: Vec<FileReport>,
    /// How often each of its training examples is expected in an epoch, `mixing` counted.
    pub weight: f64,
    /// The part of an epoch's draws that comes from it.
    pub share: f64,
    /// The list it stands in.
    pub split: Split,
    /// The evaluation set of its records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// The domain of its records, unless they bring their own.
    pub domain: String,
    /// The format its records were read with.
    pub format: String,
    /// How many records it holds, up to its limit.
    pub records: usize,
    /// How many of them are trained on.
    pub train_examples: usize,
    /// How many of them are validated on.
    pub valid_examples: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Those of their tokens that are predicted and trained or scored.
    pub label_tokens: usize,
    /// The longest example's tokens.
    pub longest: usize,
    /// How many records were cut to `max_seq_len`.
    pub truncated: usize,
    /// How many tokens that cost.
    pub tokens_lost: usize,
    /// What became of answers that are not trained as the template writes them in the whole
    /// conversation.
    #[serde(flatten)]
    pub turns: TurnCounts,
    /// Examples whose template writes nothing after the last answer.
    pub endless: usize,
    /// Records whose own texts write out special tokens, which are read as such.
    pub records_with_special: usize,
    /// How many such tokens there are.
    pub special_in_text: usize,
    /// Whether they are kept text.
    pub special_kept_text: bool,
    /// Records by the name of a field that nobody reads.
    pub unread_fields: BTreeMap<String, usize>,
    /// Records by the name of a field that the chat template does not write.
    pub unwritten_fields: BTreeMap<String, usize>,
    /// Answers by the token that was trained last of them.
    pub answer_ends: BTreeMap<u32, usize>,
    /// Files of the source's folder that are left out, as their names say that they are of another
    /// split.
    pub other_splits: Vec<PathBuf>,
    /// Whether it is a folder that is trained on although the names of all its files are of held-out splits.
    pub held_out_alone: bool,
    /// Records not used.
    pub dropped: Dropped,
}

impl SourceReport {
    pub(crate) fn new(source: &SourceConfig, split: Split, counts: &Counts) -> Self {
        Self {
            path: source.label(),
            licence: source.named().map(|named| named.licence),
            files: Vec::new(),
            weight: 1.0,
            share: 0.0,
            split,
            set: source.set.clone(),
            domain: source.domain_name(),
            format: counts.format.clone(),
            records: counts.records,
            train_examples: 0,
            valid_examples: 0,
            tokens: 0,
            label_tokens: 0,
            longest: 0,
            truncated: counts.truncated,
            tokens_lost: counts.tokens_lost,
            turns: counts.turns,
            endless: counts.endless,
            records_with_special: counts.special[0],
            special_in_text: counts.special[1],
            special_kept_text: false,
            unread_fields: counts.unread.clone(),
            unwritten_fields: counts.unwritten.clone(),
            answer_ends: counts.ends.clone(),
            other_splits: Vec::new(),
            held_out_alone: false,
            dropped: counts.dropped,
        }
    }
}

/// What became of all sources.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct DataReport {
    /// One entry a file: those of `data.train`, then those of `data.valid`.
    pub sources: Vec<SourceReport>,
    /// Examples trained on.
    pub train_examples: usize,
    /// Their tokens.
    pub train_tokens: usize,
    /// Those of their tokens that are predicted and trained.
    pub train_label_tokens: usize,
    /// Examples validated on.
    pub valid_examples: usize,
    /// Their tokens.
    pub valid_tokens: usize,
    /// Those of their tokens that are predicted and scored.
    pub valid_label_tokens: usize,
    /// Validation examples with exactly the tokens of a training example.
    pub duplicates: usize,
    /// Hash of all examples in their order.
    pub fingerprint: String,
    /// Bytes of token ids that are kept on disk; 0 when all are in memory.
    pub streamed_bytes: u64,
    /// What the comparison with benchmark questions found, if it was asked for.
    pub overlap: Option<OverlapReport>,
    /// What a person should know before training.
    pub notes: Vec<String>,
}

impl DataReport {
    /// How often each example of each training source is expected in an epoch, in their order:
    /// what [`Sampler::new`](crate::Sampler::new) takes.
    pub fn weights(&self) -> Vec<f64> {
        let train = self.sources.iter().filter(|source| source.split == Split::Train);
        train.map(|source| source.weight).collect()
    }

    /// Whether a source's records are conversations.
    pub fn has_conversations(&self) -> bool {
        let chat = |source: &SourceReport| crate::format::is_chat(&source.format) == Some(true);
        self.sources.iter().any(chat)
    }

    /// The tokens that were trained last of answers, the most frequent first.
    pub fn answer_ends(&self) -> Vec<u32> {
        let mut counted: BTreeMap<u32, usize> = BTreeMap::new();
        for (token, count) in self.sources.iter().flat_map(|source| &source.answer_ends) {
            *counted.entry(*token).or_default() += count;
        }
        let mut tokens: Vec<(u32, usize)> = counted.into_iter().collect();
        tokens.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        tokens.into_iter().map(|(token, _)| token).collect()
    }

    pub(crate) fn take_notes(&mut self) {
        let mut notes = Vec::new();
        for source in &self.sources {
            let path = source.path.display();
            if let Some(licence) = source.licence {
                notes.push(format!("{path}: licence: {licence}"));
                let unknown = source.files.iter().filter(|file| file.known == Some(false));
                let unknown: Vec<&FileReport> = unknown.collect();
                if let Some(first) = unknown.first() {
                    let more = match unknown.len() {
                        1 => String::new(),
                        count => format!(" and {} more", count - 1),
                    };
                    notes.push(format!(
                        "{path}: no checksum is pinned for {}{more} (SHA-256 {}…); the run's \
                         data.json records what was read",
                        first.path.file_name().unwrap_or_default().to_string_lossy(),
                        first.sha256.get(..12).unwrap_or_default(),
                    ));
                }
            }
            if source.dropped.total() > 0 {
                notes.push(format!("{path}: left out {}", source.dropped));
            }
            if source.truncated > 0 {
                notes.push(format!(
                    "{path}: {} record(s) cut to max_seq_len, {} token(s) lost",
                    source.truncated, source.tokens_lost
                ));
            }
            notes
                .extend(source.turns.sentences().into_iter().map(|note| format!("{path}: {note}")));
            if source.special_in_text > 0 {
                let what = match source.special_kept_text {
                    true => "which are kept text",
                    false => {
                        "which are read as those tokens; `special_tokens: text` keeps them text"
                    }
                };
                notes.push(format!(
                    "{path}: {} record(s) write out {} special token(s) of the model in their own texts, {what}",
                    source.records_with_special, source.special_in_text
                ));
            }
            for (fields, what) in [
                (&source.unread_fields, "hold fields that are not used"),
                (&source.unwritten_fields, "hold fields that the chat template does not write"),
            ] {
                let most = fields.values().max().copied().unwrap_or(0);
                if most > 0 {
                    let counted = fields.iter().map(|(name, count)| format!("{name} ({count})"));
                    let listed = counted.collect::<Vec<_>>().join(", ");
                    notes.push(format!("{path}: records {what}: {listed}"));
                }
            }
            if let [first, ..] = &source.other_splits[..] {
                let names = source.other_splits.iter().filter_map(|path| path.file_name());
                let names: Vec<_> = names.map(|name| name.to_string_lossy()).collect();
                notes.push(format!(
                    "{path}: {} left out: by their names they are of other splits; list them by \
                     themselves to use them, as in `path: {}`",
                    names.join(", "),
                    first.display()
                ));
            }
            if source.held_out_alone {
                notes.push(format!(
                    "{path}: by their names all files of the folder are for validation or tests; they are \
                     trained on, as there are no others"
                ));
            }
            if source.endless > 0 {
                notes.push(format!(
                    "{path}: the chat template writes nothing after an answer, so the model does \
                     not learn to stop; end assistant turns with eos_token"
                ));
            }
        }
        if self.duplicates > 0 {
            notes.push(format!(
                "{} validation record(s) have exactly the tokens of a training record",
                self.duplicates
            ));
        }
        if self.streamed_bytes > 0 {
            let megabytes = self.streamed_bytes.div_ceil(1 << 20);
            notes.push(format!("token ids are kept on disk, {megabytes} MB"));
        }
        if let Some(overlap) = &self.overlap {
            notes.push(format!(
                "{} training record(s) hold {} of {} benchmark question(s), by runs of {} words; \
                 {} question(s) are too short to tell",
                overlap.records,
                overlap.questions_found,
                overlap.questions,
                overlap.words,
                overlap.too_short
            ));
            for found in &overlap.examples {
                notes.push(format!("  {} holds {}: {}", found.record, found.question, found.text));
            }
        }
        self.notes = notes;
    }
}

fn examples(count: usize) -> String {
    format!("{count} example{}", if count == 1 { "" } else { "s" })
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HEAD: [&str; 11] = [
            "source", "domain", "format", "records", "train", "valid", "tokens", "labels", "cut",
            "dropped", "share",
        ];
        let mut rows: Vec<[String; 11]> = vec![HEAD.map(str::to_owned)];
        rows.extend(self.sources.iter().map(|source| {
            [
                source.path.display().to_string(),
                source.domain.clone(),
                source.format.clone(),
                source.records.to_string(),
                source.train_examples.to_string(),
                source.valid_examples.to_string(),
                source.tokens.to_string(),
                source.label_tokens.to_string(),
                source.truncated.to_string(),
                source.dropped.total().to_string(),
                match source.split {
                    Split::Train => format!("{:.1} %", 100.0 * source.share),
                    Split::Valid => "-".to_owned(),
                },
            ]
        }));
        let width = |column: usize| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
        for row in &rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let space = " ".repeat(widths[column] - cell.chars().count());
                // The first three columns are words, the others numbers.
                let padded =
                    if column < 3 { format!("{cell}{space}") } else { format!("{space}{cell}") };
                line.push_str(&padded);
                line.push_str("  ");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        writeln!(
            f,
            "train: {}, {} tokens, {} labels; valid: {}, {} tokens, {} labels",
            examples(self.train_examples),
            self.train_tokens,
            self.train_label_tokens,
            examples(self.valid_examples),
            self.valid_tokens,
            self.valid_label_tokens
        )?;
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

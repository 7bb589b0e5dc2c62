//! Records → token ids and labels.
//!
//! What is trained is an answer behind the prompt it will be asked with, token for token: prompt and
//! answer are encoded as they are at use, the prompt as a whole and the answer as what follows it. Where
//! the text of both would be cut into other tokens than those (a prompt that ends in a space before a
//! word), the answer's tokens are those that continue the prompt's.
//!
//! * **Chat.** For every turn of the assistant, [`turns`] gives the prompt, the answer and its end. Turns
//!   whose prompt begins with the sequence so far share it; where the template writes the turns before
//!   differently once others follow (it takes reasoning out of them, moves the system prompt), a turn
//!   gets a sequence of its own. With [`Turns::Last`] the last answer alone is trained. Answers that the
//!   record marks as not to be trained are not. A conversation without any trainable turn is an error.
//! * **Completion.** The completion behind its prompt, then the end-of-text token.
//! * **Text.** The text with the end-of-text token; all of it is trained.
//!
//! The start-of-text token is put first if the tokenizer adds one to every text and the text does
//! not begin with it already; it is never doubled. Special tokens written in a record's text are
//! recognised as such.

mod literal;
mod turns;
mod unwritten;

use std::ops::Range;

use serde_json::{Map, Value};

use crate::config::{Overlong, SpecialTokens, Turns};
use crate::error::{Error, Result};
use crate::record::{Body, Message, Record};
use crate::report::DropReason;
use crate::template::ChatTemplate;
use literal::Literal;
use turns::Conversation;
pub use turns::without_reasoning;

/// The label of a token that is not trained.
pub const IGNORE_LABEL: u32 = u32::MAX;

/// A tokenizer, as far as data need one.
pub trait TextEncoder: Send + Sync {
    /// Token ids, each with its range of bytes in `text`. Special tokens written in the text are
    /// recognised; none are added.
    ///
    /// # Errors
    /// A message for people, when the text cannot be encoded.
    fn encode(&self, text: &str) -> std::result::Result<Vec<(u32, Range<usize>)>, String>;
    /// The start-of-text token: id and text.
    fn bos_token(&self) -> Option<(u32, &str)>;
    /// The end-of-text token: id and text.
    fn eos_token(&self) -> Option<(u32, &str)>;
    /// Whether the model's own tokenizer starts every text with the start-of-text token.
    fn add_bos(&self) -> bool;
    /// Where special tokens are written out in a text, in bytes.
    fn special_in(&self, text: &str) -> Vec<Range<usize>> {
        let _ = text;
        Vec::new()
    }
    /// Whether a token is recognised whole before a text is cut into others, as those are that begin
    /// and end turns.
    fn is_special(&self, id: u32) -> bool {
        let marks = [self.bos_token(), self.eos_token()];
        marks.into_iter().flatten().any(|(mark, _)| mark == id)
    }
}

/// Token ids of a text that starts a sequence, each with its range of bytes: however many start-of-text
/// tokens it begins with, one is kept, and one is put first where the tokenizer wants it.
///
/// # Errors
/// A message for people, when the text cannot be encoded.
pub fn encode_start(
    encoder: &dyn TextEncoder,
    text: &str,
) -> std::result::Result<Vec<(u32, Range<usize>)>, String> {
    let mut encoded = encoder.encode(text)?;
    if let Some((bos, _)) = encoder.bos_token() {
        let leading = encoded.iter().take_while(|(token, _)| *token == bos).count();
        if leading > 0 || encoder.add_bos() {
            encoded.splice(..leading, [(bos, 0..0)]);
        }
    }
    Ok(encoded)
}

/// One sequence to train on. `labels[i]` is `tokens[i]` where that token is trained and
/// [`IGNORE_LABEL`] elsewhere: not shifted, [`Batch`](crate::Batch) does that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, at least two.
    pub tokens: Vec<u32>,
    /// As many labels as tokens.
    pub labels: Vec<u32>,
    /// Index into [`Dataset::domains`](crate::Dataset::domains).
    pub domain: u32,
    /// Index into [`DataReport::sources`](crate::DataReport::sources): training files first.
    pub source: u32,
    /// The record's number in its file, from 0.
    pub row: u32,
}

impl Example {
    /// How many tokens are predicted and trained; the first token of a sequence has no predecessor
    /// to be predicted from.
    pub fn label_tokens(&self) -> usize {
        label_tokens(&self.labels)
    }
}

fn label_tokens(labels: &[u32]) -> usize {
    labels.iter().skip(1).filter(|&&label| label != IGNORE_LABEL).count()
}

/// How records become tokens.
#[derive(Clone, Copy)]
pub struct EncodeOptions<'a> {
    /// The tokenizer.
    pub encoder: &'a dyn TextEncoder,
    /// The template of conversations.
    pub template: Option<&'a ChatTemplate>,
    /// The most tokens of one sequence.
    pub max_seq_len: usize,
    /// Whether prompts are trained too.
    pub train_on_prompt: bool,
    /// What happens to longer records.
    pub overlong: Overlong,
    /// Which answers of a conversation are trained.
    pub turns: Turns,
    /// What special tokens are that a record's texts write out.
    pub special_tokens: SpecialTokens,
}

/// Tokens and what is trained of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// As many labels.
    pub labels: Vec<u32>,
    /// How many tokens were cut off the end.
    pub lost: usize,
}

impl Sequence {
    fn push(&mut self, tokens: &[u32], trained: bool) {
        self.tokens.extend(tokens);
        let label = |&token: &u32| if trained { token } else { IGNORE_LABEL };
        self.labels.extend(tokens.iter().map(label));
    }
}

/// What was seen on the way from a record to its tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Answers that could not be located and are not trained.
    pub untrained_turns: usize,
    /// Answers that the record says are not to be trained.
    pub masked_turns: usize,
    /// Answers before which the template writes other things once they are there; they follow the
    /// prompt as it is asked.
    pub moved_turns: usize,
    /// Answers whose reasoning the template leaves out; it was put back.
    pub restored_reasoning: usize,
    /// Answers whose reasoning is not trained, as the template has no place for it.
    pub left_out_reasoning: usize,
    /// Sequences beyond the first that the record became.
    pub further_sequences: usize,
    /// Sequences of the record that `overlong: drop` or a cut before their first label left out, while
    /// others stayed.
    pub lost_sequences: usize,
    /// Special tokens that the record's own texts write out; they are read as such.
    pub special_in_text: usize,
    /// Whether the template writes nothing after the last answer, so that the model does not
    /// learn to stop.
    pub endless: bool,
    /// Names of fields that hold something and that the template does not write.
    pub unwritten: Vec<String>,
    /// The tokens that were trained last of answers.
    pub ends: Vec<u32>,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoded {
    /// Sequences to train on, at least one.
    Kept {
        /// Tokens and labels.
        sequences: Vec<Sequence>,
        /// What was seen on the way.
        seen: Seen,
    },
    /// Nothing to train on.
    Dropped {
        /// Why.
        reason: DropReason,
        /// How many tokens were cut off the end before that was found.
        lost: usize,
    },
}

/// Encodes one record.
///
/// # Errors
/// When a conversation has no template or the template refuses it, when the tokenizer fails or
/// lacks the end-of-text token that a completion needs. The error names the record.
pub fn encode_record(record: &Record, options: &EncodeOptions<'_>) -> Result<Encoded> {
    let dropped = |reason| Ok(Encoded::Dropped { reason, lost: 0 });
    let fail = |message: String| Error::Encode { location: record.location.clone(), message };
    let mut seen = Seen::default();
    let special = |text: &str| options.encoder.special_in(text).len();
    seen.special_in_text = match &record.body {
        Body::Chat(messages) => {
            let said =
                |m: &Message| special(&m.content) + special(m.reasoning().unwrap_or_default());
            messages.iter().map(said).sum()
        }
        Body::Completion { prompt, completion } => special(prompt) + special(completion),
        Body::Text(text) => special(text),
    };
    let as_text = options.special_tokens == SpecialTokens::Text && seen.special_in_text > 0;
    let broken = as_text.then(|| literal::break_special(&record.body, options.encoder));
    let encoder = Literal(options.encoder);
    let literal = EncodeOptions { encoder: &encoder, ..*options };
    let options = if as_text { &literal } else { options };
    let sequences = match broken.as_ref().unwrap_or(&record.body) {
        Body::Chat(messages) => {
            let answers = || messages.iter().filter(|message| message.is_assistant());
            let trained = || answers().filter(|message| message.is_trained());
            if answers().next().is_none() || trained().any(Message::is_blank) {
                return dropped(DropReason::EmptyAnswer);
            }
            if trained().next().is_none() {
                return dropped(DropReason::Masked);
            }
            let template = options
                .template
                .ok_or_else(|| Error::NoTemplate { path: record.location.path.clone() })?;
            chat(messages, &record.variables, template, options, &mut seen).map_err(fail)?
        }
        Body::Completion { prompt, completion } => {
            if completion.trim().is_empty() {
                return dropped(DropReason::EmptyAnswer);
            }
            vec![plain(prompt, completion, options, &mut seen).map_err(fail)?]
        }
        Body::Text(text) => {
            if text.trim().is_empty() {
                return dropped(DropReason::EmptyText);
            }
            vec![plain("", text, options, &mut seen).map_err(fail)?]
        }
    };
    Ok(fit(sequences, options, seen))
}

/// Cuts sequences to `max_seq_len` and leaves out what then trains nothing.
fn fit(sequences: Vec<Sequence>, options: &EncodeOptions<'_>, mut seen: Seen) -> Encoded {
    let most = options.max_seq_len;
    let (mut kept, mut lost, mut reason) = (Vec::new(), 0, DropReason::NoLabel);
    let before = sequences.len();
    for mut sequence in sequences {
        if sequence.tokens.len() > most {
            if options.overlong == Overlong::Drop {
                reason = DropReason::TooLong;
                continue;
            }
            sequence.lost = sequence.tokens.len() - most;
            sequence.tokens.truncate(most);
            sequence.labels.truncate(most);
        }
        if label_tokens(&sequence.labels) == 0 {
            lost += sequence.lost;
            continue;
        }
        kept.push(sequence);
    }
    if kept.is_empty() {
        return Encoded::Dropped { reason, lost };
    }
    seen.lost_sequences = before - kept.len();
    seen.further_sequences = kept.len() - 1;
    Encoded::Kept { sequences: kept, seen }
}

/// A prompt and what follows it to the end of the text, without a template.
fn plain(
    prompt: &str,
    completion: &str,
    options: &EncodeOptions<'_>,
    seen: &mut Seen,
) -> std::result::Result<Sequence, String> {
    let encoder = options.encoder;
    let Some((eos, _)) = encoder.eos_token() else {
        return Err("the tokenizer has no end-of-text token, without which the model cannot \
                    learn to stop; use a chat template instead"
            .to_owned());
    };
    let mut sequence = Sequence::default();
    let ids = |encoded: Vec<(u32, Range<usize>)>| encoded.into_iter().map(|(id, _)| id).collect();
    if prompt.is_empty() {
        let tokens: Vec<u32> = ids(encode_start(encoder, completion)?);
        sequence.push(&tokens, true);
    } else {
        let (asked, answer) = pair(encoder, None, prompt, completion)?;
        sequence.push(&asked, options.train_on_prompt);
        sequence.push(&answer, true);
    }
    let bos = encoder.bos_token().map(|(id, _)| id);
    let only_start = sequence.tokens.iter().all(|token| Some(*token) == bos);
    if only_start || sequence.tokens.last() != Some(&eos) {
        sequence.push(&[eos], true);
    }
    seen.ends.push(eos);
    Ok(sequence)
}

/// A text with its tokens, those of the start among them.
struct Whole {
    text: String,
    tokens: Vec<(u32, Range<usize>)>,
}

impl Whole {
    fn of(encoder: &dyn TextEncoder, text: String) -> std::result::Result<Self, String> {
        let tokens = encode_start(encoder, &text)?;
        Ok(Self { text, tokens })
    }

    /// How many of the tokens are those of its first `end` bytes alone.
    fn asked(
        &self,
        encoder: &dyn TextEncoder,
        end: usize,
    ) -> std::result::Result<Option<usize>, String> {
        let count = self.tokens.iter().take_while(|(_, range)| range.end <= end).count();
        if self.tokens.get(count).is_some_and(|(_, range)| range.start < end) {
            return Ok(None);
        }
        // A text is cut at its special tokens first, so what stands after the last of them decides.
        let special = |(id, _): &(u32, Range<usize>)| encoder.is_special(*id);
        let Some(from) = self.tokens[..count].iter().rposition(special) else {
            let alone = encode_start(encoder, &self.text[..end])?;
            return Ok(same(&alone, &self.tokens[..count]).then_some(count));
        };
        let start = self.tokens[from].1.start;
        let alone = encoder.encode(&self.text[start..end])?;
        // The start-of-text token may have been put there, or stand for several.
        let own = if alone.first().is_some_and(|(id, _)| *id == self.tokens[from].0) {
            &self.tokens[from..count]
        } else {
            &self.tokens[from + 1..count]
        };
        Ok(same(&alone, own).then_some(count))
    }
}

fn same(a: &[(u32, Range<usize>)], b: &[(u32, Range<usize>)]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|((a, _), (b, _))| a == b)
}

/// The tokens of a prompt as it is asked, and those of the answer that continues it. `shared` is a longer
/// text that may begin with both.
fn pair(
    encoder: &dyn TextEncoder,
    shared: Option<&Whole>,
    prompt: &str,
    answer: &str,
) -> std::result::Result<(Vec<u32>, Vec<u32>), String> {
    let ids = |tokens: &[(u32, Range<usize>)]| tokens.iter().map(|(id, _)| *id).collect::<Vec<_>>();
    let end = prompt.len() + answer.len();
    let begins = |whole: &&Whole| {
        let rest = whole.text.strip_prefix(prompt);
        rest.is_some_and(|rest| rest.starts_with(answer))
    };
    let own;
    let whole = match shared.filter(begins) {
        Some(whole) => whole,
        None => {
            own = Whole::of(encoder, format!("{prompt}{answer}"))?;
            &own
        }
    };
    if let Some(count) = whole.asked(encoder, prompt.len())? {
        let answered = whole.tokens[count..].iter().take_while(|(_, range)| range.start < end);
        let last = count + answered.count();
        return Ok((ids(&whole.tokens[..count]), ids(&whole.tokens[count..last])));
    }
    let asked = encode_start(encoder, prompt)?;
    Ok((ids(&asked), continuation(encoder, answer)?))
}

/// The tokens of a text that continues another with which its own would grow together. Tokenizers put a
/// space before the start of a text, so it is encoded behind something that ends a word.
fn continuation(encoder: &dyn TextEncoder, text: &str) -> std::result::Result<Vec<u32>, String> {
    for before in ["\n", ".", "a", "0"] {
        let encoded = encoder.encode(&format!("{before}{text}"))?;
        let first = encoded.iter().position(|(_, range)| range.start >= before.len());
        let whole =
            |first: &usize| encoded[..*first].iter().all(|(_, range)| range.end <= before.len());
        if let Some(first) = first.filter(whole) {
            return Ok(encoded[first..].iter().map(|(id, _)| *id).collect());
        }
    }
    Ok(encoder.encode(text)?.into_iter().map(|(id, _)| id).collect())
}

/// The sequences of a conversation.
fn chat(
    messages: &[Message],
    variables: &Map<String, Value>,
    template: &ChatTemplate,
    options: &EncodeOptions<'_>,
    seen: &mut Seen,
) -> std::result::Result<Vec<Sequence>, String> {
    let encoder = options.encoder;
    let bos = encoder.bos_token().map_or("", |(_, text)| text);
    let eos = encoder.eos_token().map_or("", |(_, text)| text);
    let messages = &template.adapt(messages, variables, bos, eos)[..];
    let conversation = Conversation { messages, variables, template, bos, eos };
    let text = conversation.text().map_err(|error| error.to_string())?;
    seen.unwritten = unwritten::fields(&conversation, &text);
    let whole = Whole::of(encoder, text)?;
    let mut sequences: Vec<Sequence> = Vec::new();
    let mut current = Sequence::default();
    let last = messages.iter().rposition(|message| message.is_assistant() && message.is_trained());
    let mut found = false;
    for (index, message) in messages.iter().enumerate().filter(|(_, m)| m.is_assistant()) {
        let wanted = message.is_trained() && (options.turns == Turns::Each || Some(index) == last);
        seen.masked_turns += usize::from(!message.is_trained());
        let Some(turn) = conversation.turn(index, &whole.text) else {
            seen.untrained_turns += usize::from(wanted);
            continue;
        };
        let (asked, answer) = pair(encoder, Some(&whole), &turn.prompt, &turn.answer)?;
        if !asked.starts_with(&current.tokens) {
            if !wanted {
                continue;
            }
            sequences.push(std::mem::take(&mut current));
        }
        current.push(&asked[current.tokens.len()..], options.train_on_prompt);
        current.push(&answer, wanted);
        if wanted {
            found = true;
            seen.endless = turn.endless;
            seen.moved_turns += usize::from(turn.moved);
            seen.restored_reasoning += usize::from(turn.restored);
            seen.left_out_reasoning += usize::from(turn.unreasoned);
            seen.ends.extend(answer.last());
        }
    }
    // What follows the last answer is read, though nothing of it is trained.
    let all: Vec<u32> = whole.tokens.iter().map(|(id, _)| *id).collect();
    if let Some(rest) = all.strip_prefix(&current.tokens[..]) {
        current.push(rest, options.train_on_prompt);
    }
    sequences.push(current);
    let trained = |sequence: &Sequence| label_tokens(&sequence.labels) > 0;
    sequences.retain(trained);
    if !found {
        return Err(format!(
            "chat template {}: no turn of the assistant can be found in the rendered conversation; \
             expected a template that writes what the assistant says",
            template.name()
        ));
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests;

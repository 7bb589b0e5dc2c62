//! A conversation, turn by turn: the prompt that an answer is asked with, the answer, and its end.
//!
//! The prompt is what the template writes for the messages before the answer, with the generation
//! prompt: what `generate`, `chat` and `eval` ask with. The answer is what the template writes after
//! that, where it writes the same before it. Some do not:
//!
//! * A template that puts the system prompt into the *last* turn of the user leaves it out, or puts it
//!   elsewhere, once an answer follows. The answer is then taken from what it writes for the turns
//!   since the user's last, and follows the prompt as it is asked.
//! * A template whose generation prompt opens the reasoning (`<think>`) and that takes reasoning out
//!   of messages writes the answer alone. The record's reasoning follows the opened tag; an answer
//!   without any closes it at once.
//! * A template that takes the reasoning out although it opens none gets it back before the answer.

use serde_json::{Map, Value};

use crate::error::Result;
use crate::record::Message;
use crate::template::ChatTemplate;

/// How reasoning is opened and closed.
const TAGS: [(&str, &str); 7] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
];

/// Messages and what the template sees beside them.
pub(super) struct Conversation<'a> {
    pub(super) messages: &'a [Message],
    pub(super) variables: &'a Map<String, Value>,
    pub(super) template: &'a ChatTemplate,
    pub(super) bos: &'a str,
    pub(super) eos: &'a str,
}

/// An answer behind its prompt.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Turn {
    /// What it is asked with.
    pub(super) prompt: String,
    /// The answer, with what the template ends it with.
    pub(super) answer: String,
    /// Whether the template writes nothing after it.
    pub(super) endless: bool,
    /// Whether the template writes other things before the answer once it is there.
    pub(super) moved: bool,
    /// Whether the template leaves out reasoning, which was put back.
    pub(super) restored: bool,
    /// Whether there is reasoning that could not be put anywhere.
    pub(super) unreasoned: bool,
}

/// What a message says: reasoning, and text after it.
struct Said<'a> {
    reasoning: &'a str,
    text: &'a str,
    /// The whole content, where the reasoning is part of it.
    whole: Option<&'a str>,
    tags: Option<(&'static str, &'static str)>,
}

impl<'a> Said<'a> {
    fn of(message: &'a Message) -> Self {
        let content = message.content.as_str();
        for tags in TAGS {
            if let Some(at) = content.rfind(tags.1) {
                let before = content[..at].trim();
                let reasoning = before.strip_prefix(tags.0).unwrap_or(before).trim();
                let text = content[at + tags.1.len()..].trim();
                return Self { reasoning, text, whole: Some(content), tags: Some(tags) };
            }
        }
        let reasoning = message.reasoning().unwrap_or_default().trim();
        Self { reasoning, text: content.trim(), whole: None, tags: None }
    }

    /// Where what is said stands in `text`: its first part that is found, if all of it is blank nowhere.
    fn find(&self, text: &str) -> Option<usize> {
        let parts = [self.reasoning, self.text].into_iter().filter(|part| !part.is_empty());
        parts.filter_map(|part| text.find(part)).min()
    }
}

/// An answer without the reasoning before its text, where that is closed by one of the usual tags.
pub fn without_reasoning(answer: &str) -> &str {
    let closed = TAGS.iter().filter_map(|(_, close)| Some(answer.rfind(close)? + close.len()));
    &answer[closed.max().unwrap_or(0)..]
}

/// Names of the tools that a message calls.
pub(super) fn called(message: &Message) -> Vec<&str> {
    let calls = message.fields.get("tool_calls").and_then(Value::as_array);
    let calls = calls.into_iter().flatten().chain(message.fields.get("function_call"));
    calls.filter_map(|call| call.get("function").unwrap_or(call).get("name")?.as_str()).collect()
}

impl Conversation<'_> {
    fn render(&self, messages: &[Message], generate: bool) -> Result<String> {
        let Self { template, variables, bos, eos, .. } = self;
        template.render_with(messages, variables, generate, bos, eos)
    }

    /// The whole conversation as text.
    ///
    /// # Errors
    /// When the template refuses it.
    pub(super) fn text(&self) -> Result<String> {
        self.render(self.messages, false)
    }

    /// The answer that is the message `index`; none where the template gives no place for it.
    /// `text` is the whole conversation's.
    pub(super) fn turn(&self, index: usize, text: &str) -> Option<Turn> {
        let message = &self.messages[index];
        let through = if index + 1 == self.messages.len() {
            text.to_owned()
        } else {
            self.render(&self.messages[..=index], false).ok()?
        };
        let through = through.trim_end();
        let said = Said::of(message);
        let Ok(prompt) = self.render(&self.messages[..index], true) else {
            // A template may refuse to render no message at all; nothing is asked then, and the answer is
            // looked for from the start.
            return self.unasked(index, through, &said);
        };
        let mut turn = Turn { prompt, ..Turn::default() };
        if let Some(answer) = through.strip_prefix(&turn.prompt) {
            turn.answer = answer.to_owned();
        } else {
            turn.answer = self.answer(index, through, &turn.prompt, &said)?;
            turn.moved = true;
        }
        self.restore(&mut turn, &said);
        if !said.reasoning.is_empty() {
            let kept = turn.answer.contains(said.reasoning);
            turn.unreasoned = !kept;
            turn.restored = kept && !through.contains(said.reasoning);
        }
        let last = said.text;
        turn.endless = !last.is_empty() && turn.answer.trim_end().ends_with(last);
        self.says_something(&turn, message, &said).then_some(turn)
    }

    fn unasked(&self, index: usize, through: &str, said: &Said<'_>) -> Option<Turn> {
        let before = match self.render(&self.messages[..index], false) {
            Ok(before) => through.starts_with(&before).then_some(before.len())?,
            Err(_) if index == 0 => 0,
            Err(_) => return None,
        };
        let start = before + said.find(&through[before..])?;
        let (prompt, answer) = through.split_at(start);
        let endless = !said.text.is_empty() && answer.ends_with(said.text);
        let (prompt, answer) = (prompt.to_owned(), answer.to_owned());
        Some(Turn { prompt, answer, endless, ..Turn::default() })
    }

    /// The answer where the template does not write it behind the prompt.
    fn answer(&self, index: usize, through: &str, prompt: &str, said: &Said<'_>) -> Option<String> {
        let shorter = self.shorter(index);
        let pairs: Vec<(String, String, String)> = shorter
            .iter()
            .filter_map(|messages| {
                let before = &messages[..messages.len() - 1];
                let whole = self.render(messages, false).ok()?.trim_end().to_owned();
                Some((self.render(before, true).ok()?, whole, self.plain(before)))
            })
            .collect();
        let prefixed = |(asked, whole, _): &(String, String, String)| {
            whole.strip_prefix(asked.as_str()).map(str::to_owned)
        };
        if let Some(answer) = pairs.iter().find_map(prefixed) {
            return Some(answer);
        }
        // The generation prompt opens something that the turn lacks, or the other way round.
        let own = (prompt.to_owned(), through.to_owned(), self.plain(&self.messages[..index]));
        let parted = std::iter::once(&own).chain(&pairs).find_map(|(asked, whole, before)| {
            let common = common_prefix(asked, whole);
            (common >= before.len() && whole.starts_with(before.as_str()))
                .then(|| (&asked[common..], &whole[common..]))
        });
        if let Some((opened, body)) = parted {
            let trimmed = opened.trim_end();
            if let Some((_, close)) = TAGS.iter().find(|(open, _)| trimmed.ends_with(open)) {
                return Some(continued(opened, body, close, said));
            }
            // With reasoning switched off the prompt holds an empty one; the text is the answer.
            let closed = TAGS.iter().any(|(_, close)| trimmed.ends_with(close));
            let start = if closed { body.rfind(said.text) } else { said.find(body) };
            if let Some(start) = start.filter(|_| !said.text.is_empty() || !closed) {
                return Some(body[start..].to_owned());
            }
            if said.text.is_empty() && said.reasoning.is_empty() {
                return Some(body.to_owned());
            }
        }
        let start = through.rfind(said.text).filter(|_| !said.text.is_empty())?;
        Some(through[start..].to_owned())
    }

    /// What the template writes for these messages alone, without the white space at its end.
    fn plain(&self, messages: &[Message]) -> String {
        self.render(messages, false).map_or(String::new(), |text| text.trim_end().to_owned())
    }

    /// Shorter conversations that end with the same answer: without a system prompt, and since the
    /// user's last turn.
    fn shorter(&self, index: usize) -> Vec<Vec<Message>> {
        let through = &self.messages[..=index];
        let of_system =
            |message: &&Message| ["system", "developer"].contains(&message.role.as_str());
        let rest: Vec<Message> = through.iter().filter(|m| !of_system(m)).cloned().collect();
        let mut shorter = Vec::new();
        if rest.len() < through.len() {
            shorter.push(rest.clone());
        }
        if let Some(user) = rest.iter().rposition(|message| message.role == "user")
            && user > 0
        {
            shorter.push(rest[user..].to_vec());
        }
        shorter.retain(|messages| messages.len() > 1);
        shorter
    }

    /// Puts reasoning back that the template left out of the answer, and takes out an empty one that the
    /// template put before that of the text.
    fn restore(&self, turn: &mut Turn, said: &Said<'_>) {
        if said.reasoning.is_empty() {
            return;
        }
        let prompt = turn.prompt.trim_end();
        let off = TAGS.iter().any(|(open, close)| without_empty(prompt, open, close).is_some());
        if turn.answer.contains(said.reasoning) {
            let text = turn.answer.rfind(said.text).filter(|_| !said.text.is_empty());
            let whole = said.whole.map(str::trim).and_then(|whole| turn.answer.find(whole));
            match (text, whole, said.tags) {
                // Asked not to reason, it is not to.
                (Some(at), ..) if off => turn.answer.replace_range(..at, ""),
                (_, Some(at), Some((open, close))) => {
                    if let Some(before) = without_empty(&turn.answer[..at], open, close) {
                        let from = before.len();
                        turn.answer.replace_range(from..at, "");
                    }
                }
                _ => {}
            }
            return;
        }
        let source = self.template.source();
        let tags = said.tags.or_else(|| TAGS.into_iter().find(|(_, close)| source.contains(close)));
        let (Some((open, close)), false) = (tags, off) else { return };
        let at = match said.text.is_empty() {
            true => 0,
            false => turn.answer.rfind(said.text).unwrap_or(0),
        };
        let (before, after) = turn.answer.split_at(at);
        // An empty one may stand there in its place.
        let before = without_empty(before, open, close).unwrap_or(before);
        let opened = prompt.ends_with(open);
        let reasoned = match said.whole.and_then(|whole| Some(&whole[..whole.rfind(said.text)?])) {
            Some(whole) if !said.text.is_empty() => match whole.trim_start().strip_prefix(open) {
                Some(inner) if opened => inner.trim_start().to_owned(),
                _ => whole.to_owned(),
            },
            _ if opened => format!("{}\n{close}\n\n", said.reasoning),
            _ => format!("{open}\n{}\n{close}\n\n", said.reasoning),
        };
        turn.answer = format!("{before}{reasoned}{after}");
    }

    /// Whether what the message says is in the answer: its text, or else its calls, or else its
    /// reasoning. To train the end of an answer alone would teach silence.
    fn says_something(&self, turn: &Turn, message: &Message, said: &Said<'_>) -> bool {
        let answer = turn.answer.as_str();
        if !said.text.is_empty() {
            // Templates may change a text, as by trimming its lines; its words stay.
            return answer.contains(said.text)
                || said.text.split_whitespace().all(|word| answer.contains(word));
        }
        let called = called(message);
        match called.is_empty() {
            false => called.iter().any(|name| answer.contains(name)),
            true if said.reasoning.is_empty() => !answer.is_empty(),
            true => answer.contains(said.reasoning),
        }
    }
}

/// A text that ends in an empty reasoning, without that.
fn without_empty<'t>(text: &'t str, open: &str, close: &str) -> Option<&'t str> {
    text.trim_end().strip_suffix(close)?.trim_end().strip_suffix(open)
}

/// The answer behind a prompt that has opened reasoning: the record's, or none.
fn continued(opened: &str, body: &str, close: &str, said: &Said<'_>) -> String {
    let start = if said.text.is_empty() { Some(0) } else { body.rfind(said.text) };
    let rest = &body[start.unwrap_or(0)..];
    let line = if opened.ends_with('\n') { "" } else { "\n" };
    if said.reasoning.is_empty() {
        return format!("\n{close}\n\n{rest}");
    }
    // As the record writes what follows the opened tag.
    if let Some((whole, (open, _))) = said.whole.zip(said.tags)
        && let Some(at) = whole.rfind(said.text).filter(|_| !said.text.is_empty())
    {
        let inner = whole[..at].trim_start();
        let inner = inner.strip_prefix(open).unwrap_or(inner);
        let inner = if opened.ends_with('\n') { inner.trim_start() } else { inner };
        return format!("{inner}{rest}");
    }
    format!("{line}{}\n{close}\n\n{rest}", said.reasoning)
}

/// How many bytes two texts share from their start, up to the end of a tag, a word or a line.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    if same == a.len() || same == b.len() {
        return same;
    }
    let same = a.floor_char_boundary(same);
    let ends = |c: char| c == '>' || c == ']' || c.is_whitespace();
    a[..same].rfind(ends).map_or(0, |at| at + a[at..].chars().next().map_or(1, char::len_utf8))
}

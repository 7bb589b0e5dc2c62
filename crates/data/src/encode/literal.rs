//! Special tokens that a record's own texts write out, kept text.
//!
//! A character that no text has is put behind the first one of each, so that the tokenizer does not
//! recognise it, and the tokens of that character are left out again.

use std::ops::Range;

use super::TextEncoder;
use crate::record::{Body, Message, REASONING};

/// Of the last plane for private use.
const BREAK: char = '\u{10f8e5}';

/// A tokenizer that leaves the breaks out.
pub(super) struct Literal<'a>(pub(super) &'a dyn TextEncoder);

impl TextEncoder for Literal<'_> {
    fn encode(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, String> {
        let breaks: Vec<usize> = text.match_indices(BREAK).map(|(at, _)| at).collect();
        let mut encoded = self.0.encode(text)?;
        if breaks.is_empty() {
            return Ok(encoded);
        }
        let width = BREAK.len_utf8();
        let touching = |range: &Range<usize>| {
            let at = breaks.partition_point(|&start| start + width <= range.start);
            breaks.get(at).filter(|&&start| start < range.end).copied()
        };
        for (_, range) in &encoded {
            let inside = |start: usize| range.start >= start && range.end <= start + width;
            if touching(range).is_some_and(|start| !inside(start)) {
                return Err(
                    "the tokenizer cannot keep a special token of this text as text; leave \
                            `special_tokens: text` out"
                        .to_owned(),
                );
            }
        }
        encoded.retain(|(_, range)| touching(range).is_none());
        Ok(encoded)
    }

    fn bos_token(&self) -> Option<(u32, &str)> {
        self.0.bos_token()
    }

    fn eos_token(&self) -> Option<(u32, &str)> {
        self.0.eos_token()
    }

    fn add_bos(&self) -> bool {
        self.0.add_bos()
    }

    fn special_in(&self, text: &str) -> Vec<Range<usize>> {
        self.0.special_in(text)
    }

    fn is_special(&self, id: u32) -> bool {
        self.0.is_special(id)
    }
}

/// The text with a break in every special token.
fn broken(text: &str, encoder: &dyn TextEncoder) -> String {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for range in encoder.special_in(text) {
        let first = text[range.start..].chars().next().map_or(0, char::len_utf8);
        out.push_str(&text[done..range.start + first]);
        out.push(BREAK);
        done = range.start + first;
    }
    out + &text[done..]
}

/// The record's texts with a break in every special token.
pub(super) fn break_special(body: &Body, encoder: &dyn TextEncoder) -> Body {
    let text = |text: &str| broken(text, encoder);
    match body {
        Body::Chat(messages) => {
            let turn = |message: &Message| {
                let mut message = message.clone();
                message.content = text(&message.content);
                for name in REASONING {
                    if let Some(serde_json::Value::String(said)) = message.fields.get_mut(name) {
                        *said = text(said);
                    }
                }
                message
            };
            Body::Chat(messages.iter().map(turn).collect())
        }
        Body::Completion { prompt, completion } => {
            Body::Completion { prompt: text(prompt), completion: text(completion) }
        }
        Body::Text(said) => Body::Text(text(said)),
    }
}

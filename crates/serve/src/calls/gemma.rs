//! `<|tool_call>call:name{key:<|"|>text<|"|>,count:3}<tool_call|>`, as Gemma 4 has it, and the same with
//! `<start_function_call>`, `<end_function_call>` and `<escape>`, as FunctionGemma has it. Texts stand between
//! two of a mark as they are; keys are bare; all else is as in JSON.

use super::{Bracket, Call, CallForm, MOST_DEPTH, Text, json_calls};
use serde_json::{Map, Value, json};

const GEMMA_4: Bracket = Bracket { open: "<|tool_call>", close: Some("<tool_call|>") };
const FUNCTION_GEMMA: Bracket =
    Bracket { open: "<start_function_call>", close: Some("<end_function_call>") };
/// What texts stand between.
const QUOTES: [&str; 2] = ["<|\"|>", "<escape>"];

pub(crate) static FORM: CallForm = CallForm {
    is_of: |source| source.contains(GEMMA_4.open) || source.contains(FUNCTION_GEMMA.open),
    brackets: &[GEMMA_4, FUNCTION_GEMMA],
    whole: None,
    marks: &[
        "<|tool_call>",
        "<tool_call|>",
        "<start_function_call>",
        "<end_function_call>",
        QUOTES[0],
        QUOTES[1],
    ],
    read: |text| calls(text).or_else(|| json_calls(text)),
    around: ("", ""),
};

fn calls(text: &str) -> Option<Vec<Call>> {
    let mut text = Text(text);
    let mut calls = Vec::new();
    while text.take("call:") {
        let name = text.until("{")?.trim();
        if name.is_empty() || name.contains(char::is_whitespace) {
            return None;
        }
        let arguments = fields(&mut text, MOST_DEPTH)?.to_string();
        calls.push(Call { name: name.to_owned(), arguments });
    }
    text.trim().0.is_empty().then_some(calls)
}

/// Fields up to the brace that closes them.
fn fields(text: &mut Text<'_>, depth: usize) -> Option<Value> {
    let one = |text: &mut Text<'_>| {
        let key = match quoted(text) {
            Some(key) => key.to_owned(),
            None => match json_text(text) {
                Some(key) => key,
                None => text.all(|letter| !":,{}[]".contains(letter)).trim_end().to_owned(),
            },
        };
        let named = !key.is_empty() && text.take(":");
        Some((key, named.then(|| value(text, depth)).flatten()?))
    };
    let fields: Map<String, Value> = text.list("}", one)?.into_iter().collect();
    Some(fields.into())
}

/// A text between two marks.
fn quoted<'a>(text: &mut Text<'a>) -> Option<&'a str> {
    let quote = QUOTES.into_iter().find(|quote| text.take(quote))?;
    text.until(quote)
}

/// A text as JSON has it.
fn json_text(text: &mut Text<'_>) -> Option<String> {
    if !text.trim().0.starts_with('"') {
        return None;
    }
    let mut values = serde_json::Deserializer::from_str(text.0).into_iter::<String>();
    let found = values.next()?.ok()?;
    text.0 = &text.0[values.byte_offset()..];
    Some(found)
}

fn value(text: &mut Text<'_>, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    if let Some(found) = quoted(text) {
        return Some(json!(found));
    }
    if let Some(found) = json_text(text) {
        return Some(json!(found));
    }
    if text.take("{") {
        return fields(text, depth);
    }
    if text.take("[") {
        return text.list("]", |text| value(text, depth)).map(Value::from);
    }
    let bare = text.all(|letter| !",{}[]<".contains(letter)).trim_end();
    match (bare, serde_json::from_str(bare)) {
        ("", _) => None,
        (_, Ok(known)) => Some(known),
        // A text without its marks.
        (bare, Err(_)) => Some(json!(bare)),
    }
}

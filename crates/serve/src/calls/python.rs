//! Calls as Python has them: `[name(key="text", count=3), other()]` as the whole answer, or a block of
//! `tool_code` with one on a line, as prompts for Gemma 3 and others without marks of their own ask for.

use super::{Bracket, Call, CallForm, MOST_DEPTH, Text, json_calls};
use serde_json::{Map, Value, json};

pub(crate) static FORM: CallForm = CallForm {
    is_of: |source| source.contains("tool_code") || source.contains("[func_name1("),
    brackets: &[Bracket { open: "```tool_code", close: Some("```") }],
    whole: Some('['),
    marks: &[],
    read: |text| calls(text).or_else(|| json_calls(text)),
    around: ("", ""),
};

fn calls(text: &str) -> Option<Vec<Call>> {
    let mut text = Text(text);
    let mut calls = Vec::new();
    if text.take("[") {
        calls = text.list("]", call)?;
    } else {
        while !text.trim().0.is_empty() {
            calls.push(call(&mut text)?);
            text.take(";");
        }
    }
    text.trim().0.is_empty().then_some(calls)
}

fn name<'a>(text: &mut Text<'a>) -> Option<&'a str> {
    let name = text.all(|letter| letter.is_alphanumeric() || "_.".contains(letter));
    let begins = name.starts_with(|first: char| first.is_alphabetic() || first == '_');
    begins.then_some(name)
}

/// A call; arguments without a name tell nothing that could be sent on.
fn call(text: &mut Text<'_>) -> Option<Call> {
    let called = name(text)?;
    if !text.take("(") {
        return None;
    }
    let one = |text: &mut Text<'_>| {
        let key = name(text)?.to_owned();
        text.take("=").then(|| value(text, MOST_DEPTH)).flatten().map(|value| (key, value))
    };
    let arguments: Map<String, Value> = text.list(")", one)?.into_iter().collect();
    Some(Call { name: called.to_owned(), arguments: Value::Object(arguments).to_string() })
}

fn value(text: &mut Text<'_>, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    for (open, close) in [("[", "]"), ("(", ")")] {
        if text.take(open) {
            return text.list(close, |text| value(text, depth)).map(Value::from);
        }
    }
    if text.take("{") {
        let one = |text: &mut Text<'_>| {
            let key = match value(text, depth)? {
                Value::String(key) => key,
                key @ (Value::Number(_) | Value::Bool(_) | Value::Null) => key.to_string(),
                _ => return None,
            };
            text.take(":").then(|| value(text, depth)).flatten().map(|value| (key, value))
        };
        let fields: Map<String, Value> = text.list("}", one)?.into_iter().collect();
        return Some(fields.into());
    }
    for quote in ["\"\"\"", "'''", "\"", "'"] {
        if text.take(quote) {
            return string(text, quote).map(Value::from);
        }
    }
    match text.all(|letter| letter.is_alphanumeric() || "_.+-".contains(letter)) {
        "True" | "true" => Some(json!(true)),
        "False" | "false" => Some(json!(false)),
        "None" | "null" => Some(Value::Null),
        number => serde_json::from_str(&number.replace('_', "")).ok(),
    }
}

/// A text up to the quote that closes it.
fn string(text: &mut Text<'_>, quote: &str) -> Option<String> {
    let mut said = String::new();
    loop {
        if let Some(rest) = text.0.strip_prefix(quote) {
            text.0 = rest;
            return Some(said);
        }
        let letter = letter(text)?;
        if letter != '\\' {
            said.push(letter);
            continue;
        }
        match self::letter(text)? {
            '\n' => {}
            'n' => said.push('\n'),
            't' => said.push('\t'),
            'r' => said.push('\r'),
            kept @ ('\\' | '\'' | '"') => said.push(kept),
            'x' => said.push(coded(text, 2)?),
            'u' => said.push(coded(text, 4)?),
            'U' => said.push(coded(text, 8)?),
            // What Python knows no meaning of stays as it is.
            other => said.extend(['\\', other]),
        }
    }
}

fn letter(text: &mut Text<'_>) -> Option<char> {
    let mut letters = text.0.chars();
    let first = letters.next()?;
    text.0 = letters.as_str();
    Some(first)
}

/// The letter of a number of so many hexadecimal digits.
fn coded(text: &mut Text<'_>, digits: usize) -> Option<char> {
    let (number, rest) = text.0.split_at_checked(digits)?;
    text.0 = rest;
    number.bytes().all(|digit| digit.is_ascii_hexdigit()).then_some(())?;
    char::from_u32(u32::from_str_radix(number, 16).ok()?)
}

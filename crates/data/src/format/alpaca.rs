//! `alpaca`: `{instruction, input?, output, system?, history?}`.
//!
//! `history` is a list of earlier turns, each a pair of what the user and what the assistant said.
//! The user says the instruction, followed by a line break and the input where that is not empty;
//! the assistant says the output.

use serde_json::Value;

use super::{FieldFault, Fields, Format, describe, known};
use crate::record::{Body, Message};

pub(super) struct Alpaca;

impl Format for Alpaca {
    fn name(&self) -> &'static str {
        "alpaca"
    }

    fn required(&self) -> &'static [&'static str] {
        &["instruction", "output"]
    }

    fn optional(&self) -> &'static [&'static str] {
        &["input", "system", "history", "thinking", "reasoning_content", "reasoning"]
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        let instruction = fields.text("instruction")?;
        let input = fields.optional_text("input")?.unwrap_or("");
        let output = fields.text("output")?;
        let user = match (instruction.trim().is_empty(), input.trim().is_empty()) {
            (_, true) => instruction.to_owned(),
            (true, false) => input.to_owned(),
            (false, false) => format!("{instruction}\n{input}"),
        };
        let mut messages = Vec::new();
        if let Some(system) = fields.optional_text("system")?.filter(|text| !text.is_empty()) {
            messages.push(Message::system(system));
        }
        for [asked, answered] in history(fields)? {
            messages.extend([Message::user(asked), Message::assistant(answered)]);
        }
        messages.push(Message::user(user));
        messages.push(known::answer(fields, output)?);
        Ok(Body::Chat(messages))
    }
}

/// Earlier turns: a list of pairs, or JSON text of one.
fn history(fields: &Fields<'_>) -> Result<Vec<[String; 2]>, FieldFault> {
    let value = match fields.get("history") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(Vec::new()),
        Some(Value::String(text)) => {
            serde_json::from_str(text).unwrap_or_else(|_| text.as_str().into())
        }
        Some(value) => value.clone(),
    };
    serde_json::from_value(value.clone()).map_err(|_| {
        let expected = "a list of pairs [what the user said, what the assistant said]";
        FieldFault::new(&fields.full_name("history"), expected, describe(&value))
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::parse;
    use super::*;

    #[test]
    fn the_input_follows_the_instruction() {
        let body = parse(
            &Alpaca,
            r#"{"instruction": "Add.", "input": "1 2", "output": "3", "task_type": 1}"#,
            &[],
        );
        assert_eq!(
            body.unwrap(),
            Body::Chat(vec![Message::user("Add.\n1 2"), Message::assistant("3")])
        );
        let body = parse(
            &Alpaca,
            r#"{"instruction": "Hi", "input": null, "output": "Ho", "system": "Be kind."}"#,
            &[],
        );
        assert_eq!(
            body.unwrap(),
            Body::Chat(vec![
                Message::system("Be kind."),
                Message::user("Hi"),
                Message::assistant("Ho")
            ])
        );
    }

    #[test]
    fn names_are_mapped_and_faults_use_the_file_s_names() {
        let names = [("instruction", "question"), ("output", "answer")];
        let body = parse(&Alpaca, r#"{"question": "q", "answer": "a"}"#, &names);
        assert_eq!(body.unwrap(), Body::Chat(vec![Message::user("q"), Message::assistant("a")]));
        let fault = parse(&Alpaca, r#"{"question": "q", "answer": 4}"#, &names).unwrap_err();
        assert_eq!(fault, FieldFault::new("answer", "a string", "the number 4"));
        let fault = parse(&Alpaca, r#"{"question": "q"}"#, &names).unwrap_err();
        assert_eq!(fault, FieldFault::new("answer", "a string", "no such field among [question]"));
    }
}

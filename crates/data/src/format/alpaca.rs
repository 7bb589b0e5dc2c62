//! `alpaca`: `{instruction, input?, output, system?}`.
//!
//! The user says the instruction, followed by a line break and the input where that is not empty;
//! the assistant says the output.

use super::{FieldFault, Fields, Format};
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
        &["input", "system"]
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
        messages.push(Message::user(user));
        messages.push(Message::assistant(output));
        Ok(Body::Chat(messages))
    }
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

//! `cloze`: `{text, label}`, where `<mask>` in the text stands for the label.
//!
//! The user gives the text and asks for what was masked, the assistant says the label. As `text`
//! alone is a format too, `format: cloze` has to be said.

use super::{FieldFault, Fields, Format};
use crate::record::{Body, Message};

pub(super) struct Cloze;

const MASK: &str = "<mask>";
const QUESTION: &str = "Which words does <mask> stand for in this text?";

impl Format for Cloze {
    fn name(&self) -> &'static str {
        "cloze"
    }

    fn required(&self) -> &'static [&'static str] {
        &["text", "label"]
    }

    fn optional(&self) -> &'static [&'static str] {
        &[]
    }

    fn automatic(&self) -> bool {
        false
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        let text = fields.text("text")?;
        if !text.contains(MASK) {
            let found = "none";
            return Err(FieldFault::new(&fields.full_name("text"), "a text with <mask>", found));
        }
        let label = fields.text("label")?;
        Ok(Body::Chat(vec![
            Message::user(format!("{QUESTION}\n{text}")),
            Message::assistant(label),
        ]))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::parse;
    use super::*;

    #[test]
    fn the_label_answers_what_is_masked() {
        let body = parse(&Cloze, r#"{"text": "a <mask> of trust", "label": "breach"}"#, &[]);
        assert_eq!(
            body.unwrap(),
            Body::Chat(vec![
                Message::user(format!("{QUESTION}\na <mask> of trust")),
                Message::assistant("breach")
            ])
        );
        let fault = parse(&Cloze, r#"{"text": "no hole", "label": "x"}"#, &[]).unwrap_err();
        assert_eq!(fault, FieldFault::new("text", "a text with <mask>", "none"));
    }
}

//! `completion`: `{prompt, completion}`, joined as they are; no template.

use super::{FieldFault, Fields, Format};
use crate::record::Body;

pub(super) struct Completion;

impl Format for Completion {
    fn name(&self) -> &'static str {
        "completion"
    }

    fn required(&self) -> &'static [&'static str] {
        &["prompt", "completion"]
    }

    fn optional(&self) -> &'static [&'static str] {
        &[]
    }

    fn is_chat(&self) -> bool {
        false
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        Ok(Body::Completion {
            prompt: fields.text("prompt")?.to_owned(),
            completion: fields.text("completion")?.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::parse;
    use super::*;

    #[test]
    fn both_halves_are_kept_as_they_are() {
        let body = parse(&Completion, r#"{"prompt": "a ", "completion": " b\n"}"#, &[]).unwrap();
        assert_eq!(body, Body::Completion { prompt: "a ".into(), completion: " b\n".into() });
        let fault = parse(&Completion, r#"{"prompt": "a", "completion": ["b"]}"#, &[]).unwrap_err();
        assert_eq!(fault, FieldFault::new("completion", "a string", "a list"));
    }
}

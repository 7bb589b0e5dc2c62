//! `prompt-response`: `{prompt, response, system?}`.
//!
//! The user says the prompt, the assistant the response, through the chat template; `completion`
//! is the format for prompts that are taken as they are.

use super::{FieldFault, Fields, Format, known};
use crate::record::{Body, Message};

pub(super) struct PromptResponse;

impl Format for PromptResponse {
    fn name(&self) -> &'static str {
        "prompt-response"
    }

    fn required(&self) -> &'static [&'static str] {
        &["prompt", "response"]
    }

    fn optional(&self) -> &'static [&'static str] {
        &["system", "thinking", "reasoning_content", "reasoning"]
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        let mut messages = Vec::new();
        if let Some(system) = fields.optional_text("system")?.filter(|text| !text.is_empty()) {
            messages.push(Message::system(system));
        }
        messages.push(Message::user(fields.text("prompt")?));
        messages.push(known::answer(fields, fields.text("response")?)?);
        Ok(Body::Chat(messages))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::parse;
    use super::*;

    #[test]
    fn a_prompt_and_a_response_are_a_conversation() {
        let names = [("prompt", "question"), ("response", "answer")];
        let body = parse(&PromptResponse, r#"{"question": "q", "answer": "a"}"#, &names);
        assert_eq!(body.unwrap(), Body::Chat(vec![Message::user("q"), Message::assistant("a")]));
        let body =
            parse(&PromptResponse, r#"{"system": "s", "prompt": "q", "response": "a"}"#, &[]);
        assert_eq!(
            body.unwrap(),
            Body::Chat(vec![Message::system("s"), Message::user("q"), Message::assistant("a")])
        );
        let fault = parse(&PromptResponse, r#"{"prompt": "q"}"#, &[]).unwrap_err();
        assert_eq!(fault.field, "response");
    }
}

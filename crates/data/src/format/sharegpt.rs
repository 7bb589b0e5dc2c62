//! `sharegpt`: `{conversations: [{from, value}, …], system?}`.
//!
//! `from` is `human` or `user`, `gpt` or `assistant`, `system`, `tool` or `observation`, or
//! `function_call`, an assistant that calls the tools which its value names in JSON. Turns with `role` and
//! `content` are read too.

use serde_json::Value;

use super::{FieldFault, Fields, Format, describe, known};
use crate::record::{Body, Message};

pub(super) struct ShareGpt;

/// A turn of the assistant that calls tools.
const CALLS: &str = "calls";

const ROLES: &[(&str, &str)] = &[
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("function", "tool"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("bot", "assistant"),
    ("function_call", CALLS),
    ("tool_call", CALLS),
];

impl Format for ShareGpt {
    fn name(&self) -> &'static str {
        "sharegpt"
    }

    fn required(&self) -> &'static [&'static str] {
        &["conversations"]
    }

    fn optional(&self) -> &'static [&'static str] {
        &["from", "value", "system"]
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        let mut messages = Vec::new();
        if let Some(system) = fields.optional_text("system")?.filter(|text| !text.is_empty()) {
            messages.push(Message::system(system));
        }
        for turn in fields.objects("conversations")? {
            known::check_controls(&turn)?;
            let other = turn.get("from").is_none() && turn.get("role").is_some();
            let [from_name, value_name] =
                if other { ["role", "content"] } else { ["from", "value"] };
            let from = turn.text(from_name)?;
            let Some((_, role)) = ROLES.iter().find(|(name, _)| *name == from) else {
                let known: Vec<&str> = ROLES.iter().map(|(name, _)| *name).collect();
                return Err(FieldFault::new(
                    &turn.full_name(from_name),
                    &format!("one of {}", known.join(", ")),
                    format!("\"{from}\""),
                ));
            };
            let named = ["from", "value", "role", "content"];
            if *role == CALLS {
                let text = turn.text(value_name)?;
                let calls = known::calls(text).ok_or_else(|| {
                    let expected = "JSON of a call {name, arguments}, or of a list of them";
                    let found = describe(&text.into());
                    FieldFault::new(&turn.full_name(value_name), expected, found)
                })?;
                let mut message = known::calling(calls);
                message.fields.extend(turn.others(&named));
                messages.push(message);
                continue;
            }
            let mut fields = turn.others(&named);
            known::read_calls(&turn, &mut fields)?;
            let text = match turn.get(value_name) {
                None if known::has_calls(&fields) => {
                    fields.insert("content".to_owned(), Value::Null);
                    ""
                }
                _ => turn.text(value_name)?,
            };
            // The record may say it beside its turns and once more as the first of them.
            if *role == "system" && messages == [Message::system(text)] {
                messages.clear();
            }
            messages.push(Message { fields, ..Message::new(*role, text) });
        }
        Ok(Body::Chat(messages))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::parse;
    use super::*;

    #[test]
    fn speakers_become_roles() {
        let body = parse(
            &ShareGpt,
            r#"{"system": "s", "conversations": [
                {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                {"from": "observation", "value": "c"}, {"from": "assistant", "value": "d"}
            ]}"#,
            &[],
        );
        let expected = vec![
            Message::system("s"),
            Message::user("a"),
            Message::assistant("b"),
            Message::new("tool", "c"),
            Message::assistant("d"),
        ];
        assert_eq!(body.unwrap(), Body::Chat(expected));
    }

    #[test]
    fn names_inside_the_list_are_mapped_too() {
        let names = [("conversations", "dialog"), ("from", "who"), ("value", "says")];
        let body = parse(&ShareGpt, r#"{"dialog": [{"who": "gpt", "says": "b"}]}"#, &names);
        assert_eq!(body.unwrap(), Body::Chat(vec![Message::assistant("b")]));
        let fault = parse(&ShareGpt, r#"{"dialog": [{"who": "cat", "says": "b"}]}"#, &names);
        assert_eq!(fault.unwrap_err().field, "dialog[0].who");
    }
}

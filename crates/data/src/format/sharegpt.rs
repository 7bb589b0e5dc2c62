//! `sharegpt`: `{conversations: [{from, value}, …], system?}`.
//!
//! `from` is `human` or `user`, `gpt` or `assistant`, `system`, `tool` or `observation`.

use super::{FieldFault, Fields, Format};
use crate::record::{Body, Message};

pub(super) struct ShareGpt;

const ROLES: &[(&str, &str)] = &[
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
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
            let from = turn.text("from")?;
            let Some((_, role)) = ROLES.iter().find(|(name, _)| *name == from) else {
                let known: Vec<&str> = ROLES.iter().map(|(name, _)| *name).collect();
                return Err(FieldFault::new(
                    &turn.full_name("from"),
                    &format!("one of {}", known.join(", ")),
                    format!("\"{from}\""),
                ));
            };
            messages.push(Message::new(*role, turn.text("value")?));
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

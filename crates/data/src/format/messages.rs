//! `messages`: `{messages: [{role, content}, …]}`, as chat APIs write conversations.
//!
//! `content` is a string, or a list of `{type: "text", text}` parts that are joined.

use serde_json::Value;

use super::{FieldFault, Fields, Format, describe};
use crate::record::{Body, Message};

pub(super) struct Messages;

const ROLES: &[&str] = &["system", "user", "assistant", "tool", "developer"];

impl Format for Messages {
    fn name(&self) -> &'static str {
        "messages"
    }

    fn required(&self) -> &'static [&'static str] {
        &["messages"]
    }

    fn optional(&self) -> &'static [&'static str] {
        &["role", "content"]
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        let turns = fields.objects("messages")?;
        turns.iter().map(message).collect::<Result<_, _>>().map(Body::Chat)
    }
}

fn message(turn: &Fields<'_>) -> Result<Message, FieldFault> {
    let role = turn.text("role")?;
    if !ROLES.contains(&role) {
        return Err(FieldFault::new(
            &turn.full_name("role"),
            &format!("one of {}", ROLES.join(", ")),
            format!("\"{role}\""),
        ));
    }
    let content = match turn.get("content") {
        Some(Value::Array(parts)) => {
            let name = turn.full_name("content");
            let text = |(index, part): (usize, &Value)| match part.get("text") {
                Some(Value::String(text)) => Ok(text.clone()),
                _ => Err(FieldFault::new(
                    &format!("{name}[{index}]"),
                    "a text part {type: \"text\", text: …}",
                    part.get("type").map_or_else(|| describe(part), |kind| format!("type {kind}")),
                )),
            };
            parts.iter().enumerate().map(text).collect::<Result<String, _>>()?
        }
        _ => turn.text("content")?.to_owned(),
    };
    Ok(Message::new(role, content))
}

#[cfg(test)]
mod tests {
    use super::super::testing::parse;
    use super::*;

    #[test]
    fn turns_keep_their_order_and_parts_are_joined() {
        let body = parse(
            &Messages,
            r#"{"messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "weight": 1}
            ]}"#,
            &[],
        );
        let expected = vec![Message::system("s"), Message::user("ab"), Message::assistant("c")];
        assert_eq!(body.unwrap(), Body::Chat(expected));
    }

    #[test]
    fn faults_name_the_turn() {
        let fault = |json: &str| parse(&Messages, json, &[]).unwrap_err();
        assert_eq!(
            fault(
                r#"{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": ""}]}"#
            ),
            FieldFault::new(
                "messages[1].role",
                "one of system, user, assistant, tool, developer",
                "\"bot\""
            )
        );
        assert_eq!(
            fault(r#"{"messages": [{"role": "user", "content": null}]}"#),
            FieldFault::new("messages[0].content", "a string", "null")
        );
        assert_eq!(
            fault(r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#),
            FieldFault::new(
                "messages[0].content[0]",
                "a text part {type: \"text\", text: …}",
                "type \"image_url\""
            )
        );
        assert_eq!(
            fault(r#"{"messages": ["hello"]}"#),
            FieldFault::new("messages[0]", "an object", "the string \"hello\"")
        );
        assert_eq!(
            fault(r#"{"messages": []}"#),
            FieldFault::new("messages", "a list of objects", "an empty list")
        );
    }
}

//! `messages`: `{messages: [{role, content}, …]}`, as chat APIs write conversations.
//!
//! `content` is a string, or a list of `{type: "text", text}` parts that are joined, those of a type
//! `reasoning` or `thinking` as the turn's reasoning; an assistant that only calls tools may have none. Everything else in a message (`tool_calls`,
//! `reasoning_content`, `name`) is kept for the chat template; `weight`, `train` and their like of 0 or
//! false say that a turn is not trained.

use serde_json::{Map, Value};

use super::{FieldFault, Fields, Format, known};
use crate::record::{Body, Message, REASONING};

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
        &["role", "content", "system"]
    }

    /// Systems among the turns go before that of the record.
    fn unused(&self, fields: &Fields<'_>) -> Vec<&'static str> {
        let Ok(Some(own)) = fields.optional_text("system") else { return Vec::new() };
        let Ok(turns) = fields.objects("messages") else { return Vec::new() };
        let mut systems = turns.iter().filter(|turn| turn.text("role") == Ok("system")).peekable();
        let differs = systems.peek().is_some()
            && !systems
                .any(|turn| turn.text("content").is_ok_and(|text| text.trim() == own.trim()));
        if differs && !own.trim().is_empty() { vec!["system"] } else { Vec::new() }
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        let turns = fields.objects("messages")?;
        let mut messages = turns.iter().map(message).collect::<Result<Vec<_>, _>>()?;
        if let Some(system) = fields.optional_text("system")?.filter(|text| !text.is_empty())
            && messages.iter().all(|message| message.role != "system")
        {
            messages.insert(0, Message::system(system));
        }
        Ok(Body::Chat(messages))
    }
}

fn message(turn: &Fields<'_>) -> Result<Message, FieldFault> {
    known::check_controls(turn)?;
    let role = turn.text("role")?;
    // The older name of a tool's result.
    let role = if role == "function" { "tool" } else { role };
    if !ROLES.contains(&role) {
        return Err(FieldFault::new(
            &turn.full_name("role"),
            &format!("one of {}", ROLES.join(", ")),
            format!("\"{role}\""),
        ));
    }
    let mut fields: Map<String, Value> = turn.others(&["role", "content"]);
    known::read_calls(turn, &mut fields)?;
    let content = match turn.get("content") {
        Some(Value::Array(parts)) => {
            let (text, reasoning) = known::parts(&turn.full_name("content"), parts)?;
            if !reasoning.is_empty() && !REASONING.iter().any(|name| fields.contains_key(*name)) {
                fields.insert(REASONING[0].to_owned(), Value::from(reasoning));
            }
            text
        }
        None if known::has_calls(&fields) => String::new(),
        _ => turn.text("content")?.to_owned(),
    };
    if turn.get("content").is_none() {
        fields.insert("content".to_owned(), Value::Null);
    }
    Ok(Message { fields, ..Message::new(role, content) })
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
        let mut expected = vec![Message::system("s"), Message::user("ab"), Message::assistant("c")];
        expected[2].fields.insert("weight".into(), 1.into());
        assert_eq!(body.unwrap(), Body::Chat(expected));
    }

    #[test]
    fn calls_and_reasoning_are_kept_for_the_template() {
        let body = parse(
            &Messages,
            r#"{"messages": [
                {"role": "user", "content": "a", "name": null},
                {"role": "assistant", "content": null, "tool_calls": [{"id": "c1"}], "reasoning": "b"}
            ]}"#,
            &[],
        );
        let Ok(Body::Chat(turns)) = body else { panic!("{body:?}") };
        assert_eq!(turns[0], Message::user("a"));
        assert!(!turns[1].is_blank());
        let expected = serde_json::json!({
            "thinking": "b", "role": "assistant", "tool_calls": [{"id": "c1"}], "reasoning": "b",
            "reasoning_content": "b"
        });
        assert_eq!(turns[1].to_json(), expected);
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

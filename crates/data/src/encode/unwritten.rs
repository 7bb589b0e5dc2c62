//! Fields of a conversation that hold something and that its template does not write.

use serde_json::Value;

use super::turns::{Conversation, called};
use crate::record::{CONTROLS, Message, REASONING};

/// Fields of a message that say nothing to the model.
const HARMLESS: [&str; 17] = [
    "id",
    "message_id",
    "parent_id",
    "index",
    "idx",
    "type",
    "source",
    "model",
    "metadata",
    "meta",
    "timestamp",
    "created_at",
    "language",
    "lang",
    "tool_call_id",
    "annotations",
    "refusal",
];

/// Their names, each once. `text` is the whole conversation as the template writes it.
pub(super) fn fields(conversation: &Conversation<'_>, text: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let mut add = |name: &str| {
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    };
    for message in conversation.messages {
        if called(message).into_iter().any(|name| !text.contains(name)) {
            add("tool_calls");
        }
        let others = message.fields.iter().filter(|(name, value)| {
            let name = name.as_str();
            let known = ["content", "tool_calls", "function_call"].contains(&name)
                || HARMLESS.contains(&name)
                || CONTROLS.contains(&name)
                // Reasoning is looked for answer by answer.
                || (REASONING.contains(&name) && message.is_assistant());
            !known && says(value)
        });
        for (name, _) in others {
            if !conversation.template.reads(name) && !conversation.uses(name, text) {
                add(name);
            }
        }
    }
    for name in ["tools", "documents"] {
        let given = conversation.variables.get(name).is_some_and(says);
        if given && !conversation.template.reads(name) {
            add(name);
        }
    }
    names
}

fn says(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(_) => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::Number(_) => true,
    }
}

impl Conversation<'_> {
    /// Whether the template writes anything else without this field.
    fn uses(&self, name: &str, text: &str) -> bool {
        let without = |message: &Message| {
            let mut message = message.clone();
            message.fields.shift_remove(name);
            message
        };
        let messages: Vec<Message> = self.messages.iter().map(without).collect();
        let other = Conversation { messages: &messages, ..*self };
        other.text().map_or(true, |other| other != text)
    }
}

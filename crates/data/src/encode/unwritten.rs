//! Fields of a conversation that hold something and that its template does not write.

use serde_json::Value;

use super::turns::{Conversation, called};
use crate::format::TEMPLATE_LISTS;
use crate::record::{CONTROLS, MASKED, Message, REASONING};

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
    for message in conversation.messages {
        if called(message).into_iter().any(|name| !text.contains(name)) {
            add(&mut names, "tool_calls");
        }
        let others = message.fields.iter().filter(|(name, value)| {
            let name = name.as_str();
            let known = ["content", "tool_calls", "function_call"].contains(&name)
                || HARMLESS.contains(&name)
                || CONTROLS.contains(&name)
                || name == MASKED
                // Reasoning is looked for answer by answer.
                || (REASONING.contains(&name) && message.is_assistant());
            !known && says(value)
        });
        for (name, _) in others {
            // That the template has the word proves nothing: it may write the name of a tool and not the user's.
            if !names.contains(name) && !conversation.uses(name, text) {
                add(&mut names, name);
            }
        }
    }
    for (name, _) in conversation.variables.iter().filter(|(_, value)| says(value)) {
        // An argument may say what the template does anyway; lists must change what it writes.
        let is_list = TEMPLATE_LISTS.contains(&name.as_str());
        let read = conversation.template.reads(name);
        if !read || (is_list && !conversation.writes_variable(name, text)) {
            add(&mut names, name);
        }
    }
    names
}

fn add(names: &mut Vec<String>, name: &str) {
    if !names.iter().any(|known| known == name) {
        names.push(name.to_owned());
    }
}

fn says(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
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

    /// Whether the template writes anything else without this variable.
    fn writes_variable(&self, name: &str, text: &str) -> bool {
        let mut variables = self.variables.clone();
        variables.shift_remove(name);
        let other = Conversation { variables: &variables, ..*self };
        other.text().map_or(true, |other| other != text)
    }
}

//! A record: what one entry of a data file says, before any template or tokenizer.

use serde_json::{Map, Value};

use crate::error::Location;

/// Names of a turn's reasoning, as data and templates write it; `transformers` takes the first
/// that is there.
pub(crate) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Names of a turn's field that says whether it is trained: 0 and false say no.
pub(crate) const CONTROLS: [&str; 8] =
    ["weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask", "mask"];

/// Name of the field that says it the other way round: true hides the turn from training.
pub(crate) const MASKED: &str = "masked";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`; the template decides what else it takes.
    pub role: String,
    /// The text of the turn; empty where it has none.
    pub content: String,
    /// What else the turn says to a template, under the names of the record: `tool_calls`,
    /// `tool_call_id`, `name`, `reasoning_content`. A `content` of null in it says that the turn
    /// has no text at all, which templates tell from an empty one.
    pub fields: Map<String, Value>,
}

impl Message {
    /// A turn of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), fields: Map::new() }
    }

    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A turn of the assistant: what training is about.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// The system prompt.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// The turn as `transformers` shows it to a template: fields of null are left out, and the
    /// reasoning has its two usual names whatever the record calls it.
    pub fn to_json(&self) -> Value {
        let mut turn = Map::new();
        let named = REASONING.iter().find_map(|name| self.fields.get(*name));
        if let Some(reasoning) = named {
            turn.insert("thinking".to_owned(), reasoning.clone());
        }
        turn.insert("role".to_owned(), Value::from(self.role.as_str()));
        if !matches!(self.fields.get("content"), Some(Value::Null)) {
            turn.insert("content".to_owned(), Value::from(self.content.as_str()));
        }
        let others = self.fields.iter().filter(|(_, value)| !value.is_null());
        turn.extend(others.map(|(name, value)| (name.clone(), value.clone())));
        if let Some(reasoning) = named {
            turn.insert("reasoning_content".to_owned(), reasoning.clone());
        }
        Value::Object(turn)
    }

    /// What the turn thinks before it speaks, where the record says so.
    pub fn reasoning(&self) -> Option<&str> {
        REASONING.iter().find_map(|name| self.fields.get(*name)).and_then(Value::as_str)
    }

    /// Whether there is nothing to read or to do in the turn: neither text nor reasoning nor calls.
    pub fn is_blank(&self) -> bool {
        let says = |value: &Value| match value {
            Value::String(text) => !text.trim().is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(object) => !object.is_empty(),
            _ => false,
        };
        let named = ["tool_calls", "function_call"].iter().chain(&REASONING);
        self.content.trim().is_empty() && !named.filter_map(|name| self.fields.get(*name)).any(says)
    }

    /// Whether nothing in the record says that the turn is not to be trained.
    pub fn is_trained(&self) -> bool {
        let no = |value: &Value| value == &Value::Bool(false) || value.as_f64() == Some(0.0);
        !CONTROLS.iter().filter_map(|name| self.fields.get(*name)).any(no)
            && self.fields.get(MASKED) != Some(&Value::Bool(true))
    }

    /// Whether the assistant speaks.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }
}

/// The three kinds of training text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// A conversation, rendered through the chat template; assistant turns are trained.
    Chat(Vec<Message>),
    /// A prompt and its continuation, taken as they are; the continuation is trained.
    Completion {
        /// The text given.
        prompt: String,
        /// The text to predict.
        completion: String,
    },
    /// A text trained from its first token to its last.
    Text(String),
}

/// One entry of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it stands, for messages about it.
    pub location: Location,
    /// Its number in the file, from 0.
    pub row: u32,
    /// What it says.
    pub body: Body,
    /// Its own domain, where `fields.domain` names a field; otherwise the file's domain counts.
    pub domain: Option<String>,
    /// What the chat template sees beside the messages: `tools` and `documents` as lists, and the
    /// entries of the record's `chat_template_kwargs`.
    pub variables: Map<String, Value>,
    /// Names of the record's fields that hold something and that nobody reads.
    pub unread: Vec<String>,
}

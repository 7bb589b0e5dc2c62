//! A record: what one entry of a data file says, before any template or tokenizer.

use crate::error::Location;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`; the template decides what else it takes.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

impl Message {
    /// A turn of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
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
}

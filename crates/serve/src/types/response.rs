//! `/v1/responses`.

use super::chat::{ChatMessage, Content, Tool};
use super::generation_request;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

generation_request! {
    /// A conversation to be answered, as items.
    ResponseRequest {
        input: Input,
        #[serde(default)]
        instructions: Option<String>,
        #[serde(default)]
        max_output_tokens: Option<usize>,
        #[serde(default)]
        tools: Option<Vec<ResponseTool>>,
        #[serde(default)]
        tool_choice: Option<ResponseToolChoice>,
        #[serde(default)]
        parallel_tool_calls: Option<bool>,
        #[serde(default)]
        text: Option<TextOptions>,
        #[serde(default)]
        reasoning: Option<ReasoningOptions>,
        #[serde(default)]
        chat_template_kwargs: Option<Map<String, Value>>,
        #[serde(default)]
        metadata: Option<Map<String, Value>>,
        #[serde(default)]
        previous_response_id: Option<String>,
        #[serde(default)]
        conversation: Option<Value>,
        #[serde(default)]
        background: Option<bool>,
        #[serde(default)]
        truncation: Option<String>,
        #[serde(default)]
        top_logprobs: Option<usize>,
        #[serde(default)]
        max_tool_calls: Option<usize>,
        #[serde(default)]
        prompt: Option<Value>,
        #[serde(default, rename = "store")]
        _store: IgnoredAny,
        #[serde(default, rename = "include")]
        _include: IgnoredAny,
        #[serde(default, rename = "client_metadata")]
        _client_metadata: IgnoredAny,
    }
}

/// What is said to the model.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of items")]
pub(crate) enum Input {
    /// A user's text.
    Text(String),
    /// Turns, calls and what they gave.
    Items(Vec<Item>),
}

/// A turn, a call of a function, what it gave, or reasoning.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Item {
    #[serde(default, rename = "type")]
    pub(crate) kind: Option<String>,
    #[serde(default)]
    pub(crate) role: Option<String>,
    #[serde(default)]
    pub(crate) content: Option<Content>,
    #[serde(default)]
    pub(crate) call_id: Option<String>,
    #[serde(default)]
    pub(crate) name: Option<String>,
    #[serde(default)]
    pub(crate) arguments: Option<String>,
    #[serde(default)]
    pub(crate) output: Option<Content>,
}

/// A tool, its function's fields beside its type.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ResponseTool {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(flatten)]
    pub(crate) function: Map<String, Value>,
}

/// Whether the model may, or has to, call a tool.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected \"auto\", \"none\", \"required\" or a function")]
pub(crate) enum ResponseToolChoice {
    /// `auto`, `none` or `required`.
    Mode(String),
    /// One tool.
    Function {
        /// Always `function`.
        #[serde(rename = "type")]
        kind: String,
        /// Which.
        name: String,
    },
}

/// The form of the text.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct TextOptions {
    #[serde(default)]
    pub(crate) format: Option<TextFormat>,
}

/// A form, with its schema.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct TextFormat {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) schema: Option<Value>,
}

/// How much the model is to think.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ReasoningOptions {
    #[serde(default)]
    pub(crate) effort: Option<String>,
}

impl ResponseTool {
    /// The same as a chat's tool.
    pub(crate) fn to_tool(&self) -> Tool {
        Tool { kind: self.kind.clone(), function: self.function.clone() }
    }
}

impl Item {
    /// A turn of a role.
    pub(crate) fn turn(role: &str, content: Option<Content>) -> ChatMessage {
        ChatMessage { role: role.to_owned(), content, ..ChatMessage::default() }
    }
}

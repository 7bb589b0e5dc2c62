//! `/v1/responses`.

use super::chat::{ChatMessage, Content, Tool, ToolChoice};
use super::{declare_request, generation_request};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

generation_request! {
    /// A conversation to be answered, as items.
    ResponseRequest {
        input: Input,
        instructions: Option<String>,
        max_output_tokens: Option<usize>,
        tools: Option<Vec<ResponseTool>>,
        tool_choice: Option<ToolChoice>,
        parallel_tool_calls: Option<bool>,
        text: Option<TextOptions>,
        reasoning: Option<ReasoningOptions>,
        chat_template_kwargs: Option<Map<String, Value>>,
        metadata: Option<Map<String, Value>>,
        previous_response_id: Option<String>,
        conversation: Option<Value>,
        background: Option<bool>,
        truncation: Option<String>,
        top_logprobs: Option<usize>,
        max_tool_calls: Option<usize>,
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
    pub(crate) role: Option<String>,
    pub(crate) content: Option<Content>,
    pub(crate) call_id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) arguments: Option<String>,
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

/// The form of the text.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct TextOptions {
    pub(crate) format: Option<TextFormat>,
}

/// A form, with its schema.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct TextFormat {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) schema: Option<Value>,
}

/// How much the model is to think.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ReasoningOptions {
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

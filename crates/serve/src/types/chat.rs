//! `/v1/chat/completions`.

use super::{declare_request, generation_request};
use crate::error::ApiError;
use hydralora_data::Message;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

generation_request! {
    /// A conversation to be answered.
    ChatRequest {
        messages: Vec<ChatMessage>,
        max_tokens: Option<usize>,
        max_completion_tokens: Option<usize>,
        logprobs: Option<bool>,
        top_logprobs: Option<usize>,
        tools: Option<Vec<Tool>>,
        tool_choice: Option<ToolChoice>,
        parallel_tool_calls: Option<bool>,
        response_format: Option<ResponseFormat>,
        /// Arguments of the chat template, such as `enable_thinking`.
        chat_template_kwargs: Option<Map<String, Value>>,
        /// Texts that templates of models for retrieval write.
        documents: Option<Vec<Value>>,
        reasoning_effort: Option<String>,
        modalities: Option<Vec<String>>,
        #[serde(default, rename = "metadata")]
        _metadata: IgnoredAny,
        #[serde(default, rename = "store")]
        _store: IgnoredAny,
        #[serde(default, rename = "verbosity")]
        _verbosity: IgnoredAny,
    }
}

/// A turn.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChatMessage {
    pub(crate) role: String,
    pub(crate) content: Option<Content>,
    pub(crate) name: Option<String>,
    pub(crate) tool_calls: Option<Vec<ToolCall>>,
    pub(crate) tool_call_id: Option<String>,
    #[serde(alias = "reasoning")]
    pub(crate) reasoning_content: Option<String>,
    // What comes back with an answer that is sent again.
    #[serde(default, rename = "refusal")]
    pub(crate) _refusal: IgnoredAny,
    #[serde(default, rename = "annotations")]
    pub(crate) _annotations: IgnoredAny,
    #[serde(default, rename = "audio")]
    pub(crate) _audio: Option<NoAudio>,
    pub(crate) function_call: Option<FunctionCall>,
}

/// Audio of an earlier answer, which none of ours has.
#[derive(Clone, Debug, Deserialize)]
pub(crate) enum NoAudio {}

/// What a turn says.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of parts of type text")]
pub(crate) enum Content {
    /// A text.
    Text(String),
    /// Parts, of which only texts are understood.
    Parts(Vec<Part>),
}

/// A part of what a turn says.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Part {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) text: Option<String>,
    pub(crate) refusal: Option<String>,
}

impl Content {
    /// Its text.
    pub(crate) fn text(&self, field: &str) -> Result<String, ApiError> {
        let parts = match self {
            Self::Text(text) => return Ok(text.clone()),
            Self::Parts(parts) => parts,
        };
        let mut texts = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            let text = match part.kind.as_str() {
                "text" | "input_text" | "output_text" => part.text.as_deref(),
                "refusal" => part.refusal.as_deref(),
                kind => {
                    let message = format!("is {kind:?}; the model reads text alone");
                    let field = format!("{field}[{number}].type");
                    return Err(ApiError::field(field, message).coded("unsupported"));
                }
            };
            let missing = || ApiError::field(format!("{field}[{number}].text"), "is missing");
            texts.push(text.ok_or_else(missing)?);
        }
        Ok(texts.join("\n"))
    }
}

/// A call of a tool in an earlier answer.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ToolCall {
    pub(crate) id: Option<String>,
    pub(crate) function: FunctionCall,
}

/// What was called.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct FunctionCall {
    pub(crate) name: String,
    /// JSON, as a text.
    #[serde(default)]
    pub(crate) arguments: Value,
}

/// A tool that the model may call.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Tool {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) function: Map<String, Value>,
}

/// Whether the model may, or has to, call a tool.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected \"auto\", \"none\", \"required\" or a function")]
pub(crate) enum ToolChoice {
    /// `auto`, `none` or `required`.
    Mode(String),
    /// One tool.
    Tool(NamedTool),
}

/// A tool by its name, which chats have within `function` and responses beside the type.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct NamedTool {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) name: Option<String>,
    pub(crate) function: Option<NamedFunction>,
}

impl NamedTool {
    /// The name.
    pub(crate) fn name(&self) -> Option<&str> {
        self.function
            .as_ref()
            .map(|function| &function.name)
            .or(self.name.as_ref())
            .map(String::as_str)
    }
}

/// A tool by its name.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct NamedFunction {
    pub(crate) name: String,
}

/// The form of the answer.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ResponseFormat {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) json_schema: Option<JsonSchema>,
}

/// A schema with its name.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct JsonSchema {
    pub(crate) schema: Option<Value>,
}

impl ChatMessage {
    /// The turn as the chat template reads it. `number` is for messages about it.
    pub(crate) fn to_message(&self, number: usize) -> Result<Message, ApiError> {
        let at = |field: &str| format!("messages[{number}].{field}");
        if !["system", "developer", "user", "assistant", "tool", "function"]
            .contains(&self.role.as_str())
        {
            let message =
                format!("is {:?}; expected system, developer, user, assistant or tool", self.role);
            return Err(ApiError::field(at("role"), message));
        }
        let text = match &self.content {
            Some(content) => Some(content.text(&at("content"))?),
            None => None,
        };
        let calls = self.tool_calls.as_deref().unwrap_or_default();
        if text.is_none() && calls.is_empty() && self.function_call.is_none() {
            return Err(ApiError::field(at("content"), "is missing"));
        }
        let mut message = Message::new(&self.role, text.as_deref().unwrap_or_default());
        if text.is_none() {
            message.fields.insert("content".to_owned(), Value::Null);
        }
        let texts = [
            ("name", &self.name),
            ("tool_call_id", &self.tool_call_id),
            ("reasoning_content", &self.reasoning_content),
        ];
        for (name, value) in texts {
            if let Some(value) = value {
                message.fields.insert(name.to_owned(), json!(value));
            }
        }
        if !calls.is_empty() {
            let calls = calls.iter().map(|call| {
                let function =
                    json!({"name": call.function.name, "arguments": call.function.arguments});
                json!({"id": call.id, "type": "function", "function": function})
            });
            message.fields.insert("tool_calls".to_owned(), calls.collect());
        }
        if let Some(call) = &self.function_call {
            let call = json!({"name": call.name, "arguments": call.arguments});
            message.fields.insert("function_call".to_owned(), call);
        }
        Ok(message)
    }
}

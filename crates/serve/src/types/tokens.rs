//! `/tokenize`, `/detokenize` and the adapters.

use super::chat::{ChatMessage, Tool};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The most that is asked for at once.
pub(crate) struct ScoreLimits;

impl ScoreLimits {
    /// Most of the likeliest tokens that are told for each.
    pub(crate) const MOST_TOP: usize = 128;
}

/// A text or a conversation to be cut into tokens.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) prompt: Option<String>,
    pub(crate) messages: Option<Vec<ChatMessage>>,
    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) return_token_strs: Option<bool>,
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) tools: Option<Vec<Tool>>,
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
}

/// Tokens to be written out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DetokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Vec<i64>,
}

/// An adapter to be loaded.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadRequest {
    pub(crate) lora_name: String,
    /// Its folder, from the adapters' root on.
    pub(crate) lora_path: String,
    /// Whether one of the same name is replaced.
    pub(crate) load_inplace: Option<bool>,
    /// The generation that the replaced one must have.
    pub(crate) expected_generation: Option<u64>,
    /// The domain to answer for, for an adapter that has an update for each.
    pub(crate) domain: Option<String>,
    pub(crate) base_model_name: Option<String>,
}

/// An adapter to be forgotten.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UnloadRequest {
    pub(crate) lora_name: String,
    /// The generation that it must have.
    pub(crate) expected_generation: Option<u64>,
    #[serde(default, rename = "lora_int_id")]
    _lora_int_id: serde::de::IgnoredAny,
}

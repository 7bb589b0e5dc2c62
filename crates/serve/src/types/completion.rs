//! `/v1/completions`.

use super::{declare_request, generation_request};
use serde::Deserialize;
use serde::de::IgnoredAny;

generation_request! {
    /// Texts to be continued.
    CompletionRequest {
        prompt: Prompts,
        max_tokens: Option<usize>,
        echo: Option<bool>,
        logprobs: Option<usize>,
        best_of: Option<usize>,
        suffix: Option<String>,
        /// Whether a text begins with the model's first token, where it has one.
        add_special_tokens: Option<bool>,
        return_tokens_as_token_ids: Option<bool>,
        #[serde(default, rename = "metadata")]
        _metadata: IgnoredAny,
    }
}

/// One prompt or several, as texts or as token ids.
#[derive(Clone, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a text, a list of texts, a list of token ids, or a list of such lists"
)]
pub(crate) enum Prompts {
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Token ids.
    Ids(Vec<i64>),
    /// Several lists of token ids.
    SeveralIds(Vec<Vec<i64>>),
}

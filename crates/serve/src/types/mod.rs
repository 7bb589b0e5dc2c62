//! What requests may say.

mod chat;
mod completion;
mod response;
mod tokens;

pub(crate) use chat::{
    ChatMessage, ChatRequest, Content, FunctionCall, Tool, ToolCall, ToolChoice,
};
pub(crate) use completion::{CompletionRequest, Prompts};
pub(crate) use response::{Input, Item, ResponseRequest, ResponseToolChoice};
pub(crate) use tokens::{
    DetokenizeRequest, LoadRequest, ScoreLimits, TokenizeRequest, UnloadRequest,
};

use crate::choice::random;
use crate::error::ApiError;
use hydralora_run::Sampling;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

/// What an answer is to tell beyond the protocol.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ours {
    /// The gates of every token by layer.
    #[serde(default)]
    pub(crate) routing: bool,
}

/// What a stream is to say.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    /// Whether the last piece tells how many tokens there were.
    #[serde(default)]
    pub(crate) include_usage: Option<bool>,
    /// Whether every piece does.
    #[serde(default)]
    pub(crate) continuous_usage_stats: Option<bool>,
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: IgnoredAny,
}

/// Texts at which an answer ends.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub(crate) enum Stop {
    /// One.
    One(String),
    /// Any of several.
    Several(Vec<Option<String>>),
}

/// Most texts to stop at.
const MOST_STOPS: usize = 64;
/// Most answers to one prompt.
const MOST_CHOICES: usize = 128;

/// How an answer is drawn, and when it ends: the fields that all kinds of requests share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Common {
    pub(crate) sampling: Sampling,
    pub(crate) choices: usize,
    pub(crate) stops: Vec<String>,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) usage_everywhere: bool,
    pub(crate) routing: bool,
}

/// The shared fields as they come.
#[derive(Clone, Debug, Default)]
pub(crate) struct Raw {
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) n: Option<usize>,
    pub(crate) seed: Option<i64>,
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) logit_bias: Option<Map<String, Value>>,
    pub(crate) stop: Option<Stop>,
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    pub(crate) ignore_eos: Option<bool>,
    pub(crate) hydralora: Option<Ours>,
}

impl Raw {
    /// Checks them.
    pub(crate) fn checked(self) -> Result<Common, ApiError> {
        let penalties = [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ];
        for (name, value) in penalties {
            if value.is_some_and(|value| value != 0.0) {
                let advice = "is not computed here; repetition_penalty is";
                return Err(ApiError::field(name, advice).coded("unsupported"));
            }
        }
        if self.logit_bias.is_some_and(|bias| !bias.is_empty()) {
            return Err(ApiError::field("logit_bias", "is not computed here").coded("unsupported"));
        }
        let top_k = match self.top_k {
            None | Some(-1) => 0,
            Some(top_k) => usize::try_from(top_k).map_err(|_| {
                ApiError::field("top_k", format!("is {top_k}; expected 0 or -1 for all, or more"))
            })?,
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k,
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            seed: self.seed.map_or_else(random, i64::cast_unsigned),
        };
        if let Some((option, message)) = sampling.faults().into_iter().next() {
            return Err(ApiError::field(
                option.replace('-', "_"),
                message.replace("top-p", "top_p"),
            ));
        }
        let stops = match self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Several(stops)) => stops.into_iter().flatten().collect(),
        };
        if stops.len() > MOST_STOPS {
            let message = format!("has {} texts; expected at most {MOST_STOPS}", stops.len());
            return Err(ApiError::field("stop", message));
        }
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        let choices = self.n.unwrap_or(1);
        if !(1..=MOST_CHOICES).contains(&choices) {
            let message = format!("is {choices}; expected 1 to {MOST_CHOICES}");
            return Err(ApiError::field("n", message));
        }
        let stream = self.stream.unwrap_or(false);
        let options = self.stream_options.filter(|_| stream).unwrap_or_default();
        Ok(Common {
            sampling,
            choices,
            stops,
            stop_ids: self.stop_token_ids.unwrap_or_default(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            stream,
            include_usage: options.include_usage.unwrap_or(false),
            usage_everywhere: options.continuous_usage_stats.unwrap_or(false),
            routing: self.hydralora.unwrap_or_default().routing,
        })
    }
}

/// Declares a request: the fields that it has alone, and those it shares.
macro_rules! generation_request {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $name {
            $($(#[$field_meta])* pub(crate) $field: $kind,)*
            /// The base's name or an adapter's.
            #[serde(default)]
            pub(crate) model: Option<String>,
            /// An adapter's name, beside the base's in `model`.
            #[serde(default)]
            pub(crate) adapter: Option<String>,
            #[serde(default)]
            stream: Option<bool>,
            #[serde(default)]
            stream_options: Option<$crate::types::StreamOptions>,
            #[serde(default)]
            n: Option<usize>,
            #[serde(default)]
            seed: Option<i64>,
            #[serde(default)]
            temperature: Option<f64>,
            #[serde(default)]
            top_p: Option<f64>,
            #[serde(default)]
            top_k: Option<i64>,
            #[serde(default)]
            min_p: Option<f64>,
            #[serde(default)]
            repetition_penalty: Option<f64>,
            #[serde(default)]
            presence_penalty: Option<f64>,
            #[serde(default)]
            frequency_penalty: Option<f64>,
            #[serde(default)]
            logit_bias: Option<serde_json::Map<String, serde_json::Value>>,
            #[serde(default)]
            stop: Option<$crate::types::Stop>,
            #[serde(default)]
            stop_token_ids: Option<Vec<u32>>,
            #[serde(default)]
            ignore_eos: Option<bool>,
            #[serde(default)]
            hydralora: Option<$crate::types::Ours>,
            // What changes nothing here.
            #[serde(default, rename = "user")]
            _user: serde::de::IgnoredAny,
            #[serde(default, rename = "safety_identifier")]
            _safety_identifier: serde::de::IgnoredAny,
            #[serde(default, rename = "prompt_cache_key")]
            _prompt_cache_key: serde::de::IgnoredAny,
            #[serde(default, rename = "prompt_cache_retention")]
            _prompt_cache_retention: serde::de::IgnoredAny,
            #[serde(default, rename = "service_tier")]
            _service_tier: serde::de::IgnoredAny,
        }

        impl $name {
            /// Takes the shared fields out of it.
            pub(crate) fn raw(&mut self) -> $crate::types::Raw {
                $crate::types::Raw {
                    stream: self.stream,
                    stream_options: self.stream_options,
                    n: self.n,
                    seed: self.seed,
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.take(),
                    stop: self.stop.take(),
                    stop_token_ids: self.stop_token_ids.take(),
                    ignore_eos: self.ignore_eos,
                    hydralora: self.hydralora,
                }
            }
        }
    };
}
use generation_request;

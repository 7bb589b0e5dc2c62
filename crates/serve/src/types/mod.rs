//! What requests may say.

mod chat;
mod completion;
mod response;
mod tokens;

pub(crate) use chat::{
    ChatMessage, ChatRequest, Content, FunctionCall, Tool, ToolCall, ToolChoice,
};
pub(crate) use completion::{CompletionRequest, Prompts};
pub(crate) use response::{Input, Item, ResponseRequest};
pub(crate) use tokens::{
    DetokenizeRequest, LoadRequest, ScoreLimits, TokenizeRequest, UnloadRequest,
};

use crate::choice::random;
use crate::error::ApiError;
use hydralora_run::{Bias, Sampling};
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::BTreeMap;

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
    pub(crate) include_usage: Option<bool>,
    /// Whether every piece does.
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
/// Largest bias of a token, either way.
const MOST_BIAS: f64 = 100.0;

/// How an answer is drawn, and when it ends: the fields that all kinds of requests share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Common {
    pub(crate) sampling: Sampling,
    pub(crate) bias: Bias,
    pub(crate) choices: usize,
    pub(crate) stops: Vec<String>,
    pub(crate) stop_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) usage_everywhere: bool,
    pub(crate) routing: bool,
}

/// Hands a macro the fields that all kinds of requests share, each of which may be left out.
macro_rules! with_shared_fields {
    ($make:ident! { $($rest:tt)* }) => {
        $make! {
            [
                stream: bool,
                stream_options: $crate::types::StreamOptions,
                n: usize,
                seed: i64,
                temperature: f64,
                top_p: f64,
                top_k: i64,
                min_p: f64,
                repetition_penalty: f64,
                presence_penalty: f64,
                frequency_penalty: f64,
                logit_bias: std::collections::BTreeMap<String, f64>,
                min_tokens: usize,
                stop: $crate::types::Stop,
                stop_token_ids: Vec<u32>,
                ignore_eos: bool,
                hydralora: $crate::types::Ours,
            ]
            $($rest)*
        }
    };
}

macro_rules! declare_raw {
    ([$($field:ident: $kind:ty,)*]) => {
        /// The shared fields as they come.
        #[derive(Debug, Default)]
        pub(crate) struct Raw {
            $($field: Option<$kind>,)*
        }
    };
}
with_shared_fields!(declare_raw! {});

macro_rules! declare_request {
    (
        [$($shared:ident: $shared_kind:ty,)*]
        $(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $kind:ty,)* }
    ) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $name {
            $($(#[$field_meta])* pub(crate) $field: $kind,)*
            /// The base's name or an adapter's.
            pub(crate) model: Option<String>,
            /// An adapter's name, beside the base's in `model`.
            pub(crate) adapter: Option<String>,
            $($shared: Option<$shared_kind>,)*
            // What changes nothing here.
            #[serde(default, rename = "user")]
            _user: serde::de::IgnoredAny,
            #[serde(default, rename = "safety_identifier")]
            _safety_identifier: serde::de::IgnoredAny,
            #[serde(default, rename = "prompt_cache_key")]
            _prompt_cache_key: serde::de::IgnoredAny,
            #[serde(default, rename = "prompt_cache_retention")]
            _prompt_cache_retention: serde::de::IgnoredAny,
            #[serde(default, rename = "prompt_cache_options")]
            _prompt_cache_options: serde::de::IgnoredAny,
            #[serde(default, rename = "service_tier")]
            _service_tier: serde::de::IgnoredAny,
        }

        impl $name {
            /// Takes the shared fields out of it.
            pub(crate) fn raw(&mut self) -> $crate::types::Raw {
                $crate::types::Raw { $($shared: self.$shared.take(),)* }
            }
        }
    };
}

/// Declares a request: the fields that it has alone, beside those it shares.
macro_rules! generation_request {
    ($($declared:tt)*) => {
        $crate::types::with_shared_fields!(declare_request! { $($declared)* });
    };
}
use {declare_request, generation_request, with_shared_fields};

/// A bias for tokens by their ids, which JSON has as texts.
fn bias(given: BTreeMap<String, f64>, vocabulary: usize) -> Result<Bias, ApiError> {
    let one = |(key, bias): (String, f64)| {
        let plain = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
        let id = key.parse::<u32>().ok().filter(|id| plain && (*id as usize) < vocabulary);
        let Some(id) = id else {
            let most = vocabulary.saturating_sub(1);
            let message = format!("has the key {key:?}; expected the id of a token, 0 to {most}");
            return Err(ApiError::field("logit_bias", message));
        };
        if !(-MOST_BIAS..=MOST_BIAS).contains(&bias) {
            let message = format!("is {bias}; expected -{MOST_BIAS} to {MOST_BIAS}");
            return Err(ApiError::field(format!("logit_bias.{key}"), message));
        }
        Ok((id, bias))
    };
    given.into_iter().map(one).collect()
}

impl Raw {
    /// Checks them for a model with `vocabulary` tokens.
    pub(crate) fn checked(self, vocabulary: usize) -> Result<Common, ApiError> {
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
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            min_new_tokens: self.min_tokens.unwrap_or(0),
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
            bias: bias(self.logit_bias.unwrap_or_default(), vocabulary)?,
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

//! What goes into the engine and what comes out of it.

use crate::sample::{Bias, Sampling};
use hydralora_kernels::Tensor;
use hydralora_model::adapter::{Adapter, Site};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Something that an engine borrows, or owns together with others.
#[derive(Debug)]
pub enum Shared<'a, T> {
    /// Borrowed.
    Borrowed(&'a T),
    /// Owned together with others.
    Owned(Arc<T>),
}

impl<T> Deref for Shared<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Borrowed(value) => value,
            Self::Owned(value) => value,
        }
    }
}

impl<'a, T> From<&'a T> for Shared<'a, T> {
    fn from(value: &'a T) -> Self {
        Self::Borrowed(value)
    }
}

impl<T> From<Arc<T>> for Shared<'_, T> {
    fn from(value: Arc<T>) -> Self {
        Self::Owned(value)
    }
}

/// An adapter as requests use it. It never changes: one that was read anew is another one.
pub struct ServedAdapter<'a> {
    adapter: Held<'a>,
    hash: [u8; 32],
}

enum Held<'a> {
    Borrowed(&'a dyn Adapter),
    Owned(Box<dyn Adapter>),
}

impl<'a> ServedAdapter<'a> {
    /// Takes an adapter. `hash` is that of all that decides what it computes: its numbers, its options, a
    /// domain chosen in it. What was computed with one adapter is used again for another exactly if
    /// their hashes are equal.
    pub fn new(adapter: Box<dyn Adapter>, hash: [u8; 32]) -> Self {
        Self { adapter: Held::Owned(adapter), hash }
    }

    /// The same for an adapter that is borrowed.
    pub fn borrowed(adapter: &'a dyn Adapter, hash: [u8; 32]) -> Self {
        Self { adapter: Held::Borrowed(adapter), hash }
    }

    /// The adapter.
    pub fn adapter(&self) -> &dyn Adapter {
        match &self.adapter {
            Held::Borrowed(adapter) => *adapter,
            Held::Owned(adapter) => adapter.as_ref(),
        }
    }

    /// The hash of its content.
    pub fn hash(&self) -> &[u8; 32] {
        &self.hash
    }
}

impl fmt::Debug for ServedAdapter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.hash[..4].iter().map(|byte| format!("{byte:02x}"));
        write!(f, "ServedAdapter({})", first.collect::<String>())
    }
}

/// What a text may consist of, asked before every token.
pub trait Constraint: Send {
    /// Sets in `allowed`, all zeros, the bit of every token that may come next: bit `token % 64` of
    /// word `token / 64`. Tokens at which a text ends are asked for like all others.
    ///
    /// # Errors
    /// Why there is no such token; the request fails with it.
    fn allow(&mut self, allowed: &mut [u64]) -> Result<(), String>;

    /// Takes the token that was drawn. It is not told of one at which the text ends.
    ///
    /// # Errors
    /// Why it cannot follow; the request fails with it.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// Whether nothing may follow; the text ends then.
    fn is_done(&self) -> bool;
}

/// A text to write, or to read.
pub struct Request<'a> {
    /// Token ids to continue, at least one.
    pub prompt: Vec<u32>,
    /// What is added to the base; nothing if none.
    pub adapter: Option<Arc<ServedAdapter<'a>>>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// What is added to the logits of tokens.
    pub bias: Bias,
    /// Most tokens to write; with 0 the prompt is read, and no more.
    pub max_new_tokens: usize,
    /// Texts at which it ends; they are not part of it. Empty ones stop nothing.
    pub stops: Vec<String>,
    /// Tokens at which it ends, as [`ends::end_ids`](crate::ends::end_ids) says.
    pub end_ids: Arc<[u32]>,
    /// With `Some(k)` every new token comes with its log-probability and the `k` likeliest.
    pub top_logprobs: Option<usize>,
    /// The same for the prompt's tokens after the first. Such a prompt is read whole, whatever of it
    /// is known already.
    pub prompt_logprobs: Option<usize>,
    /// Whether the text goes on with the prompt's, or is one of its own, as an answer is: tokenizers
    /// that mark the beginnings of words leave out the space with which a text of its own begins.
    pub continues: bool,
    /// What the text may consist of.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Whether every token comes with the gates of routed adapters. Such a request is computed in passes
    /// of its own, and its prompt is read whole.
    pub routing: bool,
}

impl Request<'_> {
    /// Asks to continue `prompt` greedily by at most `max_new_tokens`, and nothing else.
    pub fn new(prompt: Vec<u32>, max_new_tokens: usize) -> Self {
        Self {
            prompt,
            adapter: None,
            sampling: Sampling::default(),
            bias: Bias::default(),
            max_new_tokens,
            stops: Vec::new(),
            end_ids: Arc::new([]),
            top_logprobs: None,
            prompt_logprobs: None,
            continues: false,
            constraint: None,
            routing: false,
        }
    }
}

impl fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("prompt", &self.prompt)
            .field("adapter", &self.adapter)
            .field("sampling", &self.sampling)
            .field("max_new_tokens", &self.max_new_tokens)
            .field("stops", &self.stops)
            .finish_non_exhaustive()
    }
}

/// Names a request of an engine; no two of one engine are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(super) u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It has no prompt.
    #[error("the prompt holds no token; expected one at least")]
    Empty,
    /// A token is none of the model's.
    #[error("token {id} of the prompt is none of the model's, which has {vocabulary}")]
    UnknownToken {
        /// The token.
        id: u32,
        /// How many the model has.
        vocabulary: usize,
    },
    /// The prompt is longer than the context.
    #[error(
        "the prompt has {tokens} tokens, learned positions included; the context holds {context}"
    )]
    TooLong {
        /// Tokens of the prompt, and positions that the adapter puts before it.
        tokens: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// The keys and values of the prompt are more than may be held.
    #[error("the prompt's keys and values take {bytes} bytes; {budget} may be held")]
    TooLarge {
        /// Bytes they take.
        bytes: usize,
        /// Bytes that may be held.
        budget: usize,
    },
    /// The sampling options make no sense.
    #[error("{0}")]
    Sampling(String),
    /// Too many requests wait already.
    #[error("{waiting} requests wait already")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
}

/// Why a text could not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The request was not taken.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It could not be finished.
    #[error("{0}")]
    Failed(String),
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or one of the texts to stop at came.
    Stop,
    /// The limit on new tokens, the model's context, or what may be held was reached.
    Length,
    /// Whoever watched it ended it.
    Cancelled,
}

impl Finish {
    /// Returns its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How likely a token was, before temperature, penalties and whatever else changes the draws.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// `log p` in nats.
    pub logprob: f64,
    /// How many tokens were likelier, and one; of equally likely ones the lower id counts as likelier.
    pub rank: usize,
    /// The likeliest tokens, as many as were asked for, the likeliest first.
    pub top: Vec<(u32, f64)>,
}

/// The gates of one token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gates {
    /// Those of every site that has some, in the order in which they were computed.
    pub sites: Vec<(Site, Vec<f32>)>,
}

impl Gates {
    /// Takes row `row` of the gates of every site.
    pub(super) fn of_row(all: &[(Site, Tensor)], row: usize) -> Self {
        let of_site = |(site, gates): &(Site, Tensor)| {
            let width = gates.cols();
            let row = gates.to_f64()[row * width..(row + 1) * width].to_vec();
            (*site, row.into_iter().map(|gate| gate as f32).collect())
        };
        Self { sites: all.iter().map(of_site).collect() }
    }
}

/// What a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens written, without the one at which the text ended.
    pub completion_tokens: usize,
    /// Tokens of the prompt whose keys and values were known already.
    pub cached_tokens: usize,
}

/// What a step brought.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A prompt was read; comes once, before all others of the request.
    Prompt {
        /// Whose.
        id: RequestId,
        /// How likely each token of the prompt after the first was, if that was asked.
        logprobs: Vec<TokenLogprobs>,
        /// The gates of each token of the prompt, if these were asked.
        gates: Vec<Gates>,
        /// Tokens of the prompt whose keys and values were known already.
        cached_tokens: usize,
    },
    /// A token was written.
    Token {
        /// Whose.
        id: RequestId,
        /// The token.
        token: u32,
        /// The text that is certain by now and was not told yet; may be empty.
        text: String,
        /// How likely it was, if that was asked.
        logprobs: Option<TokenLogprobs>,
        /// The gates of the token before it, from whose hidden state it was predicted, if asked.
        gates: Option<Gates>,
    },
    /// A text ended; the last of its request.
    Done {
        /// Whose.
        id: RequestId,
        /// Why.
        finish: Finish,
        /// The rest of the text.
        text: String,
        /// What it took.
        usage: Usage,
        /// The text to stop at that came, if one did.
        stop: Option<String>,
        /// The token that ended it, which is not part of the text, and how likely it was, if that was
        /// asked.
        end: Option<TokenLogprobs>,
    },
    /// A request could not be finished; the last of it.
    Failed {
        /// Whose.
        id: RequestId,
        /// Why.
        error: String,
    },
}

impl Event {
    /// The request it is of.
    pub fn id(&self) -> RequestId {
        match self {
            Self::Prompt { id, .. }
            | Self::Token { id, .. }
            | Self::Done { id, .. }
            | Self::Failed { id, .. } => *id,
        }
    }
}

//! One answer as it comes: its parts, its tokens, its end.

use crate::answer::{Part, Shape, Splitter};
use crate::calls::Call;
use crate::error::ApiError;
use crate::pieces::Pieces;
use hydralora_model::Tokenizer;
use hydralora_run::engine::{Event, Finish, Gates, TokenLogprobs, Usage};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

/// Tokens that are left out of texts and yet part the answer.
pub(crate) type Marks = Arc<HashMap<u32, &'static str>>;

/// Finds those of a shape.
pub(crate) fn marks(tokenizer: &Tokenizer, shape: Shape) -> Marks {
    let of_calls = shape.calls.map_or(&[][..], |form| form.marks);
    let of_reasoning = shape.reasoning.map_or(&[][..], |thinking| &thinking.marks);
    let all = of_calls.iter().chain(of_reasoning);
    let hidden = |mark: &&&'static str| {
        let id = tokenizer.token_to_id(mark)?;
        tokenizer.decode(&[id], true).is_ok_and(|text| text.is_empty()).then_some(id)
    };
    Arc::new(all.filter_map(|mark| Some((hidden(&mark)?, *mark))).collect())
}

/// A call with the name that its result will refer to.
#[derive(Clone, Debug)]
pub(crate) struct NamedCall {
    pub(crate) id: String,
    pub(crate) call: Call,
}

/// What became certain with an event.
#[derive(Debug)]
pub(crate) enum Said {
    Reasoning(String),
    Content(String),
    Call(NamedCall),
}

/// One answer.
pub(crate) struct Choice {
    splitter: Splitter,
    marks: Marks,
    one_call: bool,
    pub(crate) content: String,
    pub(crate) reasoning: String,
    pub(crate) calls: Vec<NamedCall>,
    /// Of the tokens since it was last [taken](Self::new_logprobs).
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// Tokens with their gates since they were last taken.
    pub(crate) gates: Vec<(u32, Gates)>,
    /// Whether a stream has told the routed layers.
    pub(crate) told_sites: bool,
    pub(crate) tokens: usize,
    /// Those of them that the model thought with.
    pub(crate) reasoning_tokens: usize,
    pub(crate) prompt_tokens: usize,
    pub(crate) end: Option<End>,
}

/// How an answer ended.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) finish: Finish,
    pub(crate) usage: Usage,
    pub(crate) stop: Option<String>,
}

impl Choice {
    pub(crate) fn new(shape: Shape, marks: Marks, one_call: bool, prompt_tokens: usize) -> Self {
        Self {
            splitter: Splitter::new(shape),
            marks,
            one_call,
            content: String::new(),
            reasoning: String::new(),
            calls: Vec::new(),
            logprobs: Vec::new(),
            gates: Vec::new(),
            told_sites: false,
            tokens: 0,
            reasoning_tokens: 0,
            prompt_tokens,
            end: None,
        }
    }

    /// Takes an event and says what became certain.
    ///
    /// # Errors
    /// If the engine could not go on.
    pub(crate) fn take(&mut self, event: Event) -> Result<Vec<Said>, ApiError> {
        let parts = match event {
            Event::Prompt { .. } => Vec::new(),
            Event::Token { token, text, logprobs, gates, .. } => {
                self.tokens += 1;
                self.reasoning_tokens += usize::from(self.splitter.reasons());
                self.logprobs.extend(logprobs);
                self.gates.extend(gates.map(|gates| (token, gates)));
                match self.marks.get(&token) {
                    Some(mark) => self.splitter.push(&format!("{text}{mark}")),
                    None if text.is_empty() => Vec::new(),
                    None => self.splitter.push(&text),
                }
            }
            Event::Done { finish, text, usage, stop, .. } => {
                let mut parts = self.splitter.push(&text);
                parts.extend(self.splitter.finish());
                self.end = Some(End { finish, usage, stop });
                parts
            }
            Event::Failed { .. } => return Err(failed()),
        };
        let mut said = Vec::new();
        for part in parts {
            match part {
                Part::Reasoning(text) => {
                    self.reasoning += &text;
                    said.push(Said::Reasoning(text));
                }
                Part::Content(text) => {
                    self.content += &text;
                    said.push(Said::Content(text));
                }
                Part::Call(_) if self.one_call && !self.calls.is_empty() => {}
                Part::Call(call) => {
                    let call = NamedCall { id: id("call_"), call };
                    self.calls.push(call.clone());
                    said.push(Said::Call(call));
                }
            }
        }
        Ok(said)
    }

    /// Why it ended, as chats say it.
    pub(crate) fn reason(&self) -> &'static str {
        match &self.end {
            Some(_) if self.splitter.called() => "tool_calls",
            Some(End { finish: Finish::Length, .. }) => "length",
            _ => "stop",
        }
    }

    /// What its request took.
    pub(crate) fn usage(&self) -> Usage {
        match &self.end {
            Some(end) => end.usage,
            None => Usage {
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.tokens,
                cached_tokens: 0,
            },
        }
    }
}

/// What is said of a request that the engine gave up.
pub(crate) fn failed() -> ApiError {
    ApiError::internal("the model could not go on with this answer")
}

/// A name that nobody else has.
pub(crate) fn id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:016x}", random(), random())
}

/// A number that nobody can foresee: the key of a fresh hash function.
pub(crate) fn random() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}

/// What several answers to one prompt took together. Each of `usages` says whether its prompt was
/// counted by another one already.
pub(crate) fn usage_json(usages: impl Iterator<Item = (bool, Usage)>) -> Value {
    let (mut prompt, mut completion, mut cached) = (0, 0, 0);
    for (counted, usage) in usages {
        completion += usage.completion_tokens;
        if !counted {
            prompt += usage.prompt_tokens;
            cached += usage.cached_tokens;
        }
    }
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    })
}

/// A log-probability as JSON can say it: it knows no infinity.
pub(crate) fn finite(logprob: f64) -> f64 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// Tokens with their log-probabilities, as chats tell them.
pub(crate) fn chat_logprobs(pieces: &Pieces, tokens: &[TokenLogprobs]) -> Value {
    let one = |token: u32, logprob: f64| {
        let logprob = finite(logprob);
        json!({"token": pieces.text(token), "logprob": logprob, "bytes": pieces.bytes(token)})
    };
    let each = tokens.iter().map(|of| {
        let mut entry = one(of.token, of.logprob);
        let top = of.top.iter().map(|(token, logprob)| one(*token, *logprob));
        entry["top_logprobs"] = top.collect();
        entry
    });
    each.collect()
}

/// Tokens with their gates, as they are told on request: the routed layers once, and for every token the
/// gates of each of them, in that order, from whose hidden state the token was predicted.
pub(crate) fn routing_json(pieces: &Pieces, tokens: &[(u32, Gates)]) -> Value {
    let mut routing = gates_json(pieces, tokens);
    let sites = tokens.first().map_or(&[][..], |(_, gates)| &gates.sites);
    let sites = sites.iter().map(|(site, gates)| {
        json!({"name": site.to_string(), "layer": site.layer, "experts": gates.len()})
    });
    routing["sites"] = sites.collect();
    routing
}

/// The same without the layers, which a stream tells once.
pub(crate) fn gates_json(pieces: &Pieces, tokens: &[(u32, Gates)]) -> Value {
    let rounded = |gate: &f32| (f64::from(*gate) * 1e5).round() / 1e5;
    let one = |(token, gates): &(u32, Gates)| {
        let gates = gates.sites.iter().map(|(_, gates)| gates.iter().map(rounded).collect());
        let gates: Vec<Vec<f64>> = gates.collect();
        json!({"id": token, "token": pieces.text(*token), "gates": gates})
    };
    json!({"tokens": tokens.iter().map(one).collect::<Value>()})
}

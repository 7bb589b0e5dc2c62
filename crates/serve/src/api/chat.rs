//! `/v1/chat/completions`.

use super::conversation::{Answering, Calling, Conversation, Format};
use super::now;
use crate::app::App;
use crate::ask::{events, in_time};
use crate::body;
use crate::choice::{
    Choice, Said, chat_logprobs, failed, gates_json, id, routing_json, usage_json,
};
use crate::error::ApiError;
use crate::error::Json;
use crate::loaded::{Loaded, Target};
use crate::stream::{Broken, Pieces, respond};
use crate::types::{ChatRequest, Common, ScoreLimits};
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use serde_json::{Map, Value, json};
use std::sync::Arc;

pub(crate) async fn chat(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let loaded = app.loaded()?;
    let in_flight = app.begin()?;
    let mut request: ChatRequest = body::json(&app, request).await?;
    let common = request.raw().checked(loaded.vocabulary)?;
    let target = loaded.target(request.model.as_deref(), request.adapter.as_deref())?;
    let logprobs = request.logprobs.unwrap_or(false);
    let conversation = conversation(request)?;
    let answering = conversation.ask(&app, &loaded, &target, &common).await?;
    let head = Head::new(&loaded, &target);
    if common.stream {
        let write = move |pieces| async move {
            streamed(&loaded, &head, &common, logprobs, answering, &pieces).await
        };
        return Ok(respond(&app, in_flight, write, |error| (None, error.to_json())));
    }
    let whole = in_time(&app, whole(&loaded, &head, &common, logprobs, answering)).await?;
    Ok(Json(whole).into_response())
}

/// What is asked, in the form that all conversations have.
fn conversation(request: ChatRequest) -> Result<Conversation, ApiError> {
    let messages = request.messages.iter().enumerate();
    let messages: Result<Vec<_>, _> =
        messages.map(|(number, message)| message.to_message(number)).collect();
    let format = match request.response_format {
        None => Format::Text,
        Some(format) => {
            let schema = format.json_schema.and_then(|named| named.schema);
            Format::of(&format.kind, schema, "response_format")?
        }
    };
    if let Some(other) = request.modalities.iter().flatten().find(|kind| *kind != "text") {
        let message = format!("has {other:?}; the model writes text alone");
        return Err(ApiError::field("modalities", message).coded("unsupported"));
    }
    let wanted = request.logprobs.unwrap_or(false);
    let top_logprobs = match (wanted, request.top_logprobs) {
        (false, Some(top)) if top > 0 => {
            return Err(ApiError::field("top_logprobs", "needs `logprobs: true` beside it"));
        }
        (true, Some(top)) if top > ScoreLimits::MOST_TOP => {
            let message = format!("is {top}; expected at most {}", ScoreLimits::MOST_TOP);
            return Err(ApiError::field("top_logprobs", message));
        }
        (true, top) => Some(top.unwrap_or(0)),
        (false, _) => None,
    };
    let (max_tokens, max_field) = match (request.max_completion_tokens, request.max_tokens) {
        (Some(most), _) => (Some(most), "max_completion_tokens"),
        (None, most) => (most, "max_tokens"),
    };
    if max_tokens == Some(0) {
        return Err(ApiError::field(max_field, "is 0; expected at least 1"));
    }
    Ok(Conversation {
        messages: messages?,
        tools: request.tools.unwrap_or_default(),
        calling: Calling::of(request.tool_choice.as_ref())?,
        format,
        one_call: request.parallel_tool_calls == Some(false),
        arguments: request.chat_template_kwargs,
        documents: request.documents,
        reasoning_effort: request.reasoning_effort,
        max_tokens,
        max_field,
        top_logprobs,
    })
}

/// What every piece of an answer begins with.
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
    pub(super) generation: Option<u64>,
}

impl Head {
    pub(super) fn new(loaded: &Loaded, target: &Target) -> Self {
        Self::with_prefix(loaded, target, "chatcmpl-")
    }

    pub(super) fn with_prefix(loaded: &Loaded, target: &Target, prefix: &str) -> Self {
        let short: String = loaded.fingerprint.chars().take(12).collect();
        Self {
            id: id(prefix),
            created: now(),
            model: target.name.clone(),
            fingerprint: format!("fp_{short}"),
            generation: target.adapter.as_ref().map(|ready| ready.generation),
        }
    }

    pub(super) fn of(&self, object: &str, choices: Value) -> Map<String, Value> {
        let mut head = Map::new();
        head.insert("id".to_owned(), json!(self.id));
        head.insert("object".to_owned(), json!(object));
        head.insert("created".to_owned(), json!(self.created));
        head.insert("model".to_owned(), json!(self.model));
        head.insert("system_fingerprint".to_owned(), json!(self.fingerprint));
        if let Some(generation) = self.generation {
            head.insert("adapter_generation".to_owned(), json!(generation));
        }
        head.insert("choices".to_owned(), choices);
        head
    }
}

fn call_json(call: &crate::choice::NamedCall) -> Value {
    let function = json!({"name": call.call.name, "arguments": call.call.arguments});
    json!({"id": call.id, "type": "function", "function": function})
}

async fn whole(
    loaded: &Loaded,
    head: &Head,
    common: &Common,
    logprobs: bool,
    answering: Answering,
) -> Result<Value, ApiError> {
    let Answering { jobs, mut choices } = answering;
    let mut events = events(jobs);
    while let Some((number, event)) = events.next().await {
        choices[number].take(event)?;
    }
    let one = |(index, choice): (usize, &Choice)| {
        if choice.end.is_none() {
            return Err(failed());
        }
        let mut message = Map::new();
        message.insert("role".to_owned(), json!("assistant"));
        let called = !choice.calls.is_empty();
        let silent = choice.content.is_empty() && called;
        let content = if silent { Value::Null } else { json!(choice.content) };
        message.insert("content".to_owned(), content);
        if !choice.reasoning.is_empty() {
            message.insert("reasoning_content".to_owned(), json!(choice.reasoning));
        }
        message.insert("refusal".to_owned(), Value::Null);
        if called {
            let calls = choice.calls.iter().map(call_json).collect();
            message.insert("tool_calls".to_owned(), calls);
        }
        let told =
            logprobs.then(|| json!({"content": chat_logprobs(&loaded.pieces, &choice.logprobs)}));
        let mut entry = json!({
            "index": index,
            "message": message,
            "logprobs": told,
            "finish_reason": choice.reason(),
        });
        if common.routing {
            let tokens = routing_json(&loaded.pieces, &choice.gates);
            entry["hydralora"] = json!({"routing": tokens});
        }
        Ok(entry)
    };
    let entries: Result<Vec<_>, _> = choices.iter().enumerate().map(one).collect();
    let mut answer = head.of("chat.completion", entries?.into());
    answer.insert("usage".to_owned(), usage_of(&choices));
    Ok(answer.into())
}

fn usage_of(choices: &[Choice]) -> Value {
    usage_json(choices.iter().enumerate().map(|(number, choice)| (number > 0, choice.usage())))
}

async fn streamed(
    loaded: &Loaded,
    head: &Head,
    common: &Common,
    logprobs: bool,
    answering: Answering,
    pieces: &Pieces,
) -> Result<(), Broken> {
    let Answering { jobs, mut choices } = answering;
    let chunk = |choices: &[Choice], entries: Value| {
        let mut chunk = head.of("chat.completion.chunk", entries);
        if common.include_usage {
            let usage = if common.usage_everywhere { usage_of(choices) } else { Value::Null };
            chunk.insert("usage".to_owned(), usage);
        }
        Value::Object(chunk)
    };
    let entry = |index: usize, delta: Value, finish: Option<&str>| json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": finish});
    for index in 0..choices.len() {
        let first = entry(index, json!({"role": "assistant", "content": ""}), None);
        pieces.data(&chunk(&choices, json!([first]))).await?;
    }
    let mut events = events(jobs);
    while let Some((index, event)) = events.next().await {
        let before = choices[index].calls.len();
        let said = choices[index].take(event)?;
        let mut deltas: Vec<Value> = Vec::new();
        let mut calls = before;
        for part in said {
            deltas.push(match part {
                Said::Content(text) => json!({"content": text}),
                Said::Reasoning(text) => json!({"reasoning_content": text}),
                Said::Call(call) => {
                    let mut call = call_json(&call);
                    call["index"] = json!(calls);
                    calls += 1;
                    json!({"tool_calls": [call]})
                }
            });
        }
        let choice = &mut choices[index];
        let told = std::mem::take(&mut choice.logprobs);
        let gates = std::mem::take(&mut choice.gates);
        let first_gates = !choice.told_sites;
        choice.told_sites |= !gates.is_empty();
        if deltas.is_empty() && ((logprobs && !told.is_empty()) || !gates.is_empty()) {
            deltas.push(json!({}));
        }
        let (ended, reason) = (choice.end.is_some(), choice.reason());
        for (number, delta) in deltas.into_iter().enumerate() {
            let mut entry = entry(index, delta, None);
            if number == 0 && logprobs && !told.is_empty() {
                entry["logprobs"] = json!({"content": chat_logprobs(&loaded.pieces, &told)});
            }
            if number == 0 && !gates.is_empty() {
                let tell = if first_gates { routing_json } else { gates_json };
                entry["hydralora"] = json!({"routing": tell(&loaded.pieces, &gates)});
            }
            pieces.data(&chunk(&choices, json!([entry]))).await?;
        }
        if ended {
            let last = entry(index, json!({}), Some(reason));
            pieces.data(&chunk(&choices, json!([last]))).await?;
        }
    }
    if choices.iter().any(|choice| choice.end.is_none()) {
        return Err(failed().into());
    }
    if common.include_usage {
        let mut last = head.of("chat.completion.chunk", json!([]));
        last.insert("usage".to_owned(), usage_of(&choices));
        pieces.data(&last.into()).await?;
    }
    pieces.done().await?;
    Ok(())
}

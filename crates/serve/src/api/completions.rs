//! `/v1/completions`: texts to be continued, and scored.

use super::chat::Head;
use crate::app::App;
use crate::ask::{Ask, aside, events, in_time, room, submit};
use crate::body;
use crate::choice::{End, failed, finite, gates_json, routing_json, usage_json};
use crate::error::ApiError;
use crate::error::Json;
use crate::loaded::Loaded;
use crate::stream::{Broken, Pieces, respond};
use crate::types::{Common, CompletionRequest, Prompts, ScoreLimits};
use crate::worker::Job;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use hydralora_run::engine::{Event, Finish, Gates, TokenLogprobs, Usage};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Tokens of an answer whose request says nothing of their number.
const USUAL_TOKENS: usize = 16;
/// Most texts of a request.
const MOST_TEXTS: usize = 4096;

pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let loaded = app.loaded()?;
    let in_flight = app.begin()?;
    let mut request: CompletionRequest = body::json(&app, request).await?;
    let common = request.raw().checked(loaded.vocabulary)?;
    let target = loaded.target(request.model.as_deref(), request.adapter.as_deref())?;
    let how = How::of(&request, &common)?;
    let (own, whom, shared) = (Arc::clone(&loaded), target.clone(), common.clone());
    let prepared = aside(&app, move || {
        let prompts = prompts(&own, &request, shared.choices)?;
        let mut requests = Vec::new();
        for (ids, _) in &prompts {
            let asked = request.max_tokens;
            let least = shared.sampling.min_new_tokens;
            let max_new_tokens = room(&own, ids.len(), asked, "max_tokens", USUAL_TOKENS, least)?;
            let ask = Ask {
                prompt: ids.clone(),
                target: &whom,
                common: &shared,
                max_new_tokens,
                top_logprobs: how.top,
                prompt_logprobs: how.top.filter(|_| how.echo),
                continues: true,
                constraint: None,
            };
            requests.extend(ask.requests());
        }
        Ok((prompts, requests))
    });
    let (prompts, requests) = prepared.await?;
    let jobs = submit(&loaded, requests).await?;
    let head = Head::with_prefix(&loaded, &target, "cmpl-");
    let texts = prompts.into_iter().flat_map(|prompt| vec![prompt; common.choices]);
    let texts: Vec<Text> = texts.map(|(ids, text)| Text::new(how, ids, &text)).collect();
    if common.stream {
        let write = move |pieces| async move {
            streamed(&loaded, &head, &common, how, jobs, texts, &pieces).await
        };
        return Ok(respond(&app, in_flight, write, |error| (None, error.to_json())));
    }
    let whole = in_time(&app, whole(&loaded, &head, &common, how, jobs, texts)).await?;
    Ok(Json(whole).into_response())
}

/// What is told of the texts.
#[derive(Clone, Copy)]
struct How {
    echo: bool,
    /// How many of the likeliest tokens are told with each.
    top: Option<usize>,
    /// Whether tokens are told by their numbers.
    as_ids: bool,
}

impl How {
    fn of(request: &CompletionRequest, common: &Common) -> Result<Self, ApiError> {
        if request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            let message = "the model writes what follows a text, not what lies between two";
            return Err(ApiError::field("suffix", message).coded("unsupported"));
        }
        if request.best_of.is_some_and(|best| best != common.choices) {
            let message = "expected the number of answers that `n` asks for";
            return Err(ApiError::field("best_of", message).coded("unsupported"));
        }
        let top = request.logprobs;
        if let Some(top) = top.filter(|top| *top > ScoreLimits::MOST_TOP) {
            let message = format!("is {top}; expected at most {}", ScoreLimits::MOST_TOP);
            return Err(ApiError::field("logprobs", message));
        }
        Ok(Self {
            echo: request.echo.unwrap_or(false),
            top,
            as_ids: request.return_tokens_as_token_ids.unwrap_or(false),
        })
    }
}

/// The prompts as token ids, and as texts where they are told again.
fn prompts(
    loaded: &Loaded,
    request: &CompletionRequest,
    choices: usize,
) -> Result<Vec<(Vec<u32>, String)>, ApiError> {
    let count = match &request.prompt {
        Prompts::Text(_) | Prompts::Ids(_) => 1,
        Prompts::Texts(texts) => texts.len(),
        Prompts::SeveralIds(several) => several.len(),
    };
    if count * choices > MOST_TEXTS {
        let message = format!(
            "asks for {} texts, all answers counted; expected at most {MOST_TEXTS} at a time",
            count * choices
        );
        return Err(ApiError::field("prompt", message));
    }
    loaded.can_wait(count * choices, if count > 1 { "prompt" } else { "n" })?;
    let special = request.add_special_tokens.unwrap_or(true);
    let of_text = |text: &String| Ok((loaded.encode(text, special)?, text.clone()));
    let of_ids = |field: &str, ids: &[i64]| {
        let ids = loaded.ids(field, ids)?;
        let text = loaded.tokenizer.decode(&ids, false);
        Ok((ids, text.unwrap_or_default()))
    };
    let prompts: Vec<_> = match &request.prompt {
        Prompts::Text(text) => vec![of_text(text)?],
        Prompts::Texts(texts) => texts.iter().map(of_text).collect::<Result<_, ApiError>>()?,
        Prompts::Ids(ids) => vec![of_ids("prompt", ids)?],
        Prompts::SeveralIds(several) => {
            let one = |(number, ids): (usize, &Vec<i64>)| of_ids(&format!("prompt[{number}]"), ids);
            several.iter().enumerate().map(one).collect::<Result<_, ApiError>>()?
        }
    };
    if prompts.is_empty() || prompts.iter().any(|(ids, _)| ids.is_empty()) {
        return Err(ApiError::field("prompt", "is empty; expected at least one token"));
    }
    Ok(prompts)
}

/// A text as it comes.
struct Text {
    text: String,
    prompt: Vec<u32>,
    told: Told,
    gates: Vec<(u32, Gates)>,
    told_sites: bool,
    tokens: usize,
    end: Option<End>,
}

impl Text {
    fn new(how: How, prompt: Vec<u32>, text: &str) -> Self {
        let text = if how.echo { text.to_owned() } else { String::new() };
        let (told, gates) = (Told::default(), Vec::new());
        Self { text, prompt, told, gates, told_sites: false, tokens: 0, end: None }
    }

    /// Takes an event.
    fn take(&mut self, loaded: &Loaded, how: How, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Prompt { logprobs, .. } if how.echo && how.top.is_some() => {
                // Nothing comes before the first token, so that it has no probability.
                let first = self.prompt.first().copied().unwrap_or_default();
                let rest = logprobs.len().min(self.prompt.len().saturating_sub(1));
                self.told.push(loaded, how, first, None);
                for of in &logprobs[logprobs.len() - rest..] {
                    self.told.push(loaded, how, of.token, Some(of));
                }
            }
            Event::Prompt { .. } => {}
            Event::Token { token, text, logprobs, gates, .. } => {
                self.tokens += 1;
                self.text += &text;
                if let Some(of) = &logprobs {
                    self.told.push(loaded, how, token, Some(of));
                }
                self.gates.extend(gates.map(|gates| (token, gates)));
            }
            Event::Done { finish, text, usage, stop, end, .. } => {
                self.text += &text;
                // It is told as what was written, so that whoever asked for one token and cuts it off
                // does not cut the prompt.
                if let Some(of) = &end {
                    self.told.push(loaded, how, of.token, Some(of));
                }
                self.end = Some(End { finish, usage, stop });
            }
            Event::Failed { .. } => return Err(failed()),
        }
        Ok(())
    }

    fn usage(&self) -> Usage {
        match &self.end {
            Some(end) => end.usage,
            None => Usage {
                prompt_tokens: self.prompt.len(),
                completion_tokens: self.tokens,
                cached_tokens: 0,
            },
        }
    }

    /// What has come since it was last asked.
    fn entry(&mut self, loaded: &Loaded, common: &Common, how: How, index: usize) -> Value {
        let logprobs = match how.top {
            Some(_) => self.told.take(),
            None => Value::Null,
        };
        let reason = self.end.as_ref().map(|end| match end.finish {
            Finish::Length => "length",
            _ => "stop",
        });
        let mut entry = json!({
            "index": index,
            "text": std::mem::take(&mut self.text),
            "logprobs": logprobs,
            "finish_reason": reason,
        });
        if let Some(stop) = self.end.as_ref().and_then(|end| end.stop.as_ref()) {
            entry["stop_reason"] = json!(stop);
        }
        if common.routing {
            let gates = std::mem::take(&mut self.gates);
            let tell = if self.told_sites { gates_json } else { routing_json };
            self.told_sites |= !gates.is_empty();
            entry["hydralora"] = json!({"routing": tell(&loaded.pieces, &gates)});
        }
        entry
    }
}

/// Log-probabilities in the form that completions have.
#[derive(Default)]
struct Told {
    tokens: Vec<String>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Where the next token begins, in characters.
    offset: usize,
}

impl Told {
    fn push(&mut self, loaded: &Loaded, how: How, token: u32, of: Option<&TokenLogprobs>) {
        let name = |id: u32| match how.as_ids {
            true => format!("token_id:{id}"),
            false => loaded.pieces.text(id),
        };
        let text = loaded.pieces.text(token);
        self.offsets.push(self.offset);
        self.offset += text.chars().count();
        self.tokens.push(name(token));
        let Some(of) = of else {
            self.logprobs.push(Value::Null);
            self.top.push(Value::Null);
            return;
        };
        let own = finite(of.logprob);
        self.logprobs.push(json!(own));
        // The token itself is among them, and of tokens with the same text the likelier counts.
        let mut top: Map<String, Value> = Map::new();
        let likeliest = of.top.iter().map(|(id, logprob)| (*id, finite(*logprob)));
        for (id, logprob) in likeliest.chain([(token, own)]) {
            let entry = top.entry(name(id)).or_insert_with(|| json!(logprob));
            if entry.as_f64().is_none_or(|present| present < logprob) {
                *entry = json!(logprob);
            }
        }
        self.top.push(top.into());
    }

    fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.logprobs),
            "top_logprobs": std::mem::take(&mut self.top),
            "text_offset": std::mem::take(&mut self.offsets),
        })
    }
}

fn usage_of(common: &Common, texts: &[Text]) -> Value {
    let counted = |number: usize| !number.is_multiple_of(common.choices);
    usage_json(texts.iter().enumerate().map(|(number, text)| (counted(number), text.usage())))
}

async fn whole(
    loaded: &Loaded,
    head: &Head,
    common: &Common,
    how: How,
    jobs: Vec<Job>,
    mut texts: Vec<Text>,
) -> Result<Value, ApiError> {
    let mut events = events(jobs);
    while let Some((number, event)) = events.next().await {
        texts[number].take(loaded, how, event)?;
    }
    if texts.iter().any(|text| text.end.is_none()) {
        return Err(failed());
    }
    let usage = usage_of(common, &texts);
    let each = texts.iter_mut().enumerate();
    let entries = each.map(|(index, text)| text.entry(loaded, common, how, index)).collect();
    let mut answer = head.of("text_completion", entries);
    answer.insert("usage".to_owned(), usage);
    Ok(answer.into())
}

async fn streamed(
    loaded: &Loaded,
    head: &Head,
    common: &Common,
    how: How,
    jobs: Vec<Job>,
    mut texts: Vec<Text>,
    pieces: &Pieces,
) -> Result<(), Broken> {
    let mut events = events(jobs);
    while let Some((index, event)) = events.next().await {
        let text = &mut texts[index];
        text.take(loaded, how, event)?;
        let tells = !text.told.tokens.is_empty() || !text.gates.is_empty();
        if text.text.is_empty() && !tells && text.end.is_none() {
            continue;
        }
        let entry = text.entry(loaded, common, how, index);
        let mut chunk = head.of("text_completion", json!([entry]));
        if common.include_usage {
            let usage =
                if common.usage_everywhere { usage_of(common, &texts) } else { Value::Null };
            chunk.insert("usage".to_owned(), usage);
        }
        pieces.data(&chunk.into()).await?;
    }
    if texts.iter().any(|text| text.end.is_none()) {
        return Err(failed().into());
    }
    if common.include_usage {
        let mut last = head.of("text_completion", json!([]));
        last.insert("usage".to_owned(), usage_of(common, &texts));
        pieces.data(&last.into()).await?;
    }
    pieces.done().await?;
    Ok(())
}

//! Prompts of a file, answered several at a time.

use super::generate::{Asking, Opened, Prompter, Shown};
use crate::args::{GenerateArguments, Global};
use crate::energy::{Meter, Work};
use crate::failure::bad_input;
use crate::ui::say;
use anyhow::Context;
use hydralora_data::Message;
use hydralora_run::Sampling;
use hydralora_run::eval::{Engine, Error, Writing, Written};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// Fields of a record that say what to answer.
const EXPECTED: &str = "expected an object with `prompt` (a text) or `messages` (role and content)";

/// A record's message; what else it says goes to the template as it stands.
#[derive(Deserialize)]
struct Turn {
    role: String,
    #[serde(default)]
    content: Option<String>,
    #[serde(flatten)]
    fields: Map<String, Value>,
}

impl From<Turn> for Message {
    fn from(turn: Turn) -> Self {
        let mut fields = turn.fields;
        if turn.content.is_none() {
            fields.insert("content".to_owned(), Value::Null);
        }
        Self { role: turn.role, content: turn.content.unwrap_or_default(), fields }
    }
}

/// Reads a file of prompts: records where its name ends in `.jsonl`, otherwise a prompt a line. Empty
/// lines are left out.
///
/// # Errors
/// That name the file, the line and what was expected.
pub(crate) fn read(path: &Path, raw: bool) -> anyhow::Result<Vec<Asking>> {
    let shown = path.display();
    let bytes =
        fs::read(path).map_err(|error| bad_input(format!("--prompts: {shown}: {error}")))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count();
        bad_input(format!("--prompts: {shown}:{line}: not valid UTF-8; save the file as UTF-8"))
    })?;
    let records = path.extension().is_some_and(|extension| extension == "jsonl");
    let mut prompts = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let prompt = if records { record(line, raw) } else { Ok(Asking::Text(line.to_owned())) };
        let line = index + 1;
        prompts.push(
            prompt.map_err(|fault| bad_input(format!("--prompts: {shown}:{line}: {fault}")))?,
        );
    }
    if prompts.is_empty() {
        return Err(bad_input(format!("--prompts: {shown}: holds no prompt")));
    }
    Ok(prompts)
}

fn record(line: &str, raw: bool) -> Result<Asking, String> {
    let value: Value =
        serde_json::from_str(line).map_err(|error| format!("{error}; {EXPECTED}"))?;
    match (value.get("prompt"), value.get("messages")) {
        (Some(Value::String(prompt)), None) if !prompt.is_empty() => {
            Ok(Asking::Text(prompt.clone()))
        }
        (None, Some(_)) if raw => {
            Err("`messages` are for the chat template, which --raw leaves out".to_owned())
        }
        (None, Some(messages)) => {
            let turns = Vec::<Turn>::deserialize(messages)
                .map_err(|error| format!("messages: {error}; {EXPECTED}"))?;
            if turns.is_empty() {
                return Err("messages: is empty; expected one at least".to_owned());
            }
            Ok(Asking::Messages(turns.into_iter().map(Message::from).collect()))
        }
        (Some(_), Some(_)) => Err(format!("has both `prompt` and `messages`; {EXPECTED}")),
        _ => Err(EXPECTED.to_owned()),
    }
}

/// Answers `prompts` and prints a JSON line each, in their order, as soon as all before it are done.
pub(crate) fn run(
    global: &Global,
    arguments: &GenerateArguments,
    opened: &Opened,
    prompter: &Prompter<'_>,
    prompts: &[Asking],
    sampling: Sampling,
) -> anyhow::Result<()> {
    let tokenizer = opened.base.tokenizer();
    let decoder = &opened.base.decoder;
    let mut engine = Engine::new(decoder, tokenizer, opened.adapter(), &opened.in_force.end_ids);
    let limit = arguments.sampling.max_new_tokens;
    let mut requests = Vec::with_capacity(prompts.len());
    for (index, prompt) in prompts.iter().enumerate() {
        let ids = prompter.encode(prompt).with_context(|| format!("prompt {}", index + 1))?;
        // A prompt that was cut would be another prompt.
        if ids.is_empty() || ids.len() + limit > engine.context() {
            return Err(bad_input(format!(
                "prompt {} has {} tokens and {limit} may follow; the model's context holds {}",
                index + 1,
                ids.len(),
                engine.context()
            )));
        }
        // Equal prompts get different draws, the same ones on every run.
        let sampling = Sampling { seed: sampling.seed.wrapping_add(index as u64), ..sampling };
        let stops = arguments.sampling.stops.clone();
        let continues = prompter.continues();
        requests.push(Writing { prompt: ids, stops, max_new_tokens: limit, sampling, continues });
    }
    let meter = Meter::start(global, &arguments.energy);
    let mark = meter.mark();
    let started = Instant::now();
    let (mut waiting, mut next, mut tokens) = (BTreeMap::new(), 0, 0);
    let mut shown = Shown::default();
    let ended = engine.write(&requests, &mut |index, written: Written| {
        tokens += written.tokens;
        waiting.insert(index, written);
        while let Some(Written { text, tokens, finish }) = waiting.remove(&next) {
            let line = json!({
                "index": next,
                "text": text,
                "finish": finish.name(),
                "prompt_tokens": requests[next].prompt.len(),
                "new_tokens": tokens,
            });
            if !shown.piece(&format!("{line}\n")) {
                // Nobody reads what else would be written.
                return Err(Error::Io(std::io::ErrorKind::BrokenPipe.into()));
            }
            next += 1;
        }
        Ok(())
    });
    shown.end()?;
    match ended {
        Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
        other => other?,
    }
    let (seconds, used) = (started.elapsed().as_secs_f64(), meter.since(&mark));
    let rate = tokens as f64 / seconds.max(1e-9);
    say(
        global,
        format!(
            "[{} prompts, {tokens} new tokens in {seconds:.2} s: {rate:.1} tokens/s]",
            prompts.len()
        ),
    );
    let work = Work { tokens: Some(tokens), answers: Some(prompts.len()) };
    meter.energy(used, work).say_if_known(global);
    Ok(())
}

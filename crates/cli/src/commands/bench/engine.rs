//! `hydralora bench engine`: texts written at once, of the base and of several adapters, against one alone.

use super::decode::adapter;
use super::median;
use crate::args::{BenchEngineArguments, Global, spelling};
use crate::energy::{Energy, Meter, Work, add};
use crate::failure::bad_input;
use crate::plan::{Base, open_base};
use crate::recipe::ModelDtype;
use crate::ui::{result, say, table};
use hydralora_model::Packed;
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_peft::Tuned;
use hydralora_run::engine::{Engine, EngineOptions, Event, Request, ServedAdapter};
use hydralora_run::likeliest;
use serde::Serialize;
use serde_json::json;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Runs of each measurement, in turn; the median counts.
const RUNS: usize = 3;

#[derive(Serialize)]
struct Figures {
    dtype: String,
    requests: usize,
    adapters: usize,
    /// New tokens of all requests, while all of them write.
    tokens_per_s: f64,
    /// Of the tokens that a bare loop over the decoder writes for one request.
    of_bare_loop: f64,
    energy: Energy,
}

fn ids(base: &Base, seed: usize, count: usize) -> Vec<u32> {
    let vocabulary = base.decoder.config().vocab_size;
    (0..count).map(|i| (((i + seed * 31) * 7919 + 17) % (vocabulary - 1) + 1) as u32).collect()
}

/// Tokens per second of one text by the decoder alone.
fn bare(
    base: &Base,
    adapter: &dyn Adapter,
    arguments: &BenchEngineArguments,
) -> anyhow::Result<f64> {
    let mut cache = base.decoder.new_cache();
    let mut feed = |tokens: &[u32]| -> anyhow::Result<u32> {
        let offsets = [0, tokens.len()];
        let caches = std::slice::from_mut(&mut cache);
        let batch = Packed { tokens, offsets: &offsets };
        let hidden = base.decoder.extend(batch, caches, adapter, &Pass::inference())?;
        Ok(likeliest(&base.decoder.logits_with(adapter, &hidden, &[tokens.len() - 1])))
    };
    let mut next = feed(&ids(base, 0, arguments.prompt))?;
    let started = Instant::now();
    for _ in 1..arguments.new_tokens {
        next = feed(&[next])?;
    }
    Ok((arguments.new_tokens - 1) as f64 / started.elapsed().as_secs_f64())
}

/// Tokens per second of `requests` texts, while all of them are written.
fn together(
    base: &Base,
    served: &[Arc<ServedAdapter<'_>>],
    requests: usize,
    arguments: &BenchEngineArguments,
) -> anyhow::Result<f64> {
    let options =
        EngineOptions { max_batch: requests, prefix_reuse: false, ..EngineOptions::default() };
    let mut engine = Engine::new(&base.decoder, base.tokenizer(), options);
    for at in 0..requests {
        let adapter = (!served.is_empty()).then(|| served[at % served.len()].clone());
        let prompt = ids(base, at, arguments.prompt);
        engine.submit(Request { adapter, ..Request::new(prompt, arguments.new_tokens) })?;
    }
    let (mut read, mut ended, mut tokens) = (0, 0, 0);
    let (mut events, mut started, mut seconds) = (Vec::new(), Instant::now(), 0.0);
    while !engine.is_idle() {
        let all_write = read == requests && ended == 0;
        engine.step(&mut events);
        for event in events.drain(..) {
            match event {
                Event::Prompt { .. } => read += 1,
                Event::Token { .. } => tokens += usize::from(all_write),
                Event::Done { .. } => ended += 1,
                Event::Failed { error, .. } => anyhow::bail!(error),
            }
        }
        if all_write {
            seconds = started.elapsed().as_secs_f64();
        } else {
            started = Instant::now();
        }
    }
    if tokens == 0 {
        return Err(bad_input(format!(
            "--new-tokens: {} are written before {requests} prompts are read; expected more",
            arguments.new_tokens
        )));
    }
    Ok(f64::from(tokens as u32) / seconds)
}

pub(crate) fn run(global: &Global, arguments: &BenchEngineArguments) -> anyhow::Result<ExitCode> {
    let counts = || arguments.requests.iter().copied();
    if arguments.prompt == 0 || arguments.new_tokens < 2 || counts().any(|count| count == 0) {
        return Err(bad_input(
            "--prompt and --requests: expected at least 1; --new-tokens: expected at least 2",
        ));
    }
    let meter = Meter::start(global, &arguments.energy);
    let mut all = Vec::new();
    for &dtype in &arguments.dtype {
        let name = spelling(&dtype);
        if dtype == ModelDtype::F64 {
            return Err(bad_input("--dtype: f64 is for checks of numbers; expected another"));
        }
        say(global, format!("weights in {name}"));
        let base = open_base(&arguments.model, dtype)?;
        let most = arguments.adapters.iter().copied().max().unwrap_or(0);
        let tuned: Vec<Box<dyn Tuned>> =
            (0..most).map(|seed| adapter(&base, seed)).collect::<anyhow::Result<_>>()?;
        let served: Vec<Arc<ServedAdapter<'_>>> = (tuned.iter().enumerate())
            .map(|(at, tuned)| {
                Arc::new(ServedAdapter::borrowed(tuned.as_adapter(), [at as u8; 32]))
            })
            .collect();
        for &adapters in &arguments.adapters {
            let alone = tuned.first().filter(|_| adapters > 0);
            let alone = alone.map_or(&NoAdapter as &dyn Adapter, |tuned| tuned.as_adapter());
            let mut loops = Vec::new();
            let mut rates: Vec<Vec<f64>> = counts().map(|_| Vec::new()).collect();
            let mut used: Vec<_> = counts().map(|_| None).collect();
            for run in 0..=RUNS {
                let rate = bare(&base, alone, arguments)?;
                // The first run of each touches pages and fills caches.
                loops.extend((run > 0).then_some(rate));
                for (at, requests) in counts().enumerate() {
                    let mark = meter.mark();
                    let rate = together(&base, &served[..adapters], requests, arguments)?;
                    if run > 0 {
                        rates[at].push(rate);
                        used[at] = Some(add(used[at].take(), meter.since(&mark)));
                    }
                }
            }
            let alone = median(&mut loops);
            for ((requests, rates), used) in counts().zip(&mut rates).zip(used) {
                let rate = median(rates);
                let work = Work::tokens(RUNS * requests * arguments.new_tokens);
                all.push(Figures {
                    dtype: name.clone(),
                    requests,
                    adapters,
                    tokens_per_s: rate,
                    of_bare_loop: rate / alone,
                    energy: meter.energy(used.unwrap_or_default(), work),
                });
            }
        }
    }
    let titles = ["weights", "adapters", "requests", "tokens/s", "of a bare loop's one"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    for one in &all {
        rows.push(vec![
            one.dtype.clone(),
            one.adapters.to_string(),
            one.requests.to_string(),
            format!("{:.1}", one.tokens_per_s),
            format!("{:.2}", one.of_bare_loop),
        ]);
    }
    let mut text = table(&rows);
    for one in all.iter().filter(|one| one.energy.energy_j.is_some()) {
        let Figures { dtype, adapters, requests, .. } = one;
        text += &format!(
            "\nenergy, {dtype}, {adapters} adapters, {requests} requests  {}",
            one.energy.in_words()
        );
    }
    let json = json!({
        "threads": hydralora_runtime::threads(),
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "runs": all,
    });
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

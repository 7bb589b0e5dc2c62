//! Requests of every family, in double precision: what is windowed, what keeps states, what turns by the
//! length of a sequence.

use crate::support::{Model, model, plainly};
use hydralora_kernels::DType;
use hydralora_kernels::block::BlockFormat;
use hydralora_model::adapter::{NoAdapter, Pass};
use hydralora_model::source::open_weights;
use hydralora_model::{Cache, Decoder, Held, Packed, RopeScaling};
use hydralora_run::engine::{Engine, EngineOptions, Event, Request, RequestId, TokenLogprobs};
use hydralora_run::eval::{self, Scoring};
use hydralora_run::{Sampling, likeliest};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn folders() -> Vec<PathBuf> {
    let families = "../train/tests/fixtures/parity/families";
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(families)).unwrap();
    let mut found: Vec<PathBuf> =
        entries.map(|entry| entry.unwrap().path().join("model")).collect();
    found.retain(|folder| folder.exists());
    found.sort();
    assert!(found.len() > 3);
    found
}

/// What the decoder writes greedily behind `prompt`, which it reads at once.
fn alone(decoder: &Decoder, prompt: &[u32], new: usize) -> Vec<u32> {
    let mut cache = decoder.new_cache();
    let feed = |cache: &mut Cache, tokens: &[u32]| {
        let batch = Packed { tokens, offsets: &[0, tokens.len()] };
        let caches = std::slice::from_mut(cache);
        let hidden = decoder.extend(batch, caches, &NoAdapter, &Pass::inference()).unwrap();
        likeliest(&decoder.logits(&hidden, &[tokens.len() - 1]))
    };
    let mut text = vec![feed(&mut cache, prompt)];
    while text.len() < new {
        let next = feed(&mut cache, &text[text.len() - 1..]);
        text.push(next);
    }
    text
}

/// Runs until there is nothing to do and gives what was written.
fn run(engine: &mut Engine<'_>) -> BTreeMap<RequestId, Vec<u32>> {
    let mut texts = BTreeMap::<RequestId, Vec<u32>>::new();
    while !engine.is_idle() {
        let mut events = Vec::new();
        engine.step(&mut events);
        let stats = engine.stats();
        assert!(stats.cache_bytes <= stats.cache_budget, "{stats:?}");
        for event in events {
            match event {
                Event::Token { id, token, .. } => texts.entry(id).or_default().push(token),
                Event::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
    }
    texts
}

#[test]
fn every_family_is_answered_together_as_alone() {
    let tokenizer = model().source.tokenizer;
    let folders = folders();
    let dynamic = folders.iter().filter(|folder| folder.ends_with("qwen3/model"));
    let all =
        folders.iter().map(|folder| (folder, false)).chain(dynamic.map(|folder| (folder, true)));
    for (folder, dynamic) in all {
        let (mut config, weights) = open_weights(folder).unwrap();
        if dynamic {
            // Every length has frequencies of its own.
            config.rope.scaling =
                RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 20 };
        }
        let decoder = Decoder::load(&config, &weights, DType::F64).unwrap();
        let name = &config.model_type;
        let (new, most) = (9, config.context_length().min(126) - 9);
        let beginning: Vec<u32> = (0..most as u32).map(|i| (i * 37 + 11) % 250 + 3).collect();
        // Some begin alike, one is the beginning of another, one is short.
        // One outgrows the original context of the model with LongRoPE.
        let cut = [most, most - 10, 28, 7];
        let mut prompts: Vec<Vec<u32>> = cut.map(|end| beginning[..end].to_vec()).to_vec();
        prompts.push([&beginning[..most - 12], &[9, 8, 7]].concat());
        let expected: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| alone(&decoder, prompt, new)).collect();
        let whole = decoder.new_cache().most_bytes(most + new, 0, 13);
        for (max_step_tokens, room, prefix_reuse) in
            [(5, 2, true), (13, 1, true), (64, 20, true), (11, 3, false)]
        {
            let cache_bytes = room * whole;
            let options =
                EngineOptions { cache_bytes, max_step_tokens, prefix_reuse, ..Default::default() };
            let mut engine = Engine::new(&decoder, &tokenizer, options);
            for round in 0..2 {
                let ids: Vec<RequestId> = (prompts.iter())
                    .map(|prompt| engine.submit(Request::new(prompt.clone(), new)).unwrap())
                    .collect();
                let texts = run(&mut engine);
                for (id, expected) in ids.iter().zip(&expected) {
                    let what = format!("{name}, {max_step_tokens} a step, round {round}");
                    assert_eq!(&texts[id], expected, "{what}");
                }
            }
            let hits = engine.stats().prefix_hits;
            let reuses = prefix_reuse && !decoder.depends_on_length();
            assert!(reuses || hits == 0, "{name}: {hits}");
            assert!(!reuses || room < 20 || hits > 0, "{name} uses nothing again");
        }
    }
}

/// Log-probabilities of a prompt and its text are the same bits beside others as alone.
#[test]
fn every_family_computes_the_same_bits() {
    let tokenizer = model().source.tokenizer;
    let mut packed = 0;
    for folder in folders() {
        let (config, weights) = open_weights(&folder).unwrap();
        let name = &config.model_type;
        for held in [Held::Wide, Held::Packed(BlockFormat::Q8_0)] {
            // Some are too small for blocks.
            let decoder = Decoder::load_held(&config, &weights, DType::F32, held);
            let Some(decoder) = decoder.ok().or_else(|| {
                assert!(held != Held::Wide, "{name}");
                None
            }) else {
                continue;
            };
            packed += usize::from(held != Held::Wide);
            let asked = |at: usize| {
                let lengths = [1, 70, 118, 40, 9, 85];
                let prompt = (0..lengths[at % 6] as u32).map(|i| (i * 37 + 11) % 250 + 3);
                let sampling =
                    Sampling { temperature: 0.7, seed: at as u64, ..Sampling::default() };
                Request {
                    sampling,
                    top_logprobs: Some(2),
                    prompt_logprobs: at.is_multiple_of(5).then_some(1),
                    ..Request::new(prompt.collect(), 7)
                }
            };
            let alone: Vec<Vec<Event>> = (0..20)
                .map(|at| {
                    let mut engine = Engine::new(&decoder, &tokenizer, EngineOptions::default());
                    engine.submit(asked(at)).unwrap();
                    told(&mut engine).into_values().next().unwrap()
                })
                .collect();
            let options = EngineOptions { max_step_tokens: 64, ..EngineOptions::default() };
            let mut engine = Engine::new(&decoder, &tokenizer, options);
            let ids: Vec<RequestId> = (0..20).map(|at| engine.submit(asked(at)).unwrap()).collect();
            let found = told(&mut engine);
            for (at, id) in ids.iter().enumerate() {
                assert_eq!(parts(&found[id]), parts(&alone[at]), "{name} {held:?}, request {at}");
            }
        }
    }
    assert!(packed > 1, "no family was packed");
}

/// What evaluation gives choices behind a shared question, through caches and trees, is what one pass over
/// each gives.
#[test]
fn every_family_scores_choices() {
    for folder in folders() {
        let (config, weights) = open_weights(&folder).unwrap();
        let decoder = Decoder::load(&config, &weights, DType::F64).unwrap();
        let Model { source, .. } = model();
        let model = Model { source, decoder };
        let name = &model.decoder.config().model_type;
        let long = model.decoder.config().max_position_embeddings.min(70) - 8;
        for question in [9, long] {
            let question: Vec<u32> =
                (0..question as u32).map(|i| (i * 37 + 11) % 250 + 3).collect();
            let choices: [&[u32]; 4] = [&[7], &[9, 8], &[9, 8, 41], &[200, 3, 5, 6]];
            let requests = choices.map(|choice| {
                let tokens = [&question[..], choice].concat();
                Scoring { tokens, from: question.len() }
            });
            let mut engine =
                eval::Engine::new(&model.decoder, &model.source.tokenizer, &NoAdapter, &[]);
            let found = engine.score(&requests).unwrap();
            for (found, request) in found.iter().zip(&requests) {
                let expected = plainly(&model, &NoAdapter, request);
                let off = (found.log_likelihood - expected.log_likelihood).abs();
                assert!(off < 1e-8, "{name}: {found:?}, not {expected:?}");
                assert_eq!((found.greedy, found.tokens), (expected.greedy, expected.tokens));
            }
        }
    }
}

/// All events of each request.
fn told(engine: &mut Engine<'_>) -> BTreeMap<RequestId, Vec<Event>> {
    let mut told = BTreeMap::<RequestId, Vec<Event>>::new();
    while !engine.is_idle() {
        let mut events = Vec::new();
        engine.step(&mut events);
        events.into_iter().for_each(|event| told.entry(event.id()).or_default().push(event));
    }
    told
}

/// The log-probabilities, and the tokens with theirs.
fn parts(events: &[Event]) -> Vec<TokenLogprobs> {
    let parts = events.iter().flat_map(|event| match event {
        Event::Prompt { logprobs, .. } => logprobs.clone(),
        Event::Token { logprobs, .. } => logprobs.clone().into_iter().collect(),
        Event::Failed { error, .. } => panic!("{error}"),
        Event::Done { .. } => Vec::new(),
    });
    parts.collect()
}

//! Requests answered together come out as each does alone.

use crate::support::{BLOCK_ROUTERS, Model, SEQUENCE, model, tuned};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::{Tensor, Var, no_grad};
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_model::{CacheDType, Packed};
use hydralora_run::engine::{
    Constraint, Engine, EngineOptions, Event, Finish, Refused, Request, RequestId, ServedAdapter,
    TokenLogprobs,
};
use hydralora_run::{Bias, Sampling};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Bytes of keys and values of 64 tokens of the model.
const BLOCK: usize = 64 * 1280;

/// What came of a request.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    text: String,
    finish: Option<Finish>,
    failed: Option<String>,
    stop: Option<String>,
    prompt: Vec<TokenLogprobs>,
    logprobs: Vec<TokenLogprobs>,
    ends: usize,
}

fn engine(model: &Model, options: EngineOptions) -> Engine<'_> {
    Engine::new(&model.decoder, &model.source.tokenizer, options)
}

/// Adds events to the answers; the prompt is told of before all else, and nothing comes after the end.
fn take(
    answers: &mut BTreeMap<RequestId, Answer>,
    events: Vec<Event>,
    told: &mut BTreeSet<RequestId>,
) {
    for event in events {
        let answer = answers.entry(event.id()).or_default();
        assert_eq!(answer.ends, 0, "{event:?} comes after the end");
        match event {
            Event::Prompt { id, logprobs, .. } => {
                assert!(told.insert(id), "the prompt is told of once");
                answer.prompt = logprobs;
            }
            Event::Token { id, token, text, logprobs, .. } => {
                assert!(told.contains(&id));
                answer.tokens.push(token);
                answer.text += &text;
                answer.logprobs.extend(logprobs);
            }
            Event::Done { finish, text, usage, stop, .. } => {
                assert_eq!(usage.completion_tokens, answer.tokens.len());
                answer.text += &text;
                answer.finish = Some(finish);
                answer.stop = stop;
                answer.ends += 1;
            }
            Event::Failed { error, .. } => {
                answer.failed = Some(error);
                answer.ends += 1;
            }
        }
    }
}

/// Steps until there is nothing to do, within the budget.
fn all(engine: &mut Engine<'_>) -> BTreeMap<RequestId, Answer> {
    let (mut answers, mut told) = (BTreeMap::new(), BTreeSet::new());
    for _ in 0..100_000 {
        if engine.is_idle() {
            assert!(answers.values().all(|answer: &Answer| answer.ends == 1));
            return answers;
        }
        let mut events = Vec::new();
        engine.step(&mut events);
        let stats = engine.stats();
        assert!(stats.cache_bytes <= stats.cache_budget, "{stats:?}");
        take(&mut answers, events, &mut told);
    }
    panic!("the engine does not come to an end: {:?}", engine.stats());
}

fn one(model: &Model, request: Request<'_>) -> Answer {
    let mut engine =
        engine(model, EngineOptions { max_step_tokens: 4096, ..EngineOptions::default() });
    engine.submit(request).unwrap();
    all(&mut engine).into_values().next().unwrap()
}

/// Logits after each of `tokens` from a pass over all of them.
fn plain_logits(model: &Model, adapter: &dyn Adapter, tokens: &[u32]) -> Vec<Vec<f64>> {
    let _guard = no_grad();
    let packed = Packed { tokens, offsets: &[0, tokens.len()] };
    let hidden = model.decoder.hidden(packed, adapter, &Pass::inference()).unwrap();
    let rows: Vec<usize> = (0..tokens.len()).collect();
    let logits = model.decoder.logits_with(adapter, hidden.value(), &rows);
    logits.to_f64().chunks(logits.cols()).map(<[f64]>::to_vec).collect()
}

fn likeliest(logits: &[f64]) -> u32 {
    let better = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
    (1..logits.len()).fold(0, better) as u32
}

/// What is asked of the engine, in words that shrink.
#[derive(Clone, Debug)]
struct Asked {
    adapter: usize,
    shares: usize,
    tail: Vec<u32>,
    temperature: f64,
    new: usize,
    arrives: usize,
    cancelled_at: Option<usize>,
}

const METHODS: [&str; 7] =
    ["none", "lora", "hydralora", SEQUENCE, "prompt-tuning", "prefix-tuning", "ia3"];

fn asked() -> impl Strategy<Value = Asked> {
    let tail = prop::collection::vec(3_u32..500, 1..40);
    let cancelled = prop::option::weighted(0.15, 0_usize..30);
    (0..METHODS.len() + 1, 0_usize..150, tail, 0..3_u8, 0_usize..40, 0_usize..20, cancelled)
        .prop_map(|(adapter, shares, tail, temperature, new, arrives, cancelled_at)| Asked {
            adapter,
            shares,
            tail,
            temperature: f64::from(temperature) / 2.0,
            new,
            arrives,
            cancelled_at,
        })
}

/// Sequences are the shared beginning's first tokens and a tail of their own.
fn request<'a>(
    asked: &Asked,
    seed: u64,
    beginning: &[u32],
    served: &[Option<Arc<ServedAdapter<'a>>>],
) -> Request<'a> {
    let prompt = [&beginning[..asked.shares], &asked.tail].concat();
    // Every third one's draws depend on what it has written, and end late.
    let changed = seed % 3 == 2;
    let sampling = Sampling {
        temperature: asked.temperature,
        seed,
        frequency_penalty: if changed { 0.7 } else { 0.0 },
        repetition_penalty: if changed { 1.2 } else { 1.0 },
        min_new_tokens: if changed { 8 } else { 0 },
        ..Sampling::default()
    };
    let bias = if changed { Bias::from([(300, 4.0), (301, 4.0)]) } else { Bias::default() };
    let end_ids = Arc::from([300, 400]);
    let adapter = served[asked.adapter].clone();
    Request { adapter, sampling, bias, end_ids, ..Request::new(prompt, asked.new) }
}

#[test]
fn mixes_of_requests_are_answered_as_each_alone() {
    let model = model();
    let adapters: Vec<_> = METHODS[1..].iter().map(|method| tuned(&model, method, 0)).collect();
    // One of the same method as another, with other numbers.
    let other = tuned(&model, "hydralora", 1);
    let adapters = adapters.iter().chain([&other]);
    let served = adapters.enumerate().map(|(at, tuned)| {
        Some(Arc::new(ServedAdapter::borrowed(tuned.as_adapter(), [at as u8; 32])))
    });
    let served: Vec<Option<Arc<ServedAdapter<'_>>>> = [None].into_iter().chain(served).collect();
    let beginning: Vec<u32> = (0..150).map(|i| 3 + (i * 37) % 490).collect();
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config { cases: 40, ..Config::default() }, rng);
    let cases = (
        prop::collection::vec(asked(), 1..12),
        (1_usize..100, any::<bool>()),
        1_usize..8,
        0_usize..3,
    );
    let preemptions = std::cell::Cell::new(0);
    runner
        .run(&cases, |(asked, (max_step_tokens, same_bits), max_batch, blocks)| {
            // The longest that is asked fits alone.
            let cache_bytes = (6 + blocks) * BLOCK;
            let options = EngineOptions {
                cache_bytes,
                max_step_tokens,
                max_batch,
                same_bits,
                ..EngineOptions::default()
            };
            let mut engine = engine(&model, options);
            let (mut answers, mut told) = (BTreeMap::new(), BTreeSet::new());
            let (mut ids, mut cancelled) = (BTreeMap::new(), BTreeSet::new());
            let mut step = 0;
            while step < 60 || !engine.is_idle() {
                for (at, asked) in asked.iter().enumerate() {
                    if asked.arrives == step {
                        let request = request(asked, at as u64, &beginning, &served);
                        ids.insert(at, engine.submit(request).unwrap());
                    }
                    if asked.cancelled_at.map(|at| at + asked.arrives) == Some(step) {
                        engine.cancel(ids[&at]);
                        cancelled.insert(at);
                    }
                }
                let mut events = Vec::new();
                engine.step(&mut events);
                let stats = engine.stats();
                prop_assert!(stats.cache_bytes <= cache_bytes, "{:?}", stats);
                for event in &events {
                    let gone = cancelled.iter().any(|at| ids[at] == event.id());
                    prop_assert!(!gone, "{:?} after it was cancelled", event);
                }
                take(&mut answers, events, &mut told);
                step += 1;
                prop_assert!(step < 50_000, "no end: {:?}", stats);
            }
            preemptions.set(preemptions.get() + engine.stats().preemptions);
            for (at, asked) in asked.iter().enumerate() {
                let found = answers.get(&ids[&at]).cloned().unwrap_or_default();
                let expected = one(&model, request(asked, at as u64, &beginning, &served));
                if cancelled.contains(&at) {
                    prop_assert!(expected.tokens.starts_with(&found.tokens));
                } else {
                    prop_assert_eq!(found, expected, "request {}", at);
                }
            }
            Ok(())
        })
        .unwrap();
    assert!(preemptions.get() > 0, "no case was short of room");
}

#[test]
fn beginnings_are_known_by_what_computed_them() {
    let model = model();
    let adapters = [0, 1].map(|seed| tuned(&model, "hydralora", seed));
    let lead = tuned(&model, "prefix-tuning", 0);
    let sequence = tuned(&model, SEQUENCE, 0);
    let serve = |adapter, byte: u8| Some(Arc::new(ServedAdapter::borrowed(adapter, [byte; 32])));
    let prompt: Vec<u32> = (0..150).map(|i| 3 + (i * 53) % 490).collect();
    let mut engine = engine(&model, EngineOptions::default());
    let mut ask = |adapter: Option<Arc<_>>, prompt: &[u32]| {
        let alone =
            one(&model, Request { adapter: adapter.clone(), ..Request::new(prompt.to_vec(), 10) });
        engine.submit(Request { adapter, ..Request::new(prompt.to_vec(), 10) }).unwrap();
        let before = engine.stats().prefix_hits;
        assert_eq!(all(&mut engine).into_values().next().unwrap(), alone);
        engine.stats().prefix_hits - before
    };
    // The base, one adapter, one of other numbers, one with learned positions, and one that remembers: each
    // knows its own only.
    let served = [
        None,
        serve(adapters[0].as_adapter(), 1),
        serve(adapters[1].as_adapter(), 2),
        serve(lead.as_adapter(), 3),
        serve(sequence.as_adapter(), 4),
    ];
    for adapter in &served {
        assert_eq!(ask(adapter.clone(), &prompt), 0);
        assert_eq!(ask(adapter.clone(), &prompt), 128);
        // As much is left to read as the kernels for many rows ask.
        assert_eq!(ask(adapter.clone(), &prompt[..143]), 64);
        let other = [&prompt[..70], &[5, 6, 7], &prompt[70..]].concat();
        assert_eq!(ask(adapter.clone(), &other), 64);
    }
    // The same content served anew.
    assert_eq!(ask(serve(adapters[0].as_adapter(), 1), &prompt), 128);
    assert_eq!(ask(serve(adapters[0].as_adapter(), 9), &prompt), 0);
}

#[test]
fn keys_and_values_in_fewer_bits_stay_close() {
    let model = model();
    let story = "Once upon a time there was a little girl named Lily. She had a red ball and she \
                 liked to play with it in the park every day with her friend Tom.";
    let prompt = model.source.tokenizer.encode(story).unwrap();
    let read = |cache_dtype| {
        let options =
            EngineOptions { cache_dtype, prefix_reuse: false, ..EngineOptions::default() };
        let mut engine = engine(&model, options);
        let asked = Request { prompt_logprobs: Some(0), ..Request::new(prompt.clone(), 3) };
        engine.submit(asked).unwrap();
        let mut events = Vec::new();
        engine.step(&mut events);
        let bytes = engine.stats().cache_bytes;
        let Some(Event::Prompt { logprobs, .. }) = events.first() else { panic!("{events:?}") };
        let logprobs: Vec<f64> = logprobs.iter().map(|of| of.logprob).collect();
        (bytes, logprobs)
    };
    let (bytes, expected) = read(CacheDType::F32);
    for (of, share, allowed) in
        [(CacheDType::F16, 0.5, [1e-3, 6e-3]), (CacheDType::Q8, 0.29, [6e-2, 0.4])]
    {
        let (fewer, found) = read(of);
        assert!(fewer as f64 <= share * bytes as f64, "{of:?}: {fewer} of {bytes}");
        let off: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).collect();
        let mean = off.iter().sum::<f64>() / off.len() as f64;
        let worst = off.iter().copied().fold(0.0, f64::max);
        let [of_mean, of_worst] = allowed;
        assert!(mean > 0.0, "{of:?} is not stored as it");
        assert!(mean < of_mean && worst < of_worst, "{of:?}: off by {mean}, at most {worst}");
    }
}

/// What is left out of a comparison to the last bit is in the engine's own words: learned embeddings.
#[test]
fn what_a_request_gets_is_the_same_to_the_last_bit() {
    let model = model();
    let prompts: Vec<Vec<u32>> = [1, 9, 40, 66, 130, 200, 300, 64, 80, 17, 31, 5]
        .iter()
        .enumerate()
        .map(|(at, &len)| (0..len).map(|i| 3 + (i * 53 + at as u32 / 3 * 7) % 490).collect())
        .collect();
    let methods = ["lora", "hydralora", "flylora", "ia3", SEQUENCE, BLOCK_ROUTERS, "prefix-tuning"];
    let adapters: Vec<_> = methods.iter().map(|method| tuned(&model, method, 0)).collect();
    let serve = |at: usize| {
        let adapter = adapters.get(at)?.as_adapter();
        Some(Arc::new(ServedAdapter::borrowed(adapter, [at as u8; 32])))
    };
    // The last is the base.
    let served: Vec<_> = (0..=adapters.len()).map(serve).collect();
    let asked = |at: usize| Request {
        adapter: served[at % served.len()].clone(),
        top_logprobs: Some(3),
        prompt_logprobs: (at % 3 == 1).then_some(1),
        continues: at % 2 == 1,
        sampling: Sampling { temperature: 0.8, seed: at as u64, ..Sampling::default() },
        ..Request::new(prompts[at % prompts.len()].clone(), 20 + at % 7)
    };
    let alone: Vec<Answer> = (0..36).map(|at| one(&model, asked(at))).collect();
    for (max_step_tokens, blocks) in [(64, 7), (100, 12), (512, 1000)] {
        let cache_bytes = blocks * BLOCK;
        let options = EngineOptions { cache_bytes, max_step_tokens, ..EngineOptions::default() };
        let mut engine = engine(&model, options);
        let ids: Vec<RequestId> = (0..36).map(|at| engine.submit(asked(at)).unwrap()).collect();
        let found = all(&mut engine);
        for (at, id) in ids.iter().enumerate() {
            assert_eq!(found[id], alone[at], "request {at}, {max_step_tokens} a step");
        }
        let stats = engine.stats();
        assert!(blocks > 7 || stats.preemptions > 0, "{stats:?}");
        assert!(blocks < 1000 || stats.prefix_hits > 0, "{stats:?}");
    }
}

#[test]
fn greedy_texts_are_those_of_whole_passes() {
    let model = model();
    for method in METHODS {
        let own = (method != "none").then(|| tuned(&model, method, 0));
        let adapter: &dyn Adapter = own.as_ref().map_or(&NoAdapter, |tuned| tuned.as_adapter());
        let served = own
            .as_ref()
            .map(|tuned| Arc::new(ServedAdapter::borrowed(tuned.as_adapter(), [1; 32])));
        let prompt: Vec<u32> = (0..150).map(|i| 3 + (i * 53) % 490).collect();
        let options = EngineOptions { max_step_tokens: 64, ..EngineOptions::default() };
        let mut engine = engine(&model, options);
        let asked = Request {
            adapter: served,
            top_logprobs: Some(2),
            prompt_logprobs: Some(3),
            ..Request::new(prompt.clone(), 12)
        };
        engine.submit(asked).unwrap();
        let answer = all(&mut engine).into_values().next().unwrap();
        let mut tokens = prompt.clone();
        for token in &answer.tokens {
            let expected = likeliest(plain_logits(&model, adapter, &tokens).last().unwrap());
            assert_eq!(*token, expected, "{method}");
            tokens.push(*token);
        }
        assert_eq!((answer.tokens.len(), answer.prompt.len()), (12, prompt.len() - 1));
        let logits = plain_logits(&model, adapter, &tokens);
        let told = answer.prompt.iter().map(|of| (of, 3));
        for (at, (found, top)) in told.chain(answer.logprobs.iter().map(|of| (of, 2))).enumerate() {
            let row = &logits[at];
            let sum: f64 = row.iter().map(|logit| logit.exp()).sum();
            assert_eq!(found.token, tokens[at + 1]);
            let expected = row[found.token as usize] - sum.ln();
            assert!((found.logprob - expected).abs() < 1e-4, "{method}: {found:?} {expected}");
            // Equally likely ones but for rounding may stand in any order.
            let above = |bound: f64| row.iter().filter(|&&logit| logit > bound).count();
            let own = row[found.token as usize];
            assert!((above(own + 1e-4) + 1..=above(own - 1e-4)).contains(&found.rank), "{found:?}");
            assert_eq!(found.top.len(), top);
            assert_eq!(found.top[0].0, likeliest(row));
            assert!(found.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        }
    }
}

#[test]
fn texts_to_stop_at_are_met_across_tokens() {
    let model = model();
    let tokenizer = &model.source.tokenizer;
    let prompt = tokenizer.encode("Once upon a time there was a little girl").unwrap();
    let whole = one(&model, Request::new(prompt.clone(), 60));
    let text = whole.text.clone();
    assert!(text.len() > 60 && text.is_ascii());
    for (from, to) in [(10, 12), (17, 29), (30, 31), (40, 55)] {
        let stop = text[from..to].to_owned();
        let request = Request {
            stops: vec!["never in it".to_owned(), stop.clone()],
            ..Request::new(prompt.clone(), 60)
        };
        let answer = one(&model, request);
        assert_eq!(answer.text, text[..text.find(&stop).unwrap()]);
        assert_eq!(answer.finish, Some(Finish::Stop));
        assert_eq!(answer.stop, Some(stop));
        assert!(whole.tokens.starts_with(&answer.tokens));
    }
    // A token at which it ends is none of it.
    let end = whole.tokens[9];
    let first = whole.tokens.iter().position(|&token| token == end).unwrap();
    let answer = one(&model, Request { end_ids: [end].into(), ..Request::new(prompt, 60) });
    assert_eq!(
        (answer.tokens, answer.finish),
        (whole.tokens[..first].to_vec(), Some(Finish::Stop))
    );
}

#[test]
fn a_text_that_goes_on_keeps_its_space_and_stops_see_it() {
    let model = model();
    let tokenizer = &model.source.tokenizer;
    let prompt = tokenizer.encode("Once upon a time, there was a").unwrap();
    let asked = |continues, stops: &[&str]| Request {
        continues,
        stops: stops.iter().map(|stop| (*stop).to_owned()).collect(),
        ..Request::new(prompt.clone(), 12)
    };
    let [own, behind] = [false, true].map(|continues| one(&model, asked(continues, &[])));
    assert_eq!(behind.tokens, own.tokens);
    let all = tokenizer.decode(&[prompt.clone(), own.tokens].concat(), true).unwrap();
    let before = tokenizer.decode(&prompt, true).unwrap();
    assert_eq!(before + &behind.text, all);
    assert_eq!(behind.text, format!(" {}", own.text));
    let first = own.text.split(' ').next().unwrap();
    let stopped = one(&model, asked(true, &[&format!(" {first} ")]));
    assert_eq!((stopped.text.as_str(), stopped.finish), ("", Some(Finish::Stop)));
}

#[test]
fn what_can_never_be_answered_is_refused() {
    let model = model();
    let context = model.source.config.context_length();
    let options =
        EngineOptions { cache_bytes: 4 * BLOCK, max_waiting: 2, ..EngineOptions::default() };
    let mut engine = engine(&model, options);
    let refused = |engine: &mut Engine<'_>, prompt: Vec<u32>| {
        engine.submit(Request::new(prompt, 4)).unwrap_err()
    };
    assert_eq!(refused(&mut engine, Vec::new()), Refused::Empty);
    let unknown = refused(&mut engine, vec![5, 100_000]);
    assert_eq!(unknown, Refused::UnknownToken { id: 100_000, vocabulary: 512 });
    let long = refused(&mut engine, vec![5; context + 1]);
    assert_eq!(long, Refused::TooLong { tokens: context + 1, context });
    let large = refused(&mut engine, vec![5; 5 * 64]);
    assert_eq!(large, Refused::TooLarge { bytes: 5 * BLOCK, budget: 4 * BLOCK });
    let sampling = Sampling { temperature: -1.0, ..Sampling::default() };
    let senseless = engine.submit(Request { sampling, ..Request::new(vec![5], 4) }).unwrap_err();
    assert!(senseless.to_string().contains("temperature is -1"), "{senseless}");
    // What fits is answered as far as there is room.
    engine.submit(Request::new(vec![5; 4 * 64 - 10], 400)).unwrap();
    engine.submit(Request::new(vec![5; 40], 3)).unwrap();
    assert_eq!(refused(&mut engine, vec![5; 5]), Refused::QueueFull { waiting: 2 });
    let answers: Vec<Answer> = all(&mut engine).into_values().collect();
    assert_eq!((answers[0].tokens.len(), answers[0].finish), (11, Some(Finish::Length)));
    assert_eq!(answers[1].tokens.len(), 3);
    // At the context's end too.
    let answer = one(&model, Request::new(vec![5; context - 4], 400));
    assert_eq!((answer.tokens.len(), answer.finish), (5, Some(Finish::Length)));
}

/// Even tokens, three of them.
struct Even(usize);

impl Constraint for Even {
    fn allow(&mut self, allowed: &mut [u64]) -> Result<(), String> {
        // Beyond the vocabulary too, which is nobody's harm.
        allowed.fill(0x5555_5555_5555_5555);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.0 += 1;
        if token.is_multiple_of(2) { Ok(()) } else { Err(format!("{token} is odd")) }
    }

    fn is_done(&self) -> bool {
        self.0 == 3
    }
}

/// Allows nothing.
struct Nothing;

impl Constraint for Nothing {
    fn allow(&mut self, _: &mut [u64]) -> Result<(), String> {
        Ok(())
    }

    fn accept(&mut self, _: u32) -> Result<(), String> {
        Ok(())
    }

    fn is_done(&self) -> bool {
        false
    }
}

#[test]
fn a_constraint_says_what_may_come() {
    let model = model();
    let even = Request { constraint: Some(Box::new(Even(0))), ..Request::new(vec![5, 9], 20) };
    let answer = one(&model, even);
    assert_eq!((answer.tokens.len(), answer.finish), (3, Some(Finish::Stop)));
    let mut tokens = vec![5, 9];
    for token in answer.tokens {
        let mut logits = plain_logits(&model, &NoAdapter, &tokens).pop().unwrap();
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f64::NEG_INFINITY);
        assert_eq!(token, likeliest(&logits));
        tokens.push(token);
    }
    let nothing = Request { constraint: Some(Box::new(Nothing)), ..Request::new(vec![5, 9], 20) };
    let answer = one(&model, nothing);
    assert_eq!(answer.failed.as_deref(), Some("the constraint allows no token"));
}

/// Whatever it touches is no number.
struct Broken;

impl Adapter for Broken {
    fn embed(&self, tokens: &[u32], frozen: &FrozenLinear) -> Var {
        let rows = frozen.gather(tokens);
        Var::constant(Tensor::new(vec![f32::NAN; rows.len()], rows.shape()))
    }
}

#[test]
fn a_request_that_fails_leaves_the_others_as_they_are() {
    let model = model();
    let broken = Arc::new(ServedAdapter::new(Box::new(Broken), [9; 32]));
    let mut engine = engine(&model, EngineOptions::default());
    let prompts = [vec![5, 9, 14], vec![7, 8], vec![30, 31, 32, 33]];
    let ids: Vec<RequestId> = (prompts.iter().enumerate())
        .map(|(at, prompt)| {
            let adapter = (at == 1).then(|| broken.clone());
            engine.submit(Request { adapter, ..Request::new(prompt.clone(), 8) }).unwrap()
        })
        .collect();
    let answers = all(&mut engine);
    assert!(answers[&ids[1]].failed.is_some());
    for at in [0, 2] {
        assert_eq!(answers[&ids[at]], one(&model, Request::new(prompts[at].clone(), 8)));
    }
}

#[test]
fn gates_of_every_token_are_told() {
    let model = model();
    let tuned = tuned(&model, "hydralora", 0);
    let served = Arc::new(ServedAdapter::borrowed(tuned.as_adapter(), [1; 32]));
    let prompt: Vec<u32> = (0..150).map(|i| 3 + (i * 53) % 490).collect();
    let asked = |routing| Request {
        adapter: Some(served.clone()),
        routing,
        ..Request::new(prompt.clone(), 6)
    };
    let mut engine =
        engine(&model, EngineOptions { max_step_tokens: 64, ..EngineOptions::default() });
    let id = engine.submit(asked(true)).unwrap();
    engine.submit(asked(false)).unwrap();
    let (mut of_prompt, mut of_text, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    while !engine.is_idle() {
        let mut events = Vec::new();
        engine.step(&mut events);
        for event in events {
            match event {
                Event::Prompt { id: of, gates, .. } if of == id => of_prompt = gates,
                Event::Token { id: of, token, gates, .. } if of == id => {
                    tokens.push(token);
                    of_text.extend(gates);
                }
                Event::Token { gates, .. } => assert!(gates.is_none()),
                _ => {}
            }
        }
    }
    assert_eq!(tokens, one(&model, asked(false)).tokens);
    assert_eq!((of_prompt.len(), of_text.len()), (150, 6));
    // What predicted the first new token is the prompt's last.
    assert_eq!(of_prompt[149], of_text[0]);
    let sites = of_prompt[0].sites.len();
    assert!(sites > 0);
    for gates in of_prompt.iter().chain(&of_text) {
        assert_eq!(gates.sites.len(), sites);
        for (_, gates) in &gates.sites {
            assert!((gates.iter().sum::<f32>() - 1.0).abs() < 1e-4);
        }
    }
    assert_ne!(of_prompt[0], of_prompt[1]);
}

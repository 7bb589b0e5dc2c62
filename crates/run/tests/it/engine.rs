//! Shared work gives the same answers as each request alone.

use crate::support::{Model, SEQUENCE, model, plainly, tuned};
use hydralora_kernels::no_grad;
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_model::{Packed, Run, Tree};
use hydralora_run::eval::{Engine, Scored, Scoring, Writing, Written};
use hydralora_run::{Generation, Generator, Request, Sampling};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

fn engine<'a>(model: &'a Model, adapter: &'a dyn Adapter) -> Engine<'a> {
    Engine::new(&model.decoder, &model.source.tokenizer, adapter, model.source.tokenizer.end_ids())
}

fn assert_same(found: &Scored, expected: &Scored) {
    let difference = (found.log_likelihood - expected.log_likelihood).abs();
    assert!(difference < 1e-4 * (1.0 + expected.log_likelihood.abs()), "{found:?} {expected:?}");
    assert_eq!((found.greedy, found.tokens), (expected.greedy, expected.tokens));
}

fn requests() -> impl Strategy<Value = Vec<Scoring>> {
    let tail = (prop::collection::vec(3_u32..500, 2..30), 1_usize..30);
    let beginning = prop::collection::vec(3_u32..500, 1..120);
    (beginning, prop::collection::vec((any::<bool>(), tail), 1..12)).prop_map(|(shared, tails)| {
        tails
            .into_iter()
            .map(|(shares, (tail, from))| {
                let start = if shares { shared.clone() } else { Vec::new() };
                let from = (start.len() + from).min(start.len() + tail.len() - 1);
                Scoring { tokens: [start, tail].concat(), from }
            })
            .collect()
    })
}

#[test]
fn shared_beginnings_score_as_each_alone() {
    let model = model();
    let mut runner = TestRunner::new(Config { cases: 24, ..Config::default() });
    let tuned = tuned(&model, SEQUENCE, 0);
    for adapter in [&NoAdapter as &dyn Adapter, tuned.as_adapter()] {
        // One engine for all cases, so that what it keeps between them is met too.
        let kept = std::cell::RefCell::new(engine(&model, adapter));
        runner
            .run(&requests(), |requests| {
                let mut kept = kept.borrow_mut();
                for _ in 0..2 {
                    let found = kept.score(&requests).unwrap();
                    for (found, request) in found.iter().zip(&requests) {
                        assert_same(found, &plainly(&model, adapter, request));
                    }
                }
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn beginnings_longer_than_a_pass_go_through_a_cache() {
    let model = model();
    let shared: Vec<u32> = (0..300).map(|i| 3 + (i * 37) % 490).collect();
    let requests: Vec<Scoring> = (0..40)
        .map(|i| {
            let tail: Vec<u32> = (0..90).map(|j| 3 + (i * 53 + j * 11) % 490).collect();
            Scoring { tokens: [shared.clone(), tail].concat(), from: 380 }
        })
        .collect();
    for adapter in ["none", "hydralora", SEQUENCE, "prompt-tuning", "prefix-tuning"] {
        let tuned = (adapter != "none").then(|| tuned(&model, adapter, 0));
        let adapter: &dyn Adapter = tuned.as_ref().map_or(&NoAdapter, |tuned| tuned.as_adapter());
        let mut engine = engine(&model, adapter);
        let found = engine.score(&requests).unwrap();
        let again = engine.score(&requests[3..7]).unwrap();
        for (index, request) in requests.iter().enumerate().step_by(13) {
            assert_same(&found[index], &plainly(&model, adapter, request));
        }
        for (index, found) in again.iter().enumerate() {
            assert_same(found, &plainly(&model, adapter, &requests[3 + index]));
        }
    }
}

#[test]
fn what_does_not_fit_loses_its_beginning() {
    let model = model();
    let context = model.source.config.max_position_embeddings;
    let tokens: Vec<u32> = (0..context as u32 + 40).map(|i| 3 + (i * 37) % 490).collect();
    let request = Scoring { from: tokens.len() - 5, tokens };
    let found = engine(&model, &NoAdapter).score(std::slice::from_ref(&request)).unwrap();
    let kept = request.tokens[request.tokens.len() - 1 - context..].to_vec();
    // The last token is predicted from `context` tokens before it.
    let mut expected = Scored { log_likelihood: 0.0, greedy: true, tokens: 5 };
    let packed = Packed { tokens: &kept[..context], offsets: &[0, context] };
    let _guard = no_grad();
    let hidden = model.decoder.hidden(packed, &NoAdapter, &Pass::inference()).unwrap();
    for at in context - 4..=context {
        let logits = model.decoder.logits(hidden.value(), &[at - 1]).to_f64();
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        expected.log_likelihood += logits[kept[at] as usize] - sum.ln();
        expected.greedy &= logits.iter().all(|logit| *logit <= logits[kept[at] as usize]);
    }
    assert_same(&found[0], &expected);
}

#[test]
fn texts_written_together_are_those_written_alone() {
    let model = model();
    let tokenizer = &model.source.tokenizer;
    let story = "Once upon a time there was a little girl named Lily. She had a red ball and she \
                 liked to play with it in the park every day with her friend Tom.";
    let ends = [" One day", " She said", " One day", " The dog", ""];
    let requests: Vec<Writing> = (ends.iter().enumerate())
        .map(|(index, end)| Writing {
            prompt: tokenizer.encode(&format!("{story}{end}")).unwrap(),
            stops: vec!["Tom".to_owned()],
            max_new_tokens: 10 + 7 * index,
            sampling: Sampling {
                repetition_penalty: if index % 2 == 0 { 1.0 } else { 1.3 },
                ..Sampling::default()
            },
            continues: index % 2 == 1,
        })
        .collect();
    for adapter in ["none", "hydralora", SEQUENCE, "prompt-tuning", "prefix-tuning"] {
        let tuned = (adapter != "none").then(|| tuned(&model, adapter, 0));
        let adapter: &dyn Adapter = tuned.as_ref().map_or(&NoAdapter, |tuned| tuned.as_adapter());
        let mut found = vec![None; requests.len()];
        let mut engine = engine(&model, adapter);
        let mut take = |index: usize, written: Written| {
            found[index] = Some(written);
            Ok(())
        };
        engine.write(&requests, &mut take).unwrap();
        for (request, found) in requests.iter().zip(&found) {
            let ends = tokenizer.end_ids();
            let mut generator = Generator::new(&model.decoder, tokenizer, adapter, ends, false);
            let asked = Request {
                prompt: &request.prompt,
                sampling: request.sampling,
                max_new_tokens: request.max_new_tokens,
                stops: &request.stops,
                continues: request.continues,
            };
            let mut shown = String::new();
            let mut watch = |piece: &str| {
                shown += piece;
                true
            };
            let alone = generator.generate(asked, &mut watch).unwrap();
            assert_eq!(shown, alone.text);
            let Generation { text, tokens, finish, .. } = alone;
            let expected = Written { text, tokens: tokens.len(), finish };
            assert_eq!(found.as_ref(), Some(&expected));
        }
    }
}

#[test]
fn sampled_texts_follow_their_seed() {
    let model = model();
    let prompt = model.source.tokenizer.encode("Once upon a time").unwrap();
    let write = |seed: u64| {
        let sampling = Sampling { temperature: 1.5, seed, ..Sampling::default() };
        let request = Writing {
            prompt: prompt.clone(),
            stops: Vec::new(),
            max_new_tokens: 20,
            sampling,
            continues: true,
        };
        let mut texts = Vec::new();
        let mut take = |_: usize, written: Written| {
            texts.push(written.text);
            Ok(())
        };
        engine(&model, &NoAdapter).write(&[request.clone(), request], &mut take).unwrap();
        assert_eq!(texts[0], texts[1]);
        texts[0].clone()
    };
    assert_eq!(write(1), write(1));
    assert_ne!(write(1), write(2));
}

#[test]
fn losses_are_those_of_the_labelled_tokens() {
    let model = model();
    let tokens: Vec<u32> = (0..40).map(|i| 3 + (i * 37) % 490).collect();
    let mut labels = [hydralora_model::IGNORE_LABEL; 40];
    labels[30..].copy_from_slice(&tokens[30..]);
    let pairs = [(&tokens[..], &labels[..]), (&tokens[..35], &labels[..35])];
    let found = engine(&model, &NoAdapter).losses(&pairs).unwrap();
    for ((sum, count), end) in found.into_iter().zip([40, 35]) {
        let request = Scoring { tokens: tokens[..end].to_vec(), from: 30 };
        let expected = plainly(&model, &NoAdapter, &request);
        assert_eq!(count, end - 30);
        assert!((sum + expected.log_likelihood).abs() < 1e-3, "{sum} {expected:?}");
    }
}

#[test]
fn a_tree_without_a_cache_refuses_learned_positions() {
    let model = model();
    let tuned = tuned(&model, "prompt-tuning", 0);
    let tree = Tree { tokens: &[5, 6], runs: &[Run { len: 2, parent: None }] };
    let pass = Pass::inference();
    let refused = model.decoder.hidden_tree(tree, None, tuned.as_adapter(), &pass).unwrap_err();
    assert!(refused.to_string().contains("learned positions"), "{refused}");
}

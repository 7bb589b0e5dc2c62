//! Gates that depend on all tokens of a text so far: the same however the text is read.

use super::{Model, model};
use hydralora_kernels::{DType, Tensor, no_grad};
use hydralora_model::adapter::{Adapter, GateObserver, NoAdapter, Pass, Site};
use hydralora_model::{Cache, Packed, Run, Tree};
use hydralora_peft::{Tuned, methods};
use serde_json::{Value, json};
use std::cell::RefCell;

/// An adapter whose gates are sharp and whose heads differ.
fn build(model: &Model, more: Value) -> Box<dyn Tuned> {
    let mut options = json!({
        "route_on": "sequence", "num_experts": 3, "rank": 2, "alpha": 8, "targets": "all",
        "router_gain": 20.0,
    });
    let section = options.as_object_mut().unwrap();
    section.extend(more.as_object().unwrap().clone());
    let options = methods::find("hydralora").unwrap().read_recipe(section).unwrap();
    let mut tuned = model.build(options.as_ref());
    for trainable in tuned.trainables_mut() {
        if !trainable.parameter.name().contains("lora_B") {
            continue;
        }
        let data = trainable.parameter.value_mut().data_mut::<f64>();
        for (at, value) in data.iter_mut().enumerate() {
            *value += 0.3 * (at as f64 * 1.3).sin();
        }
    }
    tuned
}

fn near(found: &[f64], wanted: &[f64], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let off = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < 1e-9, "{what}: off by {off}");
}

/// Final hidden states of texts read whole, one after the other.
fn whole(model: &Model, adapter: &dyn Adapter, texts: &[&[u32]]) -> Vec<f64> {
    let _guard = no_grad();
    let mut offsets = vec![0];
    texts.iter().for_each(|text| offsets.push(offsets[offsets.len() - 1] + text.len()));
    let tokens = texts.concat();
    let batch = Packed { tokens: &tokens, offsets: &offsets };
    model.decoder.hidden(batch, adapter, &Pass::inference()).unwrap().value().to_f64()
}

fn extend(model: &Model, adapter: &dyn Adapter, cache: &mut Cache, tokens: &[u32]) -> Vec<f64> {
    let batch = Packed { tokens, offsets: &[0, tokens.len()] };
    let caches = std::slice::from_mut(cache);
    model.decoder.extend(batch, caches, adapter, &Pass::inference()).unwrap().to_f64()
}

#[test]
fn a_text_has_its_gates_however_it_is_read() {
    let model = model(DType::F64);
    let width = model.decoder.config().hidden_size;
    let text: Vec<u32> = (0..23).map(|i| 3 + (i * 37) % 490).collect();
    let other: Vec<u32> = (0..9).map(|i| 5 + (i * 53) % 490).collect();
    for more in [
        json!({}),
        json!({"router_scope": "block", "router_top_k": 2, "router_bias": true}),
        json!({"init_lora_weights": "rlora"}),
    ] {
        let tuned = build(&model, more.clone());
        let adapter = tuned.as_adapter();
        let of_text = whole(&model, adapter, &[&text]);
        let of_other = whole(&model, adapter, &[&other]);
        // It matters what came before.
        let mut changed = text.clone();
        changed[0] = 400;
        let off = whole(&model, adapter, &[&changed]);
        assert!(off[22 * width] != of_text[22 * width]);
        // What comes after does not.
        near(&whole(&model, adapter, &[&text[..11]]), &of_text[..11 * width], "a beginning");
        // In a batch.
        let both = whole(&model, adapter, &[&other, &text, &other]);
        near(&both, &[&of_other[..], &of_text, &of_other].concat(), "a batch");
        // In parts, token by token, and after tokens were taken back.
        for parts in [&[10, 23][..], &[1, 2, 3, 20, 23], &[7, 8, 9, 23]] {
            let (mut cache, mut from, mut found) = (model.decoder.new_cache(), 0, Vec::new());
            for &to in parts {
                found.extend(extend(&model, adapter, &mut cache, &text[from..to]));
                from = to;
            }
            near(&found, &of_text, "parts");
            cache.truncate(12);
            let again = extend(&model, adapter, &mut cache, &text[12..]);
            near(&again, &of_text[12 * width..], "taken back");
            // What a cache holds of the beginning serves another text with it.
            let block = cache.block(0..8).unwrap();
            let mut fresh = model.decoder.new_cache();
            fresh.append(&block, &text[..8]);
            let second = cache.block(8..10).unwrap();
            fresh.append(&second, &text[8..10]);
            let rest = extend(&model, adapter, &mut fresh, &text[10..]);
            near(&rest, &of_text[10 * width..], "a known beginning");
            let mut fork = fresh.fork(3);
            fork.truncate(20);
            let rest = extend(&model, adapter, &mut fork, &text[20..]);
            near(&rest, &of_text[20 * width..], "a copy");
        }
        // Beside texts of other adapters, which stand between.
        let mut caches: Vec<Cache> = (0..4).map(|_| model.decoder.new_cache()).collect();
        let plain = build(&model, json!({"route_on": "x"}));
        let adapters = [adapter, &NoAdapter, plain.as_adapter(), adapter];
        let mut found = [Vec::new(), Vec::new()];
        for (from, to) in [(0, 5), (5, 6), (6, 9)] {
            let texts = [&text[from..to], &other[from..to], &other[from..to], &other[from..to]];
            let rows = to - from;
            let offsets: Vec<usize> = (0..=4).map(|at| at * rows).collect();
            let tokens = texts.concat();
            let batch = Packed { tokens: &tokens, offsets: &offsets };
            let pass = Pass::inference();
            let all = model.decoder.extend_each(batch, &mut caches, &adapters, &pass).unwrap();
            let all = all.to_f64();
            found[0].extend_from_slice(&all[..rows * width]);
            found[1].extend_from_slice(&all[3 * rows * width..]);
        }
        near(&found[0], &of_text[..9 * width], "among others");
        near(&found[1], &of_other, "behind others");
        // As a tree: two continuations of one beginning, behind a cache and without one.
        for cached in [0, 4] {
            let mut cache = model.decoder.new_cache();
            if cached > 0 {
                extend(&model, adapter, &mut cache, &text[..cached]);
            }
            let runs = [
                Run { len: 11 - cached, parent: None },
                Run { len: 3, parent: Some(0) },
                Run { len: 9, parent: Some(0) },
                Run { len: 9, parent: Some(1) },
            ];
            let first: Vec<u32> = [&text[cached..11], &text[11..14], &other, &text[14..]].concat();
            let tree = Tree { tokens: &first, runs: &runs };
            let cache = (cached > 0).then_some(&cache);
            let pass = Pass::inference();
            let rows = model.decoder.hidden_tree(tree, cache, adapter, &pass).unwrap().to_f64();
            let at = |row: usize| (row - cached) * width;
            near(&rows[..at(14)], &of_text[cached * width..14 * width], "a tree's beginning");
            near(&rows[at(23)..], &of_text[14 * width..], "a tree's branch");
            let branch: Vec<u32> = [&text[..11], &other].concat();
            let wanted = whole(&model, adapter, &[&branch]);
            near(&rows[at(14)..at(23)], &wanted[11 * width..], "a tree's other branch");
        }
    }
}

/// Keeps the gates of every site.
#[derive(Default)]
struct Seen(RefCell<Vec<(Site, Vec<f64>)>>);

impl GateObserver for Seen {
    fn observe(&self, site: Site, gates: &Tensor) {
        self.0.borrow_mut().push((site, gates.to_f64()));
    }
}

/// Gates settle: with every token the mean moves less.
#[test]
fn gates_of_a_sequence_move_less_and_less() {
    let model = model(DType::F64);
    let text: Vec<u32> = (0..120).map(|i| 3 + (i * 37) % 490).collect();
    let moves = |route_on: &str| -> [f64; 2] {
        let tuned = build(&model, json!({"route_on": route_on}));
        let seen = Seen::default();
        let batch = Packed { tokens: &text, offsets: &[0, text.len()] };
        let pass = Pass::inference().observed_by(&seen);
        let _guard = no_grad();
        model.decoder.hidden(batch, tuned.as_adapter(), &pass).unwrap();
        let mut sums = [0.0; 2];
        for (_, gates) in seen.0.borrow().iter() {
            let rows: Vec<&[f64]> = gates.chunks_exact(3).collect();
            let step = |at: usize| {
                rows[at].iter().zip(rows[at - 1]).map(|(a, b)| (a - b).abs()).sum::<f64>()
            };
            sums[0] += (1..20).map(step).sum::<f64>();
            sums[1] += (101..120).map(step).sum::<f64>();
        }
        sums
    };
    let [early, late] = moves("sequence");
    assert!(late < 0.35 * early, "{early} {late}");
    let [early, late] = moves("x");
    assert!(late > 0.5 * early, "{early} {late}");
}

//! Rows of several adapters, of every method, in one batch.

use super::{cases, model};
use hydralora_kernels::DType;
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_model::{Cache, Error, Packed};
use hydralora_peft::Tuned;

/// One sequence of a batch.
struct Sequence<'a> {
    name: String,
    adapter: &'a dyn Adapter,
    tokens: &'a [u32],
    cache: Cache,
}

fn moved(mut tuned: Box<dyn Tuned>) -> Box<dyn Tuned> {
    for trainable in tuned.trainables_mut() {
        for value in trainable.parameter.value_mut().data_mut::<f32>() {
            *value += 0.02;
        }
    }
    tuned
}

#[test]
fn rows_of_several_adapters_share_a_batch() {
    let model = model(DType::F32);
    let (width, base) = (model.decoder.config().hidden_size, NoAdapter);
    let tuned: Vec<(String, Box<dyn Tuned>)> = cases()
        .iter()
        .map(|case| (case.name(), moved(model.build(case.options().as_ref()))))
        .collect();
    let examples = [0, 2].map(|at| model.dataset.train.get(at).unwrap().tokens);
    // Every adapter, and the base between them.
    let adapters = tuned.iter().flat_map(|(name, tuned)| {
        [(name.clone(), tuned.as_adapter()), ("base".to_owned(), &base as &dyn Adapter)]
    });
    let mut sequences: Vec<Sequence<'_>> = adapters
        .enumerate()
        .map(|(at, (name, adapter))| {
            let tokens = &examples[at % 2][..6 + at % 5];
            Sequence { name, adapter, tokens, cache: model.decoder.new_cache() }
        })
        .collect();
    let alone = |sequence: &Sequence<'_>, from: usize, to: usize| {
        let mut caches = [sequence.cache.clone()];
        let tokens = &sequence.tokens[from..to];
        let (batch, pass) = (Packed { tokens, offsets: &[0, tokens.len()] }, Pass::inference());
        let rows = model.decoder.extend(batch, &mut caches, sequence.adapter, &pass).unwrap();
        let [cache] = caches;
        (cache, rows.to_f64())
    };
    let together = |sequences: &[Sequence<'_>], spans: &[(usize, usize)]| {
        let (mut tokens, mut offsets) = (Vec::new(), vec![0]);
        for (sequence, &(from, to)) in sequences.iter().zip(spans) {
            tokens.extend_from_slice(&sequence.tokens[from..to]);
            offsets.push(tokens.len());
        }
        let mut caches: Vec<Cache> = sequences.iter().map(|s| s.cache.clone()).collect();
        let adapters: Vec<&dyn Adapter> = sequences.iter().map(|s| s.adapter).collect();
        let batch = Packed { tokens: &tokens, offsets: &offsets };
        let rows =
            model.decoder.extend_each(batch, &mut caches, &adapters, &Pass::inference()).ok()?;
        let rows = rows.to_f64();
        Some(offsets.windows(2).map(|w| rows[w[0] * width..w[1] * width].to_vec()).collect())
    };
    let check = |what: &str, name: &str, found: &[f64], expected: &[f64]| {
        assert_eq!(found.len(), expected.len());
        let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let size = expected.iter().map(|v| v.abs()).fold(0.0, f64::max);
        assert!(off < 1e-4 * size, "{what}: {name} is off by {off} of {size}");
    };

    // Sequences that start side by side, but for those with learned positions.
    let plain: Vec<Sequence<'_>> = sequences
        .iter()
        .filter(|s| model.decoder.lead_rows(s.adapter, &Pass::inference()) == 0)
        .map(|s| Sequence { name: s.name.clone(), cache: s.cache.clone(), ..*s })
        .collect();
    assert!(plain.len() > tuned.len());
    let spans: Vec<(usize, usize)> = plain.iter().map(|s| (0, s.tokens.len())).collect();
    let found: Vec<Vec<f64>> = together(&plain, &spans).unwrap();
    for (sequence, found) in plain.iter().zip(&found) {
        let (_, expected) = alone(sequence, 0, sequence.tokens.len());
        check("prefill", &sequence.name, found, &expected);
    }

    // All of them, one or a few tokens further.
    let spans: Vec<(usize, usize)> =
        sequences.iter().map(|s| (4, 5 + s.tokens.len() % 2)).collect();
    for sequence in &mut sequences {
        sequence.cache = alone(sequence, 0, 4).0;
    }
    for few in [2, 4, 7, sequences.len()] {
        for (part, spans) in sequences.chunks(few).zip(spans.chunks(few)) {
            let found: Vec<Vec<f64>> = together(part, spans).unwrap();
            for ((sequence, found), &(from, to)) in part.iter().zip(&found).zip(spans) {
                check(
                    &format!("{few} together"),
                    &sequence.name,
                    found,
                    &alone(sequence, from, to).1,
                );
            }
        }
    }
}

#[test]
fn learned_positions_start_in_a_pass_of_their_own() {
    let model = model(DType::F32);
    let prompt = cases().into_iter().find(|case| case.method == "prompt-tuning").unwrap();
    let tuned = model.build(prompt.options().as_ref());
    let (batch, pass) = (Packed { tokens: &[1, 2, 3, 4], offsets: &[0, 2, 4] }, Pass::inference());
    let start = |adapters: &[&dyn Adapter]| {
        let mut caches = [model.decoder.new_cache(), model.decoder.new_cache()];
        model.decoder.extend_each(batch, &mut caches, adapters, &pass).err()
    };
    let mixed = start(&[&NoAdapter, tuned.as_adapter()]);
    assert!(matches!(mixed, Some(Error::LeadNeedsOwnPass)), "{mixed:?}");
    assert!(start(&[tuned.as_adapter(), tuned.as_adapter()]).is_none());
}

//! Sliding windows: what is cached, and what can be cut back. The trained model of `stories.rs` with a
//! window it was not trained with.

use hydralora_kernels::DType;
use hydralora_model::adapter::{NoAdapter, Pass};
use hydralora_model::{Cache, Decoder, ModelSource, Packed};
use std::path::Path;

const WINDOW: usize = 40;

fn open(dtype: DType, sliding_layers: Option<Vec<bool>>) -> Decoder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stories260K");
    let ModelSource { mut config, weights, .. } = ModelSource::open(&folder).unwrap();
    config.model_type = "mistral".to_owned();
    config.sliding_window = Some(WINDOW);
    config.sliding_layers = sliding_layers;
    Decoder::load(&config, &weights, dtype).unwrap()
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 3 + i * 7919 % 500).collect()
}

fn feed(decoder: &Decoder, cache: &mut Cache, tokens: &[u32]) -> Vec<f64> {
    let offsets = [0, tokens.len()];
    let caches = std::slice::from_mut(cache);
    let batch = Packed { tokens, offsets: &offsets };
    decoder.extend(batch, caches, &NoAdapter, &Pass::inference()).unwrap().to_f64()
}

/// The hidden states of all tokens in one pass.
fn whole(decoder: &Decoder, tokens: &[u32]) -> Vec<f64> {
    let offsets = [0, tokens.len()];
    let batch = Packed { tokens, offsets: &offsets };
    decoder.hidden(batch, &NoAdapter, &Pass::inference()).unwrap().value().to_f64()
}

fn assert_close(got: &[f64], expected: &[f64], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-9, "{what}: off by {worst}");
}

#[test]
fn a_cached_window_gives_what_one_pass_gives() {
    let alternating = Some(vec![true, false, true, true, false]);
    for layers in [None, alternating] {
        let decoder = open(DType::F64, layers);
        let tokens = tokens(330);
        let expected = whole(&decoder, &tokens);
        let width = decoder.config().hidden_size;
        let mut cache = decoder.new_cache();
        let (mut at, mut next) = (0, [1, 1, 130, 1, 7, 60, 1, 1, 1].into_iter().cycle());
        while at < tokens.len() {
            let end = (at + next.next().unwrap()).min(tokens.len());
            let got = feed(&decoder, &mut cache, &tokens[at..end]);
            assert_close(&got, &expected[at * width..end * width], &format!("{at}..{end}"));
            at = end;
        }
    }
}

#[test]
fn the_cache_of_a_window_does_not_grow() {
    let (windowed, mixed) = (open(DType::F32, None), open(DType::F32, Some(vec![true, false])));
    let bytes_at = |decoder: &Decoder, count: usize, step: usize| {
        let mut cache = decoder.new_cache();
        tokens(count).chunks(step).for_each(|new| drop(feed(decoder, &mut cache, new)));
        assert_eq!(cache.len(), count);
        cache.bytes()
    };
    let limit = 3 * (WINDOW + 32) * windowed.cache_bytes_per_token();
    for step in [3, 16, 400] {
        assert!(bytes_at(&windowed, 400, step) <= limit, "{step} tokens at a time");
    }
    assert!(bytes_at(&mixed, 400, 16) > bytes_at(&windowed, 400, 16));
}

#[test]
fn a_window_is_cut_back_as_far_as_it_is_held() {
    let decoder = open(DType::F64, None);
    let tokens = tokens(300);
    let width = decoder.config().hidden_size;
    let expected = whole(&decoder, &tokens);
    let fill = || {
        let mut cache = decoder.new_cache();
        tokens.chunks(7).for_each(|new| drop(feed(&decoder, &mut cache, new)));
        cache
    };
    // Just now, and further back than is held.
    for end in [299, 270, 100, 0] {
        let mut cache = fill();
        cache.truncate(end);
        let held = cache.len();
        assert!(held == end || held == 0, "{end}: {held}");
        assert!(end < 270 || held == end, "{end}: the last tokens are held");
        let got = feed(&decoder, &mut cache, &tokens[held..]);
        assert_close(&got, &expected[held * width..], &format!("from {held}"));
    }
}

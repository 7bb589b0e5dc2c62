//! Any number of threads may call into one decoder.

use hydralora_kernels::DType;
use hydralora_model::adapter::{NoAdapter, Pass};
use hydralora_model::{Decoder, ModelSource, Packed};
use hydralora_runtime::Pool;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// The hidden states of a prompt of three tokens, then of single ones, as bits.
fn states(decoder: &Decoder, rounds: usize) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for _ in 0..rounds {
        let mut cache = [decoder.new_cache()];
        let mut extend = |tokens: &[u32]| {
            let batch = Packed { tokens, offsets: &[0, tokens.len()] };
            let pass = Pass::inference();
            let hidden = decoder.extend(batch, &mut cache, &NoAdapter, &pass).unwrap();
            let logits = decoder.logits(&hidden, &[tokens.len() - 1]);
            let bits = |tensor: &[f32]| tensor.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            all.push([bits(hidden.data()), bits(logits.data())].concat());
        };
        extend(&[1, 2, 3]);
        (0..4).for_each(|token| extend(&[5 + token]));
    }
    all
}

/// `leaders` threads on one pool of `threads`, none of them the pool's own, find what one alone does.
fn agree(decoder: &Arc<Decoder>, expected: &[Vec<u32>], threads: usize, leaders: usize) {
    let pool = Pool::new(threads);
    let (done, ended) = mpsc::channel();
    for _ in 0..leaders {
        let (decoder, pool, done) = (decoder.clone(), pool.clone(), done.clone());
        std::thread::spawn(move || {
            // Nobody may listen any more.
            let _ = done.send(pool.enter(|| states(&decoder, 20)));
        });
    }
    for _ in 0..leaders {
        let found = ended.recv_timeout(Duration::from_secs(60));
        let found = found.unwrap_or_else(|e| panic!("{leaders} on {threads} threads: {e}"));
        for round in found.chunks(expected.len()) {
            assert_eq!(round, expected, "{leaders} on {threads} threads");
        }
    }
}

#[test]
fn threads_that_use_one_decoder_neither_wait_for_each_other_nor_differ() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stories260K");
    let source = ModelSource::open(&folder).unwrap();
    let decoder = Arc::new(Decoder::load(&source.config, &source.weights, DType::F32).unwrap());
    let expected = Pool::new(1).enter(|| states(&decoder, 1));
    for (threads, leaders) in [(2, 1), (2, 2), (4, 2), (2, 4), (4, 4)] {
        agree(&decoder, &expected, threads, leaders);
    }
}

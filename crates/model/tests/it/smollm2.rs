//! SmolLM2-135M-Instruct from its GGUF file against its own tokenizer and `transformers`.
//! `tests/fixtures/smollm2/golden.py` makes the references.
//!
//! The file (98 MB) is found in the cache or fetched; where neither works the tests say so.

use hydralora_kernels::DType;
use hydralora_model::adapter::{NoAdapter, Pass};
use hydralora_model::{Decoder, ModelSource, Packed, hub};
use serde::Deserialize;
use std::path::{Path, PathBuf};

fn model() -> Option<PathBuf> {
    match hub::resolve("smollm2-135m", &mut |line| println!("{line}")) {
        Ok(path) => Some(path),
        Err(error) => {
            hydralora_testing::skip("smollm2", error);
            None
        }
    }
}

fn fixture<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2");
    serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
}

#[derive(Deserialize)]
struct Greedy {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

#[test]
fn the_tokenizer_encodes_as_the_models_own() {
    let Some(path) = model() else { return };
    let tokenizer = ModelSource::open(&path).unwrap().tokenizer;
    let lines: Vec<(String, Vec<u32>)> = fixture("tokens.json");
    assert!(lines.len() >= 1000);
    for (line, ids) in &lines {
        assert_eq!(&tokenizer.encode(line).unwrap(), ids, "{line:?}");
        assert_eq!(&tokenizer.decode(ids, false).unwrap(), line);
        let offsets = tokenizer.encode_with_offsets(line).unwrap();
        assert!(offsets.iter().all(|(_, range)| range.end <= line.len()));
    }
    assert_eq!(tokenizer.encode("1987").unwrap().len(), 4, "digits are split one by one");
    assert!(tokenizer.chat_template().is_some_and(|template| template.contains("<|im_start|>")));
    assert_eq!(tokenizer.end_ids(), [tokenizer.token_to_id("<|im_end|>").unwrap()]);
}

#[test]
fn greedy_texts_equal_transformers() {
    let Some(path) = model() else { return };
    let source = ModelSource::open(&path).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, DType::F32).unwrap();
    assert_eq!(decoder.num_parameters(), 134_515_008);
    assert_eq!(source.config.rms_norm_eps, 1e-5);
    for Greedy { prompt, greedy } in fixture::<Vec<Greedy>>("greedy.json") {
        let mut cache = [decoder.new_cache()];
        let (mut feed, mut said) = (prompt, Vec::<u32>::new());
        while said.len() < greedy.len() {
            let offsets = [0, feed.len()];
            let batch = Packed { tokens: &feed, offsets: &offsets };
            let hidden = decoder.extend(batch, &mut cache, &NoAdapter, &Pass::inference()).unwrap();
            let logits = decoder.logits(&hidden, &[feed.len() - 1]).to_f64();
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            feed = vec![best.unwrap() as u32];
            said.extend(&feed);
        }
        assert_eq!(said, greedy);
    }
}

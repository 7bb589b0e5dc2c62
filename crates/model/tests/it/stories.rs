//! A trained model of 260,032 parameters against `transformers` on the same weights.
//! `tests/fixtures/stories260K/convert.py` makes the folder and the golden numbers.

use hydralora_kernels::DType;
use hydralora_model::adapter::{NoAdapter, Pass};
use hydralora_model::{Decoder, ModelSource, Packed, TokenStream};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stories260K")
}

fn golden() -> Value {
    serde_json::from_slice(&std::fs::read(folder().join("golden.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn open(dtype: DType) -> (ModelSource, Decoder) {
    let source = ModelSource::open(&folder()).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, dtype).unwrap();
    (source, decoder)
}

fn largest(logits: &[f64]) -> u32 {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

#[test]
fn logits_match_transformers() {
    let golden = golden();
    let prompt = ids(&golden["prompt"]);
    let expected: Vec<f64> =
        golden["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    for dtype in [DType::F32, DType::F64] {
        let (_, decoder) = open(dtype);
        assert_eq!(decoder.num_parameters(), 260_032);
        let offsets = [0, prompt.len()];
        let logits = decoder.last_logits(Packed { tokens: &prompt, offsets: &offsets }).unwrap();
        let logits = logits.to_f64();
        let pairs = logits.iter().zip(&expected);
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 2e-5, "{dtype}: logits differ by {worst}");
    }
}

#[test]
fn cached_generation_repeats_transformers_greedy_text() {
    let golden = golden();
    let (source, decoder) = open(DType::F32);
    let mut cache = [decoder.new_cache()];
    let mut tokens = ids(&golden["prompt"]);
    let mut said = Vec::new();
    let mut stream = TokenStream::new(&source.tokenizer);
    let mut text = String::new();
    for &id in &tokens {
        text += &stream.push(id).unwrap();
    }
    while said.len() < 60 {
        let offsets = [0, tokens.len()];
        let batch = Packed { tokens: &tokens, offsets: &offsets };
        let hidden = decoder.extend(batch, &mut cache, &NoAdapter, &Pass::inference()).unwrap();
        let next = largest(&decoder.logits(&hidden, &[tokens.len() - 1]).to_f64());
        text += &stream.push(next).unwrap();
        said.push(next);
        tokens = vec![next];
    }
    text += &stream.finish().unwrap();
    assert_eq!(said, ids(&golden["greedy"]));
    assert_eq!(text.trim_start(), golden["text"].as_str().unwrap());
    assert_eq!(cache[0].len(), ids(&golden["prompt"]).len() + 59);
}

#[test]
fn packing_changes_nothing() {
    let (_, decoder) = open(DType::F64);
    let prompt = ids(&golden()["prompt"]);
    let short = &prompt[..5];
    let packed: Vec<u32> = [short, &prompt, short].concat();
    let offsets = [0, 5, 5 + prompt.len(), 10 + prompt.len()];
    let together = decoder.last_logits(Packed { tokens: &packed, offsets: &offsets }).unwrap();
    let width = decoder.config().vocab_size;
    for (row, sequence) in [short, &prompt, short].into_iter().enumerate() {
        let offsets = [0, sequence.len()];
        let alone = decoder.last_logits(Packed { tokens: sequence, offsets: &offsets }).unwrap();
        let both = alone.to_f64().into_iter().zip(together.to_f64()[row * width..].to_vec());
        assert!(both.fold(0.0, |worst, (a, b)| f64::max(worst, (a - b).abs())) < 1e-12);
    }
}

#[test]
fn a_cache_can_be_cut_back() {
    let (_, decoder) = open(DType::F32);
    let prompt = ids(&golden()["prompt"]);
    let mut cache = [decoder.new_cache()];
    let feed = |cache: &mut [hydralora_model::Cache], tokens: &[u32]| {
        let offsets = [0, tokens.len()];
        let batch = Packed { tokens, offsets: &offsets };
        decoder.extend(batch, cache, &NoAdapter, &Pass::inference()).unwrap().to_f64()
    };
    feed(&mut cache, &prompt[..6]);
    let first = feed(&mut cache, &prompt[6..]);
    cache[0].truncate(6);
    assert_eq!(feed(&mut cache, &prompt[6..]), first);
}

#[test]
fn input_that_does_not_fit_is_refused() {
    let (_, decoder) = open(DType::F32);
    let error = |tokens: &[u32], offsets: &[usize]| {
        decoder.last_logits(Packed { tokens, offsets }).unwrap_err().to_string()
    };
    assert_eq!(error(&[1, 2], &[0, 2, 2]), "sequence 1 is empty");
    assert_eq!(
        error(&[1; 513], &[0, 513]),
        "sequence 0 has 513 tokens, the model's context holds 512"
    );
    assert_eq!(error(&[512], &[0, 1]), "token id 512 is not below the vocabulary size 512");
}

#[test]
fn the_tokenizer_round_trips_and_marks_bytes() {
    let (source, _) = open(DType::F32);
    let tokenizer = &source.tokenizer;
    assert_eq!(tokenizer.bos(), Some((1, "<s>")));
    assert_eq!(tokenizer.end_ids(), [2]);
    assert!(tokenizer.add_bos());
    for text in ["Lily's mom said, \"no\".", "a  b\n\tc", "héllo ☃ 日本", "x"] {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
}

#[cfg(feature = "gpu")]
mod on_a_gpu {
    use super::*;
    use hydralora_kernels::check::device;
    use hydralora_model::{IGNORE_LABEL, Run, Tree};

    /// The model on the host, and on the device if there is one.
    fn both() -> Option<(Decoder, Decoder)> {
        let device = device()?;
        let mut there = open(DType::F32).1;
        there.to_device(&device);
        Some((open(DType::F32).1, there))
    }

    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        let pairs = got.iter().zip(expected);
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 5e-5, "off by {worst}");
    }

    #[test]
    fn logits_and_greedy_text_are_those_of_transformers() {
        let Some((host, there)) = both() else { return };
        let golden = golden();
        let mut tokens = ids(&golden["prompt"]);
        let expected: Vec<f64> =
            golden["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let offsets = [0, tokens.len()];
        let batch = Packed { tokens: &tokens, offsets: &offsets };
        let hidden = there.hidden(batch, &NoAdapter, &Pass::inference()).unwrap();
        assert!(hidden.value().device().is_some(), "the pass ran on the host");
        close(&there.last_logits(batch).unwrap().to_f64(), &expected);
        close(
            &there.last_logits(batch).unwrap().to_f64(),
            &host.last_logits(batch).unwrap().to_f64(),
        );

        let mut cache = [there.new_cache()];
        let mut said = Vec::new();
        while said.len() < 60 {
            let offsets = [0, tokens.len()];
            let batch = Packed { tokens: &tokens, offsets: &offsets };
            let hidden = there.extend(batch, &mut cache, &NoAdapter, &Pass::inference()).unwrap();
            let next = largest(&there.logits(&hidden, &[tokens.len() - 1]).to_f64());
            said.push(next);
            tokens = vec![next];
        }
        assert_eq!(said, ids(&golden["greedy"]));
    }

    #[test]
    fn packed_sequences_trees_and_losses_are_those_of_the_host() {
        let Some((host, there)) = both() else { return };
        let prompt = ids(&golden()["prompt"]);
        let packed: Vec<u32> = [&prompt[..5], &prompt, &prompt[..5]].concat();
        let offsets = [0, 5, 5 + prompt.len(), 10 + prompt.len()];
        let batch = Packed { tokens: &packed, offsets: &offsets };
        close(
            &there.last_logits(batch).unwrap().to_f64(),
            &host.last_logits(batch).unwrap().to_f64(),
        );

        let labels: Vec<u32> = (0..packed.len())
            .map(|row| if row % 3 == 0 { IGNORE_LABEL } else { packed[row] })
            .collect();
        let loss = |decoder: &Decoder| {
            let hidden = decoder.hidden(batch, &NoAdapter, &Pass::inference()).unwrap();
            decoder.loss(&hidden, &labels, 1.0).token_losses
        };
        close(&loss(&there), &loss(&host));

        let runs = [
            Run { len: 5, parent: None },
            Run { len: prompt.len(), parent: Some(0) },
            Run { len: 5, parent: Some(0) },
        ];
        let tree = |decoder: &Decoder| {
            let tree = Tree { tokens: &packed, runs: &runs };
            decoder.hidden_tree(tree, None, &NoAdapter, &Pass::inference()).unwrap().to_f64()
        };
        close(&tree(&there), &tree(&host));
    }

    #[test]
    fn packed_weights_give_what_they_give_on_the_host() {
        use hydralora_kernels::block::BlockFormat;
        use hydralora_model::Held;
        let Some(device) = device() else { return };
        let source = ModelSource::open(&folder()).unwrap();
        let load = || {
            let held = Held::Packed(BlockFormat::F16);
            Decoder::load_held(&source.config, &source.weights, DType::F32, held).unwrap()
        };
        let (host, mut there) = (load(), load());
        there.to_device(&device);
        let prompt = ids(&golden()["prompt"]);
        let offsets = [0, prompt.len()];
        let batch = Packed { tokens: &prompt, offsets: &offsets };
        close(
            &there.last_logits(batch).unwrap().to_f64(),
            &host.last_logits(batch).unwrap().to_f64(),
        );
    }
}

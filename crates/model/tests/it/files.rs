//! Model files in their several forms, whole and spoiled.

use hydralora_kernels::DType;
use hydralora_model::source::open_weights;
use hydralora_model::{Decoder, GgufFile, ModelSource, Packed, Weights};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stories260K")
}

const PROMPT: [u32; 9] = [1, 403, 407, 261, 378, 33, 44, 310, 266];

fn logits(path: &Path) -> Vec<f64> {
    let (config, weights) = open_weights(path).unwrap();
    let decoder = Decoder::load(&config, &weights, DType::F32).unwrap();
    let batch = Packed { tokens: &PROMPT, offsets: &[0, PROMPT.len()] };
    decoder.last_logits(batch).unwrap().to_f64()
}

#[test]
fn a_quantised_gguf_file_is_the_same_model() {
    let gguf = folder().join("stories260K.gguf");
    let (whole, packed) = (logits(&folder()), logits(&gguf));
    let difference = whole.iter().zip(&packed).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
    let relative = difference / whole.iter().map(|a| a * a).sum::<f64>().sqrt();
    assert!(relative > 0.0 && relative < 0.02, "8-bit weights move the logits by {relative}");
    let best = |logits: &[f64]| {
        (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
    };
    assert_eq!(best(&whole), best(&packed));

    let (from_gguf, from_folder) =
        (ModelSource::open(&gguf).unwrap(), ModelSource::open(&folder()).unwrap());
    assert_eq!(from_gguf.config, from_folder.config);
    let texts = ["Once upon a time", " two  spaces", "Zoë's ☃\nnew line", "", "</s> end"];
    for text in texts {
        assert_eq!(
            from_gguf.tokenizer.encode(text).unwrap(),
            from_folder.tokenizer.encode(text).unwrap(),
            "{text:?}"
        );
    }
    assert_eq!(from_gguf.tokenizer.end_ids(), from_folder.tokenizer.end_ids());
    assert!(from_gguf.tokenizer.add_bos());
}

/// The model's tensors over two shards and an index.
fn shard(target: &Path) {
    let bytes = fs::read(folder().join("model.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = all.tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let mut map = serde_json::Map::new();
    for (number, part) in tensors.chunks(tensors.len() / 2 + 1).enumerate() {
        let name = format!("model-{number}.safetensors");
        for (tensor, _) in part {
            map.insert(tensor.clone(), json!(name));
        }
        let views = part.iter().map(|(name, view)| (name.as_str(), view.clone()));
        fs::write(target.join(name), safetensors::serialize(views, None).unwrap()).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(target.join("model.safetensors.index.json"), index).unwrap();
    fs::copy(folder().join("config.json"), target.join("config.json")).unwrap();
}

#[test]
fn shards_are_the_same_model() {
    let target = tempfile::tempdir().unwrap();
    shard(target.path());
    assert_eq!(logits(target.path()), logits(&folder()));
    fs::remove_file(target.path().join("model-1.safetensors")).unwrap();
    let error = Weights::open_folder(target.path()).err().unwrap().to_string();
    assert!(error.contains("index.json") && error.contains("model-1.safetensors"), "{error}");
}

#[test]
fn a_type_that_is_no_number_of_ours_is_named() {
    let target = tempfile::tempdir().unwrap();
    let view = TensorView::new(Dtype::I64, vec![1], &[0; 8]).unwrap();
    let bytes = safetensors::serialize([("lm_head.weight", view)], None).unwrap();
    fs::write(target.path().join("model.safetensors"), bytes).unwrap();
    let error = Weights::open_folder(target.path()).err().unwrap().to_string();
    assert!(error.contains("`lm_head.weight` has type I64"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happens to a GGUF file on its way, reading it ends in a model or an error.
    #[test]
    fn spoiled_gguf_files_never_panic(
        cut in 0_usize..60_000,
        changes in prop::collection::vec((0_usize..30_000, any::<u8>()), 0..6),
    ) {
        let mut bytes = fs::read(folder().join("stories260K.gguf")).unwrap();
        for (at, value) in changes {
            bytes[at] = value;
        }
        if cut < 30_000 {
            bytes.truncate(cut);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &bytes).unwrap();
        if let Ok(opened) = GgufFile::open(file.path()) {
            drop(opened);
            let _ = ModelSource::open(file.path()).map(|source| source.identity);
        }
    }
}

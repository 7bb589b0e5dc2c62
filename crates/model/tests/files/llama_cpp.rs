//! Files that llama.cpp's own converter wrote, against transformers on the same weights, and against the
//! files that are written here. `tests/fixtures/llama_cpp/make.py` makes them.

use crate::families::{greedy, logits, relative_error};
use crate::fixture;
use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::{DType, Tensor};
use hydralora_model::gguf::{Array, GgufWriter, Value as GgufValue};
use hydralora_model::save::Saving;
use hydralora_model::{Decoder, GgufFile, ModelConfig, ModelSource, Packed};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const NAMES: [&str; 2] = ["qwen35", "gemma4"];

fn converted(name: &str) -> PathBuf {
    fixture("llama_cpp").join(format!("{name}.gguf"))
}

fn golden(name: &str) -> Value {
    let path = fixture("llama_cpp").join(format!("{name}.json"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn saving(source: &ModelSource) -> Saving<'_> {
    Saving {
        source,
        name: "small",
        edit: &|_, tensor: Tensor| tensor,
        format: BlockFormat::F32,
        chat_template: None,
        end_ids: &[],
        untie: false,
    }
}

#[test]
fn what_the_converter_writes_is_the_model_of_transformers() {
    for name in NAMES {
        let (source, golden) = (ModelSource::open(&converted(name)).unwrap(), golden(name));
        let prompt = ids(&golden["prompt"]);
        let mut tokens = source.tokenizer.encode(golden["text"].as_str().unwrap()).unwrap();
        if source.tokenizer.add_bos() {
            tokens.insert(0, source.tokenizer.bos().unwrap().0);
        }
        assert_eq!(tokens, prompt, "{name}");
        let expected: Vec<f64> =
            golden["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        let decoder = Decoder::load(&source.config, &source.weights, DType::F64).unwrap();
        let batch = Packed { tokens: &prompt, offsets: &[0, prompt.len()] };
        let found = decoder.last_logits(batch).unwrap().to_f64();
        let error = relative_error(&found, &expected);
        assert!(error < 1e-6, "{name}: {error}");
        assert_eq!(greedy(&decoder, &prompt, 16), ids(&golden["greedy"]), "{name}");
    }
}

#[test]
fn the_same_file_is_written_from_a_folder() {
    for name in NAMES {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("folder");
        let first = ModelSource::open(&converted(name)).unwrap();
        saving(&first).folder(&folder).unwrap();
        let of_folder = ModelSource::open(&folder).unwrap();
        let written = scratch.path().join("written.gguf");
        saving(&of_folder).gguf(&written).unwrap();
        // Through the file itself too, whose metadata are carried over.
        let carried = scratch.path().join("carried.gguf");
        saving(&first).gguf(&carried).unwrap();

        let tokens = ids(&golden(name)["prompt"]);
        let batch = Packed { tokens: &tokens, offsets: &[0, 20, tokens.len()] };
        let single = |path: &Path| {
            let source = ModelSource::open(path).unwrap();
            logits(&Decoder::load(&source.config, &source.weights, DType::F32).unwrap(), batch)
        };
        let expected = single(&converted(name));
        for path in [&folder, &written, &carried] {
            assert_eq!(single(path), expected, "{name}: {}", path.display());
        }
        same_tensors(&written, &converted(name), first.config.num_hidden_layers);
        same_tensors(&carried, &converted(name), first.config.num_hidden_layers);
        same_metadata(&written, &converted(name), first.config.num_hidden_layers);
        same_metadata(&carried, &converted(name), first.config.num_hidden_layers);
    }
}

/// What the metadata of a converted file say after a change; none takes a value away.
fn changed(name: &str, key: &str, value: Option<GgufValue>) -> Result<ModelConfig, String> {
    let file = GgufFile::open(&converted(name)).unwrap();
    let key = format!("{name}.{key}");
    let mut writer = GgufWriter::new();
    // Without tensors nothing else says how many tokens there are.
    let rows = (format!("{name}.vocab_size"), Some(GgufValue::U32(300)));
    let new = [rows, (key, value)];
    let kept = file.metadata().iter().filter(|(key, _)| new.iter().all(|(new, _)| new != key));
    let kept = kept.map(|(key, value)| (key, Some(value)));
    for (key, value) in kept.chain(new.iter().map(|(key, value)| (key, value.as_ref()))) {
        if let Some(value) = value {
            writer.metadata(key.clone(), value.clone());
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("changed.gguf");
    writer.write(&path).unwrap();
    ModelConfig::from_gguf(&GgufFile::open(&path).unwrap()).map_err(|error| error.to_string())
}

#[test]
fn what_the_metadata_get_wrong_is_said() {
    let number = |x: u32| Some(GgufValue::U32(x));
    let list = |x: &[u32]| Some(GgufValue::Array(Array::U32(x.to_vec())));
    let flags = |x: &[bool]| Some(GgufValue::Array(Array::Bool(x.to_vec())));
    let (windowed, full) = (true, false);
    for (name, key, value, words) in [
        ("gemma4", "block_count", Some(GgufValue::U64(1 << 60)), "num_hidden_layers"),
        ("gemma4", "attention.sliding_window_pattern", None, "expected a list of 5, found 0"),
        ("gemma4", "attention.sliding_window_pattern", flags(&[windowed; 4]), "of 5, found 4"),
        (
            "gemma4",
            "attention.sliding_window_pattern",
            flags(&[windowed, full, windowed, windowed, full]),
            "layer 3 does not",
        ),
        ("gemma4", "attention.shared_kv_layers", number(3), "in the last 3 layers"),
        ("gemma4", "attention.value_length_swa", number(4), "expected 8, as wide as keys, found 4"),
        ("gemma4", "attention.head_count_kv", list(&[1, 1, 2, 1, 1]), "the same in all layers"),
        (
            "gemma4",
            "feed_forward_length",
            list(&[48, 48, 48, 96, 48]),
            "or twice that in the last 2",
        ),
        ("gemma4", "feed_forward_length", list(&[48, 96, 48, 96, 96]), "expected 48"),
        (
            "gemma4",
            "embedding_length_per_layer_input",
            number(u32::MAX),
            "hidden_size_per_layer_input",
        ),
        ("qwen35", "block_count", Some(GgufValue::U64(1 << 60)), "num_hidden_layers"),
        ("qwen35", "ssm.group_count", number(4), "expected a multiple of linear_num_key_heads 4"),
        ("qwen35", "ssm.state_size", None, "qwen35.ssm.state_size: missing"),
        ("qwen35", "ssm.time_step_rank", number(0), "linear_num_value_heads"),
        ("qwen35", "attention.recurrent_layers", flags(&[true, false]), "expected 3, found 2"),
        ("qwen35", "attention.head_count", list(&[2, 2, 3, 2]), "the same in all layers"),
    ] {
        let error = changed(name, key, value).unwrap_err();
        assert!(error.contains(words), "{name}.{key}: {error}");
    }
    // The same said otherwise.
    for (name, key, value) in [
        ("gemma4", "attention.head_count_kv", list(&[1; 5])),
        ("qwen35", "attention.head_count", list(&[2; 4])),
        ("qwen35", "attention.recurrent_layers", flags(&[true, false, true, false])),
    ] {
        let as_it_was = changed(name, "nothing", None);
        assert_eq!(changed(name, key, value), as_it_was, "{name}.{key}");
    }
}

/// A file that lists the layers that attend, the one among them that only predicts later tokens.
#[test]
fn lists_of_layers_go_with_the_layers() {
    let scratch = tempfile::tempdir().unwrap();
    let (listed, carried) =
        (scratch.path().join("listed.gguf"), scratch.path().join("carried.gguf"));
    let key = "qwen35.attention.recurrent_layers";
    let file = GgufFile::open(&converted("qwen35")).unwrap();
    let bytes = fs::read(converted("qwen35")).unwrap();
    // Not as an interval would have it.
    for recurrent in [[true, false, true, false], [false, true, true, false]] {
        let mut writer = GgufWriter::new();
        for (key, value) in file.metadata() {
            writer.metadata(key.clone(), value.clone());
        }
        writer.metadata(key.to_owned(), GgufValue::Array(Array::Bool(recurrent.to_vec())));
        for tensor in file.tensors() {
            let data = bytes[tensor.range.clone()].to_vec();
            writer.tensor(tensor.name.clone(), tensor.format, &tensor.shape, data);
        }
        writer.write(&listed).unwrap();
        let source = ModelSource::open(&listed).unwrap();
        assert_eq!(source.config.linear_attention.as_ref().unwrap().layers, recurrent[..3]);
    }
    let source = ModelSource::open(&listed).unwrap();
    saving(&source).gguf(&carried).unwrap();
    let expected = GgufValue::Array(Array::Bool(vec![false, true, true]));
    assert_eq!(GgufFile::open(&carried).unwrap().get(key), Some(&expected));
}

/// The tensors are the same, byte for byte, but for layers from `layers` on, which are left out.
fn same_tensors(found: &Path, expected: &Path, layers: usize) {
    let open = |path: &Path| (fs::read(path).unwrap(), GgufFile::open(path).unwrap());
    let ((found_bytes, found), (expected_bytes, expected)) = (open(found), open(expected));
    let later = |name: &str| {
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
        layer.is_some_and(|layer| layer.parse::<usize>().unwrap() >= layers)
    };
    let expected: Vec<_> = expected.tensors().iter().filter(|t| !later(&t.name)).collect();
    assert_eq!(found.tensors().len(), expected.len());
    for wanted in expected {
        let tensor = found.tensor(&wanted.name).unwrap_or_else(|| panic!("no {}", wanted.name));
        assert_eq!(tensor.shape, wanted.shape, "{}", wanted.name);
        assert_eq!(tensor.format, wanted.format, "{}", wanted.name);
        let same = found_bytes[tensor.range.clone()] == expected_bytes[wanted.range.clone()];
        assert!(same, "{} differs", wanted.name);
    }
}

/// What the converter says of the model and of its tokenizer is said, and the same.
fn same_metadata(found: &Path, expected: &Path, layers: usize) {
    let (found, expected) = (GgufFile::open(found).unwrap(), GgufFile::open(expected).unwrap());
    let architecture = expected.str("general.architecture").unwrap().unwrap();
    for (key, wanted) in expected.metadata() {
        let wanted = match key.strip_prefix(architecture) {
            Some(".nextn_predict_layers") => {
                assert_eq!(found.get(key), None);
                continue;
            }
            Some(".block_count") => &GgufValue::U32(layers as u32),
            Some(_) => wanted,
            // Scores say nothing beside merges.
            None if key == "tokenizer.ggml.scores" || !key.starts_with("tokenizer.") => continue,
            None => wanted,
        };
        let value = found.get(key).unwrap_or_else(|| panic!("no {key}"));
        // Counts may be signed or not.
        let same = value == wanted || value.as_u64s().is_some_and(|x| Some(x) == wanted.as_u64s());
        assert!(same, "{key}: {value:?}, and the converter has {wanted:?}");
    }
}

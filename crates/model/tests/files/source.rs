//! Whole models: the same one out of a folder and out of a GGUF file, and bad ones.

use crate::{copied_stories, fixture, replace};
use hydralora_kernels::block::BlockFormat;
use hydralora_model::gguf::{Array, GgufWriter, Value};
use hydralora_model::{Error, ModelSource};
use serde_json::Value as Json;
use std::fs;
use std::path::Path;

/// GGUF's name of a Hugging Face tensor of the small model.
fn gguf_name(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let mut name = name.replace("layers.", "blk.");
    for (from, to) in [
        ("embed_tokens", "token_embd"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(from, to);
    }
    if name == "norm.weight" { "output_norm.weight".to_owned() } else { name }
}

/// Rows as llama.cpp stores them.
fn interleaved(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (width, dim) = (bytes.len() / rows, rows / heads);
    let order = (0..rows).map(|row| {
        let (head, within) = (row / dim, row % dim);
        head * dim + within % 2 * (dim / 2) + within / 2
    });
    order.flat_map(|row| bytes[row * width..(row + 1) * width].to_vec()).collect()
}

/// Metadata of the small model; `change` may alter it.
pub(crate) fn write_gguf(path: &Path, change: impl Fn(&mut Vec<(String, Value)>)) {
    let source = ModelSource::open(&fixture("stories260K")).unwrap();
    let config = &source.config;
    let tokenizer: Json =
        serde_json::from_slice(&fs::read(fixture("stories260K/tokenizer.json")).unwrap()).unwrap();
    let mut tokens = vec![String::new(); config.vocab_size];
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let kinds = (0..tokens.len() as i32).map(|id| match id {
        0 => 2,
        1 | 2 => 3,
        3..=258 => 6,
        _ => 1,
    });
    // The pieces are in the order of their scores.
    let scores = (0..tokens.len()).map(|id| -(id.saturating_sub(259) as f32));
    let size = |size: usize| Value::U32(size as u32);
    let text = |text: &str| Value::String(text.to_owned());
    let mut metadata: Vec<(String, Value)> = [
        ("general.architecture", text("llama")),
        ("general.name", text("stories260K")),
        ("llama.context_length", size(config.max_position_embeddings)),
        ("llama.embedding_length", size(config.hidden_size)),
        ("llama.block_count", size(config.num_hidden_layers)),
        ("llama.feed_forward_length", size(config.intermediate_size)),
        ("llama.attention.head_count", size(config.num_attention_heads)),
        ("llama.attention.head_count_kv", size(config.num_key_value_heads)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.dimension_count", size(config.head_dim)),
        ("llama.rope.freq_base", Value::F32(10000.0)),
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.tokens", Value::Array(Array::String(tokens.clone()))),
        ("tokenizer.ggml.scores", Value::Array(Array::F32(scores.collect()))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds.collect()))),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect();
    change(&mut metadata);
    let mut writer = GgufWriter::new();
    for (key, value) in metadata {
        writer.metadata(key, value);
    }
    for name in source.weights.names() {
        let view = source.weights.get(name).unwrap();
        let heads = match name.split('.').rev().nth(1) {
            Some("q_proj") => Some(config.num_attention_heads),
            Some("k_proj") => Some(config.num_key_value_heads),
            _ => None,
        };
        let bytes = match heads {
            Some(heads) => interleaved(&view.bytes, view.shape[0], heads),
            None => view.bytes.into_owned(),
        };
        writer.tensor(gguf_name(name), BlockFormat::F32, &view.shape, bytes);
    }
    writer.write(path).unwrap();
}

fn set(metadata: &mut Vec<(String, Value)>, key: &str, value: Option<Value>) {
    metadata.retain(|(name, _)| name != key);
    metadata.extend(value.map(|value| (key.to_owned(), value)));
}

#[test]
fn a_folder_and_its_gguf_file_are_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stories.gguf");
    write_gguf(&path, |_| {});
    let a = ModelSource::open(&fixture("stories260K")).unwrap();
    let b = ModelSource::open(&path).unwrap();
    assert_eq!(a.config, b.config);
    assert_eq!(a.config.rms_norm_eps, 1e-5);
    assert_eq!((a.identity.name.as_str(), b.identity.name.as_str()), ("stories260K", "stories"));
    for name in a.weights.names() {
        let (shape, _) = a.weights.describe(name).unwrap();
        assert!(
            a.weights.take_f32(name, shape).unwrap()[..]
                == b.weights.take_f32(name, shape).unwrap()[..],
            "{name}"
        );
    }
    assert!(a.weights.unused().is_empty() && b.weights.unused().is_empty());
    let (a, b) = (&a.tokenizer, &b.tokenizer);
    assert_eq!(
        (a.bos(), a.eos(), a.end_ids(), a.add_bos()),
        (b.bos(), b.eos(), b.end_ids(), b.add_bos())
    );
    for text in [
        "Once upon a time, Lily's mom said: \"no\".",
        "a  b\n\tc  ",
        "héllo ☃ 日本",
        "",
        " ",
        "<s>x</s>",
    ] {
        let ids = a.encode(text).unwrap();
        assert_eq!(ids, b.encode(text).unwrap(), "{text:?}");
        assert_eq!(b.decode(&ids, false).unwrap(), a.decode(&ids, false).unwrap());
    }
    // A folder whose only content is the file means the file.
    let c = ModelSource::open(folder.path()).unwrap();
    assert_eq!(c.identity.fingerprint, ModelSource::open(&path).unwrap().identity.fingerprint);
}

/// SentencePiece's own rule, spelled out: join the neighbours whose union has the best score, the
/// leftmost of equals, until none is left; characters without a piece become bytes.
fn sentence_piece(text: &str, tokens: &[String], scores: &[f32]) -> Vec<u32> {
    let id = |piece: &str| tokens.iter().position(|token| token == piece);
    let mut pieces: Vec<String> = Vec::new();
    if !text.is_empty() {
        pieces = format!(" {text}").replace(' ', "\u{2581}").chars().map(String::from).collect();
    }
    loop {
        let mut best: Option<(f32, usize)> = None;
        for (at, pair) in pieces.windows(2).enumerate() {
            if let Some(id) = id(&pair.concat()).filter(|&id| id > 258)
                && best.is_none_or(|(score, _)| scores[id] > score)
            {
                best = Some((scores[id], at));
            }
        }
        let Some((_, at)) = best else { break };
        let right = pieces.remove(at + 1);
        pieces[at].push_str(&right);
    }
    let ids = pieces.iter().flat_map(|piece| match id(piece) {
        Some(id) => vec![id as u32],
        None => piece.bytes().map(|byte| u32::from(byte) + 3).collect(),
    });
    ids.collect()
}

#[test]
fn pieces_are_joined_by_score_as_sentencepiece_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let golden: Json =
        serde_json::from_slice(&fs::read(fixture("stories260K/golden.json")).unwrap()).unwrap();
    let story = golden["text"].as_str().unwrap();
    let key = "tokenizer.ggml.scores";
    // The trained scores fall with the id; shuffled ones show that the id does not matter.
    for shuffled in [false, true] {
        let score = |id: usize| if shuffled { -((id * 211 % 509) as f32) } else { -(id as f32) };
        let scores: Vec<f32> = (0..512).map(score).collect();
        write_gguf(&path, |metadata| {
            set(metadata, key, Some(Value::Array(Array::F32(scores.clone()))));
        });
        let source = ModelSource::open(&path).unwrap();
        let file = source.weights.gguf().unwrap();
        let tokens = file.strings("tokenizer.ggml.tokens").unwrap().unwrap();
        let words: Vec<&str> = story.split(' ').collect();
        let pairs = words.windows(3).map(|words| words.join(" "));
        let others = ["  two  spaces ", "aaaaaaaa", "the the\nthe", "日本 ☃ é", "thththeee", " "];
        for text in pairs.chain(others.map(str::to_owned)).chain([story.to_owned()]) {
            let expected = sentence_piece(&text, tokens, &scores);
            assert_eq!(source.tokenizer.encode(&text).unwrap(), expected, "{shuffled} {text:?}");
        }
    }
}

#[test]
fn a_file_without_what_it_needs_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let text = |text: &str| Some(Value::String(text.to_owned()));
    for (key, value, message) in [
        ("general.architecture", None, "general.architecture: missing"),
        (
            "general.architecture",
            text("mamba"),
            "model_type `mamba` is not supported (it has state-space layers); the nearest supported one is \
             `qwen3_5_text`; supported are llama",
        ),
        (
            "general.architecture",
            Some(Value::U32(1)),
            "expected a string, found a value of type u32",
        ),
        ("llama.embedding_length", None, "llama.embedding_length: missing"),
        ("llama.embedding_length", Some(Value::U32(63)), "63 is not divisible by"),
        ("llama.attention.layer_norm_rms_epsilon", None, "epsilon: missing"),
        (
            "llama.rope.dimension_count",
            Some(Value::U32(4)),
            "expected 8 (rotation of the whole head), found 4",
        ),
        ("llama.rope.scaling.type", text("spiral"), "`spiral` is not supported"),
        ("tokenizer.ggml.tokens", None, "no tokenizer found"),
        (
            "tokenizer.ggml.model",
            text("bert"),
            "the kind `bert` is not supported; expected gpt2, llama or gemma4",
        ),
        ("tokenizer.ggml.scores", None, "tokenizer.ggml.scores: expected an array of numbers"),
        (
            "tokenizer.ggml.scores",
            Some(Value::Array(Array::F32(vec![0.0]))),
            "one for each of 512 tokens, found 1",
        ),
        (
            "tokenizer.ggml.eos_token_id",
            Some(Value::U32(512)),
            "512 is outside the vocabulary of 512",
        ),
        (
            "tokenizer.ggml.eot_token_id",
            Some(Value::U32(600)),
            "600 is outside the vocabulary of 512",
        ),
        (
            "tokenizer.ggml.remove_extra_whitespaces",
            Some(Value::Bool(true)),
            "collapsing runs of spaces",
        ),
    ] {
        write_gguf(&path, |metadata| set(metadata, key, value.clone()));
        let error = ModelSource::open(&path).unwrap_err().to_string();
        assert!(error.contains(message), "{key}: {error}");
        assert!(error.contains("x.gguf"), "{key}: {error}");
    }
}

#[test]
fn a_truncated_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    write_gguf(&path, |_| {});
    let whole = fs::read(&path).unwrap();
    for cut in [0, 10, 1000, whole.len() / 2, whole.len() - 1000] {
        fs::write(&path, &whole[..cut]).unwrap();
        let error = ModelSource::open(&path).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }) || cut == 0, "cut at {cut}: {error}");
    }
}

#[test]
fn the_fingerprint_tells_models_apart() {
    let original = ModelSource::open(&fixture("stories260K")).unwrap().identity.fingerprint;
    assert_eq!(original.len(), 64);
    let folder = copied_stories();
    let print = || ModelSource::open(folder.path()).unwrap().identity.fingerprint;
    assert_eq!(print(), original, "the folder's name does not matter");
    let weights = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    let changed = print();
    assert_ne!(changed, original);
    replace(&folder.path().join("config.json"), "10000.0", "20000.0");
    assert_ne!(print(), changed);
}

#[test]
fn a_tokenizer_much_larger_than_the_embedding_is_refused() {
    let folder = copied_stories();
    replace(&folder.path().join("config.json"), "\"vocab_size\": 512", "\"vocab_size\": 400");
    let error = ModelSource::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("512 tokens for an embedding of 400 rows"), "{error}");
}

#[test]
fn a_token_without_a_row_is_refused_where_a_text_uses_it() {
    let folder = copied_stories();
    // An entry more than the 512 rows, as published tokenizers have them.
    let path = folder.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let added = serde_json::json!({
        "id": 512, "content": "<extra>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    });
    json["added_tokens"].as_array_mut().unwrap().push(added);
    fs::write(&path, json.to_string()).unwrap();
    let source = ModelSource::open(folder.path()).unwrap();
    assert_eq!(source.tokenizer.vocab_size(), 513);
    assert!(source.tokenizer.encode("Once").unwrap().iter().all(|&id| id < 512));
    let error = source.tokenizer.encode("Once <extra>").unwrap_err().to_string();
    assert!(error.contains("the token 512 (\"<extra>\")"), "{error}");
    assert!(error.contains("embedding of 512"), "{error}");
    assert!(source.tokenizer.encode_with_offsets("<extra>").is_err());
}

#[test]
fn nothing_there_is_said() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_path_buf(), folder.path().join("absent")] {
        let error = ModelSource::open(&path).unwrap_err();
        assert!(matches!(error, Error::NoModel { .. }), "{error}");
    }
    fs::write(folder.path().join("a.gguf"), "").unwrap();
    fs::write(folder.path().join("b.gguf"), "").unwrap();
    let error = ModelSource::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("2 .gguf files here"), "{error}");
}

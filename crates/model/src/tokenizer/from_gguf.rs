//! The tokenizer in a GGUF file, rebuilt as the `tokenizers` crate describes one.
//!
//! Byte-level BPE (`gpt2`) is a vocabulary, merges and the name of the rule that cuts a text into
//! words; SentencePiece BPE (`llama`) is pieces with scores, from which the merges follow.

use super::{Tokenizer, parse};
use crate::error::{Error, Result};
use crate::weights::{GgufFile, MetaValue};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

const CONTRACTIONS_AND_DIGIT_RUNS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CONTRACTIONS_AND_DIGITS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GGUF's kinds of token.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

pub(super) fn build(file: &GgufFile) -> Result<Tokenizer> {
    let fault = |message: String| Error::Tokenizer { path: file.path().to_path_buf(), message };
    let text = |key: &str| file.get(key).and_then(MetaValue::as_str);
    let list = |key: &str| {
        file.get(key)
            .and_then(MetaValue::as_list)
            .ok_or_else(|| fault(format!("`{key}` is missing")))
    };
    let tokens: Vec<&str> = list("tokenizer.ggml.tokens")?
        .iter()
        .map(|token| token.as_str().ok_or_else(|| fault("a token is not a text".to_owned())))
        .collect::<Result<_>>()?;
    let kinds: Vec<u64> = match file.get("tokenizer.ggml.token_type").and_then(MetaValue::as_list) {
        Some(kinds) => kinds.iter().map(|kind| kind.as_u64().unwrap_or(1)).collect(),
        None => vec![1; tokens.len()],
    };
    if kinds.len() != tokens.len() {
        return Err(fault(format!("{} token types for {} tokens", kinds.len(), tokens.len())));
    }
    let flag =
        |key: &str, default: bool| file.get(key).and_then(MetaValue::as_bool).unwrap_or(default);

    let model = text("tokenizer.ggml.model").unwrap_or("missing");
    let mut description = match model {
        "gpt2" => {
            let merges: Vec<&str> = list("tokenizer.ggml.merges")?
                .iter()
                .map(|merge| {
                    merge.as_str().ok_or_else(|| fault("a merge is not a text".to_owned()))
                })
                .collect::<Result<_>>()?;
            let rule = text("tokenizer.ggml.pre").unwrap_or("default");
            let (words, ignore_merges) = word_rule(rule)
                .ok_or_else(|| fault(format!("the word rule `{rule}` is not supported")))?;
            byte_level(&tokens, &merges, words, ignore_merges)
        }
        "llama" => {
            let scores: Vec<f64> = list("tokenizer.ggml.scores")?
                .iter()
                .map(|score| score.as_f64().unwrap_or(0.0))
                .collect();
            if scores.len() != tokens.len() {
                return Err(fault(format!("{} scores for {} tokens", scores.len(), tokens.len())));
            }
            let unknown = kinds.iter().position(|&kind| kind == UNKNOWN).map(|id| tokens[id]);
            let prefix = flag("tokenizer.ggml.add_space_prefix", true);
            sentence_piece(&tokens, &scores, unknown, prefix)
        }
        other => {
            return Err(fault(format!(
                "the kind `{other}` is not supported; expected gpt2 or llama"
            )));
        }
    };
    description["added_tokens"] = tokens
        .iter()
        .zip(&kinds)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (content, kind))| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": *kind == CONTROL,
            })
        })
        .collect();
    let inner = parse(file.path(), description.to_string().as_bytes())?;

    let token = |name: &str| -> Result<Option<(u32, String)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = file.get(&key).and_then(MetaValue::as_u64) else { return Ok(None) };
        match tokens.get(id as usize) {
            Some(text) => Ok(Some((id as u32, (*text).to_owned()))),
            None => Err(fault(format!("`{key}` is {id}, which is not in the vocabulary"))),
        }
    };
    let end_ids = ["eos", "eot"].iter().map(|name| token(name));
    let end_ids = end_ids.collect::<Result<Vec<_>>>()?.into_iter().flatten().map(|(id, _)| id);
    Ok(Tokenizer {
        path: file.path().to_path_buf(),
        bos: token("bos")?,
        eos: token("eos")?,
        end_ids: end_ids.collect(),
        add_bos: flag("tokenizer.ggml.add_bos_token", model == "llama"),
        chat_template: text("tokenizer.chat_template").map(str::to_owned),
        inner,
    })
}

/// How a text is cut into words under the rule of that name, and whether whole words in the
/// vocabulary skip the merges.
fn word_rule(name: &str) -> Option<(Value, bool)> {
    let byte_level = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": use_regex,
        })
    };
    let after_split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]})
    };
    Some(match name {
        "gpt-2" | "gpt2" | "default" => (byte_level(true), false),
        "smollm" => (
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true}, byte_level(true),
            ]}),
            false,
        ),
        "llama-bpe" | "llama3" | "llama-v3" => (after_split(CONTRACTIONS_AND_DIGIT_RUNS), true),
        "qwen2" => (after_split(CONTRACTIONS_AND_DIGITS), false),
        _ => return None,
    })
}

fn vocabulary(tokens: &[&str]) -> Value {
    let entries = tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id)));
    Value::Object(entries.collect::<Map<_, _>>())
}

fn byte_level(tokens: &[&str], merges: &[&str], words: Value, ignore_merges: bool) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "pre_tokenizer": words,
        "post_processor": null,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": ignore_merges, "vocab": vocabulary(tokens), "merges": merges,
        },
    })
}

fn sentence_piece(tokens: &[&str], scores: &[f64], unknown: Option<&str>, prefix: bool) -> Value {
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": "\u{2581}"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}));
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary(tokens), "merges": merges_by_score(tokens, scores),
        },
    })
}

/// SentencePiece always joins the neighbours whose union has the best score. So every way to cut a
/// piece into two known pieces is a merge, and the piece's score is the merge's rank.
fn merges_by_score(tokens: &[&str], scores: &[f64]) -> Vec<[String; 2]> {
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut merges = Vec::new();
    for (piece, &score) in tokens.iter().zip(scores) {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
                merges.push((score, left_id, right_id, [left.to_owned(), right.to_owned()]));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    merges.into_iter().map(|merge| merge.3).collect()
}

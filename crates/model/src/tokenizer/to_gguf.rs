//! The tokenizer as the metadata of a GGUF file.
//!
//! Byte-level BPE becomes a vocabulary, merges and the name of the rule that cuts words; BPE with
//! byte fallback, as converted from SentencePiece, becomes pieces with scores, for Gemma 4 with merges
//! too. All are read from the tokenizer's own JSON form.

use super::{Tokenizer, words};
use crate::error::{Error, Result};
use crate::family::SENTENCE_PIECE;
use crate::gguf::{Array, Value};
use serde_json::Value as Json;
use std::collections::{HashMap, HashSet};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The metadata of `tokenizer` for a model with `rows` embeddings, whose architecture calls a tokenizer of
/// pieces `pieces`.
pub(super) fn metadata(
    tokenizer: &Tokenizer,
    rows: usize,
    template: Option<&str>,
    pieces: &str,
) -> Result<Vec<(String, Value)>> {
    let text = tokenizer.inner.to_string(false).map_err(|error| tokenizer.fault(&error))?;
    let path = &tokenizer.path;
    let json: Json =
        serde_json::from_str(&text).map_err(|fault| Error::Json { path: path.clone(), fault })?;
    let model = &json["model"];
    if model["type"] != "BPE" {
        let message = format!("{} cannot be written to a GGUF file; expected BPE", model["type"]);
        return Err(Error::tokenizer(path, message));
    }
    let vocabulary = model["vocab"].as_object();
    let vocabulary: HashMap<&str, usize> = vocabulary
        .into_iter()
        .flatten()
        .filter_map(|(token, id)| Some((token.as_str(), usize::try_from(id.as_u64()?).ok()?)))
        .collect();
    let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; rows];
    let byte_fallback = model["byte_fallback"] == true;
    for (&token, &id) in &vocabulary {
        // A token without a row stands for nothing.
        let Some(slot) = tokens.get_mut(id) else { continue };
        token.clone_into(slot);
        kinds[id] = if byte_fallback && is_byte(token) { BYTE } else { NORMAL };
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(id), Some(content)) = (added["id"].as_u64(), added["content"].as_str()) else {
            continue;
        };
        let id = usize::try_from(id).unwrap_or(usize::MAX);
        let Some(slot) = tokens.get_mut(id) else { continue };
        content.clone_into(slot);
        kinds[id] = if added["special"] == true { CONTROL } else { USER_DEFINED };
    }
    let unknown = model["unk_token"].as_str().and_then(|token| vocabulary.get(token).copied());
    let merges = merges(model);
    let mut out: Vec<(String, Value)> = Vec::new();
    let mut put = |key: &str, value: Value| out.push((format!("tokenizer.{key}"), value));
    if byte_fallback {
        if let Some(fault) = normalizer_fault(&json["normalizer"]) {
            return Err(Error::tokenizer(path, fault));
        }
        if model["ignore_merges"] == true {
            // What is taken out of a text whole is what no merge ends in.
            let joined: HashSet<String> =
                merges.iter().map(|(left, right)| format!("{left}{right}")).collect();
            let whole = |token: &String| token.chars().count() > 1 && !joined.contains(token);
            let pieces = tokens.iter().zip(&mut kinds).filter(|(_, kind)| **kind == NORMAL);
            pieces.filter(|(token, _)| whole(token)).for_each(|(_, kind)| *kind = USER_DEFINED);
        }
        let scores = scores(&tokens, &merges);
        put("ggml.scores", Value::Array(Array::F32(scores)));
        let prefix = json["normalizer"].to_string().contains("\"Prepend\"")
            || json["pre_tokenizer"]["prepend_scheme"] == "first"
            || json["pre_tokenizer"]["prepend_scheme"] == "always";
        put("ggml.add_space_prefix", Value::Bool(prefix));
        // llama.cpp puts no space before a text whose merges are listed.
        if pieces == SENTENCE_PIECE || prefix {
            if let Some(kind) = unknown.and_then(|id| kinds.get_mut(id)) {
                *kind = UNKNOWN;
            }
            put("ggml.model", Value::String(SENTENCE_PIECE.to_owned()));
            put("ggml.pre", Value::String("default".to_owned()));
        } else {
            put("ggml.model", Value::String(pieces.to_owned()));
            put("ggml.merges", joined(&merges));
        }
    } else {
        let rule = words::name_of(&json["pre_tokenizer"], model["ignore_merges"] == true)
            .ok_or_else(|| {
                let message = "GGUF has no name for its rule to cut words; write a Hugging Face \
                               folder instead";
                Error::tokenizer(path, message)
            })?;
        put("ggml.model", Value::String("gpt2".to_owned()));
        put("ggml.pre", Value::String(rule.to_owned()));
        put("ggml.merges", joined(&merges));
    }
    put("ggml.tokens", Value::Array(Array::String(tokens)));
    put("ggml.token_type", Value::Array(Array::I32(kinds)));
    let unknown = unknown.and_then(|id| u32::try_from(id).ok());
    for (role, id) in [
        ("bos", tokenizer.bos().map(|(id, _)| id)),
        ("eos", tokenizer.eos().map(|(id, _)| id)),
        ("padding", tokenizer.pad().map(|(id, _)| id)),
        ("unknown", unknown),
    ] {
        if let Some(id) = id {
            put(&format!("ggml.{role}_token_id"), Value::U32(id));
        }
    }
    put("ggml.add_bos_token", Value::Bool(tokenizer.add_bos()));
    if let Some(template) = template.or(tokenizer.chat_template()) {
        put("chat_template", Value::String(template.to_owned()));
    }
    Ok(out)
}

/// What a normalizer does that a GGUF file cannot say of SentencePiece's pieces: anything but spaces
/// written as U+2581 and one put before the text.
fn normalizer_fault(normalizer: &Json) -> Option<String> {
    if normalizer.is_null() {
        return None;
    }
    if let Some(parts) = normalizer["normalizers"].as_array() {
        return parts.iter().find_map(normalizer_fault);
    }
    let spaces = normalizer["type"] == "Replace"
        && normalizer["pattern"]["String"] == " "
        && normalizer["content"] == "\u{2581}";
    if spaces || normalizer["type"] == "Prepend" {
        return None;
    }
    let what = match normalizer["type"].as_str() {
        Some("Precompiled") => "replaces characters by a table",
        Some("Replace") => "rewrites texts, such as runs of spaces",
        _ => "changes texts",
    };
    Some(format!("{what} first, which a GGUF file cannot say; write a Hugging Face folder instead"))
}

/// Whether a piece stands for a byte, as `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// Merges in order, written as pairs or with a space between.
fn merges(model: &Json) -> Vec<(String, String)> {
    fn pair(merge: &Json) -> Option<(String, String)> {
        let (left, right) = match merge {
            Json::Array(pair) => (pair.first()?.as_str()?, pair.get(1)?.as_str()?),
            Json::String(joined) => joined.split_once(' ')?,
            _ => return None,
        };
        Some((left.to_owned(), right.to_owned()))
    }
    model["merges"].as_array().into_iter().flatten().filter_map(pair).collect()
}

fn joined(merges: &[(String, String)]) -> Value {
    let joined = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
    Value::Array(Array::String(joined))
}

/// SentencePiece joins the neighbours whose union scores best, so a piece scores by the first merge
/// that makes it.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let last = merges.len();
    tokens.iter().map(|token| -(ranks.get(token).copied().unwrap_or(last) as f32)).collect()
}

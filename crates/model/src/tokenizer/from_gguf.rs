//! The tokenizer in a GGUF file, rebuilt for the `tokenizers` crate.
//!
//! Byte-level BPE (`gpt2`) is a vocabulary, merges and the name of the rule that cuts a text into
//! words; SentencePiece BPE (`llama`) is pieces with scores, from which the merges follow; Gemma 4's
//! (`gemma4`) is pieces and merges.

use super::sentence_piece::{CONTROL, NORMAL, Pieces, UNKNOWN, USER_DEFINED, vocabulary};
use super::{Extras, Special, Tokenizer, missing, words};
use crate::error::{Error, Result};
use crate::gguf::{Array, GgufFile, Value};
use std::collections::HashMap;
use tokenizers::AddedToken;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeBuilder};

/// The metadata of a tokenizer.
struct Source<'a> {
    file: &'a GgufFile,
    tokens: &'a [String],
    kinds: Vec<u64>,
}

pub(super) fn build(file: &GgufFile) -> Result<Tokenizer> {
    let key = "tokenizer.ggml.tokens";
    let tokens = file.strings(key)?.ok_or_else(|| Error::MissingTokenizer {
        folder: file.path().to_path_buf(),
        message: format!("expected the metadata `{key}`"),
    })?;
    let kinds = match file.get("tokenizer.ggml.token_type") {
        None => vec![NORMAL; tokens.len()],
        Some(value) => numbers(value)
            .ok_or_else(|| {
                let message = "expected an array of integers";
                Error::config(file.path(), "tokenizer.ggml.token_type", message)
            })?
            .into_iter()
            .map(|kind| kind as u64)
            .collect(),
    };
    let source = Source { file, tokens, kinds };
    source.same_length("token_type", source.kinds.len())?;
    let kind = file.str("tokenizer.ggml.model")?.unwrap_or("missing");
    let (mut inner, default_add_bos) = match kind {
        "gpt2" => source.byte_level()?,
        "llama" => (source.sentence_piece(None)?, true),
        "gemma4" => (source.sentence_piece(Some(source.listed_merges()?))?, true),
        other => {
            let message =
                format!("the kind `{other}` is not supported; expected gpt2, llama or gemma4");
            return Err(source.fault(message));
        }
    };
    let added: Vec<AddedToken> = source
        .of_kind(&[CONTROL, UNKNOWN, USER_DEFINED])
        .filter(|(id, text)| !text.is_empty() && (kind != "gpt2" || source.kinds[*id] != UNKNOWN))
        .map(|(id, text)| {
            AddedToken::from(text, source.kinds[id] != USER_DEFINED).normalized(false)
        })
        .collect();
    inner
        .add_special_tokens(added)
        .map_err(|error| source.fault(format!("its special tokens: {error}")))?;
    // Tokens that the vocabulary lists twice would shift the ids of added ones.
    if inner.get_vocab_size(true) != tokens.len() {
        let message =
            format!("{} tokens of which {} are distinct", tokens.len(), inner.get_vocab_size(true));
        return Err(source.fault(message));
    }
    let mut end_ids: Vec<u32> = Vec::new();
    for role in ["eos", "eot", "eom"] {
        end_ids.extend(source.special(role)?.map(|(id, _)| id));
    }
    let extras = Extras {
        bos: source.special("bos")?,
        eos: source.special("eos")?,
        pad: source.special("padding")?,
        end_ids,
        add_bos: Some(file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(default_add_bos)),
        chat_template: file.str("tokenizer.chat_template")?.map(str::to_owned),
    };
    Tokenizer::assemble(file.path(), inner, extras)
}

impl Source<'_> {
    fn fault(&self, message: impl Into<String>) -> Error {
        Error::tokenizer(self.file.path(), message)
    }

    fn same_length(&self, name: &str, found: usize) -> Result<()> {
        if found == self.tokens.len() {
            return Ok(());
        }
        let message =
            format!("expected one for each of {} tokens, found {found}", self.tokens.len());
        Err(Error::config(self.file.path(), format!("tokenizer.ggml.{name}"), message))
    }

    fn of_kind(&self, kinds: &[u64]) -> impl Iterator<Item = (usize, &str)> {
        let tokens = self.tokens.iter().zip(&self.kinds).enumerate();
        tokens
            .filter(|(_, (_, kind))| kinds.contains(kind))
            .map(|(id, (text, _))| (id, text.as_str()))
    }

    /// The special token that `tokenizer.ggml.{role}_token_id` names.
    fn special(&self, role: &str) -> Result<Option<Special>> {
        let key = format!("tokenizer.ggml.{role}_token_id");
        let Some(id) = self.file.u64(&key)? else { return Ok(None) };
        let text = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        match (u32::try_from(id), text) {
            (Ok(id), Some(text)) => Ok(Some((id, text.clone()))),
            _ => Err(missing(self.file.path(), &key, &id.to_string(), self.tokens.len())),
        }
    }

    fn model(&self, merges: Vec<(String, String)>) -> BpeBuilder {
        let vocabulary =
            vocabulary(self.tokens).into_iter().map(|(text, id)| (text.to_owned(), id));
        BPE::builder().vocab_and_merges(vocabulary.collect::<HashMap<_, _, _>>(), merges)
    }

    fn listed_merges(&self) -> Result<Vec<(String, String)>> {
        let key = "tokenizer.ggml.merges";
        let merges = self.file.strings(key)?.ok_or_else(|| self.fault(format!("no `{key}`")))?;
        merges
            .iter()
            .map(|merge| {
                // The first character may itself be a space in odd vocabularies.
                let cut = merge.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
                let pair = cut.map(|at| (merge[..at].to_owned(), merge[at + 1..].to_owned()));
                pair.ok_or_else(|| {
                    let message =
                        format!("expected two tokens with a space between, found {merge:?}");
                    Error::config(self.file.path(), key, message)
                })
            })
            .collect()
    }

    fn byte_level(&self) -> Result<(tokenizers::Tokenizer, bool)> {
        let name = self.file.str("tokenizer.ggml.pre")?.unwrap_or("default");
        let rule = words::find(name).ok_or_else(|| {
            let known = words::known();
            let message = format!("`{name}` is not supported; supported are {known}");
            Error::config(self.file.path(), "tokenizer.ggml.pre", message)
        })?;
        let merges = self.listed_merges()?;
        let mut inner = tokenizers::Tokenizer::new(
            self.model(merges)
                .ignore_merges(rule.ignore_merges)
                .build()
                .map_err(|error| self.fault(error.to_string()))?,
        );
        let words = rule.pre_tokenizer().map_err(|error| self.fault(error.to_string()))?;
        inner.with_pre_tokenizer(Some(words)).with_decoder(Some(ByteLevel::default()));
        Ok((inner, rule.add_bos))
    }

    /// Pieces joined by the merges that are `listed`, or those that follow from their scores.
    fn sentence_piece(
        &self,
        listed: Option<Vec<(String, String)>>,
    ) -> Result<tokenizers::Tokenizer> {
        if self.file.bool("tokenizer.ggml.remove_extra_whitespaces")? == Some(true) {
            let message = "collapsing runs of spaces is not supported";
            let field = "tokenizer.ggml.remove_extra_whitespaces";
            return Err(Error::config(self.file.path(), field, message));
        }
        let prefix = self.file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(listed.is_none());
        let scores = if listed.is_none() { self.scores()? } else { Vec::new() };
        let mut kinds = self.kinds.clone();
        if let Some((id, _)) = self.special("unknown")? {
            kinds[id as usize] = UNKNOWN;
        }
        let pieces = Pieces {
            tokens: self.tokens,
            kinds: &kinds,
            scores: &scores,
            listed,
            unigram: false,
            cut_user_defined: false,
            byte_fallback: true,
            prefix,
            collapse: false,
            replaced: &[],
        };
        pieces.build().map_err(|error| self.fault(error.to_string()))
    }

    fn scores(&self) -> Result<Vec<f64>> {
        let key = "tokenizer.ggml.scores";
        let scores =
            self.file.get(key).and_then(numbers).ok_or_else(|| {
                Error::config(self.file.path(), key, "expected an array of numbers")
            })?;
        self.same_length("scores", scores.len())?;
        Ok(scores)
    }
}

/// An array of numbers of any width.
fn numbers(value: &Value) -> Option<Vec<f64>> {
    let Value::Array(array) = value else { return None };
    Some(match array {
        Array::U8(v) => v.iter().map(|&v| v.into()).collect(),
        Array::I8(v) => v.iter().map(|&v| v.into()).collect(),
        Array::U16(v) => v.iter().map(|&v| v.into()).collect(),
        Array::I16(v) => v.iter().map(|&v| v.into()).collect(),
        Array::U32(v) => v.iter().map(|&v| v.into()).collect(),
        Array::I32(v) => v.iter().map(|&v| v.into()).collect(),
        Array::U64(v) => v.iter().map(|&v| v as f64).collect(),
        Array::I64(v) => v.iter().map(|&v| v as f64).collect(),
        Array::F32(v) => v.iter().map(|&v| v.into()).collect(),
        Array::F64(v) => v.clone(),
        Array::Bool(_) | Array::String(_) | Array::Array(_) => return None,
    })
}

//! The tokenizer of a Hugging Face folder: `tokenizer.json`, or `tekken.json` or `tokenizer.model`
//! where there is none, and the files beside it that name special tokens and hold the chat
//! template.

use super::sentence_piece::table_fits;
use super::{CONFIG_FILE, Extras, Special, TOKENIZER_FILE, Tokenizer, guarded, missing};
use super::{from_sentence_piece, from_tekken};
use crate::config::token_ids;
use crate::error::{Error, Result};
use crate::pointer::lfs_pointer;
use serde_json::Value;
use std::path::Path;

/// Older file of special tokens.
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
/// Defaults of generation, among them the tokens at which it stops.
const GENERATION_FILE: &str = "generation_config.json";
/// Chat template in a file of its own.
const TEMPLATE_FILE: &str = "chat_template.jinja";

/// What a file of a vocabulary says.
pub(super) struct Read {
    pub(super) inner: tokenizers::Tokenizer,
    /// The start-of-text token, where the file itself names it.
    pub(super) bos: Option<Special>,
    pub(super) eos: Option<Special>,
    pub(super) add_bos: Option<bool>,
}

/// How such a file is read: by its path and bytes.
type Reader = fn(&Path, &[u8]) -> Result<Read>;

/// The files that hold a vocabulary, the first of those that are there counts.
const KINDS: &[(&str, Reader)] = &[
    (TOKENIZER_FILE, from_json),
    ("tekken.json", from_tekken::read),
    ("tokenizer.model", from_sentence_piece::read),
];

/// Files of vocabularies that are known and not read.
const OTHERS: &[&str] = &["vocab.json", "merges.txt", "vocab.txt", "spiece.model"];

fn from_json(path: &Path, bytes: &[u8]) -> Result<Read> {
    check_tables(path, bytes)?;
    let inner = guarded(path, || tokenizers::Tokenizer::from_bytes(bytes))?;
    Ok(Read { inner, bos: None, eos: None, add_bos: None })
}

/// Checks that SentencePiece's compiled tables are as long as they say.
fn check_tables(path: &Path, bytes: &[u8]) -> Result<()> {
    const NAME: &str = "precompiled_charsmap";
    let cut_off = |value: &Value| {
        let table = value.as_str().and_then(from_tekken::base64);
        table.is_some_and(|table| !table_fits(&table))
    };
    fn any(value: &Value, found: &impl Fn(&Value) -> bool) -> bool {
        match value {
            Value::Object(map) => {
                map.iter().any(|(key, value)| key == NAME && found(value) || any(value, found))
            }
            Value::Array(list) => list.iter().any(|value| any(value, found)),
            _ => false,
        }
    }
    // Only few files have one, and parsing a file twice takes time.
    if !bytes.windows(NAME.len()).any(|window| window == NAME.as_bytes()) {
        return Ok(());
    }
    let file: Value = serde_json::from_slice(bytes)
        .map_err(|fault| Error::Json { path: path.to_path_buf(), fault })?;
    if any(&file["normalizer"], &cut_off) {
        return Err(Error::tokenizer(path, format!("normalizer: {NAME} is cut off")));
    }
    Ok(())
}

pub(super) fn read(folder: &Path, config_end_ids: &[u32]) -> Result<Tokenizer> {
    let found = KINDS.iter().map(|(name, read)| (folder.join(name), read));
    let Some((path, read)) = found.into_iter().find(|(path, _)| path.exists()) else {
        let names: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
        let mut message = format!("expected {}", names.join(" or "));
        if let Some(other) = OTHERS.iter().find(|name| folder.join(name).exists()) {
            message.push_str(&format!("; {other} alone is not read, convert it first"));
        }
        return Err(Error::MissingTokenizer { folder: folder.to_path_buf(), message });
    };
    let bytes = hydralora_files::read(&path)?;
    if let Some(what) = lfs_pointer(&bytes) {
        return Err(Error::malformed(&path, what));
    }
    let Read { inner, bos: own_bos, eos: own_eos, add_bos: own_add_bos } = read(&path, &bytes)?;
    let config_path = folder.join(CONFIG_FILE);
    let special_path = folder.join(SPECIAL_TOKENS_FILE);
    let generation_path = folder.join(GENERATION_FILE);
    let config = optional_object(&config_path)?;
    let special = optional_object(&special_path)?;
    let generation = optional_object(&generation_path)?;

    let find = |role: &str| -> Result<Option<Special>> {
        let key = format!("{role}_token");
        for (path, object) in [(&config_path, &config), (&special_path, &special)] {
            let Some(text) = token_text(&object[&key]) else { continue };
            return match inner.token_to_id(text) {
                Some(id) => Ok(Some((id, text.to_owned()))),
                None => Err(missing(path, &key, &format!("`{text}`"), inner.get_vocab_size(true))),
            };
        }
        Ok(None)
    };
    let mut end_ids = config_end_ids.to_vec();
    if !generation["eos_token_id"].is_null() {
        let ids = token_ids(&generation["eos_token_id"]).ok_or_else(|| {
            let message = "expected a token id or a list of them";
            Error::config(&generation_path, "eos_token_id", message)
        })?;
        end_ids.extend(ids);
    }
    let template_path = folder.join(TEMPLATE_FILE);
    let chat_template = if template_path.exists() {
        Some(hydralora_files::read_to_string(&template_path)?)
    } else {
        default_template(&config["chat_template"])
    };
    let extras = Extras {
        bos: find("bos")?.or(own_bos),
        eos: find("eos")?.or(own_eos),
        pad: find("pad")?,
        end_ids,
        add_bos: config["add_bos_token"].as_bool().or(own_add_bos),
        chat_template,
    };
    Tokenizer::assemble(&path, inner, extras)
}

/// The object in a file that may be absent; null if it is.
fn optional_object(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    let bytes = hydralora_files::read(path)?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|fault| Error::Json { path: path.to_path_buf(), fault })?;
    if !value.is_object() {
        return Err(Error::malformed(path, "expected an object"));
    }
    Ok(value)
}

/// A special token's text, written plainly or as an object.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A template, or the one called `default` in a list of named ones.
fn default_template(value: &Value) -> Option<String> {
    match value {
        Value::String(template) => Some(template.clone()),
        Value::Array(named) => {
            let template = named.iter().find(|entry| entry["name"] == "default")?;
            template["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

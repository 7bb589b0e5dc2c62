//! The tokenizer of a Hugging Face folder: `tokenizer.json`, and the files beside it that name
//! special tokens and hold the chat template.

use super::{CONFIG_FILE, Extras, Special, TOKENIZER_FILE, Tokenizer, guarded, missing};
use crate::config::token_ids;
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Older file of special tokens.
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
/// Defaults of generation, among them the tokens at which it stops.
const GENERATION_FILE: &str = "generation_config.json";
/// Chat template in a file of its own.
const TEMPLATE_FILE: &str = "chat_template.jinja";

pub(super) fn read(folder: &Path, config_end_ids: &[u32]) -> Result<Tokenizer> {
    let path = folder.join(TOKENIZER_FILE);
    if !path.exists() {
        let mut message = format!("expected {TOKENIZER_FILE}");
        if folder.join("tokenizer.model").exists() {
            message.push_str("; a tokenizer.model alone is not read, convert it first");
        }
        return Err(Error::MissingTokenizer { folder: folder.to_path_buf(), message });
    }
    let bytes = hydralora_files::read(&path)?;
    let inner = guarded(&path, || tokenizers::Tokenizer::from_bytes(&bytes))?;
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
        bos: find("bos")?,
        eos: find("eos")?,
        pad: find("pad")?,
        end_ids,
        add_bos: config["add_bos_token"].as_bool(),
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

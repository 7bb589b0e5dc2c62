//! What an adapter was trained with: `hydralora.json`, the chat template and, for added tokens, the
//! tokenizer.

use super::{naming, pretty, read_json, write};
use crate::error::Result;
use hydralora_model::AddedToken;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// What an adapter was trained with.
pub const METADATA_FILE: &str = "hydralora.json";
/// What other trainers leave of the tokenizer; it may hold the chat template.
const TOKENIZER_FILE: &str = "tokenizer_config.json";
/// The chat template, where the Hugging Face tools look for it.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";

/// The files of a tokenizer beside an adapter that adds tokens.
const TOKENIZER_FILES: [&str; 2] = ["tokenizer.json", "tokenizer_config.json"];

/// What an adapter was trained with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Version of hydralora that wrote the folder.
    pub version: String,
    /// Name of the base model.
    pub base_model: String,
    /// Fingerprint of the base model's weights and configuration; empty where nobody knows it.
    pub base_fingerprint: String,
    /// The chat template's source, if records were put through one.
    pub chat_template: Option<String>,
    /// Arguments of the chat template, such as `enable_thinking`; answers are asked for with the same
    /// ones.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub template_arguments: Map<String, Value>,
    /// Text of the tokens that end an answer.
    pub end_tokens: Vec<String>,
    /// Tokens that were added to the base model's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub added_tokens: Vec<AddedToken>,
    /// The files of the tokenizer with them, by name; beside `hydralora.json`, not in it.
    #[serde(skip)]
    pub tokenizer: Vec<(String, Arc<[u8]>)>,
}

pub(super) fn write_metadata(folder: &Path, metadata: &Metadata) -> Result<()> {
    // What names no base model is not worth a file of its own.
    if !metadata.base_fingerprint.is_empty() {
        write(&folder.join(METADATA_FILE), &pretty(metadata))?;
    }
    for (name, bytes) in &metadata.tokenizer {
        write(&folder.join(name), bytes)?;
    }
    match &metadata.chat_template {
        Some(template) => write(&folder.join(TEMPLATE_FILE), template.as_bytes()),
        None => Ok(()),
    }
}

/// What the adapter in `folder` was trained with, if it says so: in our own file, or else in the
/// template and the tokenizer's configuration that other trainers leave beside an adapter. Those name no
/// base model, so that its fingerprint is empty.
///
/// # Errors
/// If a file is there but malformed.
pub fn read_metadata(folder: &Path) -> Result<Option<Metadata>> {
    let path = folder.join(METADATA_FILE);
    if path.exists() {
        let mut metadata: Metadata = read_json(&path)?;
        if !metadata.added_tokens.is_empty() {
            for name in TOKENIZER_FILES.iter().filter(|name| folder.join(name).is_file()) {
                let path = folder.join(name);
                let bytes =
                    hydralora_files::bytes_of(&path).map_err(|error| naming(&path, &error))?;
                metadata.tokenizer.push(((*name).to_owned(), bytes.into()));
            }
        }
        return Ok(Some(metadata));
    }
    let path = folder.join(TOKENIZER_FILE);
    let tokenizer: Map<String, Value> = if path.exists() { read_json(&path)? } else { Map::new() };
    let path = folder.join(TEMPLATE_FILE);
    let chat_template = match path.exists() {
        true => Some(hydralora_files::text_of(&path).map_err(|error| naming(&path, &error))?),
        false => named_template(tokenizer.get("chat_template")),
    };
    let eos = tokenizer.get("eos_token");
    let eos = eos.and_then(|eos| eos.as_str().or_else(|| eos.get("content")?.as_str()));
    let found = Metadata {
        chat_template,
        end_tokens: eos.map(str::to_owned).into_iter().collect(),
        ..Metadata::default()
    };
    Ok((found != Metadata::default()).then_some(found))
}

/// A template, or that called `default` in a list of named ones.
fn named_template(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(template) => Some(template.clone()),
        Value::Array(named) => {
            let of = |name: &str| named.iter().find(|entry| entry["name"] == name);
            of("default")?["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

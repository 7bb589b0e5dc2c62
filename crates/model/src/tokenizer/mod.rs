//! Text to token ids and back, as the model's own tokenizer does it.

mod from_gguf;
mod stream;

pub use stream::TokenStream;

use crate::config::token_ids;
use crate::error::{Error, Result};
use crate::weights::GgufFile;
use serde_json::Value;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Tokens that end a turn in the chat templates of the supported families.
const END_OF_TURN: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"];

/// A tokenizer with the special tokens and the chat template that belong to it.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    bos: Option<(u32, String)>,
    eos: Option<(u32, String)>,
    end_ids: Vec<u32>,
    add_bos: bool,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and the files beside it.
    ///
    /// # Errors
    /// If it is missing or malformed, or names a special token it does not have.
    pub fn from_folder(folder: &Path, config_end_ids: &[u32]) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let inner = parse(&path, &bytes)?;
        let config = optional_json(&folder.join("tokenizer_config.json"))?;
        let generation = optional_json(&folder.join("generation_config.json"))?;
        let special = |key: &str| match &config[key] {
            Value::String(text) => Some(text.clone()),
            Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
            _ => None,
        };
        let find = |key: &str| match special(key) {
            None => Ok(None),
            Some(text) => match inner.token_to_id(&text) {
                Some(id) => Ok(Some((id, text))),
                None => Err(Error::Tokenizer {
                    path: path.clone(),
                    message: format!("{key} is `{text}`, which is not in the vocabulary"),
                }),
            },
        };
        let (bos, mut eos) = (find("bos_token")?, find("eos_token")?);
        let mut end_ids = config_end_ids.to_vec();
        end_ids.extend(token_ids(&generation["eos_token_id"]));
        if eos.is_none()
            && let Some(&id) = end_ids.first()
        {
            eos = inner.id_to_token(id).map(|text| (id, text));
        }
        let template_file = folder.join("chat_template.jinja");
        let chat_template = if template_file.exists() {
            Some(fs::read_to_string(&template_file).map_err(Error::io(&template_file))?)
        } else {
            default_template(&config["chat_template"])
        };
        let add_bos = config["add_bos_token"].as_bool().unwrap_or_else(|| {
            // Newer files say it only through the post-processor.
            let first = inner.encode("a", true).ok().and_then(|e| e.get_ids().first().copied());
            bos.as_ref().is_some_and(|(id, _)| first == Some(*id))
        });
        Self { path, inner, bos, eos, end_ids, add_bos, chat_template }.finish()
    }

    /// Builds the tokenizer a GGUF file describes.
    ///
    /// # Errors
    /// If its kind is not supported or it lacks what that kind needs.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        from_gguf::build(file)?.finish()
    }

    fn finish(mut self) -> Result<Self> {
        for &id in &self.end_ids {
            if self.inner.id_to_token(id).is_none() {
                return Err(Error::Tokenizer {
                    path: self.path,
                    message: format!("the end token {id} is not in the vocabulary"),
                });
            }
        }
        self.end_ids.extend(self.eos.as_ref().map(|(id, _)| *id));
        let template = self.chat_template.as_deref().unwrap_or_default();
        let in_template = END_OF_TURN.iter().filter(|token| template.contains(**token));
        self.end_ids.extend(in_template.filter_map(|token| self.inner.token_to_id(token)));
        self.end_ids.sort_unstable();
        self.end_ids.dedup();
        Ok(self)
    }

    /// Token ids of `text`. Special tokens written in the text are recognised; none is added.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encoding(text)?.get_ids().to_vec())
    }

    /// Token ids with the bytes of `text` each stands for.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.encoding(text)?;
        let pairs = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(pairs.map(|(&id, &(start, end))| (id, start..end)).collect())
    }

    fn encoding(&self, text: &str) -> Result<tokenizers::Encoding> {
        self.inner.encode(text, false).map_err(|error| self.fault(error.to_string()))
    }

    /// Text of `ids`; special tokens are left out on request.
    ///
    /// # Errors
    /// If the ids cannot be decoded.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|error| self.fault(error.to_string()))
    }

    fn fault(&self, message: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), message }
    }

    /// The id of a token by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token's text by its id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token every text begins with, if the model has one.
    pub fn bos(&self) -> Option<(u32, &str)> {
        self.bos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<(u32, &str)> {
        self.eos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// All tokens at which generation stops.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Whether the model expects every text to begin with its first token.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// The model's own chat template, as Jinja source.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| Error::Tokenizer {
        path: path.to_path_buf(),
        message: error.to_string(),
    })?;
    // A file may ask for truncation or padding; whole texts are needed here.
    inner.with_padding(None);
    let _ = inner.with_truncation(None);
    Ok(inner)
}

fn optional_json(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::malformed(path, error.to_string()))
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

//! A Hugging Face folder.

use super::Saving;
use crate::error::{Error, Result};
use crate::family::Layout;
use hydralora_files::{Kind, replace_folder};
use hydralora_kernels::block::BlockFormat;
use safetensors::Dtype;
use safetensors::tensor::View;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// What such a folder is. Builds that left no list of its files wrote what any program writes, so
/// their folders cannot be told from a model that somebody put there.
pub const FOLDER: Kind = Kind { name: "merged model", earlier: None };

/// Defaults of generation, where programs look for the tokens at which it stops.
const GENERATION_FILE: &str = "generation_config.json";
/// Those tokens, in it and in the configuration.
const ENDS: &str = "eos_token_id";

/// Files of a folder that stay as they are.
const CARRIED: &[&str] = &[
    GENERATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

pub(super) fn write(saving: &Saving<'_>, out: &Path) -> Result<()> {
    let (dtype, name) = match saving.format {
        BlockFormat::F32 => (Dtype::F32, "float32"),
        BlockFormat::F16 => (Dtype::F16, "float16"),
        BlockFormat::BF16 => (Dtype::BF16, "bfloat16"),
        other => {
            let message = format!("{other} is no format of safetensors; expected f32, f16 or bf16");
            return Err(Error::malformed(out, message));
        }
    };
    let weights = &saving.source.weights;
    // Of a GGUF file only what it says is left to write; a folder has files to carry over.
    let from = weights.gguf().is_none().then(|| beside(weights.path()));
    replace_folder(out, &FOLDER, |folder| {
        let carried = match &from {
            Some(from) => carried_config(&from.join("config.json"), name)?,
            None => None,
        };
        let mut config = carried.unwrap_or_else(|| saving.source.config.to_json(name));
        // What the configuration says may not be what its tensors are.
        let own_head = !saving.source.config.tie_word_embeddings
            && config.get("tie_word_embeddings") != Some(&json!(false));
        if saving.unties() || own_head {
            untie(&mut config);
        }
        let grown = !saving.source.added.is_empty();
        if let Some(fields) = config.as_object_mut().filter(|_| grown) {
            fields.insert("vocab_size".to_owned(), json!(saving.source.config.vocab_size));
        }
        add_ends(&mut config, saving.end_ids);
        write_json(&folder.join("config.json"), &config)?;
        match &from {
            // The files of its own tokenizer know nothing of added tokens.
            Some(from) if grown => {
                let kept = from.join(GENERATION_FILE);
                if kept.is_file() {
                    fs_err::copy(kept, folder.join(GENERATION_FILE))?;
                }
                saving.source.tokenizer.save(folder)?;
            }
            Some(from) => {
                for file in CARRIED.iter().filter(|file| from.join(file).is_file()) {
                    fs_err::copy(from.join(file), folder.join(file))?;
                }
            }
            None => saving.source.tokenizer.save(folder)?,
        }
        name_ends(&folder.join(GENERATION_FILE), saving)?;
        if let Some(template) = saving.chat_template {
            fs_err::write(folder.join("chat_template.jinja"), template)?;
        }
        let weights = folder.join("model.safetensors");
        write_weights(saving, &weights, dtype)?;
        // The format's own writer makes a file that only its owner may read.
        let usual = fs_err::metadata(folder.join("config.json"))?.permissions();
        Ok(fs_err::set_permissions(&weights, usual)?)
    })
}

/// The folder of a model's other files.
fn beside(path: &Path) -> PathBuf {
    match path.parent() {
        _ if path.is_dir() => path.to_path_buf(),
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(fs_err::write(path, format!("{value:#}\n"))?)
}

/// Says that the output layer has a weight of its own.
fn untie(config: &mut Value) {
    if let Some(fields) = config.as_object_mut() {
        fields.insert("tie_word_embeddings".to_owned(), json!(false));
    }
}

/// Adds the ids that `eos_token_id` does not name; one alone stays a number.
fn add_ends(config: &mut Value, end_ids: &[u32]) {
    let Some(fields) = config.as_object_mut() else { return };
    let named = match fields.get(ENDS) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(ids)) => ids.clone(),
        Some(id) => vec![id.clone()],
    };
    let new = end_ids.iter().map(|id| json!(id)).filter(|id| !named.contains(id));
    let all: Vec<Value> = named.iter().cloned().chain(new).collect();
    if all.len() > named.len() {
        let value = if all.len() == 1 { all[0].clone() } else { Value::Array(all) };
        fields.insert(ENDS.to_owned(), value);
    }
}

/// Says in the defaults of generation where answers end; a model without such a file gets one where its
/// configuration alone said something else.
fn name_ends(path: &Path, saving: &Saving<'_>) -> Result<()> {
    let known = &saving.source.config.eos_token_ids;
    let new = saving.end_ids.iter().any(|id| !known.contains(id));
    if !path.is_file() && !new {
        return Ok(());
    }
    let mut settings: Value = match path.is_file() {
        true => serde_json::from_slice(&hydralora_files::read(path)?)
            .map_err(|fault| Error::Json { path: path.to_path_buf(), fault })?,
        false => {
            let bos = saving.source.tokenizer.bos().map(|(id, _)| id);
            json!({"bos_token_id": bos, ENDS: known})
        }
    };
    let before = settings.clone();
    add_ends(&mut settings, saving.end_ids);
    if settings == before && path.is_file() {
        return Ok(());
    }
    write_json(path, &settings)
}

fn carried_config(path: &Path, dtype: &str) -> Result<Option<Value>> {
    let text = hydralora_files::read(path)?;
    let mut config: Map<String, Value> = serde_json::from_slice(&text)
        .map_err(|fault| Error::Json { path: path.to_path_buf(), fault })?;
    // Of a model of pictures and text only the text's part is written.
    if config.contains_key("text_config") {
        return Ok(None);
    }
    let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
    config.insert(key.to_owned(), json!(dtype));
    Ok(Some(Value::Object(config)))
}

/// A tensor that is computed when the file's writer comes to it.
struct Lazy<'a> {
    saving: &'a Saving<'a>,
    name: &'a str,
    dtype: Dtype,
    /// The first error, since the writer's interface has no place for one.
    failed: &'a RefCell<Option<Error>>,
}

impl View for &Lazy<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.saving.shape(self.name)
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let failed_before = self.failed.borrow().is_some();
        let encoded = if failed_before {
            Ok(vec![0; self.data_len()])
        } else {
            self.saving.encode(self.name, self.saving.format, &Layout::default())
        };
        Cow::Owned(encoded.unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            vec![0; self.data_len()]
        }))
    }

    fn data_len(&self) -> usize {
        self.saving.format.bytes_for(self.shape().iter().product())
    }
}

fn write_weights(saving: &Saving<'_>, path: &Path, dtype: Dtype) -> Result<()> {
    let failed = RefCell::new(None);
    let tensors: Vec<Lazy<'_>> =
        saving.names().map(|name| Lazy { saving, name, dtype, failed: &failed }).collect();
    let views = tensors.iter().map(|tensor| (tensor.name, tensor));
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let written = safetensors::serialize_to_file(views, Some(metadata), path);
    if let Some(error) = failed.take() {
        return Err(error);
    }
    written.map_err(|error| match error {
        safetensors::SafeTensorError::IoError(error) => error.into(),
        other => Error::malformed(path, other.to_string()),
    })
}

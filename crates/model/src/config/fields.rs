//! Typed access to the fields of a `config.json`.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// Fields that change nothing here: how a program runs, stores or names a model, how it generates and trains,
/// what only training from nothing or losses beside the main one read, what predicts later tokens, and what
/// holds for pictures or for heads of classes.
const HARMLESS: &[&str] = &[
    "add_bos_token",
    "add_eos_token",
    "architectures",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token",
    "cache_implementation",
    "chunk_size_feed_forward",
    "custom_pipelines",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "eos_token",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "language",
    "length_penalty",
    "license",
    "mask_token",
    "max_length",
    "max_new_tokens",
    "max_seq_len",
    "max_sequence_length",
    "max_window_layers",
    "min_length",
    "model_max_length",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_layers",
    "num_nextn_predict_layers",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token",
    "padding_side",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "sep_token",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "truncation_side",
    "typical_p",
    "unk_token",
    "unsloth_fixed",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
    "use_unsloth_gradient_checkpointing",
];
/// How names of such fields begin.
const HARMLESS_BEGINNINGS: &[&str] = &[
    "_attn_implementation",
    "_commit_hash",
    "_experts_implementation",
    "_flash_attn",
    "_name_or_path",
    "attn_implementation",
    "flash_attention",
    "flash_attn",
    "initializer_",
    "neftune_",
    "summary_",
    "use_flash_attention",
    "use_flash_attn",
];
/// How they end.
const HARMLESS_ENDS: &[&str] = &[
    "_dropout",
    "_loss",
    "_loss_coef",
    "_pdrop",
    "_token_id",
    "_token_ids",
    "_token_index",
    "_token_ratio",
    "_version",
    "dropout_prob",
];
/// Names that mean something done unless they say false.
const USUALLY_ON: &[&str] =
    &["attn_output_gate", "causal", "is_causal", "rope", "rotary", "use_rope", "use_rotary"];

/// Typed access to the fields of a JSON object, with errors that name file and field.
#[derive(Debug)]
pub struct Fields<'a> {
    pub(super) object: &'a Map<String, Value>,
    pub(super) path: &'a Path,
    pub(super) prefix: String,
    /// The names asked for so far.
    pub(super) read: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(object: &'a Map<String, Value>, path: &'a Path, prefix: String) -> Self {
        Self { object, path, prefix, read: RefCell::default() }
    }

    /// Refuses a field that nobody asked for.
    ///
    /// # Errors
    /// Naming the first one that is there and not null.
    pub fn refuse_unread(&self) -> Result<()> {
        match self.unread().next() {
            Some((name, value)) => Err(self
                .error(name, format!("found {}; what it asks for is not supported", kind(value)))),
            None => Ok(()),
        }
    }

    /// Refuses a field that nobody asked for, unless it says that nothing is done or is known to change
    /// nothing: a program that knows it would compute something else.
    ///
    /// # Errors
    /// Naming the first such field.
    pub(super) fn refuse_unknown(&self) -> Result<()> {
        let mut unread = self.unread().filter(|(name, value)| {
            let harmless = HARMLESS.contains(&name.as_str())
                || HARMLESS_BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
                || HARMLESS_ENDS.iter().any(|end| name.ends_with(end));
            !(harmless || says_nothing(name, value))
        });
        match unread.next() {
            Some((name, value)) => {
                let message = format!(
                    "found {}; this model_type has no such field here, and what it says may change what \
                     the model computes: it is not supported (leave it out if it means nothing)",
                    kind(value)
                );
                Err(self.error(name, message))
            }
            None => Ok(()),
        }
    }

    fn unread(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        let all = self.object.iter().filter(|(_, value)| !value.is_null());
        all.filter(|(name, _)| !self.read.borrow().contains(name.as_str()))
    }

    /// Gives the field, if it is there and not null.
    pub fn value(&self, field: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(field.to_owned());
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// Tells whether the field is there, be it null.
    pub fn has(&self, field: &str) -> bool {
        self.read.borrow_mut().insert(field.to_owned());
        self.object.contains_key(field)
    }

    /// Makes an error of this file that names the field.
    pub fn error(&self, field: &str, message: impl Into<String>) -> Error {
        Error::config(self.path, format!("{}{field}", self.prefix), message)
    }

    /// Reads a field that may be missing or null.
    ///
    /// # Errors
    /// If it is not what was `expected`.
    pub fn optional<T>(
        &self,
        field: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(field) else { return Ok(None) };
        convert(value)
            .map(Some)
            .ok_or_else(|| self.error(field, format!("expected {expected}, found {}", kind(value))))
    }

    /// Reads a field.
    ///
    /// # Errors
    /// If it is missing, or not what was `expected`.
    pub fn required<T>(
        &self,
        field: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(field, expected, convert)?
            .ok_or_else(|| self.error(field, format!("missing; expected {expected}")))
    }

    /// Reads a positive integer.
    ///
    /// # Errors
    /// If it is missing or something else.
    pub fn size(&self, field: &str) -> Result<usize> {
        self.optional_size(field)?
            .ok_or_else(|| self.error(field, "missing; expected a positive integer"))
    }

    /// Reads a positive integer that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn optional_size(&self, field: &str) -> Result<Option<usize>> {
        self.optional(field, "a positive integer", |value| usize::try_from(value.as_u64()?).ok())
    }

    /// Reads a number that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn number(&self, field: &str) -> Result<Option<f64>> {
        self.optional(field, "a number", Value::as_f64)
    }

    /// Reads true or false, which may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.optional(field, "true or false", Value::as_bool)
    }

    /// Reads a positive number.
    ///
    /// # Errors
    /// If it is something else.
    pub fn positive(&self, field: &str) -> Result<Option<f64>> {
        match self.number(field)? {
            Some(found) if !(found > 0.0 && found.is_finite()) => {
                Err(self.error(field, format!("expected a positive number, found {found}")))
            }
            found => Ok(found),
        }
    }

    /// Reads a list of as many entries as there are layers, which may be missing.
    ///
    /// # Errors
    /// If it is something else, or has another length.
    pub fn by_layer(&self, field: &str, layers: usize) -> Result<Option<&'a [Value]>> {
        let Some(list) = self.optional(field, "a list", Value::as_array)? else { return Ok(None) };
        if list.len() != layers {
            let message =
                format!("expected one entry for each of {layers} layers, found {}", list.len());
            return Err(self.error(field, message));
        }
        Ok(Some(list))
    }

    /// Reads an object that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn nested(&self, field: &str) -> Result<Option<Fields<'a>>> {
        let object = self.optional(field, "an object", Value::as_object)?;
        let prefix = format!("{}{field}.", self.prefix);
        Ok(object.map(|object| Fields::new(object, self.path, prefix)))
    }

    /// Reads one token id or a list of them; nothing if missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let ids = self.optional(field, "a token id or a list of them", token_ids)?;
        Ok(ids.unwrap_or_default())
    }
}

/// Whether a field that nobody knows says that nothing is done.
fn says_nothing(name: &str, value: &Value) -> bool {
    match value {
        Value::Bool(on) => !on && !USUALLY_ON.contains(&name),
        Value::Number(number) => matches!(number.as_f64(), Some(0.0 | 1.0)),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Null => true,
    }
}

/// One id or a list of them; files write -1 for "none".
pub(crate) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    match value {
        Value::Array(items) => items.iter().map(|id| id.as_u64()?.try_into().ok()).collect(),
        _ if value.as_i64() == Some(-1) => Some(Vec::new()),
        _ => Some(vec![value.as_u64()?.try_into().ok()?]),
    }
}

/// What kind of JSON value this is, with the value where it is short.
pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) if text.len() <= 40 => format!("{text:?}"),
        Value::String(_) => "a long string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

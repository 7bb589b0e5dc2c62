//! Typed access to the fields of a `config.json`.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// Parts of the names of fields that describe arithmetic. A family that reads such a field handles it; one
/// that does not would compute something else than the model.
const ARITHMETIC: &[&str] = &[
    "act",
    "attention",
    "attn",
    "bidirectional",
    "bias",
    "causal",
    "conv",
    "cap",
    "clip",
    "delta",
    "embedding_size",
    "expert",
    "head",
    "kernel",
    "layer",
    "linear",
    "mlp",
    "moe",
    "multiplier",
    "norm",
    "per_layer",
    "query",
    "residual",
    "rope",
    "rotary",
    "scal",
    "shared",
    "sink",
    "sliding",
    "ssm",
    "swiglu",
    "window",
];

/// Fields with such names that change nothing here: how transformers runs a model, what only training from
/// nothing or losses beside the main one read, and what holds for pictures.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "attention_dropout",
    "attn_implementation",
    "attn_pdrop",
    "cache_implementation",
    "dtype",
    "initializer_range",
    "is_causal",
    "layer_types",
    "max_window_layers",
    "mlp_dropout",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
    "num_layers",
    "output_router_logits",
    "pretraining_tp",
    "rope_interleaved",
    "router_aux_loss_coef",
    "use_cache",
    "use_flash_attention",
];

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

    /// Refuses a field that describes arithmetic and that nobody asked for, unless it says that nothing
    /// is done.
    ///
    /// # Errors
    /// Naming the first such field.
    pub(super) fn refuse_unread_arithmetic(&self) -> Result<()> {
        let neutral = |value: &Value| match value {
            Value::Bool(on) => !on,
            Value::Number(number) => matches!(number.as_f64(), Some(0.0 | 1.0)),
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        };
        let asks = |name: &str| ARITHMETIC.iter().any(|part| name.contains(part));
        let mut unread = self.unread().filter(|(name, value)| {
            asks(name) && !HARMLESS.contains(&name.as_str()) && !neutral(value)
        });
        match unread.next() {
            Some((name, value)) => {
                let message = format!(
                    "found {}, which changes what the model computes and is not supported for \
                     this model_type",
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

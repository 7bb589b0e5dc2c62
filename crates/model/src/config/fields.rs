//! Typed access to the fields of a `config.json`.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// Typed access to the fields of a JSON object, with errors that name file and field.
#[derive(Debug)]
pub struct Fields<'a> {
    pub(super) object: &'a Map<String, Value>,
    pub(super) path: &'a Path,
    pub(super) prefix: String,
}

impl<'a> Fields<'a> {
    /// Gives the field, if it is there and not null.
    pub fn value(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
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

    /// Reads an object that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn nested(&self, field: &str) -> Result<Option<Fields<'a>>> {
        let object = self.optional(field, "an object", Value::as_object)?;
        let prefix = format!("{}{field}.", self.prefix);
        Ok(object.map(|object| Fields { object, path: self.path, prefix }))
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

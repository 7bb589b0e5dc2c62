//! Typed access to what a GGUF file's metadata say of its architecture.

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, GgufTensor, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// Keys that change nothing here: what only experts, states, pictures and sound read, whose tensors would be
/// left over; how texts are pooled to one vector; what only training or other norms read.
const HARMLESS: &[&str] = &[
    "attention.group_norm_epsilon",
    "attention.group_norm_groups",
    "attention.layer_norm_epsilon",
    "decoder_start_token_id",
    "deepstack_mapping",
    "embedding_length_out",
    "features_length",
    "interleave_moe_layer_step",
    "leading_dense_block_count",
    "moe_every_n_layers",
    "n_deepstack_layers",
    "name",
    "pooling_type",
    "rope.dimension_sections",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
];
/// How names of such keys begin.
const HARMLESS_BEGINNINGS: &[&str] =
    &["audio.", "classifier.", "expert_", "mm.", "projector.", "ssm.", "vision."];

/// Typed access to the keys of a GGUF file that begin with its architecture, by what follows it, with errors
/// that name file and key.
#[derive(Debug)]
pub struct Keys<'a> {
    file: &'a GgufFile,
    architecture: &'a str,
    /// The names asked for so far.
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub(super) fn new(file: &'a GgufFile, architecture: &'a str) -> Self {
        Self { file, architecture, read: RefCell::default() }
    }

    /// Gives where the file is.
    pub fn path(&self) -> &'a Path {
        self.file.path()
    }

    /// Gives the description of a tensor, if the file has it.
    pub fn tensor(&self, name: &str) -> Option<&'a GgufTensor> {
        self.file.tensor(name)
    }

    /// Makes an error of this file that names the key.
    pub fn error(&self, name: &str, message: impl Into<String>) -> Error {
        Error::config(self.path(), self.full(name), message)
    }

    fn full(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    /// Notes that `name` is handled, and gives its whole name.
    fn asked(&self, name: &str) -> String {
        self.read.borrow_mut().insert(name.to_owned());
        self.full(name)
    }

    /// Tells whether the key is there.
    pub fn has(&self, name: &str) -> bool {
        self.file.get(&self.asked(name)).is_some()
    }

    /// Reads text that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn str(&self, name: &str) -> Result<Option<&'a str>> {
        self.file.str(&self.asked(name))
    }

    /// Reads an unsigned integer that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn size(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.file.u64(&self.asked(name))? else { return Ok(None) };
        let size = usize::try_from(value);
        size.map(Some).map_err(|_| self.error(name, format!("{value} is too large")))
    }

    /// Reads unsigned integers, or truth values as 0 and 1, which may be missing; a single one is a list of
    /// one.
    ///
    /// # Errors
    /// If it is something else.
    pub fn u64s(&self, name: &str) -> Result<Option<Vec<u64>>> {
        self.file.u64s(&self.asked(name))
    }

    /// Reads a number that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn f64(&self, name: &str) -> Result<Option<f64>> {
        self.file.f64(&self.asked(name))
    }

    /// Reads a factor that may be missing; files write 0 for that too.
    ///
    /// # Errors
    /// If it is something else, or not finite.
    pub fn factor(&self, name: &str) -> Result<Option<f64>> {
        match self.f64(name)? {
            Some(found) if !(found.is_finite() && found >= 0.0) => {
                Err(self.error(name, format!("expected a positive number, found {found}")))
            }
            found => Ok(found.filter(|&found| found != 0.0)),
        }
    }

    /// Reads a truth value that may be missing.
    ///
    /// # Errors
    /// If it is something else.
    pub fn bool(&self, name: &str) -> Result<Option<bool>> {
        self.file.bool(&self.asked(name))
    }

    /// Reads which layers are windowed: a list of them, or a number that says every which layer is not. A
    /// 1 then says that none is, a 0 that all are.
    ///
    /// # Errors
    /// If it is something else, or a list of another length than `layers`.
    pub fn windowed_layers(&self, name: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        let full = self.asked(name);
        let Some(found) = self.file.u64s(&full)? else { return Ok(None) };
        match (self.file.get(&full).and_then(Value::as_u64), found.len()) {
            (Some(period), _) => Ok(Some(
                (1..=layers as u64).map(|layer| period == 0 || layer % period != 0).collect(),
            )),
            (None, listed) if listed >= layers => {
                Ok(Some(found[..layers].iter().map(|&windowed| windowed != 0).collect()))
            }
            (None, listed) => Err(self.error(
                name,
                format!("expected an entry for each of {layers} layers, found {listed}"),
            )),
        }
    }

    /// Refuses a key that nobody asked for, unless it says that nothing is done or is known to change
    /// nothing.
    ///
    /// # Errors
    /// Naming the first such key.
    pub(super) fn refuse_unread(&self) -> Result<()> {
        let read = self.read.borrow();
        let own = self.file.metadata().iter().filter_map(|(key, value)| {
            let name = key.strip_prefix(self.architecture)?.strip_prefix('.')?;
            Some((name, value))
        });
        let mut unread = own.filter(|(name, value)| {
            let harmless = HARMLESS.contains(name)
                || HARMLESS_BEGINNINGS.iter().any(|beginning| name.starts_with(beginning));
            !(harmless || read.contains(*name) || is_neutral(name, value))
        });
        match unread.next() {
            Some((name, value)) => {
                let message = format!(
                    "found {}; the architecture `{}` has no such key here, and what it says may change \
                     what the model computes",
                    shown(value),
                    self.architecture
                );
                Err(self.error(name, message))
            }
            None => Ok(()),
        }
    }
}

/// Whether a key that nobody reads says that nothing is done: a zero, a list of them, a factor of 1.
fn is_neutral(name: &str, value: &Value) -> bool {
    let factor = name.ends_with("factor") || (name.ends_with("scale") && name != "attention.scale");
    match value {
        Value::String(text) => text.is_empty(),
        Value::Bool(on) => !on,
        Value::Array(_) => value.as_u64s().is_some_and(|all| all.iter().all(|&one| one == 0)),
        _ => value.as_f64().is_some_and(|found| found == 0.0 || (found == 1.0 && factor)),
    }
}

/// A value in words, whole where it is short.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) if text.len() <= 40 => format!("{text:?}"),
        Value::Bool(on) => on.to_string(),
        _ => value.as_f64().map_or_else(|| value.type_name().to_owned(), |found| found.to_string()),
    }
}

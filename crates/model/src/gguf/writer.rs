//! Writing a GGUF file, version 3.

use super::value::{Array, Value, type_id};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_RANK, VERSION_KEY};
use crate::error::{Error, Result};
use hydralora_files::NewFile;
use hydralora_kernels::block::BlockFormat;
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Collects metadata and tensors, and writes them as one file.
#[derive(Debug, Default)]
pub struct GgufWriter<'a> {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Pending<'a>>,
}

#[derive(Debug)]
struct Pending<'a> {
    name: String,
    format: BlockFormat,
    shape: Vec<usize>,
    len: usize,
    content: Content<'a>,
}

enum Content<'a> {
    Ready(Cow<'a, [u8]>),
    /// Made when the file comes to it.
    Later(Box<dyn Fn() -> Result<Vec<u8>> + 'a>),
}

impl fmt::Debug for Content<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Content::Ready(_) => "Ready",
            Content::Later(_) => "Later",
        })
    }
}

impl<'a> GgufWriter<'a> {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty file that says which version of this program wrote it, by which it is known later.
    pub fn marked() -> Self {
        let mut writer = Self::default();
        writer.metadata(VERSION_KEY, Value::String(env!("CARGO_PKG_VERSION").to_owned()));
        writer
    }

    /// Adds a metadata entry. `general.alignment` sets the alignment of the tensors.
    pub fn metadata(&mut self, key: impl Into<String>, value: Value) -> &mut Self {
        self.metadata.push((key.into(), value));
        self
    }

    /// Adds a tensor of `shape` `[out, in]`, whose numbers `bytes` holds in `format`.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        format: BlockFormat,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> &mut Self {
        let bytes = bytes.into();
        self.tensors.push(Pending {
            name: name.into(),
            format,
            shape: shape.to_vec(),
            len: bytes.len(),
            content: Content::Ready(bytes),
        });
        self
    }

    /// The same for a tensor of `len` bytes that `make` gives when the file comes to it, so that
    /// not all tensors need be in memory at once.
    pub fn lazy_tensor(
        &mut self,
        name: impl Into<String>,
        format: BlockFormat,
        shape: &[usize],
        len: usize,
        make: impl Fn() -> Result<Vec<u8>> + 'a,
    ) -> &mut Self {
        self.tensors.push(Pending {
            name: name.into(),
            format,
            shape: shape.to_vec(),
            len,
            content: Content::Later(Box::new(make)),
        });
        self
    }

    /// Writes the file: to a temporary one beside `path`, flushed to disk, then renamed.
    ///
    /// # Errors
    /// If a key or a tensor occurs twice, a tensor's bytes and shape disagree, the alignment is no
    /// power of two, or the file system refuses; then `path` is as it was.
    pub fn write(&self, path: &Path) -> Result<()> {
        let alignment = self.check(path)?;
        let mut out = BufWriter::new(NewFile::create(path)?);
        self.write_to(&mut out, alignment, path)?;
        Ok(out.into_inner().map_err(io::IntoInnerError::into_error)?.finish()?)
    }

    fn check(&self, path: &Path) -> Result<usize> {
        let mut seen = HashSet::new();
        for (key, _) in &self.metadata {
            if !seen.insert(key) {
                return Err(Error::malformed(path, format!("metadata key `{key}` is given twice")));
            }
        }
        let mut seen = HashSet::new();
        for tensor in &self.tensors {
            if !seen.insert(&tensor.name) {
                let message = format!("tensor `{}` is given twice", tensor.name);
                return Err(Error::malformed(path, message));
            }
            let row = tensor.shape.last().copied().unwrap_or(1);
            let len: usize = tensor.shape.iter().product();
            if tensor.shape.len() > MAX_RANK
                || !row.is_multiple_of(tensor.format.block_len())
                || tensor.format.bytes_for(len) != tensor.len
            {
                let message = format!(
                    "tensor `{}`: shape {:?} and {} bytes do not fit the format {}",
                    tensor.name, tensor.shape, tensor.len, tensor.format
                );
                return Err(Error::malformed(path, message));
            }
        }
        let alignment = self.metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY);
        let alignment = match alignment {
            None => Some(DEFAULT_ALIGNMENT),
            Some((_, value)) => value.as_u64(),
        };
        alignment
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
            .map(|alignment| alignment as usize)
            .ok_or_else(|| {
                Error::config(path, ALIGNMENT_KEY, "expected a power of two up to 1048576")
            })
    }

    fn write_to(&self, out: &mut impl Write, alignment: usize, path: &Path) -> Result<()> {
        let mut head = Vec::new();
        head.extend_from_slice(MAGIC);
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        head.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut head, key);
            put_value(&mut head, value);
        }
        let mut offset = 0usize;
        for tensor in &self.tensors {
            put_string(&mut head, &tensor.name);
            head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
            for &extent in tensor.shape.iter().rev() {
                head.extend_from_slice(&(extent as u64).to_le_bytes());
            }
            head.extend_from_slice(&tensor.format.ggml_id().to_le_bytes());
            head.extend_from_slice(&(offset as u64).to_le_bytes());
            offset = (offset + tensor.len).next_multiple_of(alignment);
        }
        head.resize(head.len().next_multiple_of(alignment), 0);
        out.write_all(&head)?;
        let padding = vec![0; alignment];
        for tensor in &self.tensors {
            let len = tensor.len;
            let made;
            let bytes: &[u8] = match &tensor.content {
                Content::Ready(bytes) => bytes,
                Content::Later(make) => {
                    made = make()?;
                    &made
                }
            };
            if bytes.len() != len {
                let message =
                    format!("tensor `{}` has {} bytes, not {len}", tensor.name, bytes.len());
                return Err(Error::malformed(path, message));
            }
            out.write_all(bytes)?;
            out.write_all(&padding[..len.next_multiple_of(alignment) - len])?;
        }
        Ok(())
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    macro_rules! number {
        ($id:ident, $value:expr) => {{
            out.extend_from_slice(&type_id::$id.to_le_bytes());
            out.extend_from_slice(&$value.to_le_bytes());
        }};
    }
    match value {
        Value::U8(v) => number!(U8, v),
        Value::I8(v) => number!(I8, v),
        Value::U16(v) => number!(U16, v),
        Value::I16(v) => number!(I16, v),
        Value::U32(v) => number!(U32, v),
        Value::I32(v) => number!(I32, v),
        Value::U64(v) => number!(U64, v),
        Value::I64(v) => number!(I64, v),
        Value::F32(v) => number!(F32, v),
        Value::F64(v) => number!(F64, v),
        Value::Bool(v) => number!(BOOL, u8::from(*v)),
        Value::String(v) => {
            out.extend_from_slice(&type_id::STRING.to_le_bytes());
            put_string(out, v);
        }
        Value::Array(v) => {
            out.extend_from_slice(&type_id::ARRAY.to_le_bytes());
            put_array(out, v);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    let mut head = |id: u32| {
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(&(array.len() as u64).to_le_bytes());
    };
    macro_rules! numbers {
        ($id:ident, $values:expr) => {{
            head(type_id::$id);
            $values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
        }};
    }
    match array {
        Array::U8(v) => numbers!(U8, v),
        Array::I8(v) => numbers!(I8, v),
        Array::U16(v) => numbers!(U16, v),
        Array::I16(v) => numbers!(I16, v),
        Array::U32(v) => numbers!(U32, v),
        Array::I32(v) => numbers!(I32, v),
        Array::U64(v) => numbers!(U64, v),
        Array::I64(v) => numbers!(I64, v),
        Array::F32(v) => numbers!(F32, v),
        Array::F64(v) => numbers!(F64, v),
        Array::Bool(v) => {
            head(type_id::BOOL);
            v.iter().for_each(|&v| out.push(v.into()));
        }
        Array::String(v) => {
            head(type_id::STRING);
            v.iter().for_each(|v| put_string(out, v));
        }
        Array::Array(v) => {
            head(type_id::ARRAY);
            v.iter().for_each(|v| put_array(out, v));
        }
    }
}

//! Reading a GGUF file out of its bytes.

use super::value::{Array, Value, type_id};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_RANK, SUPPORTED_FORMATS, kind, types};
use crate::error::{Error, Result};
use crate::pointer::lfs_pointer;
use crate::weights::map::MappedFile;
use hydralora_kernels::block::BlockFormat;
use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// How deep arrays of arrays may go; the format sets no limit, the stack does.
const MAX_ARRAY_DEPTH: usize = 8;
/// Fewest bytes of a metadata entry: a key's length, a type, a one-byte value.
const SMALLEST_ENTRY: u64 = 8 + 4 + 1;
/// Fewest bytes of a tensor's description: a name's length, rank, format, offset.
const SMALLEST_TENSOR: u64 = 8 + 4 + 4 + 8;

/// The description of a GGUF file: its metadata and where its tensors are.
#[derive(Clone, Debug)]
pub struct GgufFile {
    path: PathBuf,
    version: u32,
    metadata: Vec<(String, Value)>,
    tensors: Vec<GgufTensor>,
}

/// Where a tensor is in the file, and how its bytes encode numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// The name in the file, as `blk.0.attn_q.weight`.
    pub name: String,
    /// Number format.
    pub format: BlockFormat,
    /// Extents, outermost first: `[out, in]`.
    pub shape: Vec<usize>,
    /// Which file of a model in several holds it, from 0 on.
    pub part: usize,
    /// The tensor's bytes within that file.
    pub range: Range<usize>,
}

impl GgufFile {
    /// Reads the description of the file at `path`.
    ///
    /// # Errors
    /// If it cannot be opened; otherwise as [`parse`](Self::parse).
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(MappedFile::open(path)?.bytes(), path)
    }

    /// Reads the description of the file `bytes`, which came from `path`.
    ///
    /// # Errors
    /// If the bytes are no GGUF file of version 2 or 3 in little endian, end early, contradict
    /// themselves, or hold a tensor in an unknown number format.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        Parser { bytes, at: 0, path }.file()
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All metadata, in the order of the file.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// All tensors, in the order of the file; of a model in several files, those of all of them.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The value of a metadata key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The value of `key` as text, if there is one.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// The value of `key` as a number that counts something, if there is one.
    ///
    /// # Errors
    /// If the value is of another type, or negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "an unsigned integer", Value::as_u64)
    }

    /// The value of `key` as numbers that count something, or truth values as 0 and 1, if there is one; a
    /// single number is a list of one.
    ///
    /// # Errors
    /// If the value is of another type, or one is negative.
    pub fn u64s(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.typed(key, "unsigned integers", Value::as_u64s)
    }

    /// The value of `key` as a float, if there is one.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// The value of `key` as a truth value, if there is one.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", Value::as_bool)
    }

    /// The value of `key` as a list of texts, if there is one.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", Value::as_strings)
    }

    /// Adds the tensors of `next`, the file of number `part` of the same model.
    pub(crate) fn append(&mut self, part: usize, next: Self) {
        let of_part = |tensor| GgufTensor { part, ..tensor };
        self.tensors.extend(next.tensors.into_iter().map(of_part));
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| {
            Error::config(
                &self.path,
                key,
                format!("expected {expected}, found a value of type {}", value.type_name()),
            )
        })
    }
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Parser<'a> {
    fn file(mut self) -> Result<GgufFile> {
        if let Some(what) = lfs_pointer(self.bytes) {
            return Err(self.error(what));
        }
        if self.bytes.len() < MAGIC.len() || &self.bytes[..MAGIC.len()] != MAGIC {
            return Err(self.error("not a GGUF file: it does not start with `GGUF`"));
        }
        self.at = MAGIC.len();
        let version = self.u32("the version")?;
        match version {
            2 | 3 => {}
            1 => return Err(self.error("GGUF version 1 is not supported; versions 2 and 3 are")),
            _ if (2..=3).contains(&version.swap_bytes()) => {
                return Err(self.error("the file is big endian; only little endian is supported"));
            }
            _ => {
                let message =
                    format!("GGUF version {version} is not supported; versions 2 and 3 are");
                return Err(self.error(message));
            }
        }
        let num_tensors = self.u64("the tensor count")?;
        let num_entries = self.u64("the metadata count")?;
        let num_entries = self.count(num_entries, SMALLEST_ENTRY, "metadata entries")?;
        let mut metadata = Vec::new();
        let mut keys = HashSet::new();
        for _ in 0..num_entries {
            let key = self.string("a metadata key")?;
            let type_number = self.u32(&format!("the type of `{key}`"))?;
            let value = self.value(type_number, &key)?;
            if !keys.insert(key.clone()) {
                return Err(self.error(format!("metadata key `{key}` occurs twice")));
            }
            metadata.push((key, value));
        }
        let num_tensors = self.count(num_tensors, SMALLEST_TENSOR, "tensors")?;
        let path = self.path.to_path_buf();
        let mut file = GgufFile { path, version, metadata, tensors: Vec::new() };
        let mut names = HashSet::new();
        for _ in 0..num_tensors {
            let tensor = match self.tensor() {
                // What kind of file this is says more than that one of its tensors is not read.
                Err(error @ Error::UnknownDtype { .. }) => {
                    kind::check_metadata(&file)?;
                    return Err(error);
                }
                tensor => tensor?,
            };
            if !names.insert(tensor.name.clone()) {
                return Err(Error::DuplicateTensor {
                    name: tensor.name,
                    first: self.path.to_path_buf(),
                    second: self.path.to_path_buf(),
                });
            }
            file.tensors.push(tensor);
        }
        self.place(&mut file)?;
        Ok(file)
    }

    /// A tensor's description; its range is still relative to the data section.
    fn tensor(&mut self) -> Result<GgufTensor> {
        let name = self.string("a tensor's name")?;
        let rank = self.u32(&format!("the rank of tensor `{name}`"))? as usize;
        if rank > MAX_RANK {
            let message = format!("tensor `{name}` has {rank} dimensions, at most {MAX_RANK} fit");
            return Err(self.error(message));
        }
        let mut shape = Vec::with_capacity(rank);
        for _ in 0..rank {
            let extent = self.u64(&format!("the shape of tensor `{name}`"))?;
            shape.push(usize::try_from(extent).map_err(|_| self.too_large(&name))?);
        }
        shape.reverse();
        let id = self.u32(&format!("the format of tensor `{name}`"))?;
        let format = BlockFormat::from_ggml(id).ok_or_else(|| Error::UnknownDtype {
            path: self.path.to_path_buf(),
            name: name.clone(),
            dtype: types::name(id),
            supported: SUPPORTED_FORMATS,
        })?;
        let offset = self.u64(&format!("the offset of tensor `{name}`"))?;
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(format.block_len()) {
            let message = format!(
                "tensor `{name}` has rows of {row} numbers, {format} needs a multiple of {}",
                format.block_len()
            );
            return Err(self.error(message));
        }
        let size = shape
            .iter()
            .try_fold(1usize, |product, &extent| product.checked_mul(extent))
            .map(|len| len / format.block_len())
            .and_then(|blocks| blocks.checked_mul(format.block_bytes()))
            .ok_or_else(|| self.too_large(&name))?;
        let start = usize::try_from(offset).map_err(|_| self.too_large(&name))?;
        let end = start.checked_add(size).ok_or_else(|| self.too_large(&name))?;
        Ok(GgufTensor { name, format, shape, part: 0, range: start..end })
    }

    /// Turns ranges within the data section into ranges within the file.
    fn place(&self, file: &mut GgufFile) -> Result<()> {
        let alignment = file.u64(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            let message = format!("expected a power of two up to 1048576, found {alignment}");
            return Err(Error::config(self.path, ALIGNMENT_KEY, message));
        }
        let alignment = alignment as usize;
        let start = self.at.next_multiple_of(alignment);
        for tensor in &mut file.tensors {
            if !tensor.range.start.is_multiple_of(alignment) {
                let message = format!(
                    "tensor `{}` starts at {}, which is no multiple of the alignment {alignment}",
                    tensor.name, tensor.range.start
                );
                return Err(self.error(message));
            }
            let end =
                start.checked_add(tensor.range.end).ok_or_else(|| self.too_large(&tensor.name))?;
            if end > self.bytes.len() {
                return Err(self.truncated(&format!("tensor `{}`", tensor.name), end as u64));
            }
            tensor.range = start + tensor.range.start..end;
        }
        Ok(())
    }

    fn value(&mut self, type_number: u32, key: &str) -> Result<Value> {
        let what = format!("the value of `{key}`");
        Ok(match type_number {
            type_id::U8 => Value::U8(u8::from_le_bytes(self.take(&what)?)),
            type_id::I8 => Value::I8(i8::from_le_bytes(self.take(&what)?)),
            type_id::U16 => Value::U16(u16::from_le_bytes(self.take(&what)?)),
            type_id::I16 => Value::I16(i16::from_le_bytes(self.take(&what)?)),
            type_id::U32 => Value::U32(self.u32(&what)?),
            type_id::I32 => Value::I32(i32::from_le_bytes(self.take(&what)?)),
            type_id::U64 => Value::U64(self.u64(&what)?),
            type_id::I64 => Value::I64(i64::from_le_bytes(self.take(&what)?)),
            type_id::F32 => Value::F32(f32::from_le_bytes(self.take(&what)?)),
            type_id::F64 => Value::F64(f64::from_le_bytes(self.take(&what)?)),
            type_id::BOOL => {
                let [byte] = self.take(&what)?;
                Value::Bool(self.truth(byte, key)?)
            }
            type_id::STRING => Value::String(self.string(&what)?),
            type_id::ARRAY => Value::Array(self.array(key, 0)?),
            other => {
                return Err(self.error(format!("`{key}` has the unknown value type {other}")));
            }
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Array> {
        if depth == MAX_ARRAY_DEPTH {
            let message = format!("`{key}` nests arrays more than {MAX_ARRAY_DEPTH} deep");
            return Err(self.error(message));
        }
        let what = format!("the array `{key}`");
        let type_number = self.u32(&what)?;
        let len = self.u64(&what)?;
        Ok(match type_number {
            type_id::U8 => Array::U8(self.numbers(len, &what, u8::from_le_bytes)?),
            type_id::I8 => Array::I8(self.numbers(len, &what, i8::from_le_bytes)?),
            type_id::U16 => Array::U16(self.numbers(len, &what, u16::from_le_bytes)?),
            type_id::I16 => Array::I16(self.numbers(len, &what, i16::from_le_bytes)?),
            type_id::U32 => Array::U32(self.numbers(len, &what, u32::from_le_bytes)?),
            type_id::I32 => Array::I32(self.numbers(len, &what, i32::from_le_bytes)?),
            type_id::U64 => Array::U64(self.numbers(len, &what, u64::from_le_bytes)?),
            type_id::I64 => Array::I64(self.numbers(len, &what, i64::from_le_bytes)?),
            type_id::F32 => Array::F32(self.numbers(len, &what, f32::from_le_bytes)?),
            type_id::F64 => Array::F64(self.numbers(len, &what, f64::from_le_bytes)?),
            type_id::BOOL => {
                let bytes = self.numbers(len, &what, u8::from_le_bytes)?;
                Array::Bool(bytes.into_iter().map(|b| self.truth(b, key)).collect::<Result<_>>()?)
            }
            type_id::STRING => {
                // A string takes at least the eight bytes of its length.
                let len = self.count(len, 8, &what)?;
                Array::String((0..len).map(|_| self.string(&what)).collect::<Result<_>>()?)
            }
            type_id::ARRAY => {
                let len = self.count(len, 4 + 8, &what)?;
                Array::Array((0..len).map(|_| self.array(key, depth + 1)).collect::<Result<_>>()?)
            }
            other => {
                let message = format!("the array `{key}` has the unknown element type {other}");
                return Err(self.error(message));
            }
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        len: u64,
        what: &str,
        convert: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let len = self.count(len, N as u64, what)?;
        let bytes = self.slice(len * N, what)?;
        Ok(bytes.as_chunks::<N>().0.iter().map(|&chunk| convert(chunk)).collect())
    }

    fn truth(&self, byte: u8, key: &str) -> Result<bool> {
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.error(format!("`{key}` is a bool with the value {byte}"))),
        }
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        let len = self.count(len, 1, what)?;
        let at = self.at;
        let bytes = self.slice(len, what)?;
        String::from_utf8(bytes.to_vec())
            .map_err(|_| self.error(format!("{what} at byte {at} is not UTF-8")))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(what)?))
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.slice(N, what)?;
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        Ok(array)
    }

    fn slice(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let slice = rest
            .get(..len)
            .ok_or_else(|| self.truncated(what, (self.at as u64).saturating_add(len as u64)))?;
        self.at += len;
        Ok(slice)
    }

    /// A count of things of at least `smallest` bytes each, which must fit into what is left.
    fn count(&self, count: u64, smallest: u64, what: &str) -> Result<usize> {
        let needed = count.saturating_mul(smallest);
        if needed > (self.bytes.len() - self.at) as u64 {
            return Err(self.truncated(what, needed.saturating_add(self.at as u64)));
        }
        Ok(count as usize)
    }

    fn truncated(&self, what: &str, expected: u64) -> Error {
        Error::Truncated {
            path: self.path.to_path_buf(),
            format: "GGUF",
            what: what.to_owned(),
            expected,
            found: self.bytes.len() as u64,
        }
    }

    fn too_large(&self, name: &str) -> Error {
        self.error(format!("tensor `{name}` is larger than the address space"))
    }

    fn error(&self, message: impl Into<String>) -> Error {
        Error::malformed(self.path, message)
    }
}

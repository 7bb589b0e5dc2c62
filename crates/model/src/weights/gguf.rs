//! GGUF files (versions 2 and 3): metadata, tensor directory, and the mapping of llama.cpp's names
//! and layouts to those of Hugging Face.
//!
//! The bytes come from anywhere, so every length is checked against the file before it is used.

use super::map::Mapping;
use super::{Entry, Weights};
use crate::error::{Error, Result};
use hydralora_kernels::block::BlockFormat;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum MetaValue {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<MetaValue>),
}

impl MetaValue {
    /// A non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            MetaValue::Unsigned(value) => Some(value),
            MetaValue::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            MetaValue::Float(value) => Some(value),
            MetaValue::Unsigned(value) => Some(value as f64),
            MetaValue::Signed(value) => Some(value as f64),
            _ => None,
        }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            MetaValue::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            MetaValue::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// A list.
    pub fn as_list(&self) -> Option<&[MetaValue]> {
        match self {
            MetaValue::List(list) => Some(list),
            _ => None,
        }
    }
}

struct TensorInfo {
    name: String,
    shape: Vec<usize>,
    format: BlockFormat,
    offset: usize,
}

/// An opened GGUF file.
pub struct GgufFile {
    path: PathBuf,
    mapping: Mapping,
    metadata: BTreeMap<String, MetaValue>,
    tensors: Vec<TensorInfo>,
    data_start: usize,
}

impl GgufFile {
    /// Opens a file and reads its directory.
    ///
    /// # Errors
    /// If it is not a whole GGUF file of a known version.
    pub fn open(path: &Path) -> Result<Self> {
        let mapping = Mapping::open(path)?;
        let mut cursor = Cursor { bytes: &mapping, at: 0 };
        let read = cursor.directory();
        let (metadata, tensors) = read.map_err(|problem| {
            Error::malformed(path, format!("{problem} (at byte {})", cursor.at))
        })?;
        let alignment = metadata
            .get("general.alignment")
            .and_then(MetaValue::as_u64)
            .unwrap_or(32)
            .clamp(1, 1 << 20) as usize;
        let data_start = cursor.at.div_ceil(alignment) * alignment;
        let file = Self { path: path.to_path_buf(), metadata, tensors, data_start, mapping };
        for tensor in &file.tensors {
            file.range(tensor)?;
        }
        Ok(file)
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.metadata.get(key)
    }

    /// Whether the file has a tensor of that (GGUF) name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.iter().any(|tensor| tensor.name == name)
    }

    fn range(&self, tensor: &TensorInfo) -> Result<std::ops::Range<usize>> {
        let cols = tensor.shape.last().copied().unwrap_or(1);
        let name = &tensor.name;
        if cols % tensor.format.block_len() != 0 {
            let message =
                format!("rows of `{name}` ({cols} numbers) are not whole {} blocks", tensor.format);
            return Err(Error::malformed(&self.path, message));
        }
        let len = tensor
            .shape
            .iter()
            .try_fold(1_usize, |product, &extent| product.checked_mul(extent))
            .map(|len| tensor.format.bytes_for(len));
        let start = self.data_start.checked_add(tensor.offset);
        match (start, len) {
            (Some(start), Some(len))
                if start.checked_add(len).is_some_and(|end| end <= self.mapping.len()) =>
            {
                Ok(start..start + len)
            }
            _ => {
                let message = format!(
                    "the file ends before tensor `{name}` does ({} bytes); it was cut off",
                    self.mapping.len()
                );
                Err(Error::malformed(&self.path, message))
            }
        }
    }

    pub(super) fn into_weights(
        self,
        num_heads: usize,
        num_key_value_heads: usize,
    ) -> Result<Weights> {
        let mut entries = BTreeMap::new();
        for tensor in &self.tensors {
            if tensor.name == "rope_freqs.weight" {
                continue;
            }
            let name = hugging_face_name(&tensor.name).ok_or_else(|| {
                Error::malformed(&self.path, format!("tensor `{}` is not known", tensor.name))
            })?;
            let interleaved_heads = match name.rsplit('.').nth(1) {
                Some("q_proj") => Some(num_heads),
                Some("k_proj") => Some(num_key_value_heads),
                _ => None,
            };
            if let Some(heads) = interleaved_heads
                && !tensor.shape[0].is_multiple_of(2 * heads)
            {
                let message =
                    format!("`{}` has {} rows for {heads} heads", tensor.name, tensor.shape[0]);
                return Err(Error::malformed(&self.path, message));
            }
            let entry = Entry {
                file: 0,
                bytes: self.range(tensor)?,
                format: tensor.format,
                shape: tensor.shape.clone(),
                interleaved_heads,
            };
            if entries.insert(name, entry).is_some() {
                let message = format!("tensor `{}` is there twice", tensor.name);
                return Err(Error::malformed(&self.path, message));
            }
        }
        Ok(Weights {
            path: self.path,
            files: vec![self.mapping],
            entries,
            used: Default::default(),
        })
    }
}

/// llama.cpp's tensor names and what follows `model.layers.N.` for them.
const LAYER_NAMES: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

fn hugging_face_name(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    let stem = match stem {
        "token_embd" => "model.embed_tokens".to_owned(),
        "output_norm" => "model.norm".to_owned(),
        "output" => "lm_head".to_owned(),
        _ => {
            let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
            let layer: usize = layer.parse().ok()?;
            let (_, part) = LAYER_NAMES.iter().find(|(gguf, _)| *gguf == part)?;
            format!("model.layers.{layer}.{part}")
        }
    };
    Some(format!("{stem}.{kind}"))
}

type Problem = String;

/// Reads little-endian values, never past the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Directory = (BTreeMap<String, MetaValue>, Vec<TensorInfo>);

impl Cursor<'_> {
    fn directory(&mut self) -> std::result::Result<Directory, Problem> {
        if self.take(4)? != b"GGUF" {
            return Err("not a GGUF file".to_owned());
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("GGUF version {version} is not supported; expected 2 or 3"));
        }
        let tensor_count = self.count(24)?;
        let metadata_count = self.count(13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..metadata_count {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(kind, 0).map_err(|problem| format!("`{key}`: {problem}"))?;
            metadata.insert(key, value);
        }
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            let name = self.text()?;
            let dimensions = self.u32()?;
            if !(1..=4).contains(&dimensions) {
                return Err(format!("tensor `{name}` has {dimensions} dimensions"));
            }
            let mut shape = Vec::new();
            for _ in 0..dimensions {
                shape.push(self.size()?);
            }
            // GGUF counts the contiguous extent first.
            shape.reverse();
            let kind = self.u32()?;
            let format = BlockFormat::from_ggml(kind)
                .ok_or_else(|| format!("tensor `{name}` has the unknown type {kind}"))?;
            tensors.push(TensorInfo { name, shape, format, offset: self.size()? });
        }
        Ok((metadata, tensors))
    }

    fn take(&mut self, len: usize) -> std::result::Result<&[u8], Problem> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| "the file ends too early; it was cut off".to_owned())?;
        let slice = &self.bytes[self.at..end];
        self.at = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self) -> std::result::Result<[u8; N], Problem> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> std::result::Result<u32, Problem> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn size(&mut self) -> std::result::Result<usize, Problem> {
        usize::try_from(u64::from_le_bytes(self.array()?))
            .map_err(|_| "a size overflows".to_owned())
    }

    /// A number of items of at least `smallest` bytes each, which the rest of the file can hold.
    fn count(&mut self, smallest: usize) -> std::result::Result<usize, Problem> {
        let count = self.size()?;
        if count > (self.bytes.len() - self.at) / smallest.max(1) {
            return Err(format!("a count of {count} is more than the file can hold"));
        }
        Ok(count)
    }

    fn text(&mut self) -> std::result::Result<String, Problem> {
        let len = self.count(1)?;
        let bytes = self.take(len)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| "a text is not UTF-8".to_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> std::result::Result<MetaValue, Problem> {
        Ok(match kind {
            0 => MetaValue::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => MetaValue::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => MetaValue::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => MetaValue::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => MetaValue::Unsigned(u64::from(self.u32()?)),
            5 => MetaValue::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            // The shortest decimal that rounds to the stored f32 is the number that was meant.
            6 => {
                let stored = f32::from_le_bytes(self.array()?);
                MetaValue::Float(format!("{stored}").parse().unwrap_or(f64::from(stored)))
            }
            7 => MetaValue::Bool(self.array::<1>()?[0] != 0),
            8 => MetaValue::Text(self.text()?),
            9 if depth < 2 => {
                let kind = self.u32()?;
                let count = self.count(1)?;
                let items = (0..count).map(|_| self.value(kind, depth + 1));
                MetaValue::List(items.collect::<std::result::Result<_, _>>()?)
            }
            10 => MetaValue::Unsigned(u64::from_le_bytes(self.array()?)),
            11 => MetaValue::Signed(i64::from_le_bytes(self.array()?)),
            12 => MetaValue::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("metadata type {other} is not known")),
        })
    }
}

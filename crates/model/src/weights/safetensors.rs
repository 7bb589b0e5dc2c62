//! Headers of safetensors files and the index of sharded ones.

use crate::error::{Error, Result};
use crate::pointer::lfs_pointer;
use hydralora_kernels::block::BlockFormat;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Bytes of the header's length at the start of a file.
const LENGTH_BYTES: usize = 8;

/// A tensor's description.
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) format: BlockFormat,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

/// The tensors of a file, sorted by name.
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Vec<Stored>> {
    if let Some(what) = lfs_pointer(bytes) {
        return Err(Error::malformed(path, what));
    }
    let (header, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|error| describe(&error, bytes, path))?;
    let start = LENGTH_BYTES + header;
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let format = match info.dtype {
            Dtype::F64 => BlockFormat::F64,
            Dtype::F32 => BlockFormat::F32,
            Dtype::F16 => BlockFormat::F16,
            Dtype::BF16 => BlockFormat::BF16,
            other => {
                return Err(Error::UnknownDtype {
                    path: path.to_path_buf(),
                    name,
                    dtype: format!("{other:?}"),
                    supported: "F64, F32, F16 and BF16",
                });
            }
        };
        let range = start + info.data_offsets.0..start + info.data_offsets.1;
        tensors.push(Stored { name, format, shape: info.shape.clone(), range });
    }
    tensors.sort_by(|a: &Stored, b| a.name.cmp(&b.name));
    Ok(tensors)
}

fn describe(error: &SafeTensorError, bytes: &[u8], path: &Path) -> Error {
    let truncated = |what: &str, expected: u64| Error::Truncated {
        path: path.to_path_buf(),
        format: "safetensors",
        what: what.to_owned(),
        expected,
        found: bytes.len() as u64,
    };
    let header_len = || Some(u64::from_le_bytes(*bytes.first_chunk::<LENGTH_BYTES>()?));
    match error {
        SafeTensorError::HeaderTooSmall => truncated("the header's length", LENGTH_BYTES as u64),
        SafeTensorError::InvalidHeaderLength => match header_len() {
            Some(len) => truncated("the header", len.saturating_add(LENGTH_BYTES as u64)),
            None => Error::malformed(path, error.to_string()),
        },
        SafeTensorError::MetadataIncompleteBuffer => {
            match header_len().and_then(|len| data_end(bytes, len)) {
                Some(end) if end > bytes.len() as u64 => truncated("the tensors", end),
                _ => Error::malformed(path, "bytes follow the last tensor"),
            }
        }
        _ => Error::malformed(path, format!("not a valid safetensors file: {error}")),
    }
}

/// Where the last tensor ends, by the header.
fn data_end(bytes: &[u8], header_len: u64) -> Option<u64> {
    let start = LENGTH_BYTES.checked_add(usize::try_from(header_len).ok()?)?;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(bytes.get(LENGTH_BYTES..start)?).ok()?;
    let end = header.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64()).max()?;
    end.checked_add(start as u64)
}

/// Tensor names and the files that hold them, as `model.safetensors.index.json` lists them.
pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = hydralora_files::read_to_string(path)?;
    let index: Index = serde_json::from_str(&text)
        .map_err(|fault| Error::Json { path: path.to_path_buf(), fault })?;
    // A name with a folder in it could lead out of the model's own.
    if let Some(shard) = index.weight_map.values().find(|shard| {
        Path::new(shard).file_name().and_then(|name| name.to_str()) != Some(shard.as_str())
    }) {
        let message =
            format!("`weight_map` lists `{shard}`, expected a file name without a folder");
        return Err(Error::malformed(path, message));
    }
    Ok(index.weight_map)
}

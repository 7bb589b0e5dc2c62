//! Hugging Face folders: one `model.safetensors`, or shards listed in an index.

use super::map::Mapping;
use super::{Entry, Weights};
use crate::error::{Error, Result};
use ::safetensors::tensor::{Dtype, SafeTensors};
use hydralora_kernels::block::BlockFormat;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

pub(super) fn open_folder(folder: &Path) -> Result<Weights> {
    let index_path = folder.join(INDEX);
    let (paths, listed) = if folder.join(SINGLE).exists() {
        (vec![folder.join(SINGLE)], None)
    } else if index_path.exists() {
        let text = fs::read(&index_path).map_err(Error::io(&index_path))?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|error| Error::malformed(&index_path, error.to_string()))?;
        let shards: BTreeSet<&String> = index.weight_map.values().collect();
        let paths: Vec<PathBuf> = shards.into_iter().map(|shard| folder.join(shard)).collect();
        if let Some(missing) = paths.iter().find(|path| !path.exists()) {
            let message = format!("lists the shard {}, which is missing", missing.display());
            return Err(Error::malformed(&index_path, message));
        }
        (paths, Some(index.weight_map))
    } else {
        return Err(Error::NoModel { path: folder.to_path_buf() });
    };

    let mut files = Vec::new();
    let mut entries = BTreeMap::new();
    for (number, path) in paths.iter().enumerate() {
        let mapping = Mapping::open(path)?;
        for (name, entry) in read_header(path, &mapping, number)? {
            if name.ends_with("rotary_emb.inv_freq") {
                continue;
            }
            if entries.insert(name.clone(), entry).is_some() {
                return Err(Error::malformed(path, format!("tensor `{name}` is in two shards")));
            }
        }
        files.push(mapping);
    }
    if let Some(name) = listed
        .iter()
        .flatten()
        .map(|(name, _)| name)
        .find(|name| !entries.contains_key(*name) && !name.ends_with("rotary_emb.inv_freq"))
    {
        return Err(Error::malformed(&index_path, format!("tensor `{name}` is in no shard")));
    }
    Ok(Weights { path: folder.to_path_buf(), files, entries, used: Default::default() })
}

fn read_header(path: &Path, bytes: &[u8], file: usize) -> Result<Vec<(String, Entry)>> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| {
        Error::malformed(path, format!("not a whole safetensors file: {error}"))
    })?;
    let start = bytes.as_ptr() as usize;
    tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let format = match view.dtype() {
                Dtype::F64 => BlockFormat::F64,
                Dtype::F32 => BlockFormat::F32,
                Dtype::F16 => BlockFormat::F16,
                Dtype::BF16 => BlockFormat::BF16,
                other => {
                    return Err(Error::UnknownDtype {
                        path: path.to_path_buf(),
                        name,
                        found: format!("{other:?}"),
                    });
                }
            };
            let offset = view.data().as_ptr() as usize - start;
            let entry = Entry {
                file,
                bytes: offset..offset + view.data().len(),
                format,
                shape: view.shape().to_vec(),
                interleaved_heads: None,
            };
            Ok((name, entry))
        })
        .collect()
}

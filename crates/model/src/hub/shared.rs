//! The cache that `huggingface_hub` keeps, in which a model or a data set may lie already:
//! `models--owner--name/snapshots/<commit>/`, and the commits of names under `refs/`.

use serde_json::Value;
use std::path::{Path, PathBuf};

/// Where that cache is, by the variables that say it.
pub(super) fn folder(variable: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    if let Some(folder) = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")) {
        return Some(PathBuf::from(folder));
    }
    let home = variable("HF_HOME").map(PathBuf::from).or_else(|| {
        let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| variable("HOME").map(|home| Path::new(&home).join(".cache")));
        cache.map(|cache| cache.join("huggingface"))
    });
    home.map(|home| home.join("hub"))
}

/// The files of a repository at a revision, of which any may be missing; `kind` is `models` or
/// `datasets`.
pub(super) fn snapshot(
    cache: &Path,
    kind: &str,
    repository: &str,
    revision: &str,
) -> Option<PathBuf> {
    let folder = cache.join(format!("{kind}--{}", repository.replace('/', "--")));
    let commit = hydralora_files::text_of(&folder.join("refs").join(revision)).ok();
    let commit = commit.as_deref().map_or(revision, str::trim);
    let plain = !commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric());
    Some(folder.join("snapshots").join(commit)).filter(|path| plain && path.is_dir())
}

/// Whether a snapshot has all that a model needs: programs fetch single files too.
pub(super) fn is_whole_model(snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).exists();
    let shards = || -> Option<bool> {
        let text =
            hydralora_files::bytes_of(&snapshot.join("model.safetensors.index.json")).ok()?;
        let index: Value = serde_json::from_slice(&text).ok()?;
        let names = index["weight_map"].as_object()?;
        Some(!names.is_empty() && names.values().all(|name| name.as_str().is_some_and(has)))
    };
    let weights = has("model.safetensors") || shards().unwrap_or(false);
    weights && has("config.json") && has("tokenizer.json")
}

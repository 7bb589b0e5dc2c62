//! The files of named data sources: from a folder of copies, the cache, or the hub.

use hydralora_data::{DataConfig, Fetch};
use hydralora_model::hub::Hub;
use std::path::PathBuf;

/// Finds the files of the named sources of a recipe.
pub(crate) fn locate(data: &mut DataConfig) -> anyhow::Result<()> {
    let copies = std::env::var_os("HYDRALORA_DATA_DIR").filter(|folder| !folder.is_empty());
    let mut files = HubFiles(Hub::from_environment());
    Ok(hydralora_data::locate(data, copies.map(PathBuf::from).as_deref(), &mut files)?)
}

/// Where token ids lie that are not held in memory.
pub(crate) fn cache_folder() -> PathBuf {
    Hub::from_environment().cache.join("tokens")
}

struct HubFiles(Hub);

impl Fetch for HubFiles {
    fn list(&mut self, repository: &str, revision: &str) -> Result<Vec<String>, String> {
        self.0.dataset_files(repository, revision)
    }

    fn file(
        &mut self,
        repository: &str,
        revision: &str,
        file: &str,
        sha256: Option<&str>,
    ) -> Result<PathBuf, String> {
        self.0.dataset_file(repository, revision, file, sha256, &mut |line| eprintln!("{line}"))
    }
}

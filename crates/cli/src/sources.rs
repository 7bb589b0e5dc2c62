//! The files of named data sources: from a folder of copies, the cache, or the hub.

use hydralora_data::{DataConfig, Fetch};
use hydralora_model::hub::Hub;
use std::path::{Path, PathBuf};

/// Finds the files of the named sources of a recipe, and of data sets of the hub; paths are those of
/// `base`.
pub(crate) fn locate(data: &mut DataConfig, base: &Path) -> anyhow::Result<()> {
    let copies = std::env::var_os("HYDRALORA_DATA_DIR").filter(|folder| !folder.is_empty());
    let mut files = HubFiles::new(|line| crate::ui::tell(line));
    let copies = copies.map(PathBuf::from);
    Ok(hydralora_data::locate(data, base, copies.as_deref(), &mut files)?)
}

/// Where token ids lie that are not held in memory.
pub(crate) fn cache_folder() -> PathBuf {
    Hub::from_environment().cache.join("tokens")
}

/// Files from the cache or the hub; `say` is told what is fetched.
pub(crate) struct HubFiles<F> {
    hub: Hub,
    say: F,
}

impl<F: FnMut(&str)> HubFiles<F> {
    pub(crate) fn new(say: F) -> Self {
        Self { hub: Hub::from_environment(), say }
    }
}

impl<F: FnMut(&str)> Fetch for HubFiles<F> {
    fn list(&mut self, repository: &str, revision: &str) -> Result<Vec<String>, String> {
        self.hub.dataset_files(repository, revision)
    }

    fn file(
        &mut self,
        repository: &str,
        revision: &str,
        file: &str,
        sha256: Option<&str>,
    ) -> Result<PathBuf, String> {
        self.hub.dataset_file(repository, revision, file, sha256, &mut self.say)
    }
}

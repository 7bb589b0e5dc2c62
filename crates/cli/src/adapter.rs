//! Finding an adapter's folder, and the base model that it goes on.

use crate::failure::bad_input;
use anyhow::Context;
use hydralora_model::hub::Hub;
use hydralora_peft::io::{self, CONFIG_FILE, METADATA_FILE};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Folders of a run that hold an adapter, the one that is meant first.
const OF_RUN: [&str; 2] = ["adapter", "best"];

/// The folder of an adapter that is given as such or as its run's folder.
///
/// # Errors
/// With what stands there instead.
pub(crate) fn folder(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if holds_adapter(path) {
        return Ok(path.to_path_buf());
    }
    if let Some(inside) = OF_RUN.map(|name| path.join(name)).into_iter().find(|p| holds_adapter(p))
    {
        return Ok(inside);
    }
    let newest = hydralora_train::checkpoint::list(path).ok().and_then(|mut all| all.pop());
    Err(match newest {
        Some((step, checkpoint)) => format!(
            "this run has not ended, so there is no {}; go on with it, or take step {step} from {}",
            path.join(OF_RUN[0]).display(),
            checkpoint.display()
        ),
        None if path.is_dir() => format!("this folder holds no adapter: {CONFIG_FILE} is missing"),
        None if path.exists() => format!("this is a file; expected a folder with {CONFIG_FILE}"),
        None => format!("there is no such folder; expected one with {CONFIG_FILE}"),
    })
}

/// Whether a folder is an adapter's, or a model's that was trained whole.
fn holds_adapter(path: &Path) -> bool {
    // Of whatever kind they are: whoever reads them says what is wrong with them.
    [CONFIG_FILE, METADATA_FILE].iter().any(|file| path.join(file).symlink_metadata().is_ok())
}

/// The base model of an adapter: `given`, or where that is left out, the one its files name.
///
/// # Errors
/// If the files name none, or one that can neither be found here nor be fetched.
pub(crate) fn base_of(given: Option<&str>, adapter: &Path) -> anyhow::Result<String> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    let mut names = Vec::new();
    if let Some(metadata) = io::read_metadata(adapter)? {
        names.push(metadata.base_model);
    }
    let config = io::read_config(adapter)?;
    let text = |key: &str| config.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    if let Some(name) = text("base_model_name_or_path") {
        names.push(match text("revision") {
            Some(revision) if !Path::new(name).exists() => format!("{name}@{revision}"),
            _ => name.to_owned(),
        });
    }
    names.dedup();
    let hub = Hub::from_environment();
    let here = names.iter().find(|name| matches!(hub.find(name), Ok(Some(_))));
    // What is not here but has the form of a hub id can be fetched.
    let found = here.or_else(|| names.iter().find(|name| matches!(hub.find(name), Ok(None))));
    found.cloned().ok_or_else(|| {
        let shown = adapter.display();
        bad_input(match names.first() {
            Some(name) => format!(
                "--model: is left out, and {shown} was trained on `{name}`, which is neither a folder or \
                 file here nor a model of the hub; give the base model"
            ),
            None => format!("--model: is left out, and {shown} names no base model; give it"),
        })
    })
}

/// Says of what an adapter does not fit whose files tell no fingerprint, which base they name.
pub(crate) fn naming_base<T>(
    loaded: hydralora_peft::Result<T>,
    adapter: &Path,
    given: &str,
) -> anyhow::Result<T> {
    let config = match &loaded {
        Err(hydralora_peft::Error::Tensors { .. }) => io::read_config(adapter).ok(),
        _ => None,
    };
    let named = config.as_ref().and_then(|config| config.get("base_model_name_or_path")?.as_str());
    match named.filter(|named| !named.is_empty() && *named != given) {
        None => Ok(loaded?),
        Some(named) => loaded.with_context(|| {
            format!(
                "{}: names `{named}` as its base model, and the model given is `{given}`",
                adapter.display()
            )
        }),
    }
}

//! The benchmark tasks: one file each, listed once below.

use super::error::{Error, Result};
use super::prompt::Reader;
use super::task::{Family, Opened, Settings, is_shard};
use hydralora_data::Fetch;
use std::path::PathBuf;

macro_rules! tasks {
    ($($task:ident),* $(,)?) => {
        $(mod $task;)*
        /// Every family of tasks there is.
        pub static FAMILIES: &[&dyn Family] = &[$(&$task::FAMILY),*];
    };
}

tasks! { mmlu, mmlu_ppl, gsm8k, bbh, humaneval, loss, exact, rouge, choices }

/// Every name that `--tasks` takes.
pub fn names() -> Vec<String> {
    FAMILIES.iter().flat_map(|family| family.names()).collect()
}

/// The family of what `spec` names.
///
/// # Errors
/// If there is no such task, with the nearest names.
pub fn known(spec: &str) -> Result<&'static dyn Family> {
    let name = spec.split_once(':').map_or(spec, |(name, _)| name);
    let mut families = FAMILIES.iter().copied();
    let found = families.find(|family| family.names().iter().any(|known| known == name));
    found.ok_or_else(|| Error::UnknownTask { name: name.to_owned(), hint: hint(name) })
}

/// Opens what `spec` names: a task, a group, or `task:FILE`.
///
/// # Errors
/// If there is no such task, with the nearest names; or its data are missing or malformed.
pub fn open(spec: &str, settings: &Settings, reader: &Reader<'_>) -> Result<Opened> {
    let family = known(spec)?;
    let (name, file) = match spec.split_once(':') {
        Some((name, file)) => (name, Some(PathBuf::from(file))),
        None => (spec, None),
    };
    match file {
        None => family.open(name, settings, reader),
        Some(data) if family.takes_file() => {
            family.open(name, &Settings { data, ..settings.clone() }, reader)
        }
        Some(_) => Err(Error::Option {
            option: "tasks",
            message: format!("`{spec}`: `{name}` takes no file; give its folder with --data"),
        }),
    }
}

/// Gets the data of what `spec` names from the hub, and gives the folder to open it with; none for
/// tasks over a user's own files.
///
/// # Errors
/// If there is no such task, or its data cannot be had.
pub fn fetch(spec: &str, settings: &Settings, hub: &mut dyn Fetch) -> Result<Option<PathBuf>> {
    let Some(remote) = known(spec)?.remote(spec, settings) else { return Ok(None) };
    let (repository, revision) = (remote.repository, remote.revision);
    let fault = |message: String| Error::Unavailable { task: spec.to_owned(), message };
    let names = hub.list(repository, revision).map_err(fault)?;
    let mut folder = None;
    for (inside, split) in &remote.splits {
        let start = format!("{inside}/");
        let own = |name: &&String| name.strip_prefix(&start).is_some_and(|n| is_shard(n, split));
        let mut own: Vec<&String> = names.iter().filter(own).collect();
        own.sort();
        if own.is_empty() {
            let message = format!("{repository} has no file {inside}/{split}-*.parquet");
            return Err(fault(message));
        }
        for name in own {
            let path = hub.file(repository, revision, name, None).map_err(fault)?;
            let depth = name.split('/').count();
            folder = path.ancestors().nth(depth).map(std::path::Path::to_path_buf);
        }
    }
    Ok(folder)
}

/// The names that resemble a mistyped one, or the families.
fn hint(name: &str) -> String {
    let wanted = name.to_lowercase();
    let known = names();
    let mut scored: Vec<(f64, &String)> = known
        .iter()
        .map(|known| (strsim::jaro_winkler(&wanted, known), known))
        .filter(|(score, _)| *score >= 0.8)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    let near: Vec<String> =
        scored.into_iter().take(3).map(|(_, known)| format!("`{known}`")).collect();
    if near.is_empty() {
        let families: Vec<String> =
            FAMILIES.iter().filter_map(|family| family.names().into_iter().next()).collect();
        format!("known: {}, and their parts", families.join(", "))
    } else {
        format!("did you mean {}?", near.join(" or "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_distinct_and_near_ones_are_found() {
        let names = names();
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        assert!(hint("gsm8").contains("`gsm8k`"), "{}", hint("gsm8"));
        assert!(hint("mmlu_profesional_law").contains("`mmlu_professional_law`"));
        assert!(hint("zzzz").contains("humaneval"));
    }
}

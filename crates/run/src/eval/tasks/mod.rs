//! The benchmark tasks: one file each, listed once below.

use super::error::{Error, Result};
use super::prompt::Reader;
use super::task::{Family, Opened, Settings};
use std::path::PathBuf;

macro_rules! tasks {
    ($($task:ident),* $(,)?) => {
        $(mod $task;)*
        /// Every family of tasks there is.
        pub static FAMILIES: &[&dyn Family] = &[$(&$task::FAMILY),*];
    };
}

tasks! { mmlu, mmlu_ppl, gsm8k, bbh, humaneval, loss, exact }

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

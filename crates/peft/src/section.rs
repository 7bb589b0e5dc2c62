//! Reading a section of options: every fault at once, unknown names with the nearest known one.

use crate::error::Fault;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Reads a section into `T`, finding every wrong option instead of only the first: a bad or unknown
/// one is noted, dropped, and the rest is read again.
///
/// # Errors
/// Every wrong option of `section`, as `prefix.option`.
pub fn read_section<T: DeserializeOwned>(
    prefix: &str,
    section: &Map<String, Value>,
    known: &Map<String, Value>,
) -> Result<T, Vec<Fault>> {
    let mut section = section.clone();
    let mut faults = Vec::new();
    section.retain(|key, _| {
        let found = known.contains_key(key);
        if !found {
            let nearest = nearest(key, known.keys().map(String::as_str));
            let hint = nearest.map_or_else(
                || {
                    format!(
                        "expected one of {}",
                        known.keys().cloned().collect::<Vec<_>>().join(", ")
                    )
                },
                |nearest| format!("did you mean `{nearest}`?"),
            );
            faults.push(Fault::new(format!("{prefix}.{key}"), format!("unknown option; {hint}")));
        }
        found
    });
    loop {
        match serde_path_to_error::deserialize::<_, T>(Value::Object(section.clone())) {
            Ok(value) if faults.is_empty() => return Ok(value),
            Ok(_) => return Err(faults),
            Err(error) => {
                let path = error.path().to_string();
                let key = path.split(['.', '[']).next().unwrap_or_default().to_owned();
                let removed = section.remove(&key).is_some();
                let field = if removed { format!("{prefix}.{path}") } else { prefix.to_owned() };
                faults.push(Fault::new(field, error.inner().to_string()));
                if !removed {
                    return Err(faults);
                }
            }
        }
    }
}

/// The name closest to `word`, if one is close enough to be a slip of the pen.
pub fn nearest<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Someone who stopped typing early is as near as someone who slipped.
    let begun = |name: &str| word.len() >= 3 && name.starts_with(word);
    names
        .into_iter()
        .map(|name| {
            let slips = strsim::damerau_levenshtein(word, name);
            (if begun(name) { slips.min(1) } else { slips }, name)
        })
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min()
        .map(|(_, name)| name)
}

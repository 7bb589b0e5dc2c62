//! Reading a section of options: every fault at once, unknown names with the nearest known one.

use crate::error::Fault;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Most names that a message lists.
const LISTED: usize = 6;

/// Reads a section into `T`, finding every wrong option instead of only the first.
///
/// # Errors
/// Every wrong option of `section`, as `prefix.option`.
pub fn read_section<T: DeserializeOwned>(
    prefix: &str,
    section: &Map<String, Value>,
    known: &Map<String, Value>,
) -> Result<T, Vec<Fault>> {
    match read_rest(prefix, section, known) {
        (Some(value), faults) if faults.is_empty() => Ok(value),
        (_, faults) => Err(faults),
    }
}

/// Reads a section into `T` and says what is wrong with it: a bad or unknown option is noted and
/// dropped, and what is left is read, so that its values can be checked too. There is no `T` where
/// something is wrong with the section as a whole.
pub fn read_rest<T: DeserializeOwned>(
    prefix: &str,
    section: &Map<String, Value>,
    known: &Map<String, Value>,
) -> (Option<T>, Vec<Fault>) {
    let mut section = section.clone();
    let mut faults = Vec::new();
    section.retain(|key, _| {
        let found = known.contains_key(key);
        if !found {
            let hint = suggestion(key, known.keys().map(String::as_str));
            faults.push(Fault::new(format!("{prefix}.{key}"), format!("unknown option; {hint}")));
        }
        found
    });
    loop {
        match serde_path_to_error::deserialize::<_, T>(Value::Object(section.clone())) {
            Ok(value) => return (Some(value), faults),
            Err(error) => {
                let path = error.path().to_string();
                let key = path.split(['.', '[']).next().unwrap_or_default().to_owned();
                let removed = section.remove(&key);
                let field = match removed {
                    Some(_) => format!("{prefix}.{path}"),
                    None => prefix.to_owned(),
                };
                let value = removed.as_ref().and_then(|value| at_path(value, &path));
                faults.push(Fault::new(field, in_words(&error.inner().to_string(), value)));
                if removed.is_none() {
                    return (None, faults);
                }
            }
        }
    }
}

/// "did you mean `x`?", or the first of the names there are.
pub fn suggestion<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    match nearest(word, names.iter().copied()) {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => format!("expected one of {}", listed(&names)),
    }
}

/// Names parted by commas, a few of them where they are many.
pub fn listed(names: &[&str]) -> String {
    match names.len().saturating_sub(LISTED) {
        0 | 1 => names.join(", "),
        more => format!("{}, and {more} more", names[..LISTED].join(", ")),
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

/// What stands at `path`, of which the first part names `value` itself.
fn at_path<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let parts = path.split(['.', '[']).skip(1).map(|part| part.trim_end_matches(']'));
    parts.into_iter().try_fold(value, |value, part| match value {
        Value::Object(map) => map.get(part),
        Value::Array(list) => list.get(part.parse::<usize>().ok()?),
        _ => None,
    })
}

/// What a parser found wrong with `value`, in the words of a recipe instead of a programmer's.
fn in_words(message: &str, value: Option<&Value>) -> String {
    if let Some((_, expected)) =
        message.split_once(", expected ").filter(|_| message.starts_with("invalid "))
    {
        let expected = type_in_words(expected);
        let is_number = expected.contains("number");
        return match value {
            Some(Value::String(text)) if is_number && text.trim().parse::<f64>().is_ok() => {
                format!("is the text `{text}`; expected {expected}: write it without quotes")
            }
            Some(Value::String(text)) => format!("is the text `{text}`; expected {expected}"),
            Some(Value::Array(_)) => format!("is a list; expected {expected}"),
            Some(Value::Object(_)) => format!("is a mapping; expected {expected}"),
            Some(Value::Null) => format!("is empty; expected {expected}"),
            Some(other) => format!("is {other}; expected {expected}"),
            None => format!("expected {expected}"),
        };
    }
    if let Some(rest) = message.strip_prefix("unknown variant `") {
        let mut words = rest.split('`').step_by(2);
        let found = words.next().unwrap_or_default();
        let known: Vec<&str> = rest.split('`').skip(2).step_by(2).collect();
        return format!("`{found}` is not known; {}", suggestion(found, known));
    }
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let found = rest.split('`').next().unwrap_or_default();
        let known: Vec<&str> = rest.split('`').skip(2).step_by(2).collect();
        return format!("`{found}` is no option here; {}", suggestion(found, known));
    }
    if message.contains("variant of untagged enum Targets") {
        let found = value.map_or_else(|| "another value".to_owned(), ToString::to_string);
        return format!("is {found}; expected a preset, a layer's name, or a list of them");
    }
    if message.contains("variant of untagged enum TokenIndices") {
        return "expected a list of token numbers, or such a list for each module".to_owned();
    }
    message.to_owned()
}

/// A type as people call it.
fn type_in_words(expected: &str) -> &str {
    match expected {
        "usize" | "u64" | "u32" | "u16" | "u8" => "a whole number, 0 or more",
        "isize" | "i64" | "i32" => "a whole number",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a string" | "string or map" | "path string" => "text",
        "a sequence" => "a list",
        "a map" => "a mapping",
        other if other.starts_with("struct ") => "a mapping of options",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Options {
        count: usize,
        rate: f64,
        on: bool,
        names: Vec<String>,
        kind: Kind,
        inner: Inner,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        #[default]
        Cosine,
        Linear,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        temperature: f64,
    }

    fn read(section: &Value) -> (Option<Options>, Vec<String>) {
        let known = json!({"count": 0, "rate": 0, "on": 0, "names": 0, "kind": 0, "inner": 0});
        let (value, faults) =
            read_rest("train", section.as_object().unwrap(), known.as_object().unwrap());
        (value, faults.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn faults_are_said_in_words() {
        for (section, expected) in [
            (
                json!({"count": "8"}),
                "train.count: is the text `8`; expected a whole number, 0 or more: write it without quotes",
            ),
            (
                json!({"count": "x"}),
                "train.count: is the text `x`; expected a whole number, 0 or more",
            ),
            (json!({"count": 1.5}), "train.count: is 1.5; expected a whole number, 0 or more"),
            (json!({"count": -1}), "train.count: is -1; expected a whole number, 0 or more"),
            (json!({"rate": true}), "train.rate: is true; expected a number"),
            (json!({"rate": [1]}), "train.rate: is a list; expected a number"),
            (json!({"rate": {}}), "train.rate: is a mapping; expected a number"),
            (json!({"on": null}), "train.on: is empty; expected true or false"),
            (json!({"on": "yes"}), "train.on: is the text `yes`; expected true or false"),
            (json!({"names": ["a", 3]}), "train.names[1]: is 3; expected text"),
            (json!({"kind": "cosin"}), "train.kind: `cosin` is not known; did you mean `cosine`?"),
            (
                json!({"kind": "poly"}),
                "train.kind: `poly` is not known; expected one of cosine, linear",
            ),
            (
                json!({"inner": {"temperature": "2"}}),
                "train.inner.temperature: is the text `2`; expected a number: write it without quotes",
            ),
            (json!({"inner": 3}), "train.inner: is 3; expected a mapping of options"),
            (json!({"countt": 3}), "train.countt: unknown option; did you mean `count`?"),
        ] {
            assert_eq!(read(&section).1, [expected], "{section}");
        }
        let nested = read(&json!({"inner": {"temprature": 1}})).1.concat();
        assert!(nested.contains("did you mean `temperature`?"), "{nested}");
    }

    #[test]
    fn what_is_right_is_read_beside_what_is_wrong() {
        let (value, faults) = read(&json!({"cuont": 3, "rate": "x", "kind": "linear", "count": 7}));
        assert_eq!(faults.len(), 2);
        let expected = Options { count: 7, kind: Kind::Linear, ..Options::default() };
        assert_eq!(value, Some(expected));
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..20).map(|i| format!("name{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert!(suggestion("xyz", names.clone()).ends_with("name5, and 14 more"));
        assert_eq!(listed(&names[..3]), "name0, name1, name2");
    }
}

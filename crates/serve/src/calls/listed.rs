//! `[TOOL_CALLS][{"name": …, "arguments": …}]` or `[TOOL_CALLS]name[ARGS]{…}`, as Mistral has it.

use super::{Bracket, Call, CallForm, json_calls};
use serde_json::{Map, Value};

const OPEN: &str = "[TOOL_CALLS]";
const ARGUMENTS: &str = "[ARGS]";

pub(crate) static FORM: CallForm = CallForm {
    is_of: |source| source.contains(OPEN),
    brackets: &[Bracket { open: OPEN, close: None }],
    whole: None,
    marks: &[OPEN, ARGUMENTS],
    read: |text| named(text).or_else(|| json_calls(text)),
    around: ("", ""),
};

/// `name[ARGS]{…}`, several behind one another.
fn named(text: &str) -> Option<Vec<Call>> {
    let parts = text.split(OPEN).map(str::trim).filter(|part| !part.is_empty());
    let call = |part: &str| {
        let at = part.find(ARGUMENTS).or_else(|| part.find('{'))?;
        let (name, rest) = part.split_at(at);
        let arguments = rest.strip_prefix(ARGUMENTS).unwrap_or(rest).trim();
        serde_json::from_str::<Map<String, Value>>(arguments).ok()?;
        let name = name.trim();
        let plain = !name.is_empty() && !name.contains(char::is_whitespace);
        plain.then(|| Call { name: name.to_owned(), arguments: arguments.to_owned() })
    };
    parts.map(call).collect()
}

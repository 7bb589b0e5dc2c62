//! `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, as Qwen 3.5 has it.

use super::{Call, CallForm, json_calls, tagged};
use serde_json::{Map, Value, json};

pub(crate) static FORM: CallForm = CallForm {
    is_of: |source| source.contains("<function=") && (tagged::FORM.is_of)(source),
    read: |text| calls(text).or_else(|| json_calls(text)),
    around: ("", ""),
    ..tagged::FORM
};

/// A value that is JSON is taken as such.
fn calls(text: &str) -> Option<Vec<Call>> {
    let mut calls = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, inside) = rest.strip_prefix("<function=")?.split_once('>')?;
        let (mut inside, after) = inside.split_once("</function>")?;
        let mut arguments = Map::new();
        while let Some((_, parameter)) = inside.split_once("<parameter=") {
            let (key, value) = parameter.split_once('>')?;
            let (value, after) = value.split_once("</parameter>")?;
            let value = value.strip_prefix('\n').unwrap_or(value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
            arguments.insert(key.to_owned(), value);
            inside = after;
        }
        let name = name.trim().to_owned();
        calls.push(Call { name, arguments: Value::Object(arguments).to_string() });
        rest = after.trim();
    }
    Some(calls)
}

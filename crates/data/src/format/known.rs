//! Fields of records beside those of their format: what turns say of themselves, what nobody needs, and
//! what would be lost.

use serde_json::{Map, Value, json};

use super::{FieldFault, Fields, Format, describe};
use crate::record::{CONTROLS, MASKED, Message, REASONING};

/// Fields that say where a record comes from, and nothing to the model.
const HARMLESS: [&str; 62] = [
    "id",
    "ids",
    "idx",
    "index",
    "uid",
    "uuid",
    "guid",
    "key",
    "row",
    "row_id",
    "source",
    "src",
    "dataset",
    "dataset_name",
    "origin",
    "url",
    "urls",
    "link",
    "date",
    "time",
    "timestamp",
    "created",
    "created_at",
    "updated_at",
    "category",
    "categories",
    "topic",
    "topics",
    "tag",
    "tags",
    "lang",
    "language",
    "license",
    "licence",
    "author",
    "authors",
    "model",
    "model_name",
    "generator",
    "split",
    "subset",
    "config",
    "version",
    "task",
    "task_id",
    "task_name",
    "task_type",
    "title",
    "meta",
    "metadata",
    "info",
    "hash",
    "length",
    "num_tokens",
    "token_count",
    "num_turns",
    "difficulty",
    "conversation_id",
    "conversation_hash",
    "prompt_id",
    "message_id",
    "__index_level_0__",
];

/// Fields of pictures and sound, of which a text model can learn nothing.
const MEDIA: [&str; 6] = ["image", "images", "video", "videos", "audio", "audios"];

/// Where a turn keeps its calls of tools, and where the older form of chat APIs kept the one.
const TOOL_CALLS: &str = "tool_calls";
const FUNCTION_CALL: &str = "function_call";

/// Answers of which one is better than another.
pub(super) const PREFERENCE: [&str; 2] = ["chosen", "rejected"];

/// Whether a value says anything.
fn says(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => !object.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// Names of the fields of a record that hold something and that its format does not read, without those
/// that say nothing to a model.
///
/// # Errors
/// When one of them makes the record something else than its format: pictures, or preferences.
pub(crate) fn unread(fields: &Fields<'_>, format: &dyn Format) -> Result<Vec<String>, FieldFault> {
    let own = format.required().iter().chain(format.optional()).copied();
    let shared: &[&str] = match format.is_chat() {
        true => &["tools", "documents", "functions", "chat_template_kwargs"],
        false => &[],
    };
    let read: Vec<&str> = own.chain(shared.iter().copied()).chain([super::DOMAIN]).collect();
    let read: Vec<&str> = read.into_iter().map(|name| fields.name(name)).collect();
    let mut unread: Vec<String> = format.unused(fields).into_iter().map(str::to_owned).collect();
    for (name, value) in fields.object.iter().filter(|(_, value)| says(value)) {
        if read.contains(&name.as_str()) {
            continue;
        }
        if MEDIA.contains(&name.as_str()) {
            let expected = "no pictures, films or sound: only texts can be trained on";
            return Err(FieldFault::new(&fields.full_name_of(name), expected, describe(value)));
        }
        let both = PREFERENCE.iter().all(|name| fields.object.contains_key(*name));
        let mapped = PREFERENCE.iter().any(|name| read.contains(name));
        if both && !mapped && PREFERENCE.contains(&name.as_str()) {
            return Err(preference(name));
        }
        if name == "label" && value.is_boolean() {
            let expected = "no preference data: a `label` says whether the answer is wanted, and here every \
                            answer is trained; leave those with false out, and the field";
            return Err(FieldFault::new(name, expected, describe(value)));
        }
        let harmless = HARMLESS.contains(&name.to_lowercase().as_str());
        if !harmless && !name.is_empty() && !name.starts_with("Unnamed: ") {
            unread.push(name.clone());
        }
    }
    Ok(unread)
}

fn preference(name: &str) -> FieldFault {
    let expected = "records of one answer: `chosen` and `rejected` are preference data, and nothing here \
                    learns from a comparison; to train the chosen answers, map one, as in \
                    `fields: {response: chosen}`";
    FieldFault::new(name, expected, "preference data")
}

/// The answer of a record that is no list of turns, with the reasoning it may name.
pub(super) fn answer(fields: &Fields<'_>, text: &str) -> Result<Message, FieldFault> {
    let mut message = Message::assistant(text);
    for name in REASONING {
        if let Some(reasoning) = fields.optional_text(name)?.filter(|text| !text.trim().is_empty())
        {
            message.fields.insert("reasoning_content".to_owned(), Value::from(reasoning));
            break;
        }
    }
    Ok(message)
}

/// Makes sure that what a turn says about its training is understood.
pub(super) fn check_controls(turn: &Fields<'_>) -> Result<(), FieldFault> {
    for name in CONTROLS {
        let Some(value) = turn.get(name) else { continue };
        let number = value.as_f64().is_some_and(|number| number == 0.0 || number == 1.0);
        // A mask of true hides in some data and shows in others.
        let names = value.is_boolean() && name != "mask";
        if !(number || names) {
            let expected = match name {
                "mask" => "0 for a turn that is not trained, or 1; or `train: false` instead",
                _ => "0 or false for a turn that is not trained, 1 or true for one that is",
            };
            return Err(FieldFault::new(&turn.full_name(name), expected, describe(value)));
        }
    }
    match turn.get(MASKED) {
        Some(value) if !value.is_boolean() => {
            let expected = "true for a turn that is not trained, false for one that is";
            Err(FieldFault::new(&turn.full_name(MASKED), expected, describe(value)))
        }
        _ => Ok(()),
    }
}

/// A call of a tool, `{name, arguments}` or what chat APIs put around it, as these write it.
fn call(value: &Value) -> Option<Value> {
    let object = value.as_object()?;
    if object.get("function").is_some_and(Value::is_object) {
        return Some(value.clone());
    }
    object.get("name")?.as_str()?;
    let mut function = Map::new();
    function.insert("name".to_owned(), object["name"].clone());
    let arguments = ["arguments", "parameters"].iter().find_map(|name| object.get(*name));
    function.insert("arguments".to_owned(), arguments.cloned().unwrap_or_else(|| json!({})));
    Some(json!({"type": "function", "function": function}))
}

/// Calls of tools written as the JSON text of one or of a list of them.
pub(super) fn calls(text: &str) -> Option<Vec<Value>> {
    let value: Value = serde_json::from_str(text).ok()?;
    match &value {
        Value::Array(list) if !list.is_empty() => list.iter().map(call).collect(),
        other => Some(vec![call(other)?]),
    }
}

/// Brings a turn's `tool_calls` and `function_call` into the form of chat APIs, where they are written as
/// JSON text, as files without nested types have it; empty ones are taken out.
pub(super) fn read_calls(
    turn: &Fields<'_>,
    others: &mut Map<String, Value>,
) -> Result<(), FieldFault> {
    let fault = |name: &'static str, expected: &str, value: &Value| {
        Err(FieldFault::new(&turn.full_name_of(name), expected, describe(value)))
    };
    if let Some(value) = others.get(TOOL_CALLS).cloned() {
        let list = match &value {
            Value::String(text) if text.trim().is_empty() => Some(Vec::new()),
            Value::String(text) if text.trim() == "[]" => Some(Vec::new()),
            Value::String(text) => calls(text),
            Value::Array(list) => list.iter().all(Value::is_object).then(|| list.clone()),
            other => call(other).map(|call| vec![call]),
        };
        match list {
            Some(list) if list.is_empty() => drop(others.shift_remove(TOOL_CALLS)),
            Some(list) => drop(others.insert(TOOL_CALLS.to_owned(), Value::Array(list))),
            None => {
                return fault(TOOL_CALLS, "a list of calls of tools, or JSON text of one", &value);
            }
        }
    }
    if let Some(value) = others.get(FUNCTION_CALL).cloned() {
        let function = match &value {
            Value::String(text) if text.trim().is_empty() => {
                others.shift_remove(FUNCTION_CALL);
                return Ok(());
            }
            Value::String(text) => serde_json::from_str::<Map<String, Value>>(text).ok(),
            other => other.as_object().cloned(),
        };
        match function {
            Some(function) => {
                drop(others.insert(FUNCTION_CALL.to_owned(), Value::Object(function)));
            }
            None => {
                let expected = "a call {name, arguments}, or JSON text of one";
                return fault(FUNCTION_CALL, expected, &value);
            }
        }
    }
    Ok(())
}

/// Whether a turn with these fields calls a tool.
pub(super) fn has_calls(fields: &Map<String, Value>) -> bool {
    [TOOL_CALLS, FUNCTION_CALL].iter().any(|name| fields.contains_key(*name))
}

/// The text of a turn that is written in parts, and the reasoning among them.
pub(super) fn parts(name: &str, parts: &[Value]) -> Result<(String, String), FieldFault> {
    let (mut text, mut reasoning) = (String::new(), String::new());
    for (index, part) in parts.iter().enumerate() {
        let kind = part.get("type").and_then(Value::as_str);
        let into = match kind {
            None | Some("text" | "input_text" | "output_text") => &mut text,
            Some("reasoning" | "thinking" | "reasoning_text") => &mut reasoning,
            Some(_) => return Err(no_text(name, index, part)),
        };
        let named = ["text", kind.unwrap_or("text")].into_iter();
        match named.filter_map(|name| part.get(name)).find_map(Value::as_str) {
            Some(said) => into.push_str(said),
            None => return Err(no_text(name, index, part)),
        }
    }
    Ok((text, reasoning))
}

fn no_text(name: &str, index: usize, part: &Value) -> FieldFault {
    FieldFault::new(
        &format!("{name}[{index}]"),
        "a text part {type: \"text\", text: …}",
        part.get("type").map_or_else(|| describe(part), |kind| format!("type {kind}")),
    )
}

/// A turn that calls tools and says nothing.
pub(super) fn calling(calls: Vec<Value>) -> Message {
    let mut message = Message::assistant("");
    message.fields.insert(TOOL_CALLS.to_owned(), Value::Array(calls));
    message.fields.insert("content".to_owned(), Value::Null);
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn unread_of(
        name: &str,
        json: &str,
        names: &[(&str, &str)],
    ) -> Result<Vec<String>, FieldFault> {
        let object: Map<String, Value> = serde_json::from_str(json).unwrap();
        let names: BTreeMap<String, String> =
            names.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let format = super::super::find(name).unwrap();
        unread(&Fields::new(&object, &names), format)
    }

    #[test]
    fn what_is_lost_is_named_and_what_says_nothing_is_not() {
        let json = r#"{"instruction": "a", "output": "b", "id": 3, "source": "x", "hint": "c",
            "empty": "", "none": null, "context": ["d"]}"#;
        assert_eq!(unread_of("alpaca", json, &[]), Ok(vec!["hint".into(), "context".into()]));
        let mapped = [("input", "context"), ("system", "hint")];
        assert_eq!(unread_of("alpaca", json, &mapped), Ok(Vec::new()));
        let json = r#"{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}"#;
        assert_eq!(unread_of("completion", json, &[]), Ok(vec!["tools".into()]));
        let json = r#"{"messages": [], "tools": [{"name": "f"}]}"#;
        assert_eq!(unread_of("messages", json, &[]), Ok(Vec::new()));
    }

    #[test]
    fn preferences_and_pictures_are_refused_as_what_they_are() {
        let json = r#"{"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}"#;
        let fault = unread_of("prompt-response", json, &[]).unwrap_err();
        assert!(fault.expected.contains("preference data"), "{fault:?}");
        let json = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
        let mapped = [("response", "chosen")];
        assert_eq!(unread_of("prompt-response", json, &mapped), Ok(vec!["rejected".into()]));
        let json = r#"{"prompt": "a", "completion": "b", "label": false}"#;
        assert!(unread_of("completion", json, &[]).unwrap_err().expected.contains("preference"));
        let json = r#"{"messages": [], "images": ["a.png"]}"#;
        assert_eq!(unread_of("messages", json, &[]).unwrap_err().field, "images");
        assert_eq!(unread_of("messages", r#"{"messages": [], "images": []}"#, &[]), Ok(Vec::new()));
    }
}

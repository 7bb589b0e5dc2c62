//! The formats of records: one file each, one line each in [`FORMATS`].

mod alpaca;
mod cloze;
mod completion;
pub(crate) mod known;
mod messages;
mod natural_instructions;
mod prompt_response;
mod sharegpt;
mod text;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::record::Body;

/// Every format, in the order in which `auto` tries them.
static FORMATS: &[&dyn Format] = &[
    &messages::Messages,
    &sharegpt::ShareGpt,
    &alpaca::Alpaca,
    &prompt_response::PromptResponse,
    &natural_instructions::NaturalInstructions,
    &cloze::Cloze,
    &completion::Completion,
    &text::Text,
];

/// The name that stands for "see what the first record looks like".
pub(crate) const AUTO: &str = "auto";

/// The field any format takes a record's own domain from, if it is mapped.
pub(crate) const DOMAIN: &str = "domain";

/// The fields of a conversation's record that a chat template sees as they are.
pub(crate) const TEMPLATE_LISTS: [&str; 2] = ["tools", "documents"];

/// The field of a record with further arguments for its chat template, as TRL names it.
pub(crate) const TEMPLATE_ARGUMENTS: &str = "chat_template_kwargs";

/// The older name of a record's tools.
const FUNCTIONS: &str = "functions";

/// How one kind of record is read.
pub(crate) trait Format: Sync {
    /// The name in recipes.
    fn name(&self) -> &'static str;
    /// Fields a record must have; `auto` takes the first format whose required fields are there.
    fn required(&self) -> &'static [&'static str];
    /// Fields it may have, and names inside its lists that can be mapped.
    fn optional(&self) -> &'static [&'static str];
    /// Whether records are conversations, so that a template and a system prompt apply.
    fn is_chat(&self) -> bool {
        true
    }
    /// Whether files that are not JSON are read too, one record a line.
    fn reads_lines(&self) -> bool {
        false
    }
    /// Whether `auto` tries it.
    fn automatic(&self) -> bool {
        true
    }
    /// Whether a `.json` file that begins so is one object that holds many records.
    fn is_document(&self, _head: &str) -> bool {
        false
    }
    /// The records of such an object.
    fn rows(
        &self,
        _path: &Path,
        document: Map<String, Value>,
    ) -> Result<Vec<Map<String, Value>>, FieldFault> {
        Ok(vec![document])
    }
    /// Names of fields of this record that the format reads and that give way to others which say
    /// something else.
    fn unused(&self, _fields: &Fields<'_>) -> Vec<&'static str> {
        Vec::new()
    }
    /// Takes a record apart.
    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault>;
}

/// The names of all formats, as recipes write them.
pub fn format_names() -> Vec<&'static str> {
    FORMATS.iter().map(|format| format.name()).collect()
}

/// The format of that name; `auto` has none.
pub(crate) fn find(name: &str) -> Option<&'static dyn Format> {
    FORMATS.iter().copied().find(|format| format.name() == name)
}

/// The field names that `fields` may map for a format, or for any of them under `auto`.
pub(crate) fn field_names(name: &str) -> Option<Vec<&'static str>> {
    let formats: Vec<_> = if name == AUTO { FORMATS.to_vec() } else { vec![find(name)?] };
    let mut names = Vec::new();
    for format in formats {
        for &field in format.required().iter().chain(format.optional()) {
            if !names.contains(&field) {
                names.push(field);
            }
        }
    }
    names.push(DOMAIN);
    Some(names)
}

/// Whether a format's records are conversations; `None` where that is not known yet.
pub(crate) fn is_chat(name: &str) -> Option<bool> {
    find(name).map(Format::is_chat)
}

/// The format for files that are not JSON.
pub(crate) fn line_format() -> &'static dyn Format {
    &text::Text
}

/// Whether a record has the fields that a format requires.
pub(crate) fn fits(format: &dyn Format, fields: &Fields<'_>) -> bool {
    format.required().iter().all(|field| fields.object.contains_key(fields.name(field)))
}

/// The first format whose required fields a record has.
///
/// # Errors
/// What the record has and what each format would need.
pub(crate) fn detect(fields: &Fields<'_>) -> Result<&'static dyn Format, String> {
    let mut automatic = FORMATS.iter().copied().filter(|format| format.automatic());
    automatic.find(|format| fits(*format, fields)).ok_or_else(|| {
        let found: Vec<&str> = fields.object.keys().map(String::as_str).collect();
        if known::PREFERENCE.iter().all(|name| fields.object.contains_key(*name)) {
            return format!(
                "the first record has the fields [{}]: `chosen` and `rejected` are preference data, and \
                 nothing here learns from a comparison; to train the chosen answers, map one, as in \
                 `fields: {{response: chosen}}`, beside `prompt`",
                found.join(", ")
            );
        }
        let needs: Vec<String> = FORMATS
            .iter()
            .filter(|format| format.automatic())
            .map(|format| format!("{} ({})", format.name(), format.required().join(", ")))
            .collect();
        format!(
            "cannot tell the format: the first record has the fields [{}]; the formats need {}; \
             set `format`, or map your names with `fields`, such as {{instruction: question, \
             output: answer}}, or with `--field instruction=question --field output=answer` where \
             the command takes it",
            found.join(", "),
            needs.join(", ")
        )
    })
}

/// What is wrong with a field of a record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FieldFault {
    pub(crate) field: String,
    pub(crate) expected: String,
    pub(crate) found: String,
}

impl FieldFault {
    pub(crate) fn new(field: &str, expected: &str, found: impl Into<String>) -> Self {
        Self { field: field.to_owned(), expected: expected.to_owned(), found: found.into() }
    }
}

/// A record's fields, under the names that the file gives them.
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    names: &'a BTreeMap<String, String>,
    /// Where the object stands inside its record: empty, or like `messages[1].`.
    prefix: String,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(object: &'a Map<String, Value>, names: &'a BTreeMap<String, String>) -> Self {
        Self { object, names, prefix: String::new() }
    }

    /// The file's name for a field.
    pub(crate) fn name(&self, field: &'a str) -> &'a str {
        self.names.get(field).map_or(field, String::as_str)
    }

    /// A name of the file with its place inside the record.
    fn full_name_of(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The file's name for a field, with its place inside the record.
    pub(crate) fn full_name(&self, field: &'a str) -> String {
        format!("{}{}", self.prefix, self.name(field))
    }

    /// A field's value; `null` counts as absent.
    pub(crate) fn get(&self, field: &'a str) -> Option<&'a Value> {
        self.object.get(self.name(field)).filter(|value| !value.is_null())
    }

    /// A text that must be there.
    pub(crate) fn text(&self, field: &'a str) -> Result<&'a str, FieldFault> {
        match self.object.get(self.name(field)) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => {
                Err(FieldFault::new(&self.full_name(field), "a string", describe(other)))
            }
            None => Err(self.missing(field, "a string")),
        }
    }

    /// A text that may be absent or `null`.
    pub(crate) fn optional_text(&self, field: &'a str) -> Result<Option<&'a str>, FieldFault> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => {
                Err(FieldFault::new(&self.full_name(field), "a string or null", describe(other)))
            }
        }
    }

    /// A list of objects that must be there and must not be empty.
    pub(crate) fn objects(&self, field: &'a str) -> Result<Vec<Fields<'a>>, FieldFault> {
        const EXPECTED: &str = "a list of objects";
        let name = self.full_name(field);
        let items = match self.object.get(self.name(field)) {
            Some(Value::Array(items)) => items,
            Some(other) => return Err(FieldFault::new(&name, EXPECTED, describe(other))),
            None => return Err(self.missing(field, EXPECTED)),
        };
        if items.is_empty() {
            return Err(FieldFault::new(&name, EXPECTED, "an empty list"));
        }
        let object = |(index, item): (usize, &'a Value)| match item {
            Value::Object(object) => {
                Ok(Fields { object, names: self.names, prefix: format!("{name}[{index}].") })
            }
            other => {
                Err(FieldFault::new(&format!("{name}[{index}]"), "an object", describe(other)))
            }
        };
        items.iter().enumerate().map(object).collect()
    }

    /// All that is not null and not under one of these names.
    pub(crate) fn others(&self, known: &[&'a str]) -> Map<String, Value> {
        let used: Vec<&str> = known.iter().map(|field| self.name(field)).collect();
        let left = self.object.iter();
        let left = left.filter(|(name, value)| !value.is_null() && !used.contains(&name.as_str()));
        left.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// What a chat template is to see beside the messages: `tools` and `documents`, each a list of
    /// objects, and the entries of `chat_template_kwargs`. Each may be written as a text of JSON,
    /// as files without nested types have it.
    pub(crate) fn variables(&self) -> Result<Map<String, Value>, FieldFault> {
        let parsed = |name: &'static str, expected: &str| -> Result<Option<Value>, FieldFault> {
            let fault = |found: String| FieldFault::new(&self.full_name(name), expected, found);
            match self.get(name) {
                Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
                Some(Value::String(text)) => {
                    let value = serde_json::from_str(text);
                    value.map(Some).map_err(|_| fault(describe(&Value::from(text.as_str()))))
                }
                other => Ok(other.cloned()),
            }
        };
        let mut variables = Map::new();
        let options = "an object of template arguments";
        match parsed(TEMPLATE_ARGUMENTS, options)? {
            None | Some(Value::Null) => {}
            Some(Value::Object(object)) => variables = object,
            Some(other) => {
                let name = self.full_name(TEMPLATE_ARGUMENTS);
                return Err(FieldFault::new(&name, options, describe(&other)));
            }
        }
        let list = |name: &'static str| -> Result<Vec<Value>, FieldFault> {
            let expected = "a list of objects, or JSON text of one";
            match parsed(name, expected)? {
                None | Some(Value::Null) => Ok(Vec::new()),
                Some(Value::Array(items)) if items.iter().all(Value::is_object) => Ok(items),
                Some(other) => {
                    Err(FieldFault::new(&self.full_name(name), expected, describe(&other)))
                }
            }
        };
        for name in TEMPLATE_LISTS {
            // As in `transformers`, no tools are the same as an empty list of them.
            let items = list(name)?;
            if !items.is_empty() {
                variables.insert(name.to_owned(), Value::Array(items));
            }
        }
        // The older name of tools, with less around each.
        let tool = |function| serde_json::json!({"type": "function", "function": function});
        let older: Vec<Value> = list(FUNCTIONS)?.into_iter().map(tool).collect();
        let names = |tools: &[Value]| -> Vec<Value> {
            tools.iter().map(|t| t.get("function").unwrap_or(t)["name"].clone()).collect()
        };
        match variables.get(TEMPLATE_LISTS[0]).and_then(Value::as_array) {
            _ if older.is_empty() => {}
            None => drop(variables.insert(TEMPLATE_LISTS[0].to_owned(), Value::Array(older))),
            Some(tools) if names(tools) == names(&older) => {}
            Some(_) => {
                let expected =
                    "the tools of `tools`, or that field left out: they are not the same";
                let found = describe(&self.get(FUNCTIONS).cloned().unwrap_or_default());
                return Err(FieldFault::new(&self.full_name(FUNCTIONS), expected, found));
            }
        }
        Ok(variables)
    }

    fn missing(&self, field: &'a str, expected: &str) -> FieldFault {
        let found: Vec<&str> = self.object.keys().map(String::as_str).collect();
        let near = crate::suggest::nearest(self.name(field), found.iter().copied());
        let hint = near.first().map_or(String::new(), |near| format!("; is it `{near}`?"));
        let found = format!("no such field among [{}]{hint}", found.join(", "));
        FieldFault::new(&self.full_name(field), expected, found)
    }
}

/// A JSON value in words.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("the boolean {value}"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(value) => format!("the string \"{}\"", crate::error::excerpt(value)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Parses one JSON object with a format, mapping fields as given.
    pub(crate) fn parse(
        format: &dyn Format,
        json: &str,
        names: &[(&str, &str)],
    ) -> Result<Body, FieldFault> {
        let object: Map<String, Value> = serde_json::from_str(json).unwrap();
        let names = names.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        format.parse(&Fields::new(&object, &names))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detected(json: &str, names: &[(&str, &str)]) -> Result<&'static str, String> {
        let object: Map<String, Value> = serde_json::from_str(json).unwrap();
        let names = names.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        detect(&Fields::new(&object, &names)).map(Format::name)
    }

    #[test]
    fn formats_are_told_by_their_fields() {
        assert_eq!(detected(r#"{"messages": []}"#, &[]), Ok("messages"));
        assert_eq!(detected(r#"{"id": 1, "conversations": []}"#, &[]), Ok("sharegpt"));
        assert_eq!(
            detected(r#"{"instruction": "", "output": "", "task_type": 1}"#, &[]),
            Ok("alpaca")
        );
        assert_eq!(detected(r#"{"prompt": "", "completion": ""}"#, &[]), Ok("completion"));
        assert_eq!(detected(r#"{"text": ""}"#, &[]), Ok("text"));
        let mapped = [("instruction", "question"), ("output", "answer")];
        assert_eq!(detected(r#"{"question": "", "answer": ""}"#, &mapped), Ok("alpaca"));
        let message = detected(r#"{"question": "", "answer": ""}"#, &[]).unwrap_err();
        assert!(message.contains("[question, answer]"), "{message}");
        assert!(message.contains("alpaca (instruction, output)"), "{message}");
    }

    #[test]
    fn names_are_unique_and_findable() {
        let names = format_names();
        for name in &names {
            assert_eq!(names.iter().filter(|other| other == &name).count(), 1);
            assert_eq!(find(name).map(Format::name), Some(*name));
            let fields = field_names(name).unwrap();
            assert!(fields.contains(&DOMAIN));
        }
        assert!(find(AUTO).is_none());
        assert!(field_names("nonsense").is_none());
    }
}

//! `natural-instructions`: a task of Super-NaturalInstructions a file,
//! `{Definition, Instances: [{input, output}, …], …}`.
//!
//! A `.json` file is one such task; each instance is a record `{definition, input, output, task}`,
//! where `task` is the file's name, or its folder's if the file is called `train`, `test` or
//! `dev`. In other layouts, records have those fields. The user says the definition and the input;
//! the assistant says the output, the first one where there are several.

use std::path::Path;

use serde_json::{Map, Value};

use super::{FieldFault, Fields, Format, describe};
use crate::input::stem;
use crate::record::{Body, Message};

pub(super) struct NaturalInstructions;

impl Format for NaturalInstructions {
    fn name(&self) -> &'static str {
        "natural-instructions"
    }

    fn required(&self) -> &'static [&'static str] {
        &["definition", "input", "output"]
    }

    fn optional(&self) -> &'static [&'static str] {
        &["task"]
    }

    fn is_document(&self, head: &str) -> bool {
        // Records of a line each would name the same things in lower case.
        ["\"Definition\"", "\"Contributors\"", "\"Instances\""].iter().any(|key| head.contains(key))
    }

    fn rows(
        &self,
        path: &Path,
        document: Map<String, Value>,
    ) -> Result<Vec<Map<String, Value>>, FieldFault> {
        let definition = match document.get("Definition") {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) if parts.iter().all(Value::is_string) => {
                let parts: Vec<&str> = parts.iter().filter_map(Value::as_str).collect();
                parts.join("\n")
            }
            other => return Err(fault("Definition", "a string or a list of them", other)),
        };
        let Some(Value::Array(instances)) = document.get("Instances") else {
            return Err(fault("Instances", "a list of objects", document.get("Instances")));
        };
        let mut task = stem(path);
        if ["train", "test", "dev", "valid", "validation"].contains(&task.as_str()) {
            let folder = path.parent().and_then(Path::file_name);
            task = folder.map_or(task, |folder| folder.to_string_lossy().into_owned());
        }
        let row = |(index, instance): (usize, &Value)| {
            let part = |name: &str| format!("Instances[{index}].{name}");
            let Value::Object(instance) = instance else {
                return Err(fault(&format!("Instances[{index}]"), "an object", Some(instance)));
            };
            let input = match instance.get("input") {
                Some(Value::String(text)) => text.clone(),
                other => return Err(fault(&part("input"), "a string", other)),
            };
            let output = match instance.get("output") {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(list)) => match list.first() {
                    Some(Value::String(text)) => text.clone(),
                    other => return Err(fault(&part("output[0]"), "a string", other)),
                },
                other => return Err(fault(&part("output"), "a string or a list of them", other)),
            };
            Ok(Map::from_iter([
                ("definition".to_owned(), Value::String(definition.clone())),
                ("input".to_owned(), Value::String(input)),
                ("output".to_owned(), Value::String(output)),
                ("task".to_owned(), Value::String(task.clone())),
            ]))
        };
        instances.iter().enumerate().map(row).collect()
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        let (definition, input) = (fields.text("definition")?, fields.text("input")?);
        let user = match input.trim().is_empty() {
            true => definition.to_owned(),
            false => format!("{definition}\n{input}"),
        };
        Ok(Body::Chat(vec![Message::user(user), Message::assistant(fields.text("output")?)]))
    }
}

fn fault(field: &str, expected: &str, found: Option<&Value>) -> FieldFault {
    FieldFault::new(field, expected, found.map_or("nothing".to_owned(), describe))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(json: &str) -> Result<Vec<Map<String, Value>>, FieldFault> {
        let document = serde_json::from_str(json).unwrap();
        NaturalInstructions.rows(Path::new("tasks/task002_x/train.json"), document)
    }

    #[test]
    fn instances_become_records_of_their_task() {
        let found = rows(
            r#"{"Definition": ["Add.", "Say the sum."], "Instances": [
                {"id": "1", "input": "1 1", "output": ["2", "two"]}, {"input": "", "output": "0"}]}"#,
        )
        .unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0]["task"], "task002_x");
        let names = std::collections::BTreeMap::new();
        let bodies: Vec<Body> = found
            .iter()
            .map(|row| NaturalInstructions.parse(&Fields::new(row, &names)).unwrap())
            .collect();
        let chat = |user: &str, answer: &str| {
            Body::Chat(vec![Message::user(user), Message::assistant(answer)])
        };
        assert_eq!(bodies[0], chat("Add.\nSay the sum.\n1 1", "2"));
        assert_eq!(bodies[1], chat("Add.\nSay the sum.", "0"));
    }

    #[test]
    fn faults_name_the_instance() {
        for (json, field) in [
            (r#"{"Instances": []}"#, "Definition"),
            (r#"{"Definition": "d", "Instances": {}}"#, "Instances"),
            (r#"{"Definition": "d", "Instances": [1]}"#, "Instances[0]"),
            (
                r#"{"Definition": "d", "Instances": [{"input": "i", "output": []}]}"#,
                "Instances[0].output[0]",
            ),
            (r#"{"Definition": "d", "Instances": [{"output": "o"}]}"#, "Instances[0].input"),
        ] {
            assert_eq!(rows(json).unwrap_err().field, field);
        }
    }
}

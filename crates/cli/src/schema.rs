//! The JSON schema of recipes, by which editors complete and check them.

use crate::recipe::{ModelSection, NUM_EXPERTS};
use hydralora_data::DataConfig;
use hydralora_peft::INIT_FROM;
use hydralora_peft::methods::METHODS;
use hydralora_train::{OPTIMIZER, OPTIMIZERS, TrainConfig};
use schemars::{JsonSchema, schema_for};
use serde_json::{Map, Value, json};

/// The method that starts from no adapter.
const FULL: &str = "full";

/// The schema of a whole recipe, draft 2020-12.
pub(crate) fn of_recipe() -> Value {
    let mut definitions = Map::new();
    let model = section::<ModelSection>(&mut definitions);
    let mut data = section::<DataConfig>(&mut definitions);
    add_sets(&mut data);
    let mut train = section::<TrainConfig>(&mut definitions);
    add_optimizers(&mut train, &mut definitions);
    let methods: Vec<Value> = METHODS
        .iter()
        .map(|method| {
            let schema = lift(method.schema().to_value(), &mut definitions);
            of_method(method.name(), method.summary(), schema)
        })
        .collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hydralora recipe",
        "description": "What to train, on what, how, and where the result goes.",
        "type": "object",
        "additionalProperties": false,
        "required": ["model", "data", "method"],
        "properties": {
            "model": model,
            "data": data,
            "method": {"description": "The fine-tuning method and its options.", "oneOf": methods},
            "train": train,
            "output": {"type": "string", "description": "The run's folder."},
        },
        "$defs": definitions,
    })
}

fn section<T: JsonSchema>(definitions: &mut Map<String, Value>) -> Value {
    lift(schema_for!(T).to_value(), definitions)
}

/// Moves a schema's own definitions to those of the whole recipe.
fn lift(mut schema: Value, definitions: &mut Map<String, Value>) -> Value {
    if let Some(object) = schema.as_object_mut() {
        object.remove("$schema");
        object.remove("title");
        if let Some(Value::Object(own)) = object.remove("$defs") {
            definitions.extend(own);
        }
    }
    schema
}

/// Lets `valid` be a mapping of evaluation sets too.
fn add_sets(data: &mut Value) {
    let valid = &mut data["properties"]["valid"];
    let list = valid.take();
    let description = list["description"].clone();
    let one = list["items"].clone();
    let files = json!({"anyOf": [{"type": "array", "items": one}, one]});
    *valid = json!({
        "description": description,
        "anyOf": [list, {"type": "object", "additionalProperties": files}],
    });
}

/// Adds the name of the optimizer, and the options of all, to the schema of `train`.
fn add_optimizers(train: &mut Value, definitions: &mut Map<String, Value>) {
    let names: Vec<&str> = OPTIMIZERS.iter().map(|kind| kind.name()).collect();
    let mut options: Map<String, Value> = Map::new();
    for kind in OPTIMIZERS {
        let mut schema = lift(kind.schema().to_value(), definitions);
        let Some(Value::Object(own)) = schema.get_mut("properties").map(Value::take) else {
            continue;
        };
        for (option, mut schema) in own {
            // Optimizers that share an option may have another default.
            let of = schema["description"].as_str().unwrap_or_default().to_owned();
            schema["description"] = json!(format!("{of} ({})", kind.name()));
            match options.get_mut(&option) {
                None => {
                    options.insert(option, json!({"description": of, "anyOf": [schema]}));
                }
                Some(known) => {
                    if let Some(all) = known["anyOf"].as_array_mut() {
                        all.push(schema);
                    }
                }
            }
        }
    }
    let named = json!({
        "enum": names, "default": names[0],
        "description": "The optimizer; its options stand beside it.",
    });
    if let Some(properties) = train["properties"].as_object_mut() {
        properties.insert(OPTIMIZER.to_owned(), named);
        properties.extend(options);
    }
}

/// Puts the method's name before its options.
fn of_method(name: &str, summary: &str, mut schema: Value) -> Value {
    let mut properties = Map::new();
    properties.insert("name".to_owned(), json!({"const": name, "description": summary}));
    if let Some(Value::Object(own)) = schema.get_mut("properties").map(Value::take) {
        properties.extend(own);
    }
    if name != FULL {
        let meaning = "The folder of an adapter, or of its run, that training starts from.";
        properties.insert(
            INIT_FROM.to_owned(),
            json!({"type": ["string", "null"], "description": meaning}),
        );
    }
    if let Some(count) = properties.get_mut(NUM_EXPERTS) {
        let number = count.take();
        let description = number.get("description").cloned();
        *count = json!({"anyOf": [number, {"const": "auto"}], "description": description});
    }
    schema["title"] = json!(name);
    schema["description"] = json!(summary);
    schema["properties"] = Value::Object(properties);
    schema["required"] = json!(["name"]);
    schema
}

/// The description of an option of a section's schema.
pub(crate) fn description<'a>(section: &'a Value, option: &str) -> &'a str {
    section["properties"][option]["description"].as_str().unwrap_or_default()
}

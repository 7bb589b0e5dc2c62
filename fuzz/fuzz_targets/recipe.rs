//! A recipe: its YAML, and the sections as the libraries read them.
#![no_main]

use hydralora_data::DataConfig;
use hydralora_fuzz::repository;
use hydralora_peft::{methods, read_section};
use hydralora_train::TrainConfig;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

fuzz_target!(|text: &str| {
    let Ok(recipe) = serde_saphyr::from_str::<Value>(text) else { return };
    let base = repository("recipes");
    if let Some(data) = section::<DataConfig>(&recipe, "data") {
        data.validate(&base);
    }
    if let Some(train) = section::<TrainConfig>(&recipe, "train") {
        train.faults();
        train.adamw();
    }
    let mut options = recipe["method"].as_object().cloned().unwrap_or_default();
    let name = options.remove("name");
    let name = name.as_ref().and_then(Value::as_str).unwrap_or_default();
    if let Ok(method) = methods::find(name)
        && let Ok(options) = method.read_recipe(&options)
    {
        let written = options.to_recipe();
        assert!(
            method.read_recipe(&written).is_ok(),
            "what {name} writes is not read: {written:?}"
        );
        options.to_peft();
        options.targets();
    }
    let _ = serde_saphyr::to_string(&recipe);
});

fn section<T: DeserializeOwned + Default + Serialize>(recipe: &Value, name: &str) -> Option<T> {
    let Ok(Value::Object(known)) = serde_json::to_value(T::default()) else { return None };
    let found: &Map<String, Value> = recipe[name].as_object()?;
    read_section(name, found, &known).ok()
}

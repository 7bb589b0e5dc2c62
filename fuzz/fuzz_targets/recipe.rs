//! A recipe: its YAML, and the sections as the libraries read them.
#![no_main]

use hydralora_data::DataConfig;
use hydralora_fuzz::repository;
use hydralora_peft::{methods, read_section};
use hydralora_train::{Chosen, TrainConfig};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

fuzz_target!(|text: &str| {
    let Ok(recipe) = serde_saphyr::from_str::<Value>(text) else { return };
    let base = repository("recipes");
    if let Some(data) = recipe["data"].as_object().and_then(section::<DataConfig>) {
        data.validate(&base);
    }
    let mut train = recipe["train"].as_object().cloned().unwrap_or_default();
    if let Ok(optimizer) = Chosen::take(&mut train) {
        let written = serde_json::to_value(&optimizer).unwrap_or_default();
        let again = Chosen::take(&mut written.as_object().cloned().unwrap_or_default());
        assert!(again.is_ok_and(|again| again == optimizer), "{written} is not read");
    }
    if let Some(train) = section::<TrainConfig>(&train) {
        train.faults();
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

fn section<T: DeserializeOwned + Default + Serialize>(found: &Map<String, Value>) -> Option<T> {
    let Ok(Value::Object(known)) = serde_json::to_value(T::default()) else { return None };
    read_section("section", found, &known).ok()
}

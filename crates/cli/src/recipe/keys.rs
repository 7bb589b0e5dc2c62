//! The options that the sections of a recipe have.

use super::ModelSection;
use hydralora_data::{DataConfig, SourceConfig};
use hydralora_peft::{INIT_FROM, methods};
use hydralora_train::TrainConfig;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// Options of the `method` section that are not the method's own.
pub(super) const OF_EVERY_METHOD: [&str; 2] = ["name", INIT_FROM];

/// The fields that `T` is read from, those among them that are written only where they are used.
fn of<T: DeserializeOwned>() -> Map<String, Value> {
    // Its parser says what it would have taken: "unknown field `?`, expected one of `a`, `b`".
    let said = serde_json::from_value::<T>(json!({"?": null})).err().map(|error| error.to_string());
    let said = said.unwrap_or_default();
    said.split('`').skip(3).step_by(2).map(|name| (name.to_owned(), Value::Null)).collect()
}

/// Those of `model`.
pub(super) fn of_model() -> Map<String, Value> {
    of::<ModelSection>()
}

/// Those of `data`.
pub(super) fn of_data() -> Map<String, Value> {
    of::<DataConfig>()
}

/// Those of a source of data.
pub(super) fn of_source() -> Map<String, Value> {
    let mut known = of::<SourceConfig>();
    known.entry("columns").or_insert(Value::Null);
    known
}

/// Those of `train`.
pub(super) fn of_train() -> Map<String, Value> {
    of::<TrainConfig>()
}

/// Those of `method`, of all methods together.
pub(super) fn of_methods() -> Map<String, Value> {
    let own = methods::METHODS.iter().flat_map(|method| method.defaults());
    own.chain(OF_EVERY_METHOD.map(|key| (key.to_owned(), Value::Null))).collect()
}

/// The options of every section.
pub(super) fn sections() -> [(&'static str, Vec<String>); 4] {
    [("model", of_model()), ("data", of_data()), ("train", of_train()), ("method", of_methods())]
        .map(|(name, known)| (name, known.into_iter().map(|(key, _)| key).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_found() {
        let written =
            |value: Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
        for (known, written) in [
            (of_data(), written(json!(DataConfig::default()))),
            (of_source(), written(json!(SourceConfig::new("")))),
            (of_train(), written(json!(TrainConfig::default()))),
            (of_model(), written(json!(ModelSection::default()))),
        ] {
            assert!(written.iter().all(|key| known.contains_key(key)), "{known:?} {written:?}");
            assert!(!known.contains_key("?"));
        }
        for rare in ["thinking", "template_arguments"] {
            assert!(of_data().contains_key(rare));
        }
        assert!(!of_source().contains_key("located"));
    }
}

//! The options that the sections of a recipe have.

use super::ModelSection;
use hydralora_data::{DataConfig, SourceConfig};
use hydralora_peft::{INIT_FROM, methods};
use hydralora_train::{OPTIMIZER, OPTIMIZERS, TrainConfig};
use serde::de::value::Error;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};

/// Options of the `method` section that are not the method's own.
pub(super) const OF_EVERY_METHOD: [&str; 2] = ["name", INIT_FROM];

/// Asks a type for the names of its fields and gives it nothing.
struct Names<'a>(&'a mut Map<String, Value>);

impl<'de> Deserializer<'de> for Names<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("only names are asked for"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.0.extend(fields.iter().map(|&name| (name.to_owned(), Value::Null)));
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The fields that `T` is read from, those among them that are written only where they are used.
fn of<T: DeserializeOwned>() -> Map<String, Value> {
    let mut known = Map::new();
    // Nothing can come of it but an error.
    let _ = T::deserialize(Names(&mut known));
    known
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

/// Those of `train`, but for the optimizer and its options.
pub(super) fn of_train_alone() -> Map<String, Value> {
    of::<TrainConfig>()
}

/// Those of `train`, the options of all optimizers among them.
pub(super) fn of_train() -> Map<String, Value> {
    let mut known = of_train_alone();
    known.insert(OPTIMIZER.to_owned(), Value::Null);
    known.extend(OPTIMIZERS.iter().flat_map(|optimizer| optimizer.defaults()));
    known
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
    use serde_json::json;

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
        for rare in ["thinking", "template_arguments", "turns", "special_tokens"] {
            assert!(of_data().contains_key(rare));
        }
        assert!(!of_source().contains_key("located"));
    }
}

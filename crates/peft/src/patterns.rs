//! Options of some layers by patterns over their names, as PEFT's `rank_pattern` and `alpha_pattern`.
//!
//! A key is a regular expression for the end of a layer's name, from a dot on or from its start:
//! `q_proj`, `self_attn\.[qk]_proj`, `^model\.layers\.0\.mlp\.up_proj`. The first that matches counts.

use fancy_regex::Regex;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

/// Values by patterns, in the order they are given.
#[derive(Clone, Debug)]
pub(crate) struct Patterns<T>(Vec<Entry<T>>);

#[derive(Clone, Debug)]
struct Entry<T> {
    key: String,
    regex: Regex,
    value: T,
}

impl<T> Patterns<T> {
    /// Gives the value of the first key that matches `name`.
    pub(crate) fn find(&self, name: &str) -> Option<&T> {
        self.0.iter().find(|entry| entry.matches(name)).map(|entry| &entry.value)
    }

    /// Lists keys and values.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.iter().map(|entry| (entry.key.as_str(), &entry.value))
    }

    /// Gives the first key that matches none of `names`.
    pub(crate) fn matching_nothing(&self, names: &[String]) -> Option<&str> {
        let idle = |entry: &&Entry<T>| !names.iter().any(|name| entry.matches(name));
        self.0.iter().find(idle).map(|entry| entry.key.as_str())
    }
}

impl<T> Entry<T> {
    fn matches(&self, name: &str) -> bool {
        self.regex.is_match(name).unwrap_or(false)
    }
}

impl<T> Default for Patterns<T> {
    /// No pattern.
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: PartialEq> PartialEq for Patterns<T> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<T: JsonSchema> JsonSchema for Patterns<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("Patterns_of_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        <BTreeMap<String, T>>::json_schema(generator)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader(PhantomData))
    }
}

/// Reads a map in its order.
struct Reader<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Reader<T> {
    type Value = Patterns<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("values by patterns of layers' names, as {q_proj: 16}")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Patterns::default())
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut entries = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, T>()? {
            let regex = Regex::new(&format!(r"^(.*\.)?({key})$"))
                .map_err(|why| M::Error::custom(format!("`{key}` is no pattern: {why}")))?;
            entries.push(Entry { key, regex, value });
        }
        Ok(Patterns(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: serde_json::Value) -> Patterns<usize> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn keys_match_as_peft_matches_them() {
        let found = |key: &str, name: &str| read(json!({key: 1})).find(name).is_some();
        let q = "model.layers.0.self_attn.q_proj";
        for key in ["q_proj", "self_attn.q_proj", r"self_attn\..*", "[qv]_proj", "k_proj|q_proj", q]
        {
            assert!(found(key, q), "{key}");
        }
        assert!(found(r"^model\.layers\.0\..*", q) && found("lm_head", "lm_head"));
        for key in ["proj", "_proj", "q_proj.x", "q", "layers.0", "^self_attn.q_proj"] {
            assert!(!found(key, q), "{key}");
        }
    }

    #[test]
    fn the_first_match_counts_and_the_order_stays() {
        let text = r#"{"z.*": 3, "q_proj": 4, ".*": 5}"#;
        let patterns: Patterns<usize> = serde_json::from_str(text).unwrap();
        assert_eq!(patterns.find("model.layers.1.q_proj"), Some(&4));
        assert_eq!(patterns.find("model.layers.1.k_proj"), Some(&5));
        assert_eq!(
            serde_json::to_string(&patterns).unwrap(),
            text.replace(": ", ":").replace(", ", ",")
        );
        assert_eq!(read(json!(null)), Patterns::default());
    }

    #[test]
    fn what_is_no_pattern_is_named() {
        let error =
            |value| serde_json::from_value::<Patterns<usize>>(value).unwrap_err().to_string();
        assert!(error(json!({"q_(proj": 4})).contains("`q_(proj` is no pattern"));
        assert!(error(json!([8])).contains("{q_proj: 16}"));
        assert!(error(json!({"q_proj": "high"})).contains("high"));
    }
}

//! The keys that a section of a recipe may have.

use serde::de::value::Error;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;

/// Asks a type for the names of its fields and gives it nothing.
struct Names<'a>(&'a mut Vec<&'static str>);

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
        self.0.extend(fields);
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The names of the fields of a structure, those that it does not write at their defaults too.
pub(crate) fn of<T: DeserializeOwned>() -> Vec<&'static str> {
    let mut names = Vec::new();
    // Nothing can come of it but an error.
    let _ = T::deserialize(Names(&mut names));
    names
}

#[cfg(test)]
mod tests {
    #[test]
    fn keys_that_are_left_out_at_their_defaults_are_known() {
        let names = super::of::<hydralora_data::DataConfig>();
        for name in ["train", "thinking", "template_arguments", "turns", "special_tokens"] {
            assert!(names.contains(&name), "{name}: {names:?}");
        }
    }
}

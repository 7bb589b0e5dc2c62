//! How much longer a tokenizer's replacements can make a text.
//!
//! A file can ask for `a` to become `aa` forty times over, and then a word asks for a terabyte. Each
//! replacement multiplies the length at most by what it puts in for what it takes out; those that
//! models bring turn a space into `▁` and back.

use crate::error::{Error, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use serde_json::Value;
use std::path::Path;

/// The largest factor that is accepted.
const MOST: f64 = 256.0;

/// Refuses a tokenizer whose normalizer or decoder could make texts too long.
///
/// # Errors
/// Naming the part and the factor.
pub(super) fn check(path: &Path, tokenizer: &tokenizers::Tokenizer) -> Result<()> {
    let normalizer = serde_json::to_value(tokenizer.get_normalizer());
    let decoder = serde_json::to_value(tokenizer.get_decoder());
    for (name, part) in [("normalizer", normalizer), ("decoder", decoder)] {
        let found = part.map_or(1.0, |part| factor(&part));
        if found > MOST {
            let message = format!(
                "its {name} could make a text {found:.0} times as long; expected replacements that \
                 make it at most {MOST} times as long"
            );
            return Err(Error::tokenizer(path, message));
        }
    }
    Ok(())
}

/// By how much a part and those in it multiply the length of a text, at most.
fn factor(part: &Value) -> f64 {
    match part {
        Value::Array(parts) => parts.iter().map(factor).product(),
        Value::Object(object) if object.get("type") == Some(&"Replace".into()) => {
            let text = |value: &Value| value.as_str().map_or(0, str::len) as f64;
            // A pattern that is no plain text may match a single byte; an empty one lies between all.
            let none = &Value::Null;
            let pattern = object.get("pattern").unwrap_or(none);
            let taken = text(&pattern["String"]).max(1.0);
            let put = text(object.get("content").unwrap_or(none));
            let between = pattern["String"].as_str() == Some("") || !pattern["Regex"].is_null();
            (put / taken + if between { 1.0 } else { 0.0 }).max(1.0)
        }
        // Put before every text, the shortest of which has one byte.
        Value::Object(object) if object.get("type") == Some(&"Prepend".into()) => {
            1.0 + object.get("prepend").and_then(Value::as_str).map_or(0, str::len) as f64
        }
        Value::Object(object) if object.get("type") == Some(&"Precompiled".into()) => {
            let map = object.get("precompiled_charsmap").and_then(Value::as_str);
            map.map_or(1.0, |map| longest_replacement(map).max(1) as f64)
        }
        Value::Object(object) => object.values().map(factor).product(),
        _ => 1.0,
    }
}

/// Bytes of the longest text that SentencePiece's map of characters puts in for one. The map, in base 64, is the
/// length of a trie in bytes as four bytes, the trie, and texts that end in a byte of zero.
fn longest_replacement(map: &str) -> usize {
    let bytes = BASE64.decode(map).unwrap_or_default();
    let trie = bytes.first_chunk::<4>().map_or(0, |length| u32::from_le_bytes(*length) as usize);
    let texts = bytes.get(4_usize.saturating_add(trie)..).unwrap_or_default();
    texts.split(|&byte| byte == 0).map(<[u8]>::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn factors_multiply() {
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let space = replace(json!({"String": " "}), "▁");
        let back = replace(json!({"String": "▁"}), " ");
        assert_eq!(factor(&Value::Null), 1.0);
        assert_eq!(factor(&json!({"type": "NFC"})), 1.0);
        assert_eq!(factor(&json!({"type": "Sequence", "normalizers": [space, back]})), 3.0);
        let double = replace(json!({"String": "a"}), "aa");
        let many = vec![double; 40];
        assert_eq!(factor(&json!({"type": "Sequence", "normalizers": many})), 2_f64.powi(40));
        assert_eq!(factor(&replace(json!({"Regex": "a*"}), &"b".repeat(1000))), 1001.0);
        assert_eq!(factor(&replace(json!({"String": ""}), "b")), 2.0);
        assert_eq!(factor(&json!({"type": "Prepend", "prepend": "▁"})), 4.0);
        let map = [&4_u32.to_le_bytes()[..], &[1, 2, 3, 4], b"ab\0abcdefg\0c\0"].concat();
        let map = json!({"type": "Precompiled", "precompiled_charsmap": BASE64.encode(map)});
        assert_eq!(factor(&map), 7.0);
    }
}

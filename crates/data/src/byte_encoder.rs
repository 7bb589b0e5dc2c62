//! A tokenizer of bytes: ids 0–255 are bytes, ids from 256 the special tokens in the order given.

use std::ops::Range;

use crate::encode::TextEncoder;

/// A [`TextEncoder`] whose tokens are bytes; for tests, examples and byte-level models.
#[derive(Debug, Clone, Default)]
pub struct ByteEncoder {
    special: Vec<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
}

impl ByteEncoder {
    /// An encoder that knows these special tokens. Where two match at the same place the longer
    /// one counts; empty ones never match.
    pub fn new(special: &[&str]) -> Self {
        Self { special: special.iter().map(|&token| token.to_owned()).collect(), ..Self::default() }
    }

    /// Makes `token` the start of text, adding it to the special tokens if it is new.
    #[must_use]
    pub fn with_bos(mut self, token: &str, add_bos: bool) -> Self {
        self.bos = Some(self.special_id(token));
        self.add_bos = add_bos;
        self
    }

    /// Makes `token` the end of text, adding it to the special tokens if it is new.
    #[must_use]
    pub fn with_eos(mut self, token: &str) -> Self {
        self.eos = Some(self.special_id(token));
        self
    }

    /// The text of token ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &token in tokens {
            match u8::try_from(token) {
                Ok(byte) => bytes.push(byte),
                Err(_) => bytes.extend(self.special_text(token).unwrap_or("").bytes()),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn special_id(&mut self, token: &str) -> u32 {
        let index = self.special.iter().position(|known| known == token).unwrap_or_else(|| {
            self.special.push(token.to_owned());
            self.special.len() - 1
        });
        256 + index as u32
    }

    fn special_text(&self, id: u32) -> Option<&str> {
        self.special.get(id.checked_sub(256)? as usize).map(String::as_str)
    }
}

impl TextEncoder for ByteEncoder {
    fn encode(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, String> {
        let bytes = text.as_bytes();
        let mut tokens = Vec::with_capacity(bytes.len());
        let mut at = 0;
        while at < bytes.len() {
            let special = (256u32..)
                .zip(&self.special)
                .filter(|(_, token)| !token.is_empty() && bytes[at..].starts_with(token.as_bytes()))
                .max_by_key(|(_, token)| token.len());
            let (id, length) = match special {
                Some((id, token)) => (id, token.len()),
                None => (u32::from(bytes[at]), 1),
            };
            tokens.push((id, at..at + length));
            at += length;
        }
        Ok(tokens)
    }

    fn bos_token(&self) -> Option<(u32, &str)> {
        self.bos.and_then(|id| Some((id, self.special_text(id)?)))
    }

    fn eos_token(&self) -> Option<(u32, &str)> {
        self.eos.and_then(|id| Some((id, self.special_text(id)?)))
    }

    fn add_bos(&self) -> bool {
        self.add_bos
    }

    fn special_in(&self, text: &str) -> Vec<Range<usize>> {
        let found = self.encode(text).unwrap_or_default().into_iter();
        found.filter(|(id, _)| *id >= 256).map(|(_, range)| range).collect()
    }

    fn is_special(&self, id: u32) -> bool {
        id >= 256
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_specials_round_trip_with_their_ranges() {
        let encoder = ByteEncoder::new(&["<a>", "<a><b>"]).with_eos("</s>").with_bos("<s>", true);
        let text = "é<a><b><a></s>x";
        let tokens = encoder.encode(text).unwrap();
        let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [0xc3, 0xa9, 257, 256, 258, u32::from(b'x')]);
        assert_eq!(tokens[2].1, 2..8);
        assert_eq!(encoder.decode(&ids), text);
        assert_eq!(encoder.eos_token(), Some((258, "</s>")));
        assert_eq!(encoder.bos_token(), Some((259, "<s>")));
        assert!(encoder.add_bos());
    }
}

//! Tokens as bytes and as texts, one by one.

use hydralora_model::Tokenizer;
use serde_json::Value;

/// The bytes of every token.
pub(crate) struct Pieces {
    bytes: Vec<Vec<u8>>,
    /// Whether a token stands for itself, as those that end a turn do.
    special: Vec<bool>,
}

/// What marks a special token's bytes, as the library of grammars wants them.
const SPECIAL: u8 = toktrie::TokTrie::SPECIAL_TOKEN_MARKER;

impl Pieces {
    /// Reads them off a tokenizer of a model with `vocabulary` tokens.
    pub(crate) fn of(tokenizer: &Tokenizer, vocabulary: usize) -> Self {
        let file = tokenizer.files().ok().and_then(|files| {
            let (_, bytes) = files.into_iter().find(|(name, _)| *name == "tokenizer.json")?;
            serde_json::from_slice::<Value>(&bytes).ok()
        });
        let stored = file.and_then(|file| llguidance::token_bytes_from_tokenizer_json(&file).ok());
        let (mut bytes, mut special) = (Vec::new(), Vec::new());
        for id in 0..vocabulary as u32 {
            let own = stored.as_ref().and_then(|stored| stored.get(id as usize)).cloned();
            let own = own
                .unwrap_or_else(|| tokenizer.decode(&[id], false).unwrap_or_default().into_bytes());
            special.push(own.first() == Some(&SPECIAL));
            bytes.push(match own.split_first() {
                Some((&SPECIAL, name)) => name.to_vec(),
                _ => own,
            });
        }
        Self { bytes, special }
    }

    /// The bytes of a token.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// Its text; what is no whole character is written as the replacement character.
    pub(crate) fn text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.bytes(id)).into_owned()
    }

    /// The words of a trie of tokens, special ones marked.
    pub(crate) fn words(&self) -> Vec<Vec<u8>> {
        let word = |(bytes, special): (&Vec<u8>, &bool)| match special {
            true => [&[SPECIAL][..], bytes].concat(),
            false => bytes.clone(),
        };
        self.bytes.iter().zip(&self.special).map(word).collect()
    }
}

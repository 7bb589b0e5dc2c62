//! Tokens that are added to a vocabulary.

use super::Tokenizer;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// A token that was added to a model's vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
    /// Whether it is a mark, which decoded texts leave out, and no text.
    #[serde(default)]
    pub special: bool,
}

impl Tokenizer {
    /// Adds tokens of these texts, each a mark or text, behind all others, and gives them with their
    /// ids. They are found wherever a text has them letter by letter.
    ///
    /// # Errors
    /// If a text is blank or a token already, or the ids of the vocabulary have gaps.
    pub fn add(&mut self, tokens: &[(String, bool)]) -> Result<Vec<AddedToken>> {
        let mut inner = self.inner.clone();
        for (text, special) in tokens {
            let fault = |message: &str| Error::tokenizer(&self.path, format!("{text:?} {message}"));
            if text.trim().is_empty() {
                return Err(fault("is blank; expected a text for the new token"));
            }
            if inner.token_to_id(text).is_some() {
                return Err(fault("is a token already"));
            }
            let token = tokenizers::AddedToken::from(text.clone(), *special).normalized(false);
            inner.add_tokens([token]).map_err(|error| self.fault(&error))?;
        }
        let added: Vec<AddedToken> = tokens
            .iter()
            .filter_map(|(text, special)| {
                let id = inner.token_to_id(text)?;
                Some(AddedToken { id, content: text.clone(), special: *special })
            })
            .collect();
        let is_taken = |token: &&AddedToken| self.inner.id_to_token(token.id).is_some();
        if let Some(AddedToken { id, .. }) = added.iter().find(is_taken) {
            let message =
                format!("its ids have gaps, so a new token would get the id {id}, which is taken");
            return Err(Error::tokenizer(&self.path, message));
        }
        self.vocab_size = inner.get_vocab_size(true);
        self.inner = inner;
        Ok(added)
    }
}

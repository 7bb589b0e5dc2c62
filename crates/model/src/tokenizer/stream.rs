//! Text of a growing run of tokens, handed out only where it is whole.

use super::Tokenizer;
use crate::error::Result;

/// Decodes tokens one at a time. A character spread over several tokens comes out with the last.
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Tokens before this one are only context for the decoder.
    context: usize,
    /// Tokens before this one have been handed out.
    done: usize,
}

impl<'a> TokenStream<'a> {
    /// A stream at the start of a text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), context: 0, done: 0 }
    }

    /// Adds a token; gives the text that is now certain, possibly none.
    ///
    /// # Errors
    /// If the id cannot be decoded.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        if text.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        self.context = self.done;
        self.done = self.ids.len();
        Ok(text)
    }

    /// What is left when no more tokens come.
    ///
    /// # Errors
    /// If the ids cannot be decoded.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[self.context..self.done], true)?;
        let all = self.tokenizer.decode(&self.ids[self.context..], true)?;
        Ok(all.strip_prefix(before.as_str()).unwrap_or(&all).to_owned())
    }
}

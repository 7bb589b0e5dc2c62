//! Text of a growing run of tokens, handed out only where it is whole.

use super::Tokenizer;
use crate::error::Result;

/// Tokens before a text that decide how it begins, at least.
const CONTEXT: usize = 8;
/// Stands for bytes that are no character.
const BROKEN: char = '\u{FFFD}';

/// Decodes tokens one at a time. A character spread over several tokens comes out with the last.
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    text: TokenText,
}

impl<'a> TokenStream<'a> {
    /// A stream at the start of a text, which leaves special tokens out.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, text: TokenText::new() }
    }

    /// A stream at the start of a text, which writes special tokens out.
    pub fn with_special(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, text: TokenText { skip_special: false, ..TokenText::new() } }
    }

    /// Adds a token; gives the text that is now certain, possibly none.
    ///
    /// # Errors
    /// If the id cannot be decoded.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.text.push(self.tokenizer, id)
    }

    /// What is left when no more tokens come.
    ///
    /// # Errors
    /// If the ids cannot be decoded.
    pub fn finish(self) -> Result<String> {
        self.text.finish(self.tokenizer)
    }
}

/// Where a [`TokenStream`] stands, for those who keep it beside the tokenizer, not borrowed from it.
#[derive(Clone, Debug)]
pub struct TokenText {
    skip_special: bool,
    /// Tokens the decoder sees: some already handed out, for context, and those still pending.
    ids: Vec<u32>,
    /// How many of them have been handed out.
    done: usize,
}

impl Default for TokenText {
    fn default() -> Self {
        Self::new()
    }
}

impl TokenText {
    /// Stands at the start of a text, whose special tokens are left out.
    pub fn new() -> Self {
        Self { skip_special: true, ids: Vec::new(), done: 0 }
    }

    /// Stands behind `before`, which is not handed out: some tokenizers leave out the space that a text
    /// begins with, and what follows another one begins none.
    pub fn after(tokenizer: &Tokenizer, before: &[u32]) -> Self {
        let mut length = CONTEXT.min(before.len());
        let text = Self::new();
        loop {
            let ids = before[before.len() - length..].to_vec();
            // Tokens without a text, as those that end a turn, say nothing of what is before them, and
            // a run of bytes that begins inside a character is no text at all.
            let decoded = tokenizer.decode(&ids, text.skip_special).unwrap_or_default();
            let is_context = !decoded.is_empty() && !decoded.contains(BROKEN);
            if is_context || length == before.len() {
                return Self { done: ids.len(), ids, ..text };
            }
            length = (2 * length).min(before.len());
        }
    }

    /// Adds a token; gives the text that is now certain, possibly none. The tokenizer is the same in
    /// all calls.
    ///
    /// # Errors
    /// If the id cannot be decoded.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        self.ids.push(id);
        let (text, before_is_whole) = self.pending(tokenizer)?;
        // The replacement character stands for bytes that more tokens may complete. Context moves
        // on only past text: a decoder that trims the start of a text must not see one here.
        if text.is_empty() || text.ends_with(BROKEN) {
            return Ok(String::new());
        }
        // Where what came before ended inside a character, its bytes are still needed.
        if before_is_whole {
            self.ids.drain(..self.done);
        }
        self.done = self.ids.len();
        Ok(text)
    }

    /// What is left when no more tokens come.
    ///
    /// # Errors
    /// If the ids cannot be decoded.
    pub fn finish(self, tokenizer: &Tokenizer) -> Result<String> {
        Ok(self.pending(tokenizer)?.0)
    }

    /// The text after what was handed out, and whether that ended with a whole character.
    fn pending(&self, tokenizer: &Tokenizer) -> Result<(String, bool)> {
        let before = tokenizer.decode(&self.ids[..self.done], self.skip_special)?;
        let all = tokenizer.decode(&self.ids, self.skip_special)?;
        // The last character of what came before may be whole only now.
        let pairs = before.chars().zip(all.chars());
        let common: usize = pairs.take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        Ok((all[common..].to_owned(), !before.ends_with(BROKEN)))
    }
}

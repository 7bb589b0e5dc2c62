//! The model's tokenizer as the data crate wants it.

use hydralora_data::TextEncoder;
use hydralora_model::Tokenizer;
use std::ops::Range;

/// Token ids of a text that starts a sequence, as training records are encoded: with one start-of-text
/// token where the model or the text wants it.
///
/// # Errors
/// If the text cannot be encoded.
pub fn start_ids(tokenizer: &Tokenizer, text: &str) -> crate::Result<Vec<u32>> {
    let mut ids = tokenizer.encode(text)?;
    if let Some((bos, _)) = tokenizer.bos() {
        let leading = ids.iter().take_while(|id| **id == bos).count();
        if leading > 0 || tokenizer.add_bos() {
            ids.splice(..leading, [bos]);
        }
    }
    Ok(ids)
}

/// A tokenizer that reads training records.
pub struct ModelEncoder<'a>(pub &'a Tokenizer);

impl TextEncoder for ModelEncoder<'_> {
    fn encode(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>, String> {
        self.0.encode_with_offsets(text).map_err(|error| error.to_string())
    }

    fn bos_token(&self) -> Option<(u32, &str)> {
        self.0.bos()
    }

    fn eos_token(&self) -> Option<(u32, &str)> {
        self.0.eos()
    }

    fn add_bos(&self) -> bool {
        self.0.add_bos()
    }

    fn special_in(&self, text: &str) -> Vec<Range<usize>> {
        self.0.special_in(text)
    }

    fn is_special(&self, id: u32) -> bool {
        self.0.is_added(id)
    }
}

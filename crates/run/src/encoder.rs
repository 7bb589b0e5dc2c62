//! The model's tokenizer as the data crate wants it.

use hydralora_data::TextEncoder;
use hydralora_model::Tokenizer;
use std::ops::Range;

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
}

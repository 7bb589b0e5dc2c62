//! Text from a prompt, one token at a time, with the keys and values of earlier tokens kept.

use crate::Result;
use crate::sample::{Sampler, Sampling};
use hydralora_model::adapter::{Adapter, Pass};
use hydralora_model::{Cache, Decoder, Packed, TokenStream, Tokenizer};

/// A model ready to write.
#[derive(Clone, Copy)]
pub struct Generator<'a> {
    /// The frozen base.
    pub decoder: &'a Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// What is added to it.
    pub adapter: &'a dyn Adapter,
    /// Tokens at which a text ends, as [`ends::end_ids`](crate::ends::end_ids) says.
    pub end_ids: &'a [u32],
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// The limit on new tokens, or the model's context, was reached.
    Length,
    /// Whoever watched it ended it.
    Cancelled,
}

/// A written text.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The text, without the token that ended it.
    pub text: String,
    /// Its tokens, likewise.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

impl Generator<'_> {
    /// Continues `prompt`, whose tokens come after those in `cache`, by at most `max_new_tokens`.
    /// `watch` sees each piece of text as it becomes certain and says whether to go on. The cache
    /// then holds everything but the token that ended the text.
    ///
    /// # Errors
    /// If the prompt is empty or does not fit the context.
    pub fn generate(
        &self,
        prompt: &[u32],
        cache: &mut Cache,
        sampling: Sampling,
        max_new_tokens: usize,
        watch: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generation> {
        let mut sampler = Sampler::new(sampling);
        let mut stream = TokenStream::new(self.tokenizer);
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let context = self.decoder.config().max_position_embeddings;
        let mut next = self.feed(prompt, cache, &mut sampler)?;
        let finish = loop {
            if tokens.len() == max_new_tokens {
                break Finish::Length;
            }
            if self.end_ids.contains(&next) {
                break Finish::Stop;
            }
            tokens.push(next);
            let piece = stream.push(next)?;
            text += &piece;
            if !piece.is_empty() && !watch(&piece) {
                break Finish::Cancelled;
            }
            if cache.len() == context {
                break Finish::Length;
            }
            next = self.feed(&[next], cache, &mut sampler)?;
        };
        let rest = stream.finish()?;
        if !rest.is_empty() {
            watch(&rest);
            text += &rest;
        }
        Ok(Generation { text, tokens, finish })
    }

    fn feed(&self, tokens: &[u32], cache: &mut Cache, sampler: &mut Sampler) -> Result<u32> {
        let offsets = [0, tokens.len()];
        let batch = Packed { tokens, offsets: &offsets };
        let caches = std::slice::from_mut(cache);
        let hidden = self.decoder.extend(batch, caches, self.adapter, &Pass::inference())?;
        Ok(sampler.next(&self.decoder.logits_with(self.adapter, &hidden, &[tokens.len() - 1])))
    }
}

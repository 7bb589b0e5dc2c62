//! Text from a prompt, one token at a time, with the keys and values of earlier tokens kept.

use crate::Result;
use crate::engine::Finish;
use crate::sample::{Sampler, Sampling};
use crate::stops::Held;
use hydralora_model::adapter::{Adapter, Pass};
use hydralora_model::{Cache, Decoder, Packed, TokenStream, Tokenizer};
use std::time::Instant;

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

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Token ids to continue.
    pub prompt: &'a [u32],
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Most tokens to write.
    pub max_new_tokens: usize,
    /// Texts at which it ends; they are not part of it.
    pub stops: &'a [String],
}

/// A written text.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The text, without what ended it.
    pub text: String,
    /// Its tokens, without the one that ended it; those of a text to stop at are among them.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Time until the first token was known, in seconds.
    pub prompt_seconds: f64,
    /// Time for the others, in seconds.
    pub decode_seconds: f64,
}

impl Generator<'_> {
    /// Continues a prompt, of which `cache` holds the first [`Cache::len`] tokens already. `watch`
    /// sees each piece of text as it becomes certain and says whether to go on. The cache then holds
    /// everything but the token that ended the text.
    ///
    /// # Errors
    /// If nothing of the prompt is left to read or it does not fit the context.
    pub fn generate(
        &self,
        request: Request<'_>,
        cache: &mut Cache,
        watch: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generation> {
        let Request { prompt, sampling, max_new_tokens, stops } = request;
        let mut sampler = Sampler::new(sampling);
        sampler.read(prompt);
        let mut stream = TokenStream::new(self.tokenizer);
        let mut held = Held::new(stops);
        let (mut text, mut tokens) = (String::new(), Vec::new());
        let context = self.decoder.config().max_position_embeddings;
        let started = Instant::now();
        let mut next = self.feed(&prompt[cache.len()..], cache, &mut sampler)?;
        let prompt_seconds = started.elapsed().as_secs_f64();
        let mut finish = loop {
            if tokens.len() == max_new_tokens {
                break Finish::Length;
            }
            if self.end_ids.contains(&next) {
                break Finish::Stop;
            }
            tokens.push(next);
            let (piece, stopped) = held.push(&stream.push(next)?);
            text += &piece;
            let cancelled = !piece.is_empty() && !watch(&piece);
            if stopped {
                break Finish::Stop;
            }
            if cancelled {
                break Finish::Cancelled;
            }
            if cache.len() == context {
                break Finish::Length;
            }
            next = self.feed(&[next], cache, &mut sampler)?;
        };
        if !held.stopped() {
            let (piece, stopped) = held.push(&stream.finish()?);
            let rest = piece + &held.take_rest();
            if stopped {
                finish = Finish::Stop;
            }
            if !rest.is_empty() {
                watch(&rest);
                text += &rest;
            }
        }
        let decode_seconds = started.elapsed().as_secs_f64() - prompt_seconds;
        Ok(Generation { text, tokens, finish, prompt_seconds, decode_seconds })
    }

    fn feed(&self, tokens: &[u32], cache: &mut Cache, sampler: &mut Sampler) -> Result<u32> {
        let offsets = [0, tokens.len()];
        let batch = Packed { tokens, offsets: &offsets };
        let caches = std::slice::from_mut(cache);
        let hidden = self.decoder.extend(batch, caches, self.adapter, &Pass::inference())?;
        Ok(sampler.next(&self.decoder.logits_with(self.adapter, &hidden, &[tokens.len() - 1])))
    }
}

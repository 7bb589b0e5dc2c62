//! One text after the other, from an engine with one request at a time.

use crate::engine::{self, Engine, EngineOptions, Error, Event, Finish, ServedAdapter};
use crate::sample::Sampling;
use hydralora_model::adapter::Adapter;
use hydralora_model::{Decoder, Tokenizer};
use std::sync::Arc;
use std::time::Instant;

/// A model ready to write.
pub struct Generator<'a> {
    engine: Engine<'a>,
    adapter: Arc<ServedAdapter<'a>>,
    end_ids: Arc<[u32]>,
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
    /// Whether it goes on with the prompt's text, or is one of its own, as an answer is.
    pub continues: bool,
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

impl<'a> Generator<'a> {
    /// Makes one of a base, its tokenizer, what is added to it, and the tokens at which a text ends, as
    /// [`ends::end_ids`](crate::ends::end_ids) says. With `keeps_beginnings` a text that begins like an
    /// earlier one is not read again as far as they agree.
    pub fn new(
        decoder: &'a Decoder,
        tokenizer: &'a Tokenizer,
        adapter: &'a dyn Adapter,
        end_ids: &[u32],
        keeps_beginnings: bool,
    ) -> Self {
        let context = decoder.config().context_length();
        // A text of the whole context, and as much again that is kept.
        let mut cache = decoder.new_cache();
        cache.remember(adapter.remembers());
        let cache_bytes = 2 * cache.most_bytes(context, 0, context);
        let options = EngineOptions {
            cache_bytes,
            max_batch: 1,
            max_step_tokens: context,
            prefix_reuse: keeps_beginnings,
            ..EngineOptions::default()
        };
        Self {
            engine: Engine::new(decoder, tokenizer, options),
            adapter: Arc::new(ServedAdapter::borrowed(adapter, [0; 32])),
            end_ids: end_ids.into(),
        }
    }

    /// Continues a prompt. `watch` sees each piece of text as it becomes certain and says whether to go
    /// on.
    ///
    /// # Errors
    /// If the prompt is empty, does not fit the context, or has a token that the model lacks; or if the
    /// model fails.
    pub fn generate(
        &mut self,
        request: Request<'_>,
        watch: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generation, Error> {
        let started = Instant::now();
        let request = engine::Request {
            adapter: Some(self.adapter.clone()),
            sampling: request.sampling,
            stops: request.stops.to_vec(),
            end_ids: self.end_ids.clone(),
            continues: request.continues,
            ..engine::Request::new(request.prompt.to_vec(), request.max_new_tokens)
        };
        let id = self.engine.submit(request)?;
        let (mut text, mut tokens, mut prompt_seconds) = (String::new(), Vec::new(), 0.0);
        let mut finish = None;
        let mut events = Vec::new();
        while finish.is_none() {
            self.engine.step(&mut events);
            let mut cancelled = false;
            for event in events.drain(..) {
                let piece = match event {
                    Event::Prompt { .. } => {
                        prompt_seconds = started.elapsed().as_secs_f64();
                        continue;
                    }
                    Event::Token { token, text, .. } => {
                        tokens.push(token);
                        text
                    }
                    Event::Done { finish: why, text, .. } => {
                        finish = Some(why);
                        text
                    }
                    Event::Failed { error, .. } => return Err(Error::Failed(error)),
                };
                text += &piece;
                cancelled |= !piece.is_empty() && !watch(&piece);
            }
            if cancelled && finish.is_none() {
                self.engine.cancel(id);
                finish = Some(Finish::Cancelled);
            }
        }
        let decode_seconds = started.elapsed().as_secs_f64() - prompt_seconds;
        let finish = finish.unwrap_or(Finish::Cancelled);
        Ok(Generation { text, tokens, finish, prompt_seconds, decode_seconds })
    }
}

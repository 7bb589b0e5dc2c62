//! One request on its way.

use super::pass::{FEWEST, PART};
use super::prefix::Chain;
use super::request::{Event, Finish, Gates, Request, RequestId, TokenLogprobs, Usage};
use crate::sample::Sampler;
use crate::stops::Held;
use hydralora_kernels::Tensor;
use hydralora_model::adapter::{Adapter, NoAdapter};
use hydralora_model::{Cache, TokenText, Tokenizer};

/// A request, how far it was read and what was written.
pub(super) struct Sequence<'a> {
    pub(super) id: RequestId,
    pub(super) request: Request<'a>,
    /// The prompt, and what was written behind it.
    pub(super) tokens: Vec<u32>,
    /// Keys and values of the first of these tokens.
    pub(super) cache: Cache,
    /// How many of them are read in parts: the prompt, or what was written too when other rotary
    /// frequencies began to hold. The others were, and are read again, one by one.
    pub(super) whole: usize,
    /// Positions that the adapter puts before the first token.
    pub(super) lead: usize,
    /// Whether it is computed in passes of its own, since one with others failed.
    pub(super) alone: bool,
    /// The blocks of it that are kept for others.
    pub(super) chain: Chain,
    /// Tokens after which it is kept as a whole for another that begins alike.
    pub(super) mark: Option<usize>,
    /// Whether it was looked up what is known of it.
    pub(super) is_begun: bool,
    /// Whether it has ended.
    pub(super) ended: bool,
    /// Tokens of the prompt that were known already when it was begun.
    pub(super) cached_tokens: usize,
    prompt_told: bool,
    pub(super) prompt_logprobs: Vec<TokenLogprobs>,
    pub(super) prompt_gates: Vec<Gates>,
    /// The token that ended the text, if probabilities were asked.
    end: Option<TokenLogprobs>,
    sampler: Sampler,
    text: TokenText,
    held: Held,
}

impl<'a> Sequence<'a> {
    pub(super) fn new(
        id: RequestId,
        request: Request<'a>,
        tokenizer: &Tokenizer,
        cache: Cache,
        lead: usize,
    ) -> Self {
        let mut sampler = Sampler::new(request.sampling, &request.bias, &request.end_ids);
        sampler.read(&request.prompt);
        Self {
            id,
            tokens: request.prompt.clone(),
            whole: request.prompt.len(),
            cache,
            lead,
            alone: false,
            chain: Chain::default(),
            mark: None,
            is_begun: false,
            ended: false,
            cached_tokens: 0,
            prompt_told: false,
            prompt_logprobs: Vec::new(),
            prompt_gates: Vec::new(),
            end: None,
            sampler,
            text: match request.continues {
                true => TokenText::after(tokenizer, &request.prompt),
                false => TokenText::new(),
            },
            held: Held::new(&request.stops),
            request,
        }
    }

    pub(super) fn adapter(&self) -> &dyn Adapter {
        self.request.adapter.as_ref().map_or(&NoAdapter, |served| served.adapter())
    }

    /// Tokens that are not in the cache.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.cache.len()
    }

    /// Tokens that are still to be read in parts.
    pub(super) fn unread(&self) -> usize {
        self.whole.saturating_sub(self.cache.len())
    }

    /// How many of the unread tokens a step reads that has `left` for them: all, or so many that the next
    /// part begins where it would in a pass over all of them, and is no shorter than the kernels for
    /// many rows ask.
    pub(super) fn part(&self, left: usize) -> usize {
        let unread = self.unread();
        let to_mark = self.mark.map_or(unread, |mark| mark.saturating_sub(self.cache.len()).max(1));
        if unread <= left && to_mark >= unread {
            return unread;
        }
        let part = (left / PART * PART).min(to_mark).min(unread);
        if part > 0 && unread - part < FEWEST { unread } else { part }
    }

    /// Whether its next pass is its first.
    pub(super) fn starts(&self) -> bool {
        self.cache.is_empty()
    }

    /// Whether its passes are its own.
    pub(super) fn needs_own_pass(&self) -> bool {
        self.alone || self.request.routing || (self.lead > 0 && self.starts())
    }

    /// Whether what was computed for other requests may stand for a part of its prompt.
    pub(super) fn may_reuse(&self) -> bool {
        self.request.prompt_logprobs.is_none() && !self.request.routing
    }

    fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    fn written(&self) -> usize {
        self.tokens.len() - self.prompt_len()
    }

    /// Rows of a pass over `from..to` whose next token's probability is wanted: tokens of the prompt.
    pub(super) fn rows_for_logprobs(&self, from: usize, to: usize) -> Vec<usize> {
        if self.request.prompt_logprobs.is_none() {
            return Vec::new();
        }
        // Those before were told when the prompt was read for the first time.
        let first = from.max(self.prompt_logprobs.len());
        (first..to.min(self.prompt_len() - 1)).map(|at| at - from).collect()
    }

    /// Tells of the prompt if it has been read.
    pub(super) fn tell_prompt(&mut self, events: &mut Vec<Event>) {
        if self.prompt_told || self.cache.len() < self.prompt_len() {
            return;
        }
        self.prompt_told = true;
        events.push(Event::Prompt {
            id: self.id,
            logprobs: std::mem::take(&mut self.prompt_logprobs),
            gates: std::mem::take(&mut self.prompt_gates),
            cached_tokens: self.cached_tokens,
        });
    }

    /// Whether the prompt was told of.
    pub(super) fn prompt_told(&self) -> bool {
        self.prompt_told
    }

    /// Draws the next token from `logits: [1, vocab_size]` and goes on with it; `context` is how many
    /// positions the model has. What goes wrong is told as an event.
    pub(super) fn go_on(
        &mut self,
        tokenizer: &Tokenizer,
        context: usize,
        logits: &Tensor,
        gates: Option<Gates>,
        events: &mut Vec<Event>,
    ) {
        if let Err(error) = self.try_go_on(tokenizer, context, logits, gates, events) {
            self.fail(error, events);
        }
    }

    fn try_go_on(
        &mut self,
        tokenizer: &Tokenizer,
        context: usize,
        logits: &Tensor,
        gates: Option<Gates>,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        if self.request.max_new_tokens == 0 {
            return self.finish(tokenizer, Finish::Length, events);
        }
        let next = self.draw(logits)?;
        let of_token = |top| super::logprobs::of_token(logits, 0, next, top);
        let logprobs = self.request.top_logprobs.map(of_token);
        if self.request.end_ids.contains(&next) {
            self.end = logprobs;
            return self.finish(tokenizer, Finish::Stop, events);
        }
        if let Some(constraint) = &mut self.request.constraint {
            constraint.accept(next)?;
        }
        self.tokens.push(next);
        let piece = self.text.push(tokenizer, next).map_err(|error| error.to_string())?;
        // Texts to stop at are not looked for before one may end the text.
        let (text, stopped) = match self.written() < self.request.sampling.min_new_tokens {
            true => (piece, false),
            false => self.held.push(&piece),
        };
        events.push(Event::Token { id: self.id, token: next, text, logprobs, gates });
        let complete = self.request.constraint.as_ref().is_some_and(|c| c.is_done());
        if stopped || complete {
            return self.finish(tokenizer, Finish::Stop, events);
        }
        // The last token is only predicted, never read.
        let full = self.lead + self.tokens.len() > context;
        if self.written() == self.request.max_new_tokens || full {
            return self.finish(tokenizer, Finish::Length, events);
        }
        Ok(())
    }

    fn draw(&mut self, logits: &Tensor) -> Result<u32, String> {
        let Some(constraint) = &mut self.request.constraint else {
            return Ok(self.sampler.next(logits));
        };
        let mut allowed = vec![0_u64; logits.cols().div_ceil(64)];
        constraint.allow(&mut allowed)?;
        let beyond = logits.cols() % 64;
        if let Some(last) = allowed.last_mut().filter(|_| beyond > 0) {
            *last &= (1 << beyond) - 1;
        }
        if allowed.iter().all(|&bits| bits == 0) {
            return Err("the constraint allows no token".to_owned());
        }
        Ok(self.sampler.next_of(logits, Some(&allowed)))
    }

    /// Ends the text.
    pub(super) fn finish(
        &mut self,
        tokenizer: &Tokenizer,
        finish: Finish,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        let mut finish = finish;
        let mut text = String::new();
        if !self.held.stopped() {
            let rest = std::mem::take(&mut self.text);
            let rest = rest.finish(tokenizer).map_err(|error| error.to_string())?;
            let (piece, stopped) = self.held.push(&rest);
            text = piece;
            if stopped {
                finish = Finish::Stop;
            } else {
                text += &self.held.take_rest();
            }
        }
        let usage = Usage {
            prompt_tokens: self.prompt_len(),
            completion_tokens: self.written(),
            cached_tokens: self.cached_tokens,
        };
        let stop = self.held.stop().map(str::to_owned);
        let end = self.end.take();
        events.push(Event::Done { id: self.id, finish, text, usage, stop, end });
        self.ended = true;
        Ok(())
    }

    /// Ends it with an error.
    pub(super) fn fail(&mut self, error: impl Into<String>, events: &mut Vec<Event>) {
        events.push(Event::Failed { id: self.id, error: error.into() });
        self.ended = true;
    }
}

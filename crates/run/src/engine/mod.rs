//! Many requests at once: the one loop that reads prompts and writes texts.
//!
//! A step is bounded: every text being written gets its next token, and prompts are read by the tokens that
//! are left, the oldest first, a part at a time. Requests of the base and of several adapters share passes.
//! Keys and values stay within a budget of bytes: requests wait until their prompt has room, and where the
//! texts outgrow it the youngest gives up what it holds and reads it again later.
//!
//! What a request gets does not depend on what else is at hand, to the last bit unless that is given up for
//! speed: see `pass.rs` for how passes are put together.

mod logprobs;
mod pass;
mod prefix;
mod request;
mod sequence;

pub use request::{
    Constraint, Error, Event, Finish, Gates, Refused, Request, RequestId, ServedAdapter, Shared,
    TokenLogprobs, Usage,
};

use hydralora_kernels::no_grad;
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_model::{Cache, CacheDType, Decoder, Tokenizer};
use pass::{FEWEST, PART};
use prefix::{BLOCK, Chain, Prefixes};
use sequence::Sequence;
use std::collections::VecDeque;

/// How much an engine may hold and do at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Bytes of keys and values that may be held.
    pub cache_bytes: usize,
    /// Requests that share a pass.
    pub max_batch: usize,
    /// Tokens of a step: one for each text being written, the rest for prompts, for which 64 are left in
    /// any case.
    pub max_step_tokens: usize,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// How keys and values are stored.
    pub cache_dtype: CacheDType,
    /// Whether keys and values of beginnings are kept for later requests, in the room that is left.
    pub prefix_reuse: bool,
    /// Whether what a request gets is the same to the last bit whatever else is at hand. Without it all
    /// rows share a pass, which is faster where many texts are written, and logits may differ by rounding.
    pub same_bits: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 2 << 30,
            max_batch: 32,
            max_step_tokens: 512,
            max_waiting: usize::MAX,
            cache_dtype: CacheDType::F32,
            prefix_reuse: true,
            same_bits: true,
        }
    }
}

/// How an engine stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests being read or written.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Bytes of keys and values that are held.
    pub cache_bytes: usize,
    /// Bytes that may be held.
    pub cache_budget: usize,
    /// Tokens of prompts that were looked up among those known, since the engine was made.
    pub prefix_queries: usize,
    /// How many of them were known.
    pub prefix_hits: usize,
    /// How often a request had to give up what it held.
    pub preemptions: usize,
}

/// A model that answers requests, any number at once. Whoever owns it calls [`step`](Self::step) while
/// there is something to do.
pub struct Engine<'a> {
    decoder: Shared<'a, Decoder>,
    tokenizer: Shared<'a, Tokenizer>,
    options: EngineOptions,
    /// In the order in which they came.
    running: Vec<Sequence<'a>>,
    /// Likewise; all came after those that run.
    waiting: VecDeque<Sequence<'a>>,
    prefixes: Prefixes,
    next_id: u64,
    /// Whether layers keep states, which are those of a sequence's last token.
    keeps_states: bool,
    /// Stands for caches that are in a pass.
    empty: Cache,
    stats: EngineStats,
}

impl<'a> Engine<'a> {
    /// Makes an engine without requests.
    pub fn new(
        decoder: impl Into<Shared<'a, Decoder>>,
        tokenizer: impl Into<Shared<'a, Tokenizer>>,
        options: EngineOptions,
    ) -> Self {
        let stats = EngineStats { cache_budget: options.cache_bytes, ..EngineStats::default() };
        let decoder = decoder.into();
        Self {
            keeps_states: decoder.new_cache().keeps_states(),
            empty: decoder.new_cache(),
            decoder,
            tokenizer: tokenizer.into(),
            options,
            running: Vec::new(),
            waiting: VecDeque::new(),
            prefixes: Prefixes::default(),
            next_id: 0,
            stats,
        }
    }

    /// Tokens that a prompt and its text may have together: the model's context without the positions
    /// that `adapter` puts before it.
    pub fn context(&self, adapter: Option<&ServedAdapter<'_>>) -> usize {
        let adapter = adapter.map_or(&NoAdapter as &dyn Adapter, |served| served.adapter());
        self.decoder.config().context_length().saturating_sub(self.lead(adapter))
    }

    fn lead(&self, adapter: &dyn Adapter) -> usize {
        let _guard = no_grad();
        self.decoder.lead_rows(adapter, &Pass::inference())
    }

    /// Takes a request.
    ///
    /// # Errors
    /// If it can never be answered, or too many wait.
    pub fn submit(&mut self, request: Request<'a>) -> std::result::Result<RequestId, Refused> {
        let config = self.decoder.config();
        let vocabulary = config.vocab_size;
        if request.prompt.is_empty() {
            return Err(Refused::Empty);
        }
        if let Some(&id) = request.prompt.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Refused::UnknownToken { id, vocabulary });
        }
        if let Some((option, fault)) = request.sampling.faults().first() {
            return Err(Refused::Sampling(format!("{option} {fault}")));
        }
        let adapter = request.adapter.as_ref().map_or(&NoAdapter as &dyn Adapter, |a| a.adapter());
        let lead = self.lead(adapter);
        let (tokens, context) = (lead + request.prompt.len(), config.context_length());
        if tokens > context {
            return Err(Refused::TooLong { tokens, context });
        }
        let cache = self.empty_cache(&request, request.prompt.len());
        let budget = self.options.cache_bytes;
        let bytes = self.bytes_of(&cache, request.prompt.len(), lead);
        if bytes > budget {
            return Err(Refused::TooLarge { bytes, budget });
        }
        if self.waiting.len() >= self.options.max_waiting {
            return Err(Refused::QueueFull { waiting: self.waiting.len() });
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence::new(id, request, &self.tokenizer, cache, lead);
        self.waiting.push_back(sequence);
        Ok(id)
    }

    /// Drops a request and all it holds; no event follows.
    pub fn cancel(&mut self, id: RequestId) {
        self.running.retain(|sequence| sequence.id != id);
        self.waiting.retain(|sequence| sequence.id != id);
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// How it stands.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            cache_bytes: self.held(),
            ..self.stats
        }
    }

    /// Bytes of keys and values that are held.
    fn held(&self) -> usize {
        self.running.iter().map(|sequence| sequence.cache.bytes()).sum::<usize>()
            + self.prefixes.bytes()
    }

    /// Whether beginnings are kept: not where the same tokens have other keys in a longer sequence.
    fn reuses(&self) -> bool {
        self.options.prefix_reuse && !self.decoder.depends_on_length()
    }

    fn empty_cache(&self, request: &Request<'_>, tokens: usize) -> Cache {
        let (stored, prompt) = (self.options.cache_dtype, request.prompt.len());
        let mut cache = self.decoder.new_cache_for(stored, prompt, tokens);
        let adapter = request.adapter.as_ref();
        cache.remember(adapter.map_or(0, |served| served.adapter().remembers()));
        cache
    }

    /// Bytes that `cache` takes at most on the way to `tokens` tokens.
    fn bytes_of(&self, cache: &Cache, tokens: usize, lead: usize) -> usize {
        cache.most_bytes(tokens, lead, self.options.max_step_tokens.max(PART) + FEWEST)
    }

    /// Does a step's worth of work and adds what came of it to `events`. A request that cannot be finished
    /// is told of as an event, too, and leaves the others as they are.
    pub fn step(&mut self, events: &mut Vec<Event>) {
        self.admit();
        let feeds = self.plan(events);
        for members in self.passes(&feeds) {
            self.run(&members, &feeds, events);
        }
        self.keep_beginnings();
        self.running.retain(|sequence| !sequence.ended);
    }

    /// Lets those begin that have waited longest, as long as all prompts that are being read have room.
    fn admit(&mut self) {
        let reserve = |engine: &Self, sequence: &Sequence<'_>| {
            engine.bytes_of(&sequence.cache, sequence.tokens.len(), sequence.lead)
        };
        let mut reserved: usize = self.running.iter().map(|s| reserve(self, s)).sum();
        while self.running.len() < self.options.max_batch.max(1) {
            let Some(first) = self.waiting.front() else { break };
            let bytes = reserve(self, first);
            if !self.running.is_empty() && reserved + bytes > self.options.cache_bytes {
                break;
            }
            if self.is_being_read() {
                break;
            }
            reserved += bytes;
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            self.begin(&mut sequence);
            self.running.push(sequence);
        }
    }

    /// Whether a request that runs is about to read what the first one waiting begins with; what both
    /// begin with is then read once.
    fn is_being_read(&mut self) -> bool {
        let Some(first) = self.waiting.front() else { return false };
        if !self.reuses() || !first.may_reuse() {
            return false;
        }
        let adapter = first.request.adapter.as_deref();
        let prompt = &first.tokens[..first.whole];
        let known = match self.keeps_states {
            true => self.prefixes.find_whole(adapter, prompt).map_or(0, |cache| cache.len()),
            false => self.prefixes.find(adapter, prompt).len(),
        };
        let most = first.whole.saturating_sub(FEWEST);
        for sequence in &mut self.running {
            let other = sequence.request.adapter.as_deref();
            if other.map(ServedAdapter::hash) != adapter.map(ServedAdapter::hash) {
                continue;
            }
            let alike = sequence.tokens.iter().zip(&first.tokens[..most]);
            let common = alike.take_while(|(a, b)| a == b).count();
            let common = common.min(sequence.whole.saturating_sub(FEWEST)) / BLOCK * BLOCK;
            let reads = if self.keeps_states { sequence.cache.len() } else { sequence.chain.len() };
            if common >= known + BLOCK && reads < common && sequence.chain.goes_on() {
                if self.keeps_states {
                    sequence.mark = Some(common);
                }
                return true;
            }
        }
        false
    }

    /// Puts what is known of a sequence's beginning into its cache.
    fn begin(&mut self, sequence: &mut Sequence<'a>) {
        if !self.reuses() || !sequence.may_reuse() {
            return;
        }
        let adapter = sequence.request.adapter.as_deref();
        // What was written is read again as it was, even if somebody else has it in a prompt.
        let prompt = &sequence.tokens[..sequence.whole];
        let held = self.held() - self.prefixes.bytes();
        let free = self.options.cache_bytes.saturating_sub(held);
        if self.keeps_states {
            if let Some(cache) = self.prefixes.find_whole(adapter, prompt) {
                self.prefixes.shrink_to(free.saturating_sub(cache.bytes()));
                if cache.bytes() + self.prefixes.bytes() <= free {
                    sequence.cache = cache;
                }
            }
        } else {
            let mut chain = self.prefixes.find(adapter, prompt);
            let bytes = self.bytes_of(&sequence.cache, chain.len(), sequence.lead);
            let room = free.saturating_sub(bytes);
            self.prefixes.shrink_to(room);
            // Where the others need all the room there is, nothing is left to begin with.
            if bytes + self.prefixes.bytes() <= free {
                self.prefixes.fill(&mut chain, prompt, &mut sequence.cache);
                sequence.chain = chain;
            }
        }
        if !sequence.is_begun {
            sequence.is_begun = true;
            sequence.cached_tokens = sequence.cache.len();
            self.stats.prefix_queries += sequence.request.prompt.len();
            self.stats.prefix_hits += sequence.cached_tokens;
        }
    }

    /// How many tokens every request that runs gets to read, for which there is room then.
    fn plan(&mut self, events: &mut Vec<Event>) -> Vec<usize> {
        self.begin_outgrown_anew();
        loop {
            let feeds = self.feeds();
            let needed = |(sequence, &feed): (&Sequence<'_>, &usize)| {
                sequence.cache.bytes_with(feed, sequence.lead)
            };
            let needed: usize = self.running.iter().zip(&feeds).map(needed).sum();
            if needed <= self.options.cache_bytes {
                self.prefixes.shrink_to(self.options.cache_bytes - needed);
                return feeds;
            }
            let Some(mut last) = self.running.pop() else { return Vec::new() };
            if self.running.is_empty() {
                // Nobody is left to make room; what was written is all there can be.
                if let Err(error) = last.finish(&self.tokenizer, Finish::Length, events) {
                    last.fail(error, events);
                }
                return Vec::new();
            }
            last.cache = self.empty_cache(&last.request, last.tokens.len());
            last.chain = Chain::default();
            last.mark = None;
            self.stats.preemptions += 1;
            self.waiting.push_front(last);
        }
    }

    /// Drops what is cached of a sequence that now gets other rotary frequencies, so that it is read anew,
    /// a part at a time.
    fn begin_outgrown_anew(&mut self) {
        for at in 0..self.running.len() {
            let sequence = &self.running[at];
            if self.decoder.outgrows(&sequence.cache, sequence.pending()) {
                let empty = self.empty_cache(&sequence.request, sequence.tokens.len());
                self.running[at].whole = sequence.tokens.len();
                self.running[at].cache = empty;
            }
        }
    }

    /// Keeps the beginnings that were read, in the room that is left.
    fn keep_beginnings(&mut self) {
        if !self.reuses() {
            return;
        }
        let held = self.running.iter().map(|s| s.cache.bytes()).sum();
        let room = self.options.cache_bytes.saturating_sub(held);
        for sequence in &mut self.running {
            let Sequence { chain, request, tokens, cache, .. } = sequence;
            let adapter = request.adapter.as_deref();
            if !self.keeps_states {
                self.prefixes.keep(chain, adapter, tokens, cache, room);
            } else if sequence.ended || sequence.mark == Some(cache.len()) {
                sequence.mark = None;
                self.prefixes.keep_whole(adapter, cache.clone(), room);
            }
        }
    }

    /// One token for each text being written, and the rest of a step for the oldest prompts.
    fn feeds(&self) -> Vec<usize> {
        let mut feeds: Vec<usize> =
            self.running.iter().map(|s| usize::from(s.unread() == 0 || s.pending() == 1)).collect();
        let mut left = self.options.max_step_tokens.saturating_sub(feeds.iter().sum()).max(PART);
        for (sequence, feed) in self.running.iter().zip(&mut feeds) {
            if *feed == 0 {
                *feed = sequence.part(left);
                left = left.saturating_sub(*feed);
            }
        }
        feeds
    }
}

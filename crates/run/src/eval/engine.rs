//! Scores and texts from a model: what the tasks ask for.
//!
//! Requests that begin alike share the work: their token sequences form a tree
//! ([`Trie`](super::trie::Trie)) whose every run is computed once. A beginning with more behind it
//! than fits one pass goes into a cache, which is kept for the next requests too. Only rows whose
//! next token is wanted meet the output layer.

use super::error::{Error, Result};
use super::trie::{Trie, common};
use crate::engine::{self, EngineOptions, Event, Finish, RequestId, ServedAdapter};
use crate::sample::Sampling;
use hydralora_kernels::{Element, Tensor, dispatch, no_grad};
use hydralora_model::adapter::{Adapter, Pass};
use hydralora_model::{Cache, Decoder, IGNORE_LABEL, Packed, Run, Tokenizer, Tree};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Tokens of one pass.
const TOKENS_PER_PASS: usize = 2048;
/// Rows whose logits are held at once.
const ROWS_PER_CHUNK: usize = 128;
/// Sequences written at once.
const MOST_WRITERS: usize = 32;
/// Bytes that the caches of the sequences written at once may take.
const CACHE_BYTES: usize = 2 << 30;
/// Tokens a beginning needs to be kept in a cache.
const SMALLEST_KEPT: usize = 32;

/// The tokens to score: `tokens[from..]` given those before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scoring {
    /// Context and continuation.
    pub tokens: Vec<u32>,
    /// Where the continuation starts, at least 1.
    pub from: usize,
}

/// How likely a continuation is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// `Σ log p(token)` in nats.
    pub log_likelihood: f64,
    /// Whether each token was the likeliest.
    pub greedy: bool,
    /// Number of tokens scored.
    pub tokens: usize,
}

/// A text to write.
#[derive(Clone, Debug, PartialEq)]
pub struct Writing {
    /// Token ids to continue.
    pub prompt: Vec<u32>,
    /// Texts at which it ends; they are not part of it.
    pub stops: Vec<String>,
    /// Most tokens to write.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Whether it goes on with the prompt's text, or is one of its own, as an answer is.
    pub continues: bool,
}

/// A text that was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// The text, without what ended it.
    pub text: String,
    /// Number of tokens written, those of a text to stop at among them.
    pub tokens: usize,
    /// Why it ended.
    pub finish: Finish,
}

/// A model that answers requests.
pub struct Engine<'a> {
    /// Writes texts.
    writer: engine::Engine<'a>,
    decoder: &'a Decoder,
    adapter: &'a dyn Adapter,
    /// Tokens at which a text ends.
    end_ids: Vec<u32>,
    /// Positions the adapter puts before every sequence leave so much of the context.
    limit: usize,
    has_lead: bool,
    kept: Option<(Vec<u32>, Cache)>,
    stop: Option<&'a AtomicBool>,
}

/// Which row of which pass predicts which token of which request.
struct Wanted {
    request: usize,
    row: usize,
    token: u32,
}

impl<'a> Engine<'a> {
    /// A model with `adapter` on; texts end at `end_ids`.
    pub fn new(
        decoder: &'a Decoder,
        tokenizer: &'a Tokenizer,
        adapter: &'a dyn Adapter,
        end_ids: &[u32],
    ) -> Self {
        let _guard = no_grad();
        let lead = decoder.lead_rows(adapter, &Pass::inference());
        let limit = decoder.config().max_position_embeddings.saturating_sub(lead);
        let (end_ids, has_lead) = (end_ids.to_vec(), lead > 0);
        let longest = decoder.config().context_length();
        let mut cache = decoder.new_cache();
        cache.remember(adapter.remembers());
        let options = EngineOptions {
            // What one request may need it gets in any case.
            cache_bytes: cache.most_bytes(longest, lead, TOKENS_PER_PASS).max(CACHE_BYTES),
            max_step_tokens: TOKENS_PER_PASS,
            max_batch: MOST_WRITERS,
            same_bits: false,
            ..EngineOptions::default()
        };
        let writer = engine::Engine::new(decoder, tokenizer, options);
        Self { writer, decoder, adapter, end_ids, limit, has_lead, kept: None, stop: None }
    }

    /// Gives up with [`Error::Interrupted`] before the next pass once `stop` is set.
    pub fn until(self, stop: &'a AtomicBool) -> Self {
        Self { stop: Some(stop), ..self }
    }

    fn go_on(&self) -> Result<()> {
        match self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// Tokens of context the model has.
    pub fn context(&self) -> usize {
        self.limit
    }

    /// Scores each request; sequences longer than the context lose their beginning.
    ///
    /// # Errors
    /// If a token id is out of range.
    pub fn score(&mut self, requests: &[Scoring]) -> Result<Vec<Scored>> {
        let _guard = no_grad();
        let limit = self.limit;
        // The last token is only predicted, never read.
        let read: Vec<&[u32]> = requests
            .iter()
            .map(|request| {
                let last = request.tokens.len() - 1;
                &request.tokens[last.saturating_sub(limit)..last]
            })
            .collect();
        let lost = |index: usize| requests[index].tokens.len() - 1 - read[index].len();
        // The first row of each that predicts a wanted token.
        let first_rows: Vec<usize> = (requests.iter().enumerate())
            .map(|(index, request)| request.from.max(lost(index) + 1) - 1 - lost(index))
            .collect();
        let cache = self.shared_cache(&read, &first_rows);
        let skip = cache.as_ref().map_or(0, Cache::len);
        let trie = Trie::new(&read, skip);
        let mut wanted: Vec<Vec<Wanted>> = trie.nodes.iter().map(|_| Vec::new()).collect();
        for (index, request) in requests.iter().enumerate() {
            let lost = lost(index);
            let mut node = trie.last[index];
            // From the last token back, through the runs that hold the rows before them.
            for row in (first_rows[index]..read[index].len()).rev() {
                let at = row + 1 + lost;
                while let Some(parent) = trie.nodes[node].parent
                    && row < trie.nodes[node].start
                {
                    node = parent;
                }
                let row = row - trie.nodes[node].start;
                wanted[node].push(Wanted { request: index, row, token: request.tokens[at] });
            }
        }
        let mut scores =
            vec![Scored { log_likelihood: 0.0, greedy: true, tokens: 0 }; requests.len()];
        let mut walk = Walk { engine: self, read: &read, trie: &trie, wanted, scores: &mut scores };
        let new = walk.visit(&trie.roots, cache.as_ref())?;
        // What all of these requests share is likely to begin the next ones too.
        if let Some((root, cache)) = new {
            let node = &trie.nodes[root];
            self.kept = Some((read[node.of][..node.end].to_vec(), cache));
        }
        Ok(scores)
    }

    /// The kept cache cut to what all of `sequences` begin with, if that is worth it. The rows from
    /// `first_rows` on are left to compute.
    fn shared_cache(&self, sequences: &[&[u32]], first_rows: &[usize]) -> Option<Cache> {
        let (tokens, cache) = self.kept.as_ref()?;
        let shared = (sequences.iter().zip(first_rows))
            .map(|(sequence, &first)| common(tokens, sequence).min(first))
            .min()?;
        if shared < SMALLEST_KEPT {
            return None;
        }
        let mut cache = cache.clone();
        cache.truncate(shared);
        // A windowed layer may have let go of what is needed there.
        (cache.len() == shared).then_some(cache)
    }

    /// `Σ` and number of the losses of labelled tokens for each packed sequence, where
    /// `labels[i]` is `tokens[i]` or [`IGNORE_LABEL`].
    ///
    /// # Errors
    /// If a sequence does not fit the context.
    pub fn losses(&mut self, sequences: &[(&[u32], &[u32])]) -> Result<Vec<(f64, usize)>> {
        let _guard = no_grad();
        let mut out = vec![(0.0, 0); sequences.len()];
        let mut first = 0;
        while first < sequences.len() {
            self.go_on()?;
            let (mut tokens, mut labels, mut offsets) = (Vec::new(), Vec::new(), vec![0]);
            let mut owner = Vec::new();
            let mut last = first;
            while last < sequences.len()
                && (last == first || tokens.len() + sequences[last].0.len() <= TOKENS_PER_PASS)
            {
                let (sequence, own) = sequences[last];
                tokens.extend_from_slice(sequence);
                // Each row predicts the next token.
                labels.extend_from_slice(&own[1..]);
                labels.push(IGNORE_LABEL);
                owner.extend(std::iter::repeat_n(last, sequence.len()));
                offsets.push(tokens.len());
                last += 1;
            }
            let packed = Packed { tokens: &tokens, offsets: &offsets };
            let pass = Pass::inference();
            let hidden = self.decoder.hidden(packed, self.adapter, &pass)?;
            let found = self.decoder.loss_with(self.adapter, &hidden, &labels, 1.0, &pass);
            for (&row, loss) in found.rows.iter().zip(&found.token_losses) {
                out[owner[row]].0 += loss;
                out[owner[row]].1 += 1;
            }
            first = last;
        }
        Ok(out)
    }

    /// Writes all texts, several at a time, what they begin with alike being read once, and hands each to `done` with its index as soon as it
    /// is finished. Prompts that leave no room for the new tokens lose their beginning.
    ///
    /// # Errors
    /// If a token id is out of range, or whatever `done` says.
    pub fn write(
        &mut self,
        requests: &[Writing],
        done: &mut dyn FnMut(usize, Written) -> Result<()>,
    ) -> Result<()> {
        let _guard = no_grad();
        let mut asked: HashMap<RequestId, (usize, String)> = HashMap::new();
        let written = self.write_all(requests, &mut asked, done);
        // After an error nobody waits for the others.
        asked.keys().for_each(|id| self.writer.cancel(*id));
        written
    }

    fn write_all(
        &mut self,
        requests: &[Writing],
        asked: &mut HashMap<RequestId, (usize, String)>,
        done: &mut dyn FnMut(usize, Written) -> Result<()>,
    ) -> Result<()> {
        let served = Arc::new(ServedAdapter::borrowed(self.adapter, [0; 32]));
        let end_ids: Arc<[u32]> = self.end_ids.as_slice().into();
        for (index, request) in requests.iter().enumerate() {
            let room = self.limit.saturating_sub(request.max_new_tokens).max(1);
            let prompt = &request.prompt[request.prompt.len().saturating_sub(room)..];
            let request = engine::Request {
                adapter: Some(served.clone()),
                sampling: request.sampling,
                stops: request.stops.clone(),
                end_ids: end_ids.clone(),
                continues: request.continues,
                ..engine::Request::new(prompt.to_vec(), request.max_new_tokens)
            };
            let id = self.writer.submit(request).map_err(engine::Error::from)?;
            asked.insert(id, (index, String::new()));
        }
        let mut events = Vec::new();
        while !asked.is_empty() {
            self.go_on()?;
            self.writer.step(&mut events);
            for event in events.drain(..) {
                match event {
                    Event::Prompt { .. } => {}
                    Event::Token { id, text: piece, .. } => {
                        if let Some((_, text)) = asked.get_mut(&id) {
                            *text += &piece;
                        }
                    }
                    Event::Done { id, finish, text: rest, usage, .. } => {
                        let Some((index, mut text)) = asked.remove(&id) else { continue };
                        text += &rest;
                        done(index, Written { text, tokens: usage.completion_tokens, finish })?;
                    }
                    Event::Failed { error, .. } => return Err(engine::Error::Failed(error).into()),
                }
            }
        }
        Ok(())
    }

    /// Puts `tokens` into `cache` and gives their hidden states, a pass at a time.
    fn extend_one(&self, tokens: &[u32], cache: &mut Cache) -> Result<Vec<Tensor>> {
        let mut hidden = Vec::new();
        for tokens in tokens.chunks(TOKENS_PER_PASS) {
            self.go_on()?;
            let packed = Packed { tokens, offsets: &[0, tokens.len()] };
            let caches = std::slice::from_mut(cache);
            hidden.push(self.decoder.extend(packed, caches, self.adapter, &Pass::inference())?);
        }
        Ok(hidden)
    }
}

/// A walk over the tree of one set of requests.
struct Walk<'w, 'a> {
    engine: &'w Engine<'a>,
    read: &'w [&'w [u32]],
    trie: &'w Trie,
    wanted: Vec<Vec<Wanted>>,
    scores: &'w mut [Scored],
}

impl Walk<'_, '_> {
    /// Computes `nodes`, siblings behind `cache`, and all below them. Gives the last of them that
    /// went into a cache.
    fn visit(&mut self, nodes: &[usize], cache: Option<&Cache>) -> Result<Option<(usize, Cache)>> {
        let mut kept = None;
        let mut batch: Vec<usize> = Vec::new();
        let mut tokens = 0;
        for &node in nodes {
            let (weight, children) =
                (self.trie.nodes[node].weight, &self.trie.nodes[node].children);
            // Learned positions come with a sequence's first tokens, into a cache.
            let first = cache.is_none() && self.engine.has_lead;
            if first || (weight > TOKENS_PER_PASS && !children.is_empty()) {
                let span = self.tokens(node);
                let mut own = match cache {
                    Some(cache) => cache.fork(span.len()),
                    None => self.engine.decoder.new_cache(),
                };
                let hidden = self.engine.extend_one(span, &mut own)?;
                let mut start = 0;
                for hidden in hidden {
                    self.take(node, start, &hidden);
                    start += hidden.rows();
                }
                let children = children.clone();
                self.visit(&children, Some(&own))?;
                kept = Some((node, own));
                continue;
            }
            if !batch.is_empty() && tokens + weight > TOKENS_PER_PASS {
                self.pass(&std::mem::take(&mut batch), cache)?;
                tokens = 0;
            }
            batch.push(node);
            tokens += weight;
        }
        if !batch.is_empty() {
            self.pass(&batch, cache)?;
        }
        Ok(kept)
    }

    fn tokens(&self, node: usize) -> &[u32] {
        let node = &self.trie.nodes[node];
        &self.read[node.of][node.start..node.end]
    }

    /// Whole subtrees in one pass.
    fn pass(&mut self, roots: &[usize], cache: Option<&Cache>) -> Result<()> {
        let (mut order, mut runs, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        let mut open: Vec<(usize, Option<usize>)> =
            roots.iter().rev().map(|&root| (root, None)).collect();
        while let Some((node, parent)) = open.pop() {
            let span = self.tokens(node);
            tokens.extend_from_slice(span);
            runs.push(Run { len: span.len(), parent });
            let here = Some(order.len());
            order.push(node);
            open.extend(self.trie.nodes[node].children.iter().rev().map(|&child| (child, here)));
        }
        let tree = Tree { tokens: &tokens, runs: &runs };
        let engine = self.engine;
        engine.go_on()?;
        let hidden = engine.decoder.hidden_tree(tree, cache, engine.adapter, &Pass::inference())?;
        let mut at = Vec::with_capacity(order.len());
        let mut first = 0_usize;
        for (&node, run) in order.iter().zip(&runs) {
            at.push((node, first));
            first += run.len;
        }
        self.take_packed(&at, &hidden);
        Ok(())
    }

    /// Takes what is wanted of `node` out of `hidden`, whose rows are the node's from `start` on.
    fn take(&mut self, node: usize, start: usize, hidden: &Tensor) {
        let here = start..start + hidden.rows();
        let wanted = self.wanted[node].iter().filter(|wanted| here.contains(&wanted.row));
        let found = wanted.map(|wanted| (wanted.row - start, wanted.request, wanted.token));
        self.add(found.collect(), hidden);
    }

    /// The same where `hidden` holds several nodes, each from its row on.
    fn take_packed(&mut self, nodes: &[(usize, usize)], hidden: &Tensor) {
        let mut found = Vec::new();
        for &(node, first) in nodes {
            let wanted = self.wanted[node].iter();
            found.extend(wanted.map(|wanted| (first + wanted.row, wanted.request, wanted.token)));
        }
        self.add(found, hidden);
    }

    /// Adds the log-likelihood of each `(row, request, token)`; rows are computed once.
    fn add(&mut self, mut found: Vec<(usize, usize, u32)>, hidden: &Tensor) {
        found.sort_unstable();
        let mut rows: Vec<usize> = found.iter().map(|&(row, ..)| row).collect();
        rows.dedup();
        let mut at = 0;
        for rows in rows.chunks(ROWS_PER_CHUNK) {
            let logits = self.engine.decoder.logits_with(self.engine.adapter, hidden, rows);
            for (slot, &row) in rows.iter().enumerate() {
                let (normaliser, likeliest) = normaliser(&logits, slot);
                while at < found.len() && found[at].0 == row {
                    let (_, request, token) = found[at];
                    let score = &mut self.scores[request];
                    score.log_likelihood += logit(&logits, slot, token) - normaliser;
                    score.greedy &= likeliest == token;
                    score.tokens += 1;
                    at += 1;
                }
            }
        }
    }
}

fn logit(logits: &Tensor, row: usize, token: u32) -> f64 {
    let at = row * logits.cols() + token as usize;
    dispatch!(logits.dtype(), |E| {
        let value: E = logits.data::<E>()[at];
        value.to_f64()
    })
}

/// `log Σ exp` of a row and its likeliest token; the lower id of two that are equal.
fn normaliser(logits: &Tensor, row: usize) -> (f64, u32) {
    let width = logits.cols();
    dispatch!(logits.dtype(), |E| {
        let row = &logits.data::<E>()[row * width..(row + 1) * width];
        let mut likeliest = 0;
        for (token, value) in row.iter().enumerate() {
            if *value > row[likeliest] {
                likeliest = token;
            }
        }
        let peak = row[likeliest];
        let sum: f64 = row.iter().map(|&value| (value - peak).exp().to_f64()).sum();
        (peak.to_f64() + sum.ln(), likeliest as u32)
    })
}

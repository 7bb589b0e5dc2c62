//! Passes over the model, and what comes of them.
//!
//! A row of a pass comes out the same, to the last bit, whatever the other rows are, as long as the same
//! kernels compute it. Which do depends on the number of rows: few are multiplied by the weights as these
//! are stored, 16 and more by weights that are packed first, unless [`few_rows`] says that more are few; and
//! attention of one query a sequence is another kernel than that of several. So rows are put together by
//! their kind, which follows from their request alone:
//!
//! - prompts of 16 tokens and more are read by parts of no fewer, which begin at multiples of 64 tokens, as
//!   attention and the delta rule cut a pass over the whole prompt; any number of them share a pass;
//! - shorter prompts share passes of up to 64 rows, computed as few;
//! - so do single tokens, of texts being written or read again.
//!
//! Routers whose gates are computed apart from the update score every row by itself, for any number of rows.
//!
//! What is not the same to the last bit is what was written when it becomes the beginning of another prompt
//! (it is known from single tokens, and not read again), and a prompt behind learned embeddings.

use super::logprobs::of_token;
use super::prefix::Chain;
use super::request::{Event, Gates};
use super::{Engine, Sequence};
use hydralora_kernels::ops::rows::select_rows;
use hydralora_kernels::{Tensor, few_rows, no_grad};
use hydralora_model::adapter::{Adapter, GateObserver, Pass, Site, is_same};
use hydralora_model::{Cache, Packed};
use std::cell::RefCell;

/// Rows from which on a pass is computed by the kernels for many.
pub(super) const FEWEST: usize = 16;

/// Most rows that are computed as a few rows are.
const MOST_FEW: usize = 64;

/// Tokens of prompts are read by multiples of these.
pub(super) const PART: usize = 64;

/// Keeps the gates of a pass.
#[derive(Default)]
struct Observed(RefCell<Vec<(Site, Tensor)>>);

impl GateObserver for Observed {
    fn observe(&self, site: Site, gates: &Tensor) {
        self.0.borrow_mut().push((site, gates.clone()));
    }
}

impl Engine<'_> {
    /// Those that share a pass, each by its place among those that run. Rows of one adapter are
    /// neighbours.
    pub(super) fn passes(&self, feeds: &[usize]) -> Vec<Vec<usize>> {
        let reading = (0..self.running.len()).filter(|&at| feeds.get(at).is_some_and(|&n| n > 0));
        let (own, mut shared): (Vec<usize>, Vec<usize>) =
            reading.partition(|&at| self.running[at].needs_own_pass());
        let adapter = |at: &usize| {
            let served = self.running[*at].request.adapter.as_ref();
            served.map_or(0, |served| std::ptr::from_ref(served.adapter()).addr())
        };
        shared.sort_by_key(adapter);
        if !self.options.same_bits {
            let shared = (!shared.is_empty()).then_some(shared);
            return shared.into_iter().chain(own.into_iter().map(|at| vec![at])).collect();
        }
        let (single, several): (Vec<usize>, Vec<usize>) =
            shared.into_iter().partition(|&at| feeds[at] == 1);
        let (few, many): (Vec<usize>, Vec<usize>) =
            several.into_iter().partition(|&at| feeds[at] < FEWEST);
        let mut passes: Vec<Vec<usize>> = Vec::new();
        // As many in each, but for one.
        let groups = single.len().div_ceil(MOST_FEW).max(1);
        passes.extend(single.chunks(single.len().div_ceil(groups).max(1)).map(<[usize]>::to_vec));
        let mut rows = MOST_FEW;
        for at in few {
            rows += feeds[at];
            match passes.last_mut() {
                Some(pass) if rows <= MOST_FEW => pass.push(at),
                _ => {
                    rows = feeds[at];
                    passes.push(vec![at]);
                }
            }
        }
        if !many.is_empty() {
            passes.push(many);
        }
        passes.extend(own.into_iter().map(|at| vec![at]));
        passes
    }

    /// Feeds the requests at `members` of those that run what `feeds` says, and goes on with those that
    /// have read all they have.
    pub(super) fn run(&mut self, members: &[usize], feeds: &[usize], events: &mut Vec<Event>) {
        let _guard = no_grad();
        let (mut tokens, mut offsets) = (Vec::new(), vec![0]);
        let mut caches: Vec<Cache> = Vec::with_capacity(members.len());
        for &at in members {
            let sequence = &mut self.running[at];
            let from = sequence.cache.len();
            tokens.extend_from_slice(&sequence.tokens[from..from + feeds[at]]);
            offsets.push(tokens.len());
            caches.push(std::mem::replace(&mut sequence.cache, self.empty.clone()));
        }
        let observed = Observed::default();
        let routing = members.iter().any(|&at| self.running[at].request.routing);
        let mut pass = Pass::inference();
        if routing {
            pass = pass.observed_by(&observed);
        }
        // Parts of longer prompts are never so short.
        let as_few = self.options.same_bits && members.iter().all(|&at| feeds[at] < FEWEST);
        let few = as_few.then(|| few_rows(MOST_FEW));
        let batch = Packed { tokens: &tokens, offsets: &offsets };
        let adapters: Vec<&dyn Adapter> =
            members.iter().map(|&at| self.running[at].adapter()).collect();
        let hidden = self.decoder.extend_each(batch, &mut caches, &adapters, &pass);
        drop((adapters, pass, few));
        let hidden = match hidden {
            Ok(hidden) => hidden,
            Err(error) => return self.put_off(members, &error, events),
        };
        for (&at, cache) in members.iter().zip(caches) {
            self.running[at].cache = cache;
        }
        let gates = observed.0.into_inner();
        for (&at, rows) in members.iter().zip(offsets.windows(2)) {
            let sequence = &mut self.running[at];
            let before = sequence.cache.len() - feeds[at];
            let wanted = sequence.rows_for_logprobs(before, sequence.cache.len());
            for wanted in wanted.chunks(PART) {
                // Filled up, so that the kernels for many rows compute all of them.
                let filled = wanted.iter().chain(std::iter::repeat(&wanted[0]));
                let filled = filled.take(wanted.len().max(FEWEST));
                let rows: Vec<usize> = filled.map(|row| rows[0] + row).collect();
                let logits = self.decoder.logits_with(sequence.adapter(), &hidden, &rows);
                let top = sequence.request.prompt_logprobs.unwrap_or(0);
                for (slot, row) in wanted.iter().enumerate() {
                    let next = sequence.tokens[before + row + 1];
                    sequence.prompt_logprobs.push(of_token(&logits, slot, next, top));
                }
            }
            if sequence.request.routing && !sequence.prompt_told() {
                // The adapter's own positions come first.
                let of_row = |row: usize| -> Gates {
                    let last = |(site, gates): &(Site, Tensor)| {
                        let skipped = gates.rows() - feeds[at];
                        (*site, select_rows(gates, &[skipped + row]))
                    };
                    Gates::of_row(&gates.iter().map(last).collect::<Vec<_>>(), 0)
                };
                let first = sequence.prompt_gates.len().saturating_sub(before);
                sequence.prompt_gates.extend((first..feeds[at]).map(of_row));
            }
            sequence.tell_prompt(events);
        }
        self.write(members, &offsets, &hidden, &gates, events);
    }

    /// Goes on with those that have read all they have.
    fn write(
        &mut self,
        members: &[usize],
        offsets: &[usize],
        hidden: &Tensor,
        gates: &[(Site, Tensor)],
        events: &mut Vec<Event>,
    ) {
        let ready: Vec<(usize, usize)> = (members.iter().zip(&offsets[1..]))
            .filter(|(at, _)| self.running[**at].pending() == 0)
            .map(|(&at, &end)| (at, end - 1))
            .collect();
        let _few = few_rows(MOST_FEW);
        for ready in ready.chunks(MOST_FEW) {
            self.write_few(ready, hidden, gates, events);
        }
    }

    /// Goes on with up to [`MOST_FEW`] of those that run, each by its place and its row of `hidden`.
    fn write_few(
        &mut self,
        ready: &[(usize, usize)],
        hidden: &Tensor,
        gates: &[(Site, Tensor)],
        events: &mut Vec<Event>,
    ) {
        let rows: Vec<usize> = ready.iter().map(|(_, row)| *row).collect();
        let mut groups: Vec<(usize, &dyn Adapter)> = Vec::new();
        for (at, _) in ready {
            let adapter = self.running[*at].adapter();
            match groups.last_mut() {
                Some((count, last)) if is_same(*last, adapter) => *count += 1,
                _ => groups.push((1, adapter)),
            }
        }
        let logits = self.decoder.logits_each(&groups, &select_rows(hidden, &rows));
        let context = self.decoder.config().context_length();
        for (slot, (at, _)) in ready.iter().enumerate() {
            let sequence: &mut Sequence<'_> = &mut self.running[*at];
            let last = |all: &[(Site, Tensor)]| {
                let rows = all
                    .iter()
                    .map(|(site, gates)| (*site, select_rows(gates, &[gates.rows() - 1])));
                Gates::of_row(&rows.collect::<Vec<_>>(), 0)
            };
            let gates = sequence.request.routing.then(|| last(gates));
            let logits = select_rows(&logits, &[slot]);
            sequence.go_on(&self.tokenizer, context, &logits, gates, events);
        }
    }

    /// After a pass that failed: one request alone fails, several are tried by themselves.
    fn put_off(
        &mut self,
        members: &[usize],
        error: &hydralora_model::Error,
        events: &mut Vec<Event>,
    ) {
        let single = members.len() == 1;
        for &at in members {
            let sequence = &self.running[at];
            let empty = self.empty_cache(&sequence.request, sequence.tokens.len());
            let sequence = &mut self.running[at];
            if single {
                sequence.fail(error.to_string(), events);
            }
            sequence.alone = true;
            sequence.chain = Chain::default();
            sequence.mark = None;
            sequence.cache = empty;
        }
    }
}

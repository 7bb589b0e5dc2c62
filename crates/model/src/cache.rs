//! Keys and values of tokens already seen, so that generation computes each position once.

use hydralora_kernels::ops::attention::AttentionConfig;
use hydralora_kernels::ops::delta_net::DeltaState;
use hydralora_kernels::{DType, Tensor, TensorElement, dispatch};
use std::ops::Range;

/// Rows a cache grows by, so that what it occupies follows what it holds. The copies that this makes are
/// few beside what attention reads: a row is copied once in so many tokens, and read for each of them.
const GROWTH: usize = 64;

/// Rows kept beyond a window, so that the last tokens can be taken back.
const SPARE: usize = 32;

/// The cache of one sequence over all layers.
#[derive(Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    /// What layers by the delta rule have in place of keys and values.
    states: Vec<Option<DeltaState>>,
    /// The same before the first token.
    empty_states: Vec<Option<DeltaState>>,
    /// The tokens held.
    tokens: Vec<u32>,
    /// Rows before the first token that an adapter put there.
    lead: usize,
    /// Tokens that the sequence is known to get at least.
    expected: Option<usize>,
}

/// Keys and values of one layer, `[capacity, kv_heads · head_dim]` with some neighbouring rows in use.
///
/// A windowed layer lets go of rows that no later token sees, but for a few, so it holds little more than
/// twice its window and what one pass brings.
#[derive(Clone)]
pub(crate) struct LayerCache {
    keys: Tensor,
    values: Tensor,
    /// Positions that were appended.
    len: usize,
    /// Of these, how many at the beginning are no longer held.
    dropped: usize,
    /// How many positions a token sees, itself included; all if none.
    window: Option<usize>,
}

impl Cache {
    /// Makes an empty cache for layers with these settings. A layer without settings has no keys and
    /// values; some have a state in their place.
    pub(crate) fn new(
        dtype: DType,
        layers: impl Iterator<Item = (Option<AttentionConfig>, Option<DeltaState>)>,
    ) -> Self {
        let (layers, states): (Vec<_>, Vec<_>) = layers.unzip();
        let empty = |config: Option<AttentionConfig>| {
            let width = config.map_or(0, |config| config.num_key_value_heads * config.head_dim);
            LayerCache {
                keys: Tensor::zeros(dtype, [0, width]),
                values: Tensor::zeros(dtype, [0, width]),
                len: 0,
                dropped: 0,
                window: config.and_then(|config| config.window),
            }
        };
        let layers = layers.into_iter().map(empty).collect();
        Self {
            layers,
            empty_states: states.clone(),
            states,
            tokens: Vec::new(),
            lead: 0,
            expected: None,
        }
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens held.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Forgets all but the first `len` tokens, or all of them if a windowed layer no longer holds what
    /// the next token would see. [`len`](Self::len) tells how many are left.
    pub fn truncate(&mut self, len: usize) {
        let rows = self.lead + len;
        // A state cannot be taken back.
        let stateless = self.states.iter().all(Option::is_none);
        let can_end = |layer: &LayerCache| layer.can_end_at(rows);
        let kept = len >= self.len() || (stateless && self.layers.iter().all(can_end));
        self.tokens.truncate(if kept { len } else { 0 });
        if self.tokens.is_empty() {
            self.lead = 0;
            self.states.clone_from(&self.empty_states);
        }
        let rows = self.rows();
        for layer in &mut self.layers {
            layer.truncate(rows);
        }
    }

    /// Positions held: tokens, and what an adapter put before them.
    pub(crate) fn rows(&self) -> usize {
        self.lead + self.len()
    }

    /// Notes that `rows` rows now stand before the first token.
    pub(crate) fn set_lead(&mut self, rows: usize) {
        self.lead = rows;
    }

    /// Says that the sequence gets `tokens` tokens at least, of which a pass may bring a part. Where a
    /// rotation depends on a sequence's length, a token's length is the larger of that and its own
    /// place, so that a text read in parts comes out as one read whole.
    pub fn expect(&mut self, tokens: usize) {
        self.expected = Some(tokens);
    }

    /// Tokens that the sequence is known to get, if that was said.
    pub(crate) fn expected(&self) -> Option<usize> {
        self.expected
    }

    /// Counts the bytes that it occupies while and after it takes `more` tokens; `lead` rows come before
    /// them if it is empty.
    pub fn bytes_with(&self, more: usize, lead: usize) -> usize {
        let rows = more + if self.rows() == 0 { lead } else { 0 };
        let of_layer = |layer: &LayerCache| {
            2 * layer.capacity_with(rows) * layer.keys.cols() * layer.keys.dtype().size()
        };
        let states = self.states.iter().flatten().map(DeltaState::bytes);
        self.layers.iter().map(of_layer).chain(states).sum()
    }

    /// Counts the bytes that it never exceeds on the way to `tokens` tokens behind `lead` rows, taking no
    /// more than `at_once` in a pass.
    pub fn most_bytes(&self, tokens: usize, lead: usize, at_once: usize) -> usize {
        let rows = tokens + lead;
        let of_layer = |layer: &LayerCache| {
            let within = |window: usize| {
                let kept = window - 1 + SPARE;
                rows.min(kept + kept.max(at_once + lead))
            };
            let rows = layer.window.map_or(rows, within).next_multiple_of(GROWTH);
            2 * rows * layer.keys.cols() * layer.keys.dtype().size()
        };
        let states = self.states.iter().flatten().map(DeltaState::bytes);
        self.layers.iter().map(of_layer).chain(states).sum()
    }

    /// Copies it with room for `more` tokens, so that it need not grow soon.
    #[must_use]
    pub fn fork(&self, more: usize) -> Self {
        let layers = self.layers.iter().map(|layer| layer.fork(more)).collect();
        let (states, empty_states) = (self.states.clone(), self.empty_states.clone());
        let tokens = self.tokens.clone();
        Self { layers, states, empty_states, tokens, lead: self.lead, expected: self.expected }
    }

    /// Counts the bytes it occupies.
    pub fn bytes(&self) -> usize {
        let bytes = |layer: &LayerCache| 2 * layer.keys.len() * layer.keys.dtype().size();
        let states = self.states.iter().flatten().map(DeltaState::bytes);
        self.layers.iter().map(bytes).chain(states).sum()
    }

    pub(crate) fn layer(&self, index: usize) -> &LayerCache {
        &self.layers[index]
    }

    /// The state of a layer by the delta rule.
    ///
    /// # Panics
    /// If the layer keeps keys and values instead.
    pub(crate) fn state(&self, index: usize) -> &DeltaState {
        self.states[index].as_ref().unwrap_or_else(|| panic!("layer {index} keeps no state"))
    }

    /// The same for going on.
    ///
    /// # Panics
    /// As [`state`](Self::state).
    pub(crate) fn state_mut(&mut self, index: usize) -> &mut DeltaState {
        self.states[index].as_mut().unwrap_or_else(|| panic!("layer {index} keeps no state"))
    }

    pub(crate) fn layer_mut(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index]
    }

    /// Notes the tokens that a pass brought, and gives back what they took in windowed layers and no
    /// later token sees.
    pub(crate) fn advance(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        self.layers.iter_mut().for_each(LayerCache::settle);
    }
}

impl LayerCache {
    /// Whether it holds all that a token at position `rows` sees of the positions before it.
    fn can_end_at(&self, rows: usize) -> bool {
        let seen = self.window.map_or(0, |window| (rows + 1).saturating_sub(window));
        self.dropped <= seen.min(self.len)
    }

    fn truncate(&mut self, rows: usize) {
        self.len = self.len.min(rows);
        self.dropped = self.dropped.min(self.len);
    }

    /// Rows in use.
    fn held(&self) -> usize {
        self.len - self.dropped
    }

    /// Rows that tokens after those held may still see, and some to spare.
    fn needed(&self) -> usize {
        self.window.map_or(self.held(), |window| self.held().min(window - 1 + SPARE))
    }

    fn fork(&self, more: usize) -> Self {
        let copy = |side: &Tensor| with_rows(side, 0..self.held(), self.held() + more);
        Self { keys: copy(&self.keys), values: copy(&self.values), ..*self }
    }

    /// Appends rows given row-major.
    pub(crate) fn append<E: TensorElement>(&mut self, keys: &[E], values: &[E]) {
        let width = self.keys.cols();
        let rows = keys.len() / width;
        if self.held() + rows > self.keys.rows() {
            self.make_room::<E>(rows);
        }
        let first = self.held() * width;
        for (side, new) in [(&mut self.keys, keys), (&mut self.values, values)] {
            side.data_mut::<E>()[first..first + new.len()].copy_from_slice(new);
        }
        self.len += rows;
    }

    /// Rows it has room for after it took `rows` more.
    fn capacity_with(&self, rows: usize) -> usize {
        let (kept, has) = (self.needed(), self.keys.rows());
        if self.keys.cols() == 0 || self.held() + rows <= has {
            return has;
        }
        let needed = kept + rows;
        if needed <= has {
            return has;
        }
        match self.window {
            // A window slides by moving what it holds; with room for two, once in a window.
            Some(_) => needed.max(2 * kept),
            None => needed,
        }
        .next_multiple_of(GROWTH)
    }

    /// Lets go of what no later token sees, and grows if that is not enough for `rows` more.
    fn make_room<E: TensorElement>(&mut self, rows: usize) {
        let width = self.keys.cols();
        let (held, kept) = (self.held(), self.needed());
        let capacity = self.capacity_with(rows);
        for side in [&mut self.keys, &mut self.values] {
            if capacity == side.rows() {
                side.data_mut::<E>().copy_within((held - kept) * width..held * width, 0);
            } else {
                *side = with_rows(side, held - kept..held, capacity);
            }
        }
        self.dropped += held - kept;
    }

    /// Shrinks to a window after a pass that brought much more than one.
    fn settle(&mut self) {
        let Some(window) = self.window else { return };
        if self.keys.rows() > 3 * (window + SPARE) {
            let (held, kept) = (self.held(), self.needed());
            for side in [&mut self.keys, &mut self.values] {
                *side = with_rows(side, held - kept..held, 2 * (window + SPARE));
            }
            self.dropped += held - kept;
        }
    }

    /// The rows in use: keys, then values.
    pub(crate) fn rows<E: TensorElement>(&self) -> (&[E], &[E]) {
        let used = self.held() * self.keys.cols();
        (&self.keys.data::<E>()[..used], &self.values.data::<E>()[..used])
    }
}

/// Copies some rows of `side` to the beginning of one with room for `capacity` rows.
fn with_rows(side: &Tensor, rows: Range<usize>, capacity: usize) -> Tensor {
    let width = side.cols();
    let mut copy = Tensor::zeros(side.dtype(), [capacity, width]);
    dispatch!(side.dtype(), |E| {
        let used = &side.data::<E>()[rows.start * width..rows.end * width];
        copy.data_mut::<E>()[..used.len()].copy_from_slice(used);
    });
    copy
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cache({} tokens, {} bytes)", self.len(), self.bytes())
    }
}

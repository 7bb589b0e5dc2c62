//! Keys and values of tokens already seen, so that generation computes each position once.

use hydralora_kernels::ops::attention::AttentionConfig;
use hydralora_kernels::ops::delta_net::DeltaState;
use hydralora_kernels::{DType, TensorElement};
use rows::Rows;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

mod history;
mod rows;

pub(crate) use history::{History, Reached};
pub use rows::CacheDType;

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
    /// What the adapter remembers of them.
    history: History,
    /// How many numbers of a token that is.
    remembered: usize,
    /// The tokens held.
    tokens: Vec<u32>,
    /// Rows before the first token that an adapter put there.
    lead: usize,
    /// Tokens that the sequence is known to get at least.
    expected: Option<usize>,
}

/// Keys and values of neighbouring tokens over all layers, taken out of a [`Cache`] to be put into another.
/// Clones share them.
#[derive(Clone)]
pub struct CacheBlock {
    /// Keys and values of each.
    layers: Arc<Vec<[Rows; 2]>>,
    /// What the adapter remembers of the tokens.
    history: Arc<History>,
    /// Rows before the first token that an adapter put there, where the block is the first.
    lead: usize,
    tokens: usize,
}

impl CacheBlock {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Counts the bytes it occupies.
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(Rows::bytes).sum::<usize>() + self.history.bytes()
    }
}

/// Keys and values of one layer, `[capacity, kv_heads · head_dim]` with some neighbouring rows in use.
///
/// A windowed layer lets go of rows that no later token sees, but for a few, so it holds little more than
/// twice its window and what one pass brings.
#[derive(Clone)]
pub(crate) struct LayerCache {
    keys: Rows,
    values: Rows,
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
        stored: CacheDType,
        dtype: DType,
        layers: impl Iterator<Item = (Option<AttentionConfig>, Option<DeltaState>)>,
    ) -> Self {
        let (layers, states): (Vec<_>, Vec<_>) = layers.unzip();
        let empty = |config: Option<AttentionConfig>| {
            let width = config.map_or(0, |config| config.num_key_value_heads * config.head_dim);
            LayerCache {
                keys: Rows::new(stored, dtype, 0, width),
                values: Rows::new(stored, dtype, 0, width),
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
            history: History::default(),
            remembered: 0,
            tokens: Vec::new(),
            lead: 0,
            expected: None,
        }
    }

    /// Says how many numbers the adapter [remembers](crate::adapter::Adapter::remembers) of a token, so that
    /// they are counted before they are there.
    pub fn remember(&mut self, numbers: usize) {
        self.remembered = numbers;
    }

    /// What the adapter remembers.
    pub(crate) fn history(&self) -> &History {
        &self.history
    }

    /// Takes up what the adapter remembers of the tokens of a pass.
    pub(crate) fn append_history(&mut self, of_pass: &History) {
        self.history.append(of_pass);
    }

    /// Bytes of what the adapter remembers of `tokens` tokens.
    fn history_bytes(&self, tokens: usize) -> usize {
        let per_token = self.remembered.max(self.history.per_token());
        History::bytes_of(tokens, per_token).max(self.history.bytes())
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens held.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Whether some layers keep a state in place of keys and values, which cannot be taken back.
    pub fn keeps_states(&self) -> bool {
        self.states.iter().any(Option::is_some)
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
        let stateless = !self.keeps_states();
        let can_end = |layer: &LayerCache| layer.can_end_at(rows);
        let kept = len >= self.len() || (stateless && self.layers.iter().all(can_end));
        self.tokens.truncate(if kept { len } else { 0 });
        if self.tokens.is_empty() {
            self.lead = 0;
            self.states.clone_from(&self.empty_states);
        }
        self.history.truncate(self.tokens.len());
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
        let of_layer = |layer: &LayerCache| 2 * layer.capacity_with(rows) * layer.row_bytes();
        let states = self.states.iter().flatten().map(DeltaState::bytes);
        let held: usize = self.layers.iter().map(of_layer).chain(states).sum();
        held + self.history_bytes(self.len() + more)
    }

    /// Counts the bytes that it never exceeds on the way to `tokens` tokens behind `lead` rows, taking no
    /// more than `at_once` in a pass.
    pub fn most_bytes(&self, tokens: usize, lead: usize, at_once: usize) -> usize {
        let rows = tokens + lead;
        let of_layer = |layer: &LayerCache| {
            let within = |window: usize| {
                let kept = window - 1 + SPARE;
                if rows <= kept { rows } else { kept + kept.max(at_once + lead) }
            };
            let rows = layer.window.map_or(rows, within).next_multiple_of(GROWTH);
            2 * rows * layer.row_bytes()
        };
        let states = self.states.iter().flatten().map(DeltaState::bytes);
        let held: usize = self.layers.iter().map(of_layer).chain(states).sum();
        held + self.history_bytes(tokens)
    }

    /// Copies it with room for `more` tokens, so that it need not grow soon.
    #[must_use]
    pub fn fork(&self, more: usize) -> Self {
        let layers = self.layers.iter().map(|layer| layer.fork(more)).collect();
        Self {
            layers,
            states: self.states.clone(),
            empty_states: self.empty_states.clone(),
            history: self.history.clone(),
            tokens: self.tokens.clone(),
            ..*self
        }
    }

    /// Counts the bytes it occupies.
    pub fn bytes(&self) -> usize {
        let bytes = |layer: &LayerCache| layer.keys.bytes() + layer.values.bytes();
        let states = self.states.iter().flatten().map(DeltaState::bytes);
        self.layers.iter().map(bytes).chain(states).sum::<usize>() + self.history.bytes()
    }

    /// Copies the keys and values of the tokens at `tokens`, for [`append`](Self::append) to another cache
    /// of the same decoder. None if a layer no longer holds some of them, or keeps a state instead, which
    /// is only that of the last token.
    pub fn block(&self, tokens: Range<usize>) -> Option<CacheBlock> {
        if tokens.end > self.len() || self.keeps_states() {
            return None;
        }
        let lead = if tokens.start == 0 { self.lead } else { 0 };
        let rows = self.lead + tokens.start - lead..self.lead + tokens.end;
        let layers: Option<Vec<[Rows; 2]>> =
            self.layers.iter().map(|layer| layer.taken(rows.clone())).collect();
        let (layers, history) = (Arc::new(layers?), Arc::new(self.history.part(tokens.clone())?));
        Some(CacheBlock { layers, history, lead, tokens: tokens.len() })
    }

    /// Appends what was copied of the cache of a sequence that is the same up to the end of `block`,
    /// whose tokens are `tokens`.
    ///
    /// # Panics
    /// If the numbers of tokens or layers differ, or the caches store keys differently.
    pub fn append(&mut self, block: &CacheBlock, tokens: &[u32]) {
        assert_eq!(tokens.len(), block.tokens, "the block's tokens");
        assert_eq!(self.layers.len(), block.layers.len(), "caches of one decoder");
        for (layer, stored) in self.layers.iter_mut().zip(block.layers.iter()) {
            if layer.keys.width() > 0 {
                layer.append_stored(stored);
            }
        }
        self.history.append(&block.history);
        self.lead += block.lead;
        self.advance(tokens);
    }

    /// An empty one of the same kind.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self {
            layers: self.layers.iter().map(LayerCache::emptied).collect(),
            states: self.empty_states.clone(),
            empty_states: self.empty_states.clone(),
            history: History::default(),
            remembered: self.remembered,
            tokens: Vec::new(),
            lead: 0,
            expected: None,
        }
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

    fn emptied(&self) -> Self {
        let empty = |side: &Rows| side.copied(0..0, 0);
        let (keys, values) = (empty(&self.keys), empty(&self.values));
        Self { keys, values, len: 0, dropped: 0, window: self.window }
    }

    fn fork(&self, more: usize) -> Self {
        let copy = |side: &Rows| side.copied(0..self.held(), self.held() + more);
        Self { keys: copy(&self.keys), values: copy(&self.values), ..*self }
    }

    /// Appends rows given row-major.
    pub(crate) fn append<E: TensorElement>(&mut self, keys: &[E], values: &[E]) {
        let rows = keys.len() / self.keys.width();
        self.make_room(rows);
        let first = self.held();
        self.keys.write(first, keys);
        self.values.write(first, values);
        self.len += rows;
    }

    /// Appends rows that are stored in the same way.
    fn append_stored(&mut self, [keys, values]: &[Rows; 2]) {
        let rows = keys.capacity();
        self.make_room(rows);
        let first = self.held();
        self.keys.copy_from(first, keys, 0..rows);
        self.values.copy_from(first, values, 0..rows);
        self.len += rows;
    }

    /// Copies the rows at `positions`; none if some are no longer held.
    fn taken(&self, positions: Range<usize>) -> Option<[Rows; 2]> {
        if self.keys.width() == 0 {
            return Some([self.keys.clone(), self.values.clone()]);
        }
        let first = positions.start.checked_sub(self.dropped)?;
        let rows = first..first + positions.len();
        let copy = |side: &Rows| side.copied(rows.clone(), rows.len());
        Some([copy(&self.keys), copy(&self.values)])
    }

    fn row_bytes(&self) -> usize {
        self.keys.stored_as().row_bytes(self.keys.dtype(), self.keys.width())
    }

    /// Rows it has room for after it took `rows` more.
    fn capacity_with(&self, rows: usize) -> usize {
        let (kept, has) = (self.needed(), self.keys.capacity());
        if self.keys.width() == 0 || self.held() + rows <= has {
            return has;
        }
        let needed = kept + rows;
        if needed <= has {
            return has;
        }
        match self.window {
            // A window slides by moving what it holds; with room for two, once in a window.
            Some(window) if self.held() + rows > window - 1 + SPARE => needed.max(2 * kept),
            _ => needed,
        }
        .next_multiple_of(GROWTH)
    }

    /// Lets go of what no later token sees, and grows if that is not enough for `rows` more.
    fn make_room(&mut self, rows: usize) {
        if self.held() + rows <= self.keys.capacity() {
            return;
        }
        let (held, kept) = (self.held(), self.needed());
        let capacity = self.capacity_with(rows);
        for side in [&mut self.keys, &mut self.values] {
            if capacity == side.capacity() {
                side.move_down(held - kept..held);
            } else {
                *side = side.copied(held - kept..held, capacity);
            }
        }
        self.dropped += held - kept;
    }

    /// Shrinks to a window after a pass that brought much more than one.
    fn settle(&mut self) {
        let Some(window) = self.window else { return };
        if self.keys.capacity() > 3 * (window + GROWTH) {
            let (held, kept) = (self.held(), self.needed());
            let room = (2 * (window - 1 + SPARE)).next_multiple_of(GROWTH);
            for side in [&mut self.keys, &mut self.values] {
                *side = side.copied(held - kept..held, room);
            }
            self.dropped += held - kept;
        }
    }

    /// The rows in use: keys, then values.
    pub(crate) fn rows<E: TensorElement>(&self) -> [Cow<'_, [E]>; 2] {
        [self.keys.read(self.held()), self.values.read(self.held())]
    }

    /// The keys in use for fetching them ahead; none if they are not stored as numbers.
    pub(crate) fn keys_ahead(&self) -> &[f32] {
        let keys = self.keys.as_numbers();
        &keys[..keys.len().min(self.held() * self.keys.width())]
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cache({} tokens, {} bytes)", self.len(), self.bytes())
    }
}

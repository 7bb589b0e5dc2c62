//! The seam through which a fine-tuning method changes the frozen decoder.
//!
//! The decoder knows this trait and nothing else about fine-tuning. For every linear layer, named as
//! in the checkpoint, an adapter says what it adds: an [`Update`], which is data. One place applies it,
//! row by row of a batch, so that the rows of a batch may belong to several adapters.

mod apply;
mod order;
mod update;

pub use crate::site::{Kind, Linear, Site, SiteShape, TensorSite, name_hash};
pub(crate) use apply::{joined, linears};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::{Tensor, Var};
pub(crate) use order::Order;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
pub use update::{
    Choice, CustomLinear, HeadGates, LowRankUpdate, Output, OutputLayer, Reads, Router, Side,
    Update,
};

/// Keys and values of learned positions, each `[p, kv_heads · head_dim]`. The keys are used as they
/// are, without rotation.
#[derive(Clone)]
pub struct KeyValue {
    /// The keys.
    pub keys: Var,
    /// The values, of the same shape.
    pub values: Var,
}

/// What a fine-tuning method may change in the frozen decoder.
pub trait Adapter: Send + Sync {
    /// Says what it does to the layer at `site`, for an input of `rows` rows.
    fn update(&self, site: Site, rows: usize, pass: &Pass<'_>) -> Update<'_> {
        let _ = (site, rows, pass);
        Update::None
    }

    /// Gives the router that serves the whole block of the layer at `site`, if there is one. Its gates
    /// are computed from the input of the first layer of the block that a pass comes to.
    fn block_router(&self, site: Site, pass: &Pass<'_>) -> Option<Router> {
        let _ = (site, pass);
        None
    }

    /// Says whether something is computed once for the whole block of the layer at `site`: by default the
    /// gates of its [router](Self::block_router).
    fn shares_in_block(&self, site: Site, pass: &Pass<'_>) -> bool {
        self.block_router(site, pass).is_some()
    }

    /// Computes it from `x: [T, in]`, the input of the first layer of the block that a pass comes to; layers
    /// of the block that are [custom](Update::Custom) are given it.
    fn of_block(&self, site: Site, x: &Var, pass: &Pass<'_>) -> Var {
        let router = self.block_router(site, pass);
        router.map_or_else(|| x.clone(), |router| router.gates(site, x, pass))
    }

    /// Embeddings `[T, hidden_size]` of `tokens`.
    fn embed(&self, tokens: &[u32], frozen: &FrozenLinear) -> Var {
        Var::constant(frozen.gather(tokens))
    }

    /// Rows `tokens` of a table that the model has beside the embedding, by its name in a checkpoint.
    fn look_up(&self, name: &str, tokens: &[u32], frozen: &FrozenLinear) -> Var {
        let _ = name;
        Var::constant(frozen.gather(tokens))
    }

    /// The weight of a norm, or another tensor that is no linear layer's, at `site`.
    fn tensor<'a>(&'a self, site: TensorSite, frozen: &'a Var) -> &'a Var {
        let _ = site;
        frozen
    }

    /// Says what it does to the output layer for final hidden states `[T, hidden_size]`.
    fn output(&self, hidden: &Var, layer: OutputLayer<'_>, pass: &Pass<'_>) -> Output<'_> {
        let _ = (hidden, layer, pass);
        Output::Frozen
    }

    /// Whether what [`update`](Self::update) does to a row depends on that row alone, so that it may
    /// be given some rows of the batch instead of all.
    fn rows_stand_alone(&self) -> bool {
        false
    }

    /// How many numbers it remembers of every token of a sequence, beside keys and values, for what comes
    /// after; see [`Pass::running_mean`].
    fn remembers(&self) -> usize {
        0
    }

    /// Embeddings `[p, hidden_size]` put before every sequence as if they were tokens; their rows
    /// are taken out of the final hidden states again.
    fn prompt(&self, pass: &Pass<'_>) -> Option<Var> {
        let _ = pass;
        None
    }

    /// Keys and values put before those of every sequence in layer `layer`, the same number in
    /// every layer; tokens then start at position `p`.
    fn prefix(&self, layer: usize, pass: &Pass<'_>) -> Option<KeyValue> {
        let _ = (layer, pass);
        None
    }
}

/// The frozen decoder as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoAdapter;

impl Adapter for NoAdapter {
    fn rows_stand_alone(&self) -> bool {
        true
    }
}

/// Tells whether two adapters are one. Those without a field may lie at one address, so their type counts
/// too; a type that is compiled twice makes two of one, which costs a pass some time and no more.
#[allow(ambiguous_wide_pointer_comparisons)]
pub fn is_same(one: &dyn Adapter, other: &dyn Adapter) -> bool {
    std::ptr::eq(one, other)
}

/// The adapters of a pass: one for all rows, or one for each sequence.
pub(crate) enum Adapters<'a> {
    /// For all rows.
    One(&'a dyn Adapter),
    /// For neighbouring rows each.
    Each(Vec<(Range<usize>, &'a dyn Adapter)>),
}

impl<'a> Adapters<'a> {
    /// One adapter for each packed sequence, neighbours with the same one taken together.
    pub(crate) fn of_sequences(adapters: &[&'a dyn Adapter], offsets: &[usize]) -> Self {
        let mut each: Vec<(Range<usize>, &'a dyn Adapter)> = Vec::new();
        for (&adapter, span) in adapters.iter().zip(offsets.windows(2)) {
            match each.last_mut() {
                Some((rows, last)) if is_same(*last, adapter) => rows.end = span[1],
                _ => each.push((span[0]..span[1], adapter)),
            }
        }
        match each[..] {
            [(_, adapter)] => Self::One(adapter),
            _ => Self::Each(each),
        }
    }

    /// Number, rows and adapter of every group of rows, of `rows` in all.
    pub(crate) fn groups(
        &self,
        rows: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>, &'a dyn Adapter)> {
        let (one, each) = match self {
            Self::One(adapter) => (Some((0..rows, *adapter)), &[][..]),
            Self::Each(each) => (None, &each[..]),
        };
        let all = one.into_iter().chain(each.iter().cloned());
        all.enumerate().map(|(number, (rows, adapter))| (number, rows, adapter))
    }
}

/// Sees the gates of routed adapters as they are computed.
pub trait GateObserver {
    /// `gates: [T, N]`, one row per token of the pass, each summing to 1.
    fn observe(&self, site: Site, gates: &Tensor);
}

/// What of a layer an adapter keeps for a loss term of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aside {
    /// The gates of a router, before they are cut down to the largest.
    Gates,
    /// The scores that they come from.
    Scores,
    /// The low-rank activation `A x`.
    LowRank,
}

/// Where the sequences of a pass lie and what they are about.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// Where each sequence starts, and the total: one entry more than there are sequences.
    pub offsets: &'a [usize],
    /// The domain of each sequence.
    pub domains: &'a [u32],
    /// The cluster of the training data that each sequence is of, [`NO_CLUSTER`] for none; empty where
    /// clusters are not known.
    pub clusters: &'a [u32],
}

/// Stands for the cluster of a sequence that belongs to none.
pub const NO_CLUSTER: u32 = u32::MAX;

impl Sequences<'_> {
    /// Says of each token what `of_sequence` says of its sequence.
    pub fn of_tokens(&self, of_sequence: &[u32]) -> Vec<u32> {
        let lengths = self.offsets.windows(2).map(|span| span[1] - span[0]);
        let each = lengths.zip(of_sequence);
        each.flat_map(|(length, &value)| std::iter::repeat_n(value, length)).collect()
    }
}

/// One run through the decoder: what is the same for all layers of it.
#[derive(Default)]
pub struct Pass<'a> {
    dropout_seed: Option<u64>,
    observer: Option<&'a dyn GateObserver>,
    sequences: Option<Sequences<'a>>,
    checkpointing: bool,
    shared: RefCell<HashMap<(usize, usize, &'static str), Var>>,
    set_aside: RefCell<BTreeMap<(Site, Aside), Var>>,
    order: RefCell<Order>,
    /// Which rows of the pass are computed now; all if not said.
    rows: RefCell<Option<Range<usize>>>,
}

impl<'a> Pass<'a> {
    /// Evaluation: no dropout.
    pub fn inference() -> Self {
        Self::default()
    }

    /// Training: dropout masks are drawn from `seed`, which differs for every micro-batch.
    pub fn training(seed: u64) -> Self {
        Self { dropout_seed: Some(seed), ..Self::default() }
    }

    /// Shows the gates of this pass to `observer`.
    #[must_use]
    pub fn observed_by(mut self, observer: &'a dyn GateObserver) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Says where the sequences of this pass lie and which domain each belongs to.
    #[must_use]
    pub fn of_sequences(mut self, offsets: &'a [usize], domains: &'a [u32]) -> Self {
        self.sequences = Some(Sequences { offsets, domains, clusters: &[] });
        self
    }

    /// Says which cluster of the training data each sequence of this pass is of; after
    /// [`of_sequences`](Self::of_sequences).
    #[must_use]
    pub fn in_clusters(mut self, clusters: &'a [u32]) -> Self {
        if let Some(sequences) = &mut self.sequences {
            sequences.clusters = clusters;
        }
        self
    }

    /// Says whether layers keep only their inputs for the way back and compute the rest again.
    #[must_use]
    pub fn checkpointing(mut self, on: bool) -> Self {
        self.checkpointing = on;
        self
    }

    /// Whether layers keep only their inputs for the way back.
    pub fn keeps_layer_inputs_only(&self) -> bool {
        self.checkpointing
    }

    /// The sequences of this pass, if they were described.
    pub fn sequences(&self) -> Option<Sequences<'a>> {
        self.sequences
    }

    /// Keeps a value an adapter computed at `site` for a loss term of its own.
    pub fn set_aside(&self, site: Site, what: Aside, value: Var) {
        self.set_aside.borrow_mut().insert((site, what), value);
    }

    /// Takes out the values of one kind that were set aside, by site.
    pub fn take_aside(&self, what: Aside) -> BTreeMap<Site, Var> {
        let mut all = self.set_aside.borrow_mut();
        let found = all.extract_if(.., |(_, kind), _| *kind == what);
        found.map(|((site, _), value)| (site, value)).collect()
    }

    /// Takes out all values that were set aside.
    pub(crate) fn take_set_aside(&self) -> BTreeMap<(Site, Aside), Var> {
        self.set_aside.take()
    }

    /// The seed of this pass's dropout masks, if it trains.
    pub fn dropout_seed(&self) -> Option<u64> {
        self.dropout_seed
    }

    /// Reports the gates used at `site`.
    pub fn report_gates(&self, site: Site, gates: &Tensor) {
        if let Some(observer) = self.observer {
            observer.observe(site, gates);
        }
    }

    /// Keeps what was set aside as mere values, without the activations they were computed from.
    pub(crate) fn detach_set_aside(&self) {
        // What was computed before the layers is not computed again.
        let mut all = self.set_aside.borrow_mut();
        for (_, value) in all.iter_mut().filter(|((site, _), _)| !site.linear.outside) {
            *value = value.detach();
        }
    }

    /// Drops the values adapters share within a layer, which is about to be computed again.
    pub(crate) fn forget_shared(&self) {
        self.shared.borrow_mut().clear();
    }

    /// Gives a value computed earlier in this pass for the same layer and name, or `compute`s it now.
    pub fn shared(&self, layer: usize, name: &'static str, compute: impl FnOnce() -> Var) -> Var {
        self.shared_by(0, layer, name, compute)
    }

    /// Gives a value computed earlier in this pass for the same adapter (by its number among those of
    /// the pass), layer and name, or `compute`s it now.
    pub(crate) fn shared_by(
        &self,
        adapter: usize,
        layer: usize,
        name: &'static str,
        compute: impl FnOnce() -> Var,
    ) -> Var {
        let key = (adapter, layer, name);
        if let Some(value) = self.shared.borrow().get(&key) {
            return value.clone();
        }
        let value = compute();
        self.shared.borrow_mut().insert(key, value.clone());
        value
    }
}

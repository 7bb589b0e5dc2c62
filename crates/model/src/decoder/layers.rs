//! The layers of a decoder, and the one loop over them.

use super::Decoder;
use super::modules::{FrozenTensor, Modules};
use crate::adapter::{Adapters, Pass, joined};
use crate::config::RopeConfig;
use crate::family::kit::LayerContext;
use hydralora_kernels::ops::attention::AttentionConfig;
use hydralora_kernels::ops::delta_net::DeltaConfig;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::rms_norm::shifted_rms_norm;
use hydralora_kernels::ops::rope::{Frequencies, Pairs, RopeTable};
use hydralora_kernels::ops::rows::take_rows;
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_runtime::{Stream, announce};
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::OnceLock;

/// One decoder layer.
pub(crate) struct Layer {
    pub(crate) modules: Modules,
    pub(super) attention: AttentionConfig,
    /// Which of the decoder's rotations its queries and keys get.
    pub(super) rope: Option<usize>,
    /// The earlier layer whose keys and values it uses instead of its own.
    pub(super) keys_of: Option<usize>,
    /// Whether a later layer uses its keys and values.
    pub(super) shares_keys: bool,
    /// The delta rule that it has in place of attention, and the taps of its convolution.
    pub(super) recurrent: Option<(DeltaConfig, usize)>,
}

impl Layer {
    pub(crate) fn attention(&self) -> AttentionConfig {
        self.attention
    }

    pub(crate) fn keys_of(&self) -> Option<usize> {
        self.keys_of
    }

    pub(crate) fn recurrent(&self) -> Option<(DeltaConfig, usize)> {
        self.recurrent
    }

    /// Whether it has keys and values of its own.
    pub(super) fn owns_keys(&self) -> bool {
        self.keys_of.is_none() && self.recurrent.is_none()
    }

    pub(crate) fn shares_keys(&self) -> bool {
        self.shares_keys
    }
}

/// Where the keys and values of a pass come from and go to.
pub(crate) trait Attention {
    /// Attends in layer `layer` with the pass's queries, keys and values.
    fn attend(&mut self, layer: usize, config: AttentionConfig, qkv: [Var; 3]) -> Var;

    /// Attends in layer `layer` with the pass's queries to the keys and values that the earlier layer
    /// `owner` had.
    fn attend_again(&mut self, layer: usize, owner: usize, config: AttentionConfig, q: Var) -> Var;

    /// Convolves rows `rows` of the pass in layer `layer`, whole sequences, with `weight: [C, K]`, from the
    /// inputs that came before them.
    fn convolve(&mut self, layer: usize, x: &Var, weight: &Var, rows: Range<usize>) -> Var;

    /// Applies the delta rule in layer `layer`, from the states that the sequences have.
    fn delta(&mut self, layer: usize, config: DeltaConfig, inputs: [&Var; 3]) -> Var;

    /// Keeps the keys and values of layer `layer` for later layers.
    fn share(&mut self, layer: usize, keys: &Var, values: &Var);

    /// Prepares layer `layer` before it runs.
    fn begin(&mut self, layer: usize) {
        let _ = layer;
    }

    /// Whether the pass is bound by reading weights and keys, so that prefetching them pays.
    fn is_bound_by_memory(&self) -> bool {
        false
    }

    /// Gives what attention reads of the keys that layer `layer` holds before the pass.
    fn keys(&self, layer: usize, config: AttentionConfig) -> Stream {
        let _ = (layer, config);
        Stream::default()
    }
}

/// What is kept of a layer's input and output while the next layers run.
pub(crate) trait Keep {
    /// Gives the input that layer `layer` computes with, from what the one before gave.
    fn enter(&mut self, layer: usize, input: Var) -> Var {
        let _ = layer;
        input
    }

    /// Gives what goes on to the next layer, from what layer `layer` computed.
    fn leave(&mut self, layer: usize, output: Var) -> Var {
        let _ = layer;
        output
    }
}

/// Keeps what the graph keeps.
pub(crate) struct KeepGraph;

impl Keep for KeepGraph {}

/// What is the same for all layers of a pass.
pub(crate) struct Forward<'a> {
    pub(crate) adapters: Adapters<'a>,
    pub(crate) pass: &'a Pass<'a>,
    pub(crate) tables: RopeTables,
    /// What the family computed for all layers before the first.
    pub(crate) shared: Option<Var>,
    /// Rows whose output is wanted of the last layer; all if none.
    pub(crate) rows: Option<&'a [usize]>,
}

/// The angles of a pass's positions, a table for every rotation that the decoder has.
pub(crate) struct RopeTables(Vec<Rotated>);

/// The angles of one rotation.
pub(crate) struct Rotated {
    pub(crate) table: RopeTable,
    /// `[T]`, what queries are multiplied by; nothing if none.
    pub(crate) query_factors: Option<Var>,
}

/// A rotation of heads.
pub(super) struct Rotation {
    pub(super) config: RopeConfig,
    pub(super) head_dim: usize,
    pub(super) pairs: Pairs,
    /// Of sequences within the original context.
    pub(super) inverse_frequencies: Vec<f64>,
}

/// Where the rows of a pass stand.
#[derive(Default)]
pub(super) struct Positions {
    /// Of each row.
    pub(super) at: Vec<u32>,
    /// How long each row's sequence is, with what came before this pass.
    pub(super) lengths: Vec<usize>,
}

impl Positions {
    /// Adds neighbouring rows, the last ones of a sequence.
    pub(super) fn add(&mut self, positions: Range<usize>) {
        self.lengths.extend(positions.clone().map(|_| positions.end));
        self.at.extend(positions.map(|position| position as u32));
    }

    /// The same for a sequence that is known to get `expected` positions at least.
    pub(super) fn add_expecting(&mut self, positions: Range<usize>, expected: usize) {
        self.lengths.extend(positions.clone().map(|position| expected.max(position + 1)));
        self.at.extend(positions.map(|position| position as u32));
    }
}

impl Rotation {
    fn rotate(&self, dtype: DType, positions: &Positions) -> Rotated {
        let factor = self.config.factor();
        // Sequences of the same length share their frequencies.
        let mut by_length: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        if self.config.depends_on_length() {
            for &length in &positions.lengths {
                let compute = || self.config.inverse_frequencies(self.head_dim, length);
                by_length.entry(length).or_insert_with(compute);
            }
        }
        let of_row = |row: usize| {
            let own = positions.lengths.get(row).and_then(|length| by_length.get(length));
            Frequencies { inverse: own.unwrap_or(&self.inverse_frequencies), factor }
        };
        let table = RopeTable::new(dtype, &positions.at, self.head_dim, self.pairs, of_row);
        let query_factors = self.config.query_scaling.map(|scaling| {
            let original = scaling.original_max_position_embeddings.max(1) as f64;
            let of = |&at: &u32| 1.0 + scaling.beta * (f64::from(at) / original).floor().ln_1p();
            let factors: Vec<f64> = positions.at.iter().map(of).collect();
            Var::constant(Tensor::from_f64(dtype, &factors, [factors.len()]))
        });
        Rotated { table, query_factors }
    }
}

/// What a pass reads, in order, up to the head: made from the first pass, because the order of a layer's
/// operations is code.
pub(super) type ReadOrder = OnceLock<Vec<Step>>;

/// Something that is read in one loop.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// The weights of linear layers that read the same input.
    Weights(Stream),
    /// Cached keys.
    Keys,
    /// Cached keys of an earlier layer.
    KeysOf(usize),
}

/// Where a pass stands in the order: every loop announces what the one after it reads.
pub(crate) struct Following<'a> {
    order: &'a [Step],
    next: Cell<usize>,
}

impl Following<'_> {
    /// Announces the step after the one that is about to run; `keys` gives what is read of those cached.
    pub(crate) fn advance(&self, keys: impl FnOnce(Option<usize>) -> Stream) {
        let next = self.next.get() + 1;
        self.next.set(next);
        match self.order.get(next) {
            Some(Step::Weights(stream)) => announce(stream),
            Some(Step::Keys) => announce(&keys(None)),
            Some(Step::KeysOf(owner)) => announce(&keys(Some(*owner))),
            None => {}
        }
    }
}

/// Notes the steps of a pass, if they are not known yet.
#[derive(Default)]
pub(crate) struct Recorder {
    steps: Option<RefCell<Vec<Step>>>,
}

impl Recorder {
    /// Adds a step.
    pub(crate) fn note(&self, step: impl FnOnce() -> Step) {
        if let Some(steps) = &self.steps {
            steps.borrow_mut().push(step());
        }
    }
}

/// Normalises rows with the weight that their adapter has for the norm.
pub(crate) fn norm(adapters: &Adapters<'_>, norm: &FrozenTensor, x: &Var, epsilon: f64) -> Var {
    let apply = |[x]: [&Var; 1], weights: &[&Var], _: Range<usize>| {
        [shifted_rms_norm(x, weights[0], norm.shift, epsilon)]
    };
    let [normalised] = by_adapter(adapters, &[norm], [x], apply);
    normalised
}

/// Computes rows from those of `inputs` with the tensors that their adapters have: all at once where the
/// adapters agree. `apply` is given the rows, the tensors, and which rows they are.
pub(crate) fn by_adapter<const I: usize, const O: usize>(
    adapters: &Adapters<'_>,
    tensors: &[&FrozenTensor],
    inputs: [&Var; I],
    mut apply: impl FnMut([&Var; I], &[&Var], Range<usize>) -> [Var; O],
) -> [Var; O] {
    let all = inputs.first().map_or(0, |x| x.value().rows());
    /// The rows of an adapter, and its tensors.
    type Group<'a> = (Range<usize>, SmallVec<[&'a Var; 4]>);
    let mut groups: SmallVec<[Group<'_>; 1]> = SmallVec::new();
    for (_, rows, adapter) in adapters.groups(all) {
        let own = tensors.iter().map(|tensor| adapter.tensor(tensor.site, &tensor.value));
        groups.push((rows, own.collect()));
    }
    let same = |own: &[&Var]| own.iter().zip(&groups[0].1).all(|(a, b)| std::ptr::eq(*a, *b));
    if groups.iter().all(|(_, own)| same(own)) {
        return apply(inputs, &groups[0].1, 0..all);
    }
    let mut parts: [Vec<Var>; O] = std::array::from_fn(|_| Vec::new());
    for (rows, own) in groups {
        let taken: Vec<usize> = rows.clone().collect();
        let inputs = inputs.map(|x| take_rows(x, &taken));
        let outputs = apply(inputs.each_ref(), &own, rows);
        parts.iter_mut().zip(outputs).for_each(|(parts, output)| parts.push(output));
    }
    parts.map(joined)
}

impl Decoder {
    /// The angles of rows at `positions`.
    pub(super) fn rope_tables(&self, positions: &Positions) -> RopeTables {
        RopeTables(self.rotations.iter().map(|of| of.rotate(self.dtype, positions)).collect())
    }

    /// Runs the decoder layers `layers` on hidden states `h`: the only loop over layers.
    pub(super) fn run_layers(
        &self,
        layers: Range<usize>,
        mut h: Var,
        run: &Forward<'_>,
        attention: &mut dyn Attention,
        keep: &mut dyn Keep,
    ) -> Var {
        let whole = layers == (0..self.layers.len());
        let recording = whole && self.read_order.get().is_none();
        let recorder = Recorder { steps: recording.then(RefCell::default) };
        let known = self.read_order.get().filter(|_| whole && attention.is_bound_by_memory());
        let following = known.map(|order| Following { order, next: Cell::new(0) });
        for index in layers {
            attention.begin(index);
            let layer = &self.layers[index];
            let last = index + 1 == self.layers.len();
            let mut context = LayerContext {
                index,
                layer,
                config: &self.config,
                adapters: &run.adapters,
                pass: run.pass,
                rope: layer.rope.map(|rope| &run.tables.0[rope]),
                shared: run.shared.as_ref(),
                attention: &mut *attention,
                rows: run.rows.filter(|_| last),
                recorder: &recorder,
                following: following.as_ref(),
            };
            let output = self.family.forward(&mut context, keep.enter(index, h));
            let output = context.wanted(output);
            h = keep.leave(index, output);
        }
        if let Some(steps) = recorder.steps {
            let mut order = steps.into_inner();
            order.push(Step::Weights(FrozenLinear::stream(&[&self.head])));
            let _ = self.read_order.set(order);
        }
        h
    }

    /// Announces the first layer's weights, which the next token begins with, if there are few `rows`.
    pub(super) fn announce_first(&self, rows: usize) {
        if rows < super::cached::FEW_TOKENS
            && let Some(Step::Weights(stream)) =
                self.read_order.get().and_then(|order| order.first())
        {
            announce(stream);
        }
    }
}

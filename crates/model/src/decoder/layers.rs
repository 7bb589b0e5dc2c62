//! The layers of a decoder, and the one loop over them.

use super::Decoder;
use crate::adapter::{Adapters, Pass, joined};
use crate::config::RopeConfig;
use crate::family::kit::LayerContext;
use crate::site::{Linear, NormSite, Site};
use hydralora_kernels::Var;
use hydralora_kernels::ops::attention::AttentionConfig;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::rms_norm::rms_norm;
use hydralora_kernels::ops::rope::RopeTable;
use hydralora_kernels::ops::rows::take_rows;
use hydralora_runtime::{Stream, announce};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::OnceLock;

/// The frozen weights of one decoder layer.
pub(crate) struct Layer {
    pub(super) linears: Vec<(Site, FrozenLinear)>,
    pub(super) norms: Vec<(NormSite, Var)>,
    pub(super) attention: AttentionConfig,
    /// Which of the decoder's rotations its queries and keys get.
    pub(super) rope: Option<usize>,
}

impl Layer {
    /// The place of a linear layer among those of this decoder layer.
    ///
    /// # Panics
    /// If the family's plan for this layer does not list it.
    pub(crate) fn position(&self, linear: &Linear) -> usize {
        let found = self.linears.iter().position(|(site, _)| site.linear.name == linear.name);
        found.unwrap_or_else(|| panic!("the layer's plan does not list {}", linear.name))
    }

    pub(crate) fn linear(&self, linear: &Linear) -> (Site, &FrozenLinear) {
        let (site, frozen) = &self.linears[self.position(linear)];
        (*site, frozen)
    }

    /// The norm of that name.
    ///
    /// # Panics
    /// If the family's plan for this layer does not list it.
    pub(crate) fn norm(&self, name: &str) -> (NormSite, &Var) {
        let found = self.norms.iter().find(|(site, _)| site.name == name);
        let (site, weight) =
            found.unwrap_or_else(|| panic!("the layer's plan does not list {name}"));
        (*site, weight)
    }

    pub(crate) fn attention(&self) -> AttentionConfig {
        self.attention
    }
}

/// Where the keys and values of a pass come from and go to.
pub(crate) trait Attention {
    /// Attends in layer `layer` with the pass's queries, keys and values.
    fn attend(&mut self, layer: usize, config: AttentionConfig, qkv: [Var; 3]) -> Var;

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
    /// Rows whose output is wanted of the last layer; all if none.
    pub(crate) rows: Option<&'a [usize]>,
}

/// The angles of a pass's positions, a table for every rotation that the decoder has.
pub(crate) struct RopeTables(Vec<RopeTable>);

/// A rotation, and its frequencies.
pub(super) struct Rotation {
    pub(super) config: RopeConfig,
    pub(super) inverse_frequencies: Vec<f64>,
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
}

/// Where a pass stands in the order: every loop announces what the one after it reads.
pub(crate) struct Following<'a> {
    order: &'a [Step],
    next: Cell<usize>,
}

impl Following<'_> {
    /// Announces the step after the one that is about to run; `keys` gives what is read of those cached.
    pub(crate) fn advance(&self, keys: impl FnOnce() -> Stream) {
        let next = self.next.get() + 1;
        self.next.set(next);
        match self.order.get(next) {
            Some(Step::Weights(stream)) => announce(stream),
            Some(Step::Keys) => announce(&keys()),
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

/// Normalises rows with the weight that their adapter has for the norm at `site`.
pub(crate) fn norm(
    adapters: &Adapters<'_>,
    site: NormSite,
    frozen: &Var,
    x: &Var,
    epsilon: f64,
) -> Var {
    let weights = adapters.groups(x.value().rows());
    let weights: Vec<_> =
        weights.map(|(_, rows, adapter)| (rows, adapter.norm(site, frozen))).collect();
    match &weights[..] {
        [(_, weight)] => rms_norm(x, weight, epsilon),
        all if all.iter().all(|(_, weight)| std::ptr::eq(*weight, frozen)) => {
            rms_norm(x, frozen, epsilon)
        }
        all => {
            let part = |(rows, weight): &(Range<usize>, &Var)| {
                let rows: Vec<usize> = rows.clone().collect();
                rms_norm(&take_rows(x, &rows), weight, epsilon)
            };
            joined(all.iter().map(part).collect())
        }
    }
}

impl Decoder {
    /// The angles of `positions`, one per row of the pass.
    pub(super) fn rope_tables(&self, positions: &[u32]) -> RopeTables {
        let of = |rotation: &Rotation| {
            RopeTable::new(self.dtype, positions, &rotation.inverse_frequencies)
        };
        RopeTables(self.rotations.iter().map(of).collect())
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

//! Many continuations of shared beginnings in one pass, each token computed once.
//!
//! A tree's nodes are runs of tokens. A run follows its parent's last token, and a run without a
//! parent follows the tokens of a cache, if one is given: its keys are `cache ++ ancestors ++ own`,
//! so that a question asked behind shared examples, or answered in several ways, costs its own
//! tokens only. Nothing is stored.

use super::layers::{Attention, Forward, KeepGraph, Positions};
use super::lead::Lead;
use super::{Decoder, Packed, check_finite};
use crate::adapter::{Adapter, Adapters, Order, Pass, joined};
use crate::cache::Cache;
use crate::error::{Error, Result};
use hydralora_kernels::ops::attention::{AttentionConfig, Source, attend};
use hydralora_kernels::ops::delta_net::{DeltaConfig, DeltaState, conv_step, delta_step};
use hydralora_kernels::ops::rows::select_rows;
use hydralora_kernels::{Tensor, TensorElement, Var, dispatch, no_grad};
use std::collections::BTreeMap;
use std::ops::Range;

/// Elements of gathered keys that are held at a time.
const GATHERED: usize = 4 << 20;

/// A run of tokens in a [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of tokens, at least one.
    pub len: usize,
    /// The run it follows, an earlier one of the tree.
    pub parent: Option<usize>,
}

/// Runs of tokens, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Tree<'a> {
    /// Token ids of all runs.
    pub tokens: &'a [u32],
    /// The runs that tile `tokens`.
    pub runs: &'a [Run],
}

/// Where the runs lie: rows in the packed tokens, and how many positions end with each.
struct Layout<'a> {
    runs: &'a [Run],
    rows: Vec<Range<usize>>,
    ends: Vec<usize>,
    past: usize,
}

impl<'a> Layout<'a> {
    fn new(tree: Tree<'a>, past: usize) -> Self {
        let mut rows: Vec<Range<usize>> = Vec::with_capacity(tree.runs.len());
        let mut ends = Vec::with_capacity(tree.runs.len());
        for (index, run) in tree.runs.iter().enumerate() {
            let first = rows.last().map_or(0, |rows| rows.end);
            rows.push(first..first + run.len);
            let before = run.parent.map_or(past, |parent| {
                assert!(parent < index, "a run follows an earlier one");
                ends[parent]
            });
            ends.push(before + run.len);
        }
        let total = rows.last().map_or(0, |rows| rows.end);
        assert_eq!(total, tree.tokens.len(), "runs tile the tokens");
        Self { runs: tree.runs, rows, ends, past }
    }

    /// Where the rows stand; the longest branch counts as the length of all, which share keys.
    fn positions(&self) -> Positions {
        let mut positions = Positions::default();
        for (rows, end) in self.rows.iter().zip(&self.ends) {
            positions.add(end - rows.len()..*end);
        }
        let longest = self.ends.iter().copied().max().unwrap_or(0);
        positions.lengths.fill(longest);
        positions
    }

    /// The runs before and including `run`, from the first on.
    fn chain(&self, run: usize) -> Vec<usize> {
        let mut chain = vec![run];
        let mut at = run;
        while let Some(parent) = self.runs[at].parent {
            chain.push(parent);
            at = parent;
        }
        chain.reverse();
        chain
    }

    /// `cache ++ ancestors ++ own` rows of `width` for one run.
    fn gather<E: TensorElement>(
        &self,
        run: usize,
        cached: &[E],
        new: &[E],
        width: usize,
    ) -> Vec<E> {
        let mut all = Vec::with_capacity(self.ends[run] * width);
        all.extend_from_slice(cached);
        for link in self.chain(run) {
            let rows = &self.rows[link];
            all.extend_from_slice(&new[rows.start * width..rows.end * width]);
        }
        all
    }
}

impl Decoder {
    /// Final hidden states `[T, hidden_size]` of the tokens of `tree`, behind the tokens in
    /// `cache`, which stays as it is.
    ///
    /// # Errors
    /// If a run is empty, a branch is longer than the context, a token id is out of range, or the
    /// adapter puts learned positions before every sequence and there is no cache that holds them.
    pub fn hidden_tree(
        &self,
        tree: Tree<'_>,
        cache: Option<&Cache>,
        adapter: &dyn Adapter,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        let _guard = no_grad();
        let past = cache.map_or(0, Cache::rows);
        if past == 0 && self.lead_rows(adapter, pass) > 0 {
            return Err(Error::LeadNeedsCache);
        }
        let layout = Layout::new(tree, past);
        let limit = self.config.context_length();
        for (sequence, (run, &length)) in tree.runs.iter().zip(&layout.ends).enumerate() {
            if run.len == 0 {
                return Err(Error::EmptySequence { sequence });
            }
            if length > limit {
                return Err(Error::ContextExceeded { sequence, length, limit });
            }
        }
        self.validate_tokens(tree.tokens)?;
        let tables = self.rope_tables(&layout.positions());
        let h = self.embed(adapter, tree.tokens);
        let adapters = Adapters::One(adapter);
        let batch = Packed { tokens: tree.tokens, offsets: &[0, tree.tokens.len()] };
        let reached = cache.map(|cache| cache.history().reached()).unwrap_or_default();
        pass.follow(Order::tree(&layout.rows, layout.runs, &reached));
        let shared = self.shared(&adapters, pass, batch, (0, &[true]), &h);
        let run = Forward { adapters, pass, tables, shared, rows: None };
        let mut attention = TreeAttention {
            layout: &layout,
            cache,
            shared: BTreeMap::new(),
            states: Vec::new(),
            empty: self.layers.iter().map(|layer| self.empty_state(layer)).collect(),
        };
        let h = self.run_layers(0..self.layers.len(), h, &run, &mut attention, &mut KeepGraph);
        let hidden = self.final_norm(&h, &run.adapters).into_value();
        check_finite(&hidden)?;
        Ok(hidden)
    }

    /// Number of learned positions that `adapter` puts before every sequence.
    pub fn lead_rows(&self, adapter: &dyn Adapter, pass: &Pass<'_>) -> usize {
        Lead::of(adapter, self.layers.len(), pass).rows()
    }
}

/// Attention of every run to the cache, its ancestors and itself.
struct TreeAttention<'a> {
    layout: &'a Layout<'a>,
    cache: Option<&'a Cache>,
    /// Keys and values of this pass that later layers use again, by layer.
    shared: BTreeMap<usize, [Var; 2]>,
    /// What the runs leave behind in the layer that keeps a state and runs now.
    states: Vec<DeltaState>,
    /// The state before the first token of each layer that keeps one.
    empty: Vec<Option<DeltaState>>,
}

impl Attention for TreeAttention<'_> {
    fn attend(&mut self, layer: usize, config: AttentionConfig, [q, k, v]: [Var; 3]) -> Var {
        self.attend_to(layer, config, [&q, &k, &v])
    }

    fn convolve(&mut self, layer: usize, x: &Var, weight: &Var, _rows: Range<usize>) -> Var {
        self.states.clear();
        let mut parts = Vec::with_capacity(self.layout.runs.len());
        for (run, rows) in self.layout.runs.iter().zip(&self.layout.rows) {
            let mut state = match (run.parent, self.cache) {
                (Some(parent), _) => self.states[parent].clone(),
                (None, Some(cache)) => cache.state(layer).clone(),
                (None, None) => self.empty[layer].clone().unwrap_or_else(|| {
                    panic!("layer {layer} keeps no state");
                }),
            };
            let x = some_rows(x.value(), rows);
            parts.push(conv_step(&x, weight.value(), &[0, rows.len()], &mut [&mut state]));
            self.states.push(state);
        }
        joined(parts.into_iter().map(Var::constant).collect())
    }

    fn delta(&mut self, _layer: usize, config: DeltaConfig, inputs: [&Var; 3]) -> Var {
        let mut parts = Vec::with_capacity(self.layout.runs.len());
        for (index, (run, rows)) in self.layout.runs.iter().zip(&self.layout.rows).enumerate() {
            if let Some(parent) = run.parent {
                self.states[index].recurrent = self.states[parent].recurrent.clone();
            }
            let [qkv, decay, beta] = inputs.map(|x| some_rows(x.value(), rows));
            let state = &mut self.states[index];
            let offsets = [0, rows.len()];
            parts.push(delta_step(&qkv, &decay, &beta, config, &offsets, &mut [state]));
        }
        joined(parts.into_iter().map(Var::constant).collect())
    }

    fn share(&mut self, layer: usize, keys: &Var, values: &Var) {
        self.shared.insert(layer, [keys.clone(), values.clone()]);
    }

    fn attend_again(
        &mut self,
        _layer: usize,
        owner: usize,
        config: AttentionConfig,
        q: Var,
    ) -> Var {
        let [k, v] = &self.shared[&owner];
        self.attend_to(owner, config, [&q, k, v])
    }
}

impl TreeAttention<'_> {
    /// Attends to what layer `owner` has cached, and to keys and values of this pass.
    fn attend_to(&self, owner: usize, config: AttentionConfig, [q, k, v]: [&Var; 3]) -> Var {
        let Self { layout, cache, .. } = self;
        let (q, k, v) = (q.value(), k.value(), v.value());
        let (width, kv_width) = (q.cols(), k.cols());
        let mut out = Tensor::zeros(q.dtype(), q.shape());
        dispatch!(q.dtype(), |E| {
            let (queries, keys, values) = (q.data::<E>(), k.data::<E>(), v.data::<E>());
            let stored = cache.map(|cache| cache.layer(owner).rows::<E>());
            let [cached_keys, cached_values] = match &stored {
                Some([keys, values]) => [&keys[..], &values[..]],
                None => [&[][..]; 2],
            };
            let mut left = out.data_mut::<E>();
            let mut first = 0;
            while first < layout.runs.len() {
                // As many runs at a time as their gathered keys allow.
                let mut gathered = Vec::new();
                let mut held = 0;
                let mut last = first;
                while last < layout.runs.len() && (last == first || held < GATHERED) {
                    let alone = layout.past == 0 && layout.runs[last].parent.is_none();
                    gathered.push((!alone).then(|| {
                        held += 2 * layout.ends[last] * kv_width;
                        (
                            layout.gather(last, cached_keys, keys, kv_width),
                            layout.gather(last, cached_values, values, kv_width),
                        )
                    }));
                    last += 1;
                }
                let sources: Vec<Source<'_, E>> = (first..last)
                    .zip(&gathered)
                    .map(|(run, gathered)| {
                        let rows = &layout.rows[run];
                        let own = rows.start * kv_width..rows.end * kv_width;
                        let (keys, values) = match gathered {
                            Some((keys, values)) => (&keys[..], &values[..]),
                            None => (&keys[own.clone()], &values[own]),
                        };
                        let queries = &queries[rows.start * width..rows.end * width];
                        Source { queries, keys, values }
                    })
                    .collect();
                let rows = layout.rows[last - 1].end - layout.rows[first].start;
                let (here, rest) = std::mem::take(&mut left).split_at_mut(rows * width);
                attend(&sources, here, config);
                left = rest;
                first = last;
            }
        });
        Var::constant(out)
    }
}

fn some_rows(x: &Tensor, rows: &Range<usize>) -> Tensor {
    select_rows(x, &rows.clone().collect::<Vec<_>>())
}

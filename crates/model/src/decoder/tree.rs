//! Many continuations of shared beginnings in one pass, each token computed once.
//!
//! A tree's nodes are runs of tokens. A run follows its parent's last token, and a run without a
//! parent follows the tokens of a cache, if one is given: its keys are `cache ++ ancestors ++ own`,
//! so that a question asked behind shared examples, or answered in several ways, costs its own
//! tokens only. Nothing is stored.

use super::layers::{Attention, Forward, KeepGraph};
use super::lead::Lead;
use super::{Decoder, check_finite};
use crate::adapter::{Adapter, Adapters, Pass};
use crate::cache::Cache;
use crate::error::{Error, Result};
use hydralora_kernels::ops::attention::{AttentionConfig, Source, attend};
use hydralora_kernels::{Tensor, TensorElement, Var, dispatch, no_grad};
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

    fn positions(&self) -> Vec<u32> {
        let of_run = |(rows, end): (&Range<usize>, &usize)| end - rows.len()..*end;
        self.rows.iter().zip(&self.ends).flat_map(of_run).map(|p| p as u32).collect()
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
        let limit = self.config.max_position_embeddings;
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
        let run = Forward { adapters: Adapters::One(adapter), pass, tables, rows: None };
        let h = adapter.embed(tree.tokens, &self.embedding);
        let mut attention = TreeAttention { layout: &layout, cache };
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
}

impl Attention for TreeAttention<'_> {
    fn attend(&mut self, layer: usize, config: AttentionConfig, [q, k, v]: [Var; 3]) -> Var {
        let Self { layout, cache } = self;
        let (q, k, v) = (q.value(), k.value(), v.value());
        let (width, kv_width) = (q.cols(), k.cols());
        let mut out = Tensor::zeros(q.dtype(), q.shape());
        dispatch!(q.dtype(), |E| {
            let (queries, keys, values) = (q.data::<E>(), k.data::<E>(), v.data::<E>());
            let cached = cache.map_or((&[][..], &[][..]), |cache| cache.layer(layer).rows::<E>());
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
                            layout.gather(last, cached.0, keys, kv_width),
                            layout.gather(last, cached.1, values, kv_width),
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

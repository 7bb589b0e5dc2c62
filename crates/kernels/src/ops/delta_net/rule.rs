//! The gated delta rule as a differentiable operation over packed sequences.

use super::chunk::{self, Carried, HeadGradients, Rows, Source};
use super::{DeltaConfig, check_offsets};
use crate::buffer::Buffer;
use crate::dispatch;
use crate::graph::{Saved, Var};
use crate::simd::rows_per_task;
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks_mut, for_each, map_in_order};
use std::cmp::Reverse;
use std::ops::Range;

/// The gated delta rule over packed sequences: from `q, k: [T, key_heads · dk]`, which it normalises,
/// `v: [T, value_heads · dv]`, and `decay` (`g`, a logarithm) and `beta`, both `[T, value_heads]`, the reads
/// `[T, value_heads · dv]`. Gradients for all five.
///
/// `initial` has, for every sequence, the state `[value_heads, dk, dv]` before its first row, or none where
/// that is zero; an empty slice if all are. A sequence's result does not depend on the others.
///
/// Its backward keeps the arguments and computes everything else again; an argument that can be recomputed
/// is not kept.
///
/// # Panics
/// If the extents disagree.
pub fn gated_delta_rule(
    q: &Var,
    k: &Var,
    v: &Var,
    decay: &Var,
    beta: &Var,
    config: DeltaConfig,
    offsets: &[usize],
    initial: &[Option<Tensor>],
) -> Var {
    let rule = Rule::new(config, offsets, initial, [decay, beta]);
    let widths = [config.key_width(), config.key_width(), config.value_width()];
    for (of, width) in [q, k, v].into_iter().zip(widths) {
        assert_eq!(of.value().shape(), [rule.rows(), width], "queries, keys or values");
    }
    let value = rule.forward([q, k, v].map(|x| (x.value(), 0)));
    let kept = [q, k, v].map(Var::save);
    Var::computed(value, &[q, k, v, decay, beta], move |gradient, parents| {
        let kept = kept.each_ref().map(Saved::get);
        let given = kept.each_ref().map(|x| (x, 0));
        dispatch!(gradient.dtype(), |E| {
            let sums = rule.backward::<E>(given, &gradient);
            for (index, width) in widths.into_iter().enumerate() {
                let part = rule.of(&sums, index, 0);
                parents.add(index, rule.assemble(width, &[part]));
            }
            rule.add_gates(&sums, parents, 3);
        });
    })
}

/// [`gated_delta_rule`] with `q`, `k` and `v` side by side, as the convolution leaves them:
/// `qkv: [T, 2 · key_heads · dk + value_heads · dv]`.
///
/// # Panics
/// If the extents disagree.
pub fn gated_delta_rule_joined(
    qkv: &Var,
    decay: &Var,
    beta: &Var,
    config: DeltaConfig,
    offsets: &[usize],
    initial: &[Option<Tensor>],
) -> Var {
    let rule = Rule::new(config, offsets, initial, [decay, beta]);
    let width = config.joined_width();
    assert_eq!(qkv.value().shape(), [rule.rows(), width], "queries, keys and values");
    let first = first_columns(&config);
    let value = rule.forward(first.map(|first| (qkv.value(), first)));
    let kept = qkv.save();
    Var::computed(value, &[qkv, decay, beta], move |gradient, parents| {
        let kept = kept.get();
        dispatch!(gradient.dtype(), |E| {
            let sums = rule.backward::<E>(first.map(|first| (&kept, first)), &gradient);
            let parts = [0, 1, 2].map(|index| rule.of(&sums, index, first[index]));
            parents.add(0, rule.assemble(width, &parts));
            rule.add_gates(&sums, parents, 1);
        });
    })
}

/// Where queries, keys and values begin when they are side by side.
pub(super) fn first_columns(config: &DeltaConfig) -> [usize; 3] {
    [0, config.key_width(), 2 * config.key_width()]
}

/// Checks decays and rates, and what the heads are made of.
pub(super) fn check(config: &DeltaConfig, offsets: &[usize], gates: [&Tensor; 2]) {
    let rows = gates[0].rows();
    check_offsets(offsets, rows);
    for gate in gates {
        assert_eq!(gate.shape(), [rows, config.num_value_heads], "one decay and rate a value head");
    }
    let heads = [config.num_key_heads, config.num_value_heads];
    assert!(heads[0] > 0 && heads[1].is_multiple_of(heads[0]), "key heads divide value heads");
    assert!(config.state_len() > 0, "heads have a width");
}

struct Rule {
    config: DeltaConfig,
    offsets: Vec<usize>,
    initial: Vec<Option<Tensor>>,
    decay: Tensor,
    beta: Tensor,
}

/// Some columns of a packed array that were computed sequence by sequence and head by head.
pub(super) struct Columns<'a, E> {
    /// Where those of the first head begin.
    pub(super) first: usize,
    /// How many each head has.
    pub(super) width: usize,
    /// Of every sequence, those of all heads: `[rows, width]` each.
    pub(super) parts: Vec<&'a [E]>,
}

/// Puts columns side by side into an array `[T, width]`, which they fill.
pub(super) fn assemble<E: TensorElement>(
    width: usize,
    offsets: &[usize],
    columns: &[Columns<'_, E>],
) -> Tensor {
    let (rows, sequences) = (offsets.last().copied().unwrap_or(0), offsets.len() - 1);
    let mut out = Buffer::<E>::scratch(rows * width);
    let task = rows_per_task(width);
    for_each(chunks_mut(&mut out, task * width), |block, out| {
        for (row, out) in (block * task..).zip(out.chunks_exact_mut(width)) {
            let sequence = offsets.partition_point(|&first| first <= row) - 1;
            let row = row - offsets[sequence];
            for columns in columns {
                let heads = columns.parts.len() / sequences;
                let parts = &columns.parts[sequence * heads..(sequence + 1) * heads];
                let out = out[columns.first..].chunks_exact_mut(columns.width);
                for (out, part) in out.zip(parts) {
                    out.copy_from_slice(&part[row * columns.width..][..columns.width]);
                }
            }
        }
    });
    Tensor::new(out, [rows, width])
}

/// Arrays and the column at which queries, keys and values begin in them.
type Given<'a> = [(&'a Tensor, usize); 3];

impl Rule {
    fn new(
        config: DeltaConfig,
        offsets: &[usize],
        initial: &[Option<Tensor>],
        [decay, beta]: [&Var; 2],
    ) -> Self {
        let [decay, beta] = [decay, beta].map(|gate| gate.value().clone());
        check(&config, offsets, [&decay, &beta]);
        assert!(
            initial.is_empty() || initial.len() + 1 == offsets.len(),
            "one state per sequence, if there are any"
        );
        for state in initial.iter().flatten() {
            assert_eq!(state.shape(), config.state_shape(), "the state before a sequence");
        }
        Self { config, offsets: offsets.to_vec(), initial: initial.to_vec(), decay, beta }
    }

    fn rows(&self) -> usize {
        self.decay.rows()
    }

    fn source<'a, E: TensorElement>(&'a self, given: Given<'a>) -> Source<'a, E> {
        let [queries, keys, values] = given.map(|(of, first)| Rows::new(of, first));
        let [decay, beta] = [&self.decay, &self.beta].map(|of| Rows::new(of, 0));
        Source { config: self.config, queries, keys, values, decay, beta }
    }

    /// Runs `body(rows, key head, states before)` for all sequences and key heads on all threads, long
    /// sequences first, and returns what it gave, sequence by sequence.
    fn of_heads<'a, E: TensorElement, R: Send>(
        &'a self,
        body: impl Fn(Range<usize>, usize, Option<&'a [E]>) -> R + Sync,
    ) -> Vec<R> {
        let heads = self.config.num_key_heads;
        let rows = |task: usize| self.offsets[task / heads]..self.offsets[task / heads + 1];
        let mut order: Vec<usize> = (0..(self.offsets.len() - 1) * heads).collect();
        order.sort_by_key(|&task| Reverse(rows(task).len()));
        let mut results = map_in_order(&order[..], |_, &task| {
            let (sequence, head) = (task / heads, task % heads);
            let len = self.config.group() * self.config.state_len();
            let state = self.initial.get(sequence).and_then(Option::as_ref);
            let state = state.map(|state| &state.data::<E>()[head * len..(head + 1) * len]);
            (task, body(rows(task), head, state))
        });
        results.sort_unstable_by_key(|(task, _)| *task);
        results.into_iter().map(|(_, result)| result).collect()
    }

    fn forward(&self, given: Given<'_>) -> Tensor {
        let _part = crate::profile::part("delta rule");
        let config = &self.config;
        let width = config.group() * config.value_head_dim;
        dispatch!(self.decay.dtype(), |E| {
            let source = self.source::<E>(given);
            let parts = self.of_heads(|rows, head, initial: Option<&[E]>| {
                let mut states = Buffer::<E>::scratch(config.group() * config.state_len());
                if let Some(initial) = initial {
                    states.copy_from_slice(initial);
                }
                let begun = initial.is_some();
                let carried = Carried { states: &mut states, begun, wanted: false };
                let mut out = Buffer::<E>::scratch(rows.len() * width);
                chunk::forward(&source, &rows, head, carried, &mut out);
                out
            });
            let parts = parts.iter().map(|part| &part[..]).collect();
            assemble(config.value_width(), &self.offsets, &[Columns { first: 0, width, parts }])
        })
    }

    fn backward<E: TensorElement>(
        &self,
        given: Given<'_>,
        gradient: &Tensor,
    ) -> Vec<HeadGradients<E>> {
        let _part = crate::profile::part("delta rule backward");
        let (source, gradient) = (self.source::<E>(given), Rows::new(gradient, 0));
        self.of_heads(|rows, head, initial| {
            chunk::backward(&source, &rows, head, initial, gradient)
        })
    }

    /// The gradients of queries (0), keys (1), values (2), decays (3) or rates (4), in columns from `first`.
    fn of<'a, E: TensorElement>(
        &self,
        sums: &'a [HeadGradients<E>],
        index: usize,
        first: usize,
    ) -> Columns<'a, E> {
        let (dim, group) = (self.config.key_head_dim, self.config.group());
        let width = [dim, dim, group * self.config.value_head_dim, group, group][index];
        let parts = sums
            .iter()
            .map(|sum| &[&sum.queries, &sum.keys, &sum.values, &sum.decay, &sum.beta][index][..]);
        Columns { first, width, parts: parts.collect() }
    }

    fn assemble<E: TensorElement>(&self, width: usize, columns: &[Columns<'_, E>]) -> Tensor {
        assemble(width, &self.offsets, columns)
    }

    /// Adds the gradients of decays and rates, whose parents begin at `first`.
    fn add_gates<E: TensorElement>(
        &self,
        sums: &[HeadGradients<E>],
        parents: &mut crate::graph::ParentGradients<'_>,
        first: usize,
    ) {
        for at in [0, 1] {
            if parents.needs(first + at) {
                let part = self.of(sums, 3 + at, 0);
                parents.add(first + at, self.assemble(self.config.num_value_heads, &[part]));
            }
        }
    }
}

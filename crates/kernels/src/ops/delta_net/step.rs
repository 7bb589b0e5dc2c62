//! The gated delta rule for generation: new tokens of sequences that go on from their states.

use super::chunk::{self, Carried, Rows, Source, normalise};
use super::rule::{Columns, assemble, check, first_columns};
use super::{DeltaConfig, DeltaState};
use crate::buffer::Buffer;
use crate::dispatch;
use crate::simd::{self, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{each_mut, for_each_in_order};
use std::cmp::Reverse;
use std::ops::Range;

/// Tokens from which on taking them together is faster than one by one.
const TOGETHER: usize = 8;

/// [`gated_delta_rule_joined`](super::gated_delta_rule_joined) without a graph: the rows of every sequence
/// go on from its state, one a sequence, which is afterwards that after the last row. However a sequence is
/// cut into calls, the results are the same but for rounding.
///
/// # Panics
/// If the extents disagree.
pub fn delta_step(
    qkv: &Tensor,
    decay: &Tensor,
    beta: &Tensor,
    config: DeltaConfig,
    offsets: &[usize],
    states: &mut [&mut DeltaState],
) -> Tensor {
    let _part = crate::profile::part("delta rule");
    check(&config, offsets, [decay, beta]);
    assert_eq!(qkv.shape(), [decay.rows(), config.joined_width()], "queries, keys and values");
    assert_eq!(states.len() + 1, offsets.len(), "one state per sequence");
    for state in states.iter() {
        assert_eq!(state.recurrent.shape(), config.state_shape(), "the state of a sequence");
    }
    dispatch!(qkv.dtype(), |E| {
        let [queries, keys, values] = first_columns(&config).map(|first| Rows::new(qkv, first));
        let [decay, beta] = [decay, beta].map(|of| Rows::new(of, 0));
        let source = Source::<E> { config, queries, keys, values, decay, beta };
        step(&source, offsets, states)
    })
}

/// One key head of one sequence.
struct Task<'a, E: TensorElement> {
    rows: Range<usize>,
    head: usize,
    /// `[group, dk, dv]`.
    states: &'a mut [E],
    /// `[rows, group · dv]`.
    out: Buffer<E>,
}

fn step<E: TensorElement>(
    source: &Source<'_, E>,
    offsets: &[usize],
    states: &mut [&mut DeltaState],
) -> Tensor {
    let config = &source.config;
    let width = config.group() * config.value_head_dim;
    let mut tasks = Vec::with_capacity(states.len() * config.num_key_heads);
    for (w, state) in offsets.windows(2).zip(states) {
        let of_heads = state.recurrent.data_mut::<E>();
        let of_heads = of_heads.chunks_exact_mut(config.group() * config.state_len());
        tasks.extend(of_heads.enumerate().map(|(head, states)| {
            let out = Buffer::scratch((w[1] - w[0]) * width);
            Task { rows: w[0]..w[1], head, states, out }
        }));
    }
    let mut order: Vec<&mut Task<'_, E>> = tasks.iter_mut().collect();
    order.sort_by_key(|task| Reverse(task.rows.len()));
    for_each_in_order(each_mut(&mut order), |_, task| {
        let Task { rows, head, states, out } = &mut **task;
        if rows.len() < TOGETHER {
            return one_by_one(source, rows, *head, states, out);
        }
        let carried = Carried { states, begun: true, wanted: true };
        chunk::forward(source, rows, *head, carried, out);
    });
    let parts = tasks.iter().map(|task| &task.out[..]).collect();
    assemble(config.value_width(), offsets, &[Columns { first: 0, width, parts }])
}

/// The rule as it is defined, with two passes over the state of a head a token: `Sᵀ k` first, then the
/// new state together with `Sᵀ q`.
fn one_by_one<E: TensorElement>(
    source: &Source<'_, E>,
    rows: &Range<usize>,
    head: usize,
    states: &mut [E],
    out: &mut [E],
) {
    let config = &source.config;
    let (dim, width) = (config.key_head_dim, config.value_head_dim);
    let mut scratch = vec![E::ZERO; 2 * dim + width];
    let (query, scratch) = scratch.split_at_mut(dim);
    let (key, update) = scratch.split_at_mut(dim);
    vectorize(
        #[inline(always)]
        || {
            for (row, out) in rows.clone().zip(out.chunks_exact_mut(config.group() * width)) {
                normalise(source.queries.head(row, head, dim), source.query_length(), query);
                normalise(source.keys.head(row, head, dim), E::ONE, key);
                let states = states.chunks_exact_mut(config.state_len());
                let heads = config.served(head).zip(states.zip(out.chunks_exact_mut(width)));
                for (value_head, (state, out)) in heads {
                    let kept = source.decay.head(row, value_head, 1)[0].exp();
                    let beta = source.beta.head(row, value_head, 1)[0];
                    update.fill(E::ZERO);
                    for (&k, state) in key.iter().zip(state.chunks_exact(width)) {
                        simd::axpy(k, state, update);
                    }
                    let value = source.values.head(row, value_head, width);
                    for (update, &v) in update.iter_mut().zip(value) {
                        *update = beta * (v - kept * *update);
                    }
                    out.fill(E::ZERO);
                    let pairs = query.iter().zip(&*key).zip(state.chunks_exact_mut(width));
                    for ((&q, &k), state) in pairs {
                        for ((s, &update), out) in state.iter_mut().zip(&*update).zip(&mut *out) {
                            *s = kept.mul_add(*s, k * update);
                            *out = q.mul_add(*s, *out);
                        }
                    }
                }
            }
        },
    );
}

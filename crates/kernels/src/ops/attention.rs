//! Causal softmax attention over packed sequences with grouped heads:
//! `o_i = Σ_j softmax_j(s · q_i · k_j) v_j`, `j` up to `i` (and within a window, if there is one), the
//! scores kept below a soft cap if there is one.
//!
//! Queries are taken a block of rows at a time, so memory is a block times the keys and never
//! `T × T`; the backward recomputes the probabilities from the saved log-sum-exp
//! (FlashAttention's bookkeeping, arXiv 2205.14135).

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::{DType, Element};
use crate::graph::Var;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::ops::softcap::Softcap;
use crate::simd::{self, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks_mut, each_mut, for_each, for_each_in_order, map_in_order};
use std::ops::Range;

mod one_query;
mod tiled;

pub use one_query::stream;

/// Query rows per task.
const BLOCK: usize = 64;

/// Head counts and constants of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores, usually `1/√head_dim`.
    pub scale: f64,
    /// How many keys back a query sees, itself included; all if none.
    pub window: Option<usize>,
    /// Bound `c` of the scores, which become `c · tanh(s · q · k / c)` before the softmax (Gemma 2);
    /// none if they stay as they are. Positive.
    pub softcap: Option<f64>,
}

impl AttentionConfig {
    /// The cap of products that lack the scale.
    fn cap_of_products(&self) -> Option<Softcap<f32>> {
        self.softcap.map(|cap| Softcap::new(cap, self.scale))
    }

    /// The cap of scores.
    fn cap_of_scores<E: Element>(&self) -> Option<Softcap<E>> {
        self.softcap.map(|cap| Softcap::new(cap, 1.0))
    }
}

/// Rows of one sequence in the packed queries and in the packed keys.
///
/// When there are more keys than queries, the queries are the last positions of the sequence, as
/// with a cache or a learned prefix.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Query rows.
    pub queries: Range<usize>,
    /// Key and value rows; at least as many.
    pub keys: Range<usize>,
}

/// Spans of packed sequences without earlier keys: `offsets` has one entry more than there are
/// sequences.
pub fn spans(offsets: &[usize]) -> Vec<Span> {
    offsets.windows(2).map(|w| Span { queries: w[0]..w[1], keys: w[0]..w[1] }).collect()
}

/// Attention of `q: [Tq, heads · head_dim]` over `k, v: [Tk, kv_heads · head_dim]`, giving
/// `[Tq, heads · head_dim]`. The spans must tile the query rows in order.
///
/// # Panics
/// If shapes or spans disagree, or if a soft cap is not positive.
pub fn causal_attention(q: &Var, k: &Var, v: &Var, spans: &[Span], config: AttentionConfig) -> Var {
    let _part = crate::profile::part("attention");
    let (queries, keys, values) = (q.value().clone(), k.value().clone(), v.value().clone());
    let rows = queries.rows();
    assert_eq!(queries.cols(), config.num_heads * config.head_dim, "query width");
    assert_eq!(keys.cols(), config.num_key_value_heads * config.head_dim, "key width");
    assert_eq!(keys.shape(), values.shape(), "keys and values differ in shape");
    let mut next = 0;
    for span in spans {
        assert_eq!(span.queries.start, next, "spans tile the queries");
        assert!(span.keys.len() >= span.queries.len() && span.keys.end <= keys.rows(), "key rows");
        next = span.queries.end;
    }
    assert_eq!(next, rows, "spans tile the queries");
    on_device!(attention::causal_attention(q, k, v, spans, config));

    let mut log_sums = Tensor::zeros(queries.dtype(), [rows, config.num_heads]);
    let value = dispatch!(queries.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(queries.len());
        let sources: Vec<Source<'_, E>> = spans
            .iter()
            .map(|span| Source {
                queries: rows_of(&queries, &span.queries),
                keys: rows_of(&keys, &span.keys),
                values: rows_of(&values, &span.keys),
            })
            .collect();
        forward(&sources, &mut out, Some(log_sums.data_mut::<E>()), config);
        Tensor::new(out, queries.shape())
    });
    let spans = spans.to_vec();
    Var::computed(value, &[q, k, v], move |gradient, parents| {
        let given = [&queries, &keys, &values, &log_sums, &gradient];
        let [dq, dk, dv] = match gradient.dtype() {
            DType::F32 => backward::<f32>(
                given,
                &spans,
                config,
                heads_per_task(spans.len(), config),
                tiled::backward_heads,
            ),
            DType::F64 => backward::<f64>(given, &spans, config, 1, backward_head),
        };
        parents.add(0, dq);
        parents.add(1, dk);
        parents.add(2, dv);
    })
}

/// Attention without a graph, where each sequence's keys and values lie in a buffer of their own.
///
/// `out` and the queries are packed in the order of `sources`.
///
/// # Panics
/// If a soft cap is not positive.
pub fn attend<E: TensorElement>(sources: &[Source<'_, E>], out: &mut [E], config: AttentionConfig) {
    let _part = crate::profile::part("attention");
    forward(sources, out, None, config);
}

/// One sequence's queries, keys and values, each row-major over all its heads.
#[derive(Clone, Copy)]
pub struct Source<'a, E> {
    /// `[n, heads · head_dim]`.
    pub queries: &'a [E],
    /// `[m, kv_heads · head_dim]`, `m ≥ n`.
    pub keys: &'a [E],
    /// `[m, kv_heads · head_dim]`.
    pub values: &'a [E],
}

fn rows_of<'a, E: TensorElement>(tensor: &'a Tensor, rows: &Range<usize>) -> &'a [E] {
    &tensor.data::<E>()[rows.start * tensor.cols()..rows.end * tensor.cols()]
}

/// Keys visible to query `row` of a sequence with `past` keys before its first query.
#[inline(always)]
pub(crate) fn visible(row: usize, past: usize, window: Option<usize>) -> Range<usize> {
    let end = past + row + 1;
    window.map_or(0, |window| end.saturating_sub(window))..end
}

fn in_f32<'a, E: TensorElement>(source: &Source<'a, E>) -> Source<'a, f32> {
    Source {
        queries: bytemuck::cast_slice(source.queries),
        keys: bytemuck::cast_slice(source.keys),
        values: bytemuck::cast_slice(source.values),
    }
}

fn forward<E: TensorElement>(
    sources: &[Source<'_, E>],
    out: &mut [E],
    log_sums: Option<&mut [E]>,
    config: AttentionConfig,
) {
    let width = config.num_heads * config.head_dim;
    let kv_width = config.num_key_value_heads * config.head_dim;
    let one_each = || sources.iter().all(|source| source.queries.len() == width);
    if E::DTYPE == DType::F32 && log_sums.is_none() && one_each() {
        let sources: Vec<Source<'_, f32>> = sources.iter().map(in_f32).collect();
        one_query::one_query_each(&sources, bytemuck::cast_slice_mut(out), config);
        return;
    }
    let mut unused;
    let log_sums = match log_sums {
        Some(log_sums) => log_sums,
        None => {
            unused = vec![E::ZERO; out.len() / config.head_dim];
            &mut unused
        }
    };
    let mut tasks = Vec::new();
    let (mut out, mut log_sums) = (out, log_sums);
    for source in sources {
        let rows = source.queries.len() / width;
        for first in (0..rows).step_by(BLOCK) {
            let block = first..(first + BLOCK).min(rows);
            let (out_block, rest) = std::mem::take(&mut out).split_at_mut(block.len() * width);
            out = rest;
            let (sums_block, rest) =
                std::mem::take(&mut log_sums).split_at_mut(block.len() * config.num_heads);
            log_sums = rest;
            tasks.push((source, block, out_block, sums_block));
        }
    }
    let work = |(source, block, ..): &(&Source<'_, E>, Range<usize>, _, _)| {
        block.len() * (source.keys.len() / kv_width - source.queries.len() / width + block.end)
    };
    tasks.sort_by_key(|task| std::cmp::Reverse(work(task)));
    for_each_in_order(each_mut(&mut tasks), |_, (source, block, out, log_sums)| {
        if E::DTYPE == DType::F32 {
            let source = in_f32(source);
            let (out, log_sums) =
                (bytemuck::cast_slice_mut(out), bytemuck::cast_slice_mut(log_sums));
            tiled::forward_block(&source, block, out, log_sums, config);
        } else {
            forward_block(source, block.clone(), out, log_sums, config);
        }
    });
}

/// Scores `s · q kᵀ`, capped if they are to be, of a block of queries against keys `0..key_count` for
/// one head.
fn scores<E: TensorElement>(
    source: &Source<'_, E>,
    block: &Range<usize>,
    head: usize,
    key_count: usize,
    out: &mut [E],
    config: AttentionConfig,
) {
    let (width, dim) = (config.num_heads * config.head_dim, config.head_dim);
    let kv_width = config.num_key_value_heads * dim;
    let kv_head = head / (config.num_heads / config.num_key_value_heads);
    gemm(
        MatMut::new(out, block.len(), key_count),
        Mat::strided(&source.queries[block.start * width + head * dim..], block.len(), dim, width),
        Mat::strided(&source.keys[kv_head * dim..], key_count, dim, kv_width).t(),
        E::from_f64(config.scale),
        Write::Set,
        Threads::One,
    );
    if let Some(cap) = config.cap_of_scores() {
        cap.apply(&mut out[..block.len() * key_count]);
    }
}

fn forward_block<E: TensorElement>(
    source: &Source<'_, E>,
    block: Range<usize>,
    out: &mut [E],
    log_sums: &mut [E],
    config: AttentionConfig,
) {
    let (width, dim) = (config.num_heads * config.head_dim, config.head_dim);
    let kv_width = config.num_key_value_heads * dim;
    let past = source.keys.len() / kv_width - source.queries.len() / width;
    let key_count = past + block.end;
    let mut weights = Buffer::<E>::scratch(block.len() * key_count);
    for head in 0..config.num_heads {
        scores(source, &block, head, key_count, &mut weights, config);
        vectorize(
            #[inline(always)]
            || {
                for (i, row) in weights.chunks_exact_mut(key_count).enumerate() {
                    let seen = visible(block.start + i, past, config.window);
                    row[..seen.start].fill(E::ZERO);
                    row[seen.end..].fill(E::ZERO);
                    let row = &mut row[seen];
                    let peak = simd::max(row);
                    for s in row.iter_mut() {
                        *s = (*s - peak).exp();
                    }
                    let sum = simd::sum_map(row, |x| x);
                    let inverse = E::ONE / sum;
                    for s in row.iter_mut() {
                        *s *= inverse;
                    }
                    log_sums[i * config.num_heads + head] = peak + E::from_f64(sum.to_f64().ln());
                }
            },
        );
        let kv_head = head / (config.num_heads / config.num_key_value_heads);
        gemm(
            MatMut::strided(&mut out[head * dim..], block.len(), dim, width),
            Mat::new(&weights, block.len(), key_count),
            Mat::strided(&source.values[kv_head * dim..], key_count, dim, kv_width),
            E::ONE,
            Write::Set,
            Threads::One,
        );
    }
}

/// Gradients of neighbouring query heads that share keys and values, of one sequence.
struct HeadGradients<E: TensorElement> {
    /// `[rows, heads · head_dim]`.
    dq: Buffer<E>,
    /// `[keys, head_dim]`, the sum over the heads.
    dk: Buffer<E>,
    /// `[keys, head_dim]`, the sum over the heads.
    dv: Buffer<E>,
}

/// Computes the gradients of heads from the output's gradient and log-sums of their sequence.
type BackwardOfHeads<E> =
    fn(&Source<'_, E>, [&[E]; 2], Range<usize>, AttentionConfig) -> HeadGradients<E>;

/// Query heads that one task takes: all that share keys and values, which are then prepared once, if
/// there are tasks enough without taking them apart.
fn heads_per_task(sequences: usize, config: AttentionConfig) -> usize {
    const TASKS_PER_THREAD: usize = 8;
    if sequences * config.num_key_value_heads >= TASKS_PER_THREAD * hydralora_runtime::threads() {
        config.num_heads / config.num_key_value_heads
    } else {
        1
    }
}

/// With `P` the probabilities: `dV = Pᵀ dO`, `dP = dO Vᵀ`, `dS = P ⊙ (dP − Σ_j P_j dP_j)`,
/// `dQ = s dS K`, `dK = s dSᵀ Q`. The sum over keys is `dO · O`, without having kept `O`. Where scores
/// `S` are capped, `dS` is multiplied by `1 − (S / c)²`.
fn backward<E: TensorElement>(
    [q, k, v, log_sums, gradient]: [&Tensor; 5],
    spans: &[Span],
    config: AttentionConfig,
    per_task: usize,
    of_heads: BackwardOfHeads<E>,
) -> [Tensor; 3] {
    let _part = crate::profile::part("attention backward");
    let tasks = config.num_heads / per_task;
    let mut order: Vec<usize> = (0..spans.len() * tasks).collect();
    order.sort_by_key(|task| {
        let span = &spans[task / tasks];
        std::cmp::Reverse(span.queries.len() * span.keys.len())
    });
    let mut parts: Vec<(usize, HeadGradients<E>)> = map_in_order(&order[..], |_, &task| {
        let (span, first) = (&spans[task / tasks], task % tasks * per_task);
        let source = Source {
            queries: rows_of(q, &span.queries),
            keys: rows_of(k, &span.keys),
            values: rows_of(v, &span.keys),
        };
        let given = [rows_of(gradient, &span.queries), rows_of(log_sums, &span.queries)];
        (task, of_heads(&source, given, first..first + per_task, config))
    });
    parts.sort_unstable_by_key(|(task, _)| *task);

    let mut dq = Buffer::<E>::scratch(q.len());
    let [mut dk, mut dv] = [k, v].map(|of| Buffer::<E>::scratch(of.len()));
    let (dim, width, kv_width) = (config.head_dim, q.cols(), k.cols());
    let group = config.num_heads / config.num_key_value_heads;
    // The part of every task that has some of `rows`, whether those of queries or of keys.
    let of_rows = |rows: Range<usize>, of_span: fn(&Span) -> &Range<usize>| {
        parts.iter().filter_map(move |(task, part)| {
            let span = of_span(&spans[task / tasks]);
            let shared = rows.start.max(span.start)..rows.end.min(span.end);
            if shared.is_empty() {
                return None;
            }
            let within = shared.start - span.start..shared.end - span.start;
            Some((task % tasks * per_task, part, within, shared.start - rows.start))
        })
    };
    for_each(chunks_mut(&mut dq, BLOCK * width), |block, dq| {
        let rows = block * BLOCK..block * BLOCK + dq.len() / width;
        for (head, part, within, below) in of_rows(rows, |span| &span.queries) {
            let columns = per_task * dim;
            let from = part.dq[within.start * columns..within.end * columns].chunks_exact(columns);
            for (dq, from) in dq[below * width..].chunks_exact_mut(width).zip(from) {
                dq[head * dim..][..columns].copy_from_slice(from);
            }
        }
    });
    let blocks = (chunks_mut(&mut dk, BLOCK * kv_width), chunks_mut(&mut dv, BLOCK * kv_width));
    for_each(blocks, |block, (dk, dv)| {
        dk.fill(E::ZERO);
        dv.fill(E::ZERO);
        let rows = block * BLOCK..block * BLOCK + dk.len() / kv_width;
        vectorize(
            #[inline(always)]
            || {
                for (head, part, within, below) in of_rows(rows, |span| &span.keys) {
                    for (sum, from) in [(&mut *dk, &part.dk), (&mut *dv, &part.dv)] {
                        let from = from[within.start * dim..within.end * dim].chunks_exact(dim);
                        let sum = sum[below * kv_width..].chunks_exact_mut(kv_width);
                        for (sum, from) in sum.zip(from) {
                            simd::axpy(E::ONE, from, &mut sum[head / group * dim..][..dim]);
                        }
                    }
                }
            },
        );
    });
    [Tensor::new(dq, q.shape()), Tensor::new(dk, k.shape()), Tensor::new(dv, v.shape())]
}

/// The first of `heads`: in double precision a task takes one.
fn backward_head<E: TensorElement>(
    source: &Source<'_, E>,
    [gradient, log_sums]: [&[E]; 2],
    heads: Range<usize>,
    config: AttentionConfig,
) -> HeadGradients<E> {
    let head = heads.start;
    let (width, dim) = (config.num_heads * config.head_dim, config.head_dim);
    let kv_width = config.num_key_value_heads * dim;
    let kv_head = head / (config.num_heads / config.num_key_value_heads);
    let (rows, keys) = (source.queries.len() / width, source.keys.len() / kv_width);
    let past = keys - rows;
    let scale = E::from_f64(config.scale);
    let mut part = HeadGradients {
        dq: Buffer::scratch(rows * dim),
        dk: Buffer::zeros(keys * dim),
        dv: Buffer::zeros(keys * dim),
    };
    let mut p = Buffer::<E>::scratch(BLOCK.min(rows) * keys);
    let mut dp = Buffer::<E>::scratch(BLOCK.min(rows) * keys);
    for first in (0..rows).step_by(BLOCK) {
        let block = first..(first + BLOCK).min(rows);
        let (len, count) = (block.len(), past + block.end);
        scores(source, &block, head, count, &mut p, config);
        let slopes = config.cap_of_scores().map(|cap| cap.slopes(&p[..len * count]));
        let at = block.start * width + head * dim;
        let dy = Mat::strided(&gradient[at..], len, dim, width);
        gemm(
            MatMut::new(&mut dp, len, count),
            dy,
            Mat::strided(&source.values[kv_head * dim..], count, dim, kv_width).t(),
            E::ONE,
            Write::Set,
            Threads::One,
        );
        vectorize(
            #[inline(always)]
            || {
                for i in 0..len {
                    let row = block.start + i;
                    let seen = visible(row, past, config.window);
                    let log_sum = log_sums[row * config.num_heads + head];
                    let p = &mut p[i * count..(i + 1) * count];
                    let dp = &mut dp[i * count..(i + 1) * count];
                    for outside in [0..seen.start, seen.end..count] {
                        p[outside.clone()].fill(E::ZERO);
                        dp[outside].fill(E::ZERO);
                    }
                    let (p, dp) = (&mut p[seen.clone()], &mut dp[seen]);
                    for p in p.iter_mut() {
                        *p = (*p - log_sum).exp();
                    }
                    let along = simd::dot(p, dp);
                    for (&mut p, dp) in p.iter_mut().zip(dp) {
                        *dp = p * (*dp - along);
                    }
                }
            },
        );
        for (i, slopes) in slopes.iter().flat_map(|slopes| slopes.chunks_exact(count)).enumerate() {
            let seen = visible(block.start + i, past, config.window);
            for (ds, &slope) in dp[i * count..][seen.clone()].iter_mut().zip(&slopes[seen]) {
                *ds *= slope;
            }
        }
        let (p, ds) = (Mat::new(&p, len, count), Mat::new(&dp, len, count));
        let queries = Mat::strided(&source.queries[at..], len, dim, width);
        let keys = Mat::strided(&source.keys[kv_head * dim..], count, dim, kv_width);
        let out = MatMut::new(&mut part.dv, count, dim);
        gemm(out, p.t(), dy, E::ONE, Write::Add, Threads::One);
        let out = MatMut::new(&mut part.dk, count, dim);
        gemm(out, ds.t(), queries, scale, Write::Add, Threads::One);
        let out = MatMut::new(&mut part.dq[block.start * dim..], len, dim);
        gemm(out, ds, keys, scale, Write::Set, Threads::One);
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    fn config(num_heads: usize, num_key_value_heads: usize, head_dim: usize) -> AttentionConfig {
        let scale = 1.0 / (head_dim as f64).sqrt();
        AttentionConfig {
            num_heads,
            num_key_value_heads,
            head_dim,
            scale,
            window: None,
            softcap: None,
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let grouped = config(4, 2, 3);
        check::gradients(&[&[6, 12], &[6, 6], &[6, 6]], |x| {
            causal_attention(&x[0], &x[1], &x[2], &spans(&[0, 4, 4, 5, 6]), grouped)
        });
        let windowed = AttentionConfig { window: Some(2), ..grouped };
        check::gradients(&[&[5, 12], &[5, 6], &[5, 6]], |x| {
            causal_attention(&x[0], &x[1], &x[2], &spans(&[0, 5]), windowed)
        });
    }

    #[test]
    fn gradients_through_a_cap_match_finite_differences() {
        let earlier = [Span { queries: 0..2, keys: 0..5 }, Span { queries: 2..3, keys: 5..8 }];
        for softcap in [0.2, 1.0, 50.0] {
            let grouped = AttentionConfig { softcap: Some(softcap), scale: 2.0, ..config(4, 2, 3) };
            let windowed = AttentionConfig { window: Some(2), ..grouped };
            for config in [grouped, windowed] {
                check::gradients(&[&[6, 12], &[6, 6], &[6, 6]], |x| {
                    causal_attention(&x[0], &x[1], &x[2], &spans(&[0, 4, 4, 5, 6]), config)
                });
                check::gradients(&[&[3, 12], &[8, 6], &[8, 6]], |x| {
                    causal_attention(&x[0], &x[1], &x[2], &earlier, config)
                });
            }
        }
    }

    #[test]
    fn gradients_reach_keys_before_the_first_query() {
        let spans = [Span { queries: 0..2, keys: 0..5 }, Span { queries: 2..3, keys: 5..8 }];
        check::gradients(&[&[3, 4], &[8, 2], &[8, 2]], |x| {
            causal_attention(&x[0], &x[1], &x[2], &spans, config(2, 1, 2))
        });
    }

    #[test]
    fn long_sequences_cross_blocks_correctly() {
        let plain = config(2, 1, 4);
        for config in [plain, AttentionConfig { softcap: Some(0.3), ..plain }] {
            matches_the_definition(config);
        }
    }

    fn matches_the_definition(config: AttentionConfig) {
        let n = 2 * BLOCK + 7;
        let x = check::inputs(&[&[n, 8], &[n, 4], &[n, 4]]);
        let y = causal_attention(&x[0], &x[1], &x[2], &spans(&[0, n]), config);
        let capped = |score: f64| config.softcap.map_or(score, |cap| cap * (score / cap).tanh());
        let [q, k, v] = [0, 1, 2].map(|i: usize| x[i].value().to_f64());
        let y = y.value().to_f64();
        for head in 0..2 {
            for i in 0..n {
                let weights: Vec<f64> = (0..=i)
                    .map(|j| {
                        let dot: f64 = (0..4).map(|d| q[i * 8 + head * 4 + d] * k[j * 4 + d]).sum();
                        capped(dot * config.scale).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for d in 0..4 {
                    let expected: f64 = (0..=i).map(|j| weights[j] / total * v[j * 4 + d]).sum();
                    assert!((expected - y[i * 8 + head * 4 + d]).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn f32_agrees_with_f64() {
        let n = 150;
        check::f32_agrees(&[&[n, 12], &[n, 6], &[n, 6]], 1e-5, |x| {
            causal_attention(&x[0], &x[1], &x[2], &spans(&[0, 70, n]), config(4, 2, 3))
        });
    }

    #[test]
    fn a_window_in_a_long_sequence_agrees_with_f64() {
        let windowed = AttentionConfig { window: Some(40), ..config(4, 2, 3) };
        let spans = [
            Span { queries: 0..520, keys: 0..520 },
            // Keys before the first query, of which it sees none of the first stretches.
            Span { queries: 520..600, keys: 520..1050 },
        ];
        check::f32_agrees(&[&[600, 12], &[1050, 6], &[1050, 6]], 1e-5, |x| {
            causal_attention(&x[0], &x[1], &x[2], &spans, windowed)
        });
    }

    /// Several sequences, few and many queries, keys before the first of them, and a window or none.
    fn of_every_kind(f: impl Fn(&[Span], AttentionConfig)) {
        let all = [
            spans(&[0, 70, 72, 72, 700]),
            vec![
                Span { queries: 0..520, keys: 0..520 },
                Span { queries: 520..523, keys: 520..980 },
                Span { queries: 523..700, keys: 980..1500 },
            ],
        ];
        for spans in &all {
            for window in [None, Some(40)] {
                f(spans, AttentionConfig { window, ..config(4, 2, 3) });
            }
        }
    }

    const OF_EVERY_KIND: [&[usize]; 3] = [&[700, 12], &[1500, 6], &[1500, 6]];

    #[test]
    fn capped_scores_in_f32_agree_with_f64() {
        of_every_kind(|spans, config| {
            for softcap in [0.05, 1.0, 50.0] {
                let config = AttentionConfig { softcap: Some(softcap), scale: 3.0, ..config };
                check::f32_agrees(&OF_EVERY_KIND, 1e-5, |x| {
                    causal_attention(&x[0], &x[1], &x[2], spans, config)
                });
            }
        });
    }

    fn run(dtype: DType, spans: &[Span], config: AttentionConfig) -> [Vec<f64>; 4] {
        let x: Vec<Var> = check::inputs(&OF_EVERY_KIND)
            .iter()
            .map(|x| Var::leaf(x.value().to_dtype(dtype)))
            .collect();
        let y = causal_attention(&x[0], &x[1], &x[2], spans, config);
        let gradients = y.backward_from(x[0].value().clone());
        let [dq, dk, dv] = [0, 1, 2].map(|i: usize| gradients.get(&x[i]).unwrap().to_f64());
        [y.value().to_f64(), dq, dk, dv]
    }

    #[test]
    fn a_cap_far_above_the_scores_changes_nothing() {
        of_every_kind(|spans, config| {
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-10)] {
                let expected = run(dtype, spans, config);
                for softcap in [1e6, f64::MAX] {
                    let config = AttentionConfig { softcap: Some(softcap), ..config };
                    for (expected, got) in expected.iter().zip(run(dtype, spans, config)) {
                        for (expected, got) in expected.iter().zip(got) {
                            assert!((expected - got).abs() < tolerance * (1.0 + expected.abs()));
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn a_cap_that_cuts_everything_off_gives_the_mean() {
        of_every_kind(|spans, config| {
            let values = check::inputs(&OF_EVERY_KIND)[2].value().to_f64();
            for dtype in [DType::F32, DType::F64] {
                for softcap in [f64::MIN_POSITIVE, 1e-8] {
                    let config = AttentionConfig { softcap: Some(softcap), ..config };
                    let [y, dq, dk, dv] = run(dtype, spans, config);
                    assert!([dk, dv].iter().flatten().all(|x| x.is_finite()));
                    assert!(dq.iter().all(|x| x.abs() < 1e-3));
                    let last = spans.last().unwrap();
                    let past = last.keys.len() - last.queries.len();
                    let seen = visible(last.queries.len() - 1, past, config.window);
                    let rows = last.keys.start + seen.start..last.keys.start + seen.end;
                    let mean =
                        rows.clone().map(|row| values[row * 6]).sum::<f64>() / rows.len() as f64;
                    assert!((y[(last.queries.end - 1) * 12] - mean).abs() < 1e-5);
                }
            }
        });
    }

    /// A weight of zero times a value that is no number is no number, so keys that spoil no result
    /// were not read.
    #[test]
    fn keys_that_a_window_hides_are_not_read() {
        let (n, window) = (700, 30);
        let windowed = AttentionConfig { window: Some(window), ..config(2, 1, 4) };
        for softcap in [None, Some(0.5)] {
            hidden_keys_are_not_read(n, window, AttentionConfig { softcap, ..windowed });
        }
    }

    fn hidden_keys_are_not_read(n: usize, window: usize, windowed: AttentionConfig) {
        let x: Vec<Tensor> = check::inputs(&[&[n, 8], &[n, 4], &[n, 4]])
            .iter()
            .map(|x| x.value().to_dtype(DType::F32))
            .collect();
        let run = |x: &[Tensor]| {
            let x: Vec<Var> = x.iter().cloned().map(Var::leaf).collect();
            let y = causal_attention(&x[0], &x[1], &x[2], &spans(&[0, n]), windowed);
            let gradients = y.backward_from(x[0].value().clone());
            (y.value().to_f32(), gradients.get(&x[0]).unwrap().to_f32())
        };
        let (clean, clean_gradient) = run(&x);
        let mut spoilt = x.clone();
        for side in &mut spoilt[1..] {
            side.data_mut::<f32>()[..384 * 4].fill(f32::NAN);
        }
        let (y, gradient) = run(&spoilt);
        // The first block whose queries see none of the first two stretches.
        let first = (384 + window).next_multiple_of(BLOCK) * 8;
        assert_eq!(y[first..], clean[first..]);
        assert_eq!(gradient[first..], clean_gradient[first..]);
        assert!(y[380 * 8].is_nan());
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        // So many sequences that one thread takes heads together which three take apart.
        let n = 200;
        let spans = spans(&[0, 70, 71, 100, 130, n]);
        let grouped = config(4, 2, 3);
        let of_threads = |threads: usize| {
            let pool = hydralora_runtime::Pool::new(threads);
            pool.enter(|| heads_per_task(spans.len(), grouped))
        };
        assert_eq!([of_threads(1), of_threads(3)], [2, 1]);
        let run = |threads: usize| {
            let pool = hydralora_runtime::Pool::new(threads);
            pool.enter(|| {
                let x: Vec<Var> = check::inputs(&[&[n, 12], &[n, 6], &[n, 6]])
                    .iter()
                    .map(|x| Var::leaf(x.value().to_dtype(DType::F32)))
                    .collect();
                let y = causal_attention(&x[0], &x[1], &x[2], &spans, grouped);
                let g = y.backward_from(y.value().clone());
                let gradients: Vec<Vec<f64>> =
                    x.iter().map(|x| g.get(x).unwrap().to_f64()).collect();
                (y.value().to_f64(), gradients)
            })
        };
        assert_eq!(run(1), run(3));
    }
}

//! Attention of one query per sequence, as in decoding. Keys and values are read once, a block of
//! positions after the other for all heads together, because that is how they lie in memory; the sums
//! of the blocks are put together at the end (FlashAttention's bookkeeping, arXiv 2205.14135). How keys
//! are cut into blocks depends on their number alone.

use super::{AttentionConfig, Source, visible};
use crate::buffer::Buffer;
use crate::element::Element;
use crate::ops::frozen_linear::few::{self, Rows, float};
use crate::simd::{self, vectorize};
use hydralora_runtime::{Stream, each_mut, for_each};
use std::ops::Range;

/// Positions of a block where there are neither few nor very many.
const USUAL: usize = 64;
/// Most blocks of a sequence.
const MOST_BLOCKS: usize = 64;

/// What a block of positions contributes to the heads of a query.
struct Task<'a> {
    source: &'a Source<'a, f32>,
    positions: Range<usize>,
    partial: Partial<'a>,
}

/// Sums over some positions.
struct Partial<'a> {
    /// The largest score of each head, times the scale.
    peaks: &'a mut [f32],
    /// `Σ exp(score − peak)` of each head.
    sums: &'a mut [f32],
    /// `Σ exp(score − peak) · value`, `[heads, head_dim]`.
    values: &'a mut [f32],
}

impl<'a> Partial<'a> {
    /// Room of `heads · (head_dim + 2)` numbers, divided.
    fn of(room: &'a mut [f32], heads: usize) -> Self {
        let (peaks, room) = room.split_at_mut(heads);
        let (sums, values) = room.split_at_mut(heads);
        Self { peaks, sums, values }
    }
}

/// Positions that a block of `seen` has: an even number of blocks, so that two threads have as much to
/// do each.
fn block_len(seen: usize) -> usize {
    let blocks = seen.div_ceil(USUAL).next_multiple_of(2).clamp(2, MOST_BLOCKS);
    seen.div_ceil(blocks).next_multiple_of(8)
}

/// Positions that the only query of a sequence with `keys` keys sees.
fn seen(keys: usize, config: AttentionConfig) -> Range<usize> {
    visible(0, keys - 1, config.window)
}

/// What [`attend`](super::attend) reads of the earlier `keys` of a sequence whose next token is the only
/// one it brings, for [`announce`](hydralora_runtime::announce).
pub fn stream(keys: &[f32], config: AttentionConfig) -> Stream {
    let width = config.num_key_value_heads * config.head_dim;
    let seen = seen(keys.len() / width + 1, config);
    let block = block_len(seen.len()) * width;
    let keys = &keys[seen.start * width..keys.len().min(seen.end * width)];
    Stream::new([(bytemuck::cast_slice(keys), block * size_of::<f32>())])
}

/// Attention of every source's only query: `out: [sources, heads · head_dim]`.
pub(super) fn one_query_each(
    sources: &[Source<'_, f32>],
    out: &mut [f32],
    config: AttentionConfig,
) {
    let (heads, dim) = (config.num_heads, config.head_dim);
    let kv_width = config.num_key_value_heads * dim;
    let positions = |source: &Source<'_, f32>| {
        let seen = seen(source.keys.len() / kv_width, config);
        let block = block_len(seen.len());
        let last = seen.end;
        seen.step_by(block).map(move |first| first..last.min(first + block))
    };
    let blocks: usize = sources.iter().map(|source| positions(source).len()).sum();
    let of_block = heads * (dim + 2);
    let mut room = Buffer::<f32>::scratch(blocks * of_block);
    let mut tasks: Vec<Task<'_>> = (sources.iter())
        .flat_map(|source| positions(source).map(move |positions| (source, positions)))
        .zip(room.chunks_exact_mut(of_block))
        .map(|((source, positions), room)| Task {
            source,
            positions,
            partial: Partial::of(room, heads),
        })
        .collect();
    for_each(each_mut(&mut tasks), |_, task| task.run(config));
    let mut rest = &mut tasks[..];
    for (source, out) in sources.iter().zip(out.chunks_exact_mut(heads * dim)) {
        let (own, others) = rest.split_at_mut(positions(source).len());
        rest = others;
        vectorize(
            #[inline(always)]
            || put_together(own, out, dim),
        );
    }
}

/// `Σ_b e^(peak_b − peak) values_b / Σ_b e^(peak_b − peak) sum_b` of every head.
#[inline(always)]
fn put_together(blocks: &[Task<'_>], out: &mut [f32], dim: usize) {
    let heads = out.len() / dim;
    let mut room = vec![0.0_f32; 3 * heads];
    let (peaks, room) = room.split_at_mut(heads);
    let (sums, factors) = room.split_at_mut(heads);
    peaks.fill(f32::NEG_INFINITY);
    for Task { partial, .. } in blocks {
        for (peak, &of_block) in peaks.iter_mut().zip(&*partial.peaks) {
            *peak = peak.max(of_block);
        }
    }
    out.fill(0.0);
    for Task { partial, .. } in blocks {
        // All heads at once, with wide instructions.
        for head in 0..heads {
            factors[head] = Element::exp(partial.peaks[head] - peaks[head]);
            sums[head] += factors[head] * partial.sums[head];
        }
        let of_heads = out.chunks_exact_mut(dim).zip(partial.values.chunks_exact(dim));
        for ((out, values), &factor) in of_heads.zip(&*factors) {
            simd::axpy(factor, values, out);
        }
    }
    for (out, sum) in out.chunks_exact_mut(dim).zip(sums) {
        let inverse = 1.0 / *sum;
        out.iter_mut().for_each(|value| *value *= inverse);
    }
}

impl Task<'_> {
    fn run(&mut self, config: AttentionConfig) {
        let dim = config.head_dim;
        let kv_width = config.num_key_value_heads * dim;
        // Heads that share keys and values.
        let group = config.num_heads / config.num_key_value_heads;
        let count = self.positions.len();
        let of_block = self.positions.start * kv_width..self.positions.end * kv_width;
        let (keys, values) = (&self.source.keys[of_block.clone()], &self.source.values[of_block]);
        let of_kv_head = |data, kv_head: usize| {
            let data: &[f32] = data;
            Rows { data: &data[kv_head * dim..], len: dim, stride: kv_width }
        };
        few::fetch(values, 0);
        let mut weights = Buffer::<f32>::zeros(config.num_heads * count);
        let queries = self.source.queries.chunks_exact(group * dim);
        let of_groups = weights.chunks_exact_mut(group * count);
        for (kv_head, (queries, weights)) in queries.zip(of_groups).enumerate() {
            float::add_products_by_row(of_kv_head(keys, kv_head), queries, 0..count, weights);
        }
        let scale = match config.cap_of_products() {
            None => config.scale as f32,
            Some(cap) => {
                cap.apply(&mut weights);
                1.0
            }
        };
        let Partial { peaks, sums, values: out } = &mut self.partial;
        vectorize(
            #[inline(always)]
            || {
                for (head, weights) in weights.chunks_exact_mut(count).enumerate() {
                    let peak = simd::max(weights);
                    for weight in weights.iter_mut() {
                        *weight = Element::exp((*weight - peak) * scale);
                    }
                    peaks[head] = peak * scale;
                    sums[head] = simd::sum_map(weights, |x| x);
                    let out = &mut out[head * dim..(head + 1) * dim];
                    weighted_sum(weights, of_kv_head(values, head / group), out);
                }
            },
        );
    }
}

/// `Σ_j weights[j] · rows[j]`, as many columns as `out` has.
#[inline(always)]
fn weighted_sum(weights: &[f32], rows: Rows<'_, f32>, out: &mut [f32]) {
    /// Columns whose sums stay in registers; with half as many the compiler leaves them in memory.
    const COLUMNS: usize = 64;
    let ahead = rows.bytes_ahead(1);
    let mut first = 0;
    for out in out.chunks_mut(COLUMNS) {
        let mut sums = [0.0_f32; COLUMNS];
        for (&weight, row) in weights.iter().zip(rows.data.chunks(rows.stride)) {
            let row = &row[first..first + out.len()];
            few::fetch(row, ahead);
            match row.first_chunk::<COLUMNS>() {
                Some(row) => {
                    for column in 0..COLUMNS {
                        sums[column] = weight.mul_add(row[column], sums[column]);
                    }
                }
                None => simd::axpy(weight, row, &mut sums),
            }
        }
        out.copy_from_slice(&sums[..out.len()]);
        first += COLUMNS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Var;
    use crate::ops::attention::{Span, attend, causal_attention};
    use crate::tensor::Tensor;

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i + seed) * 7919 + 13) % 1009) as f32 / 252.0 - 2.0).collect()
    }

    /// What it says in the formula, in `f64`.
    fn expected(source: &Source<'_, f32>, config: AttentionConfig) -> Vec<f64> {
        let (dim, width) = (config.head_dim, config.num_key_value_heads * config.head_dim);
        let seen = seen(source.keys.len() / width, config);
        let group = config.num_heads / config.num_key_value_heads;
        let mut out = Vec::new();
        for (head, query) in source.queries.chunks(dim).enumerate() {
            let row = |data: &[f32], position: usize| -> Vec<f64> {
                let start = position * width + head / group * dim;
                data[start..start + dim].iter().map(|&x| f64::from(x)).collect()
            };
            let weight = |position| -> f64 {
                let pairs = query.iter().zip(row(source.keys, position));
                let score = pairs.map(|(&q, k)| f64::from(q) * k).sum::<f64>() * config.scale;
                config.softcap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
            };
            let sum: f64 = seen.clone().map(weight).sum();
            out.extend((0..dim).map(|column| {
                let of = |position| weight(position) * row(source.values, position)[column];
                seen.clone().map(of).sum::<f64>() / sum
            }));
        }
        out
    }

    #[test]
    fn one_query_sees_all_its_keys() {
        let shapes = [
            (9, 3, 16, None, None),
            (9, 3, 16, None, Some(0.4)),
            (4, 4, 70, None, None),
            (8, 2, 64, Some(100), None),
            (8, 2, 64, Some(100), Some(1.5)),
            (2, 1, 256, None, None),
        ];
        for (num_heads, num_key_value_heads, head_dim, window, softcap) in shapes {
            let scale = 1.0 / (head_dim as f64).sqrt();
            let config = AttentionConfig {
                num_heads,
                num_key_value_heads,
                head_dim,
                scale,
                window,
                softcap,
            };
            let width = num_key_value_heads * head_dim;
            // Sequences of one key, of a few, and of so many that their blocks are larger.
            let kept: Vec<_> = [1, 7, 64, 65, 150, 5000]
                .map(|n| [numbers(num_heads * head_dim, n), numbers(n * width, n + 1)])
                .to_vec();
            let sources: Vec<Source<'_, f32>> = (kept.iter())
                .map(|[queries, keys]| Source { queries, keys, values: &keys[..] })
                .collect();
            let run = |threads: usize| {
                let mut out = vec![0.0; sources.len() * num_heads * head_dim];
                let pool = hydralora_runtime::Pool::new(threads);
                pool.enter(|| attend(&sources, &mut out, config));
                out
            };
            let got = run(1);
            assert_eq!(got, run(3));
            let expected: Vec<f64> = sources.iter().flat_map(|s| expected(s, config)).collect();
            for (got, expected) in got.iter().zip(&expected) {
                assert!((f64::from(*got) - expected).abs() < 1e-5, "{got} {expected}");
            }
        }
    }

    #[test]
    fn one_query_gives_what_packed_ones_give() {
        let (keys, width) = (300, 2 * 24);
        let (q, k, v) = (numbers(2 * width, 1), numbers(keys * width, 2), numbers(keys * width, 3));
        for (window, softcap) in [(None, None), (None, Some(1.5)), (Some(70), Some(0.2))] {
            let config = AttentionConfig {
                num_heads: 4,
                num_key_value_heads: 2,
                head_dim: 24,
                scale: 0.2,
                window,
                softcap,
            };
            let mut got = vec![0.0; 2 * width];
            attend(&[Source { queries: &q, keys: &k, values: &v }], &mut got, config);
            let [packed_q, packed_k, packed_v] =
                [(1, &q), (keys, &k), (keys, &v)].map(|(rows, data)| {
                    Var::constant(Tensor::new(data.clone(), [rows, data.len() / rows]))
                });
            let spans = [Span { queries: 0..1, keys: 0..keys }];
            let packed = causal_attention(&packed_q, &packed_k, &packed_v, &spans, config);
            for (got, expected) in got.iter().zip(packed.value().to_f32()) {
                assert!((got - expected).abs() < 1e-5, "{got} {expected}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_not_lost() {
        let config = AttentionConfig {
            num_heads: 1,
            num_key_value_heads: 1,
            head_dim: 16,
            scale: 0.25,
            window: None,
            softcap: None,
        };
        let (queries, values) = (numbers(16, 1), numbers(200 * 16, 2));
        for wrong in [f32::NAN, f32::INFINITY] {
            let mut keys = values.clone();
            keys[150 * 16 + 3] = wrong * queries[3].signum();
            let mut out = vec![0.0; 16];
            attend(&[Source { queries: &queries, keys: &keys, values: &values }], &mut out, config);
            assert!(out.iter().any(|x| !x.is_finite()), "{wrong}: {out:?}");
        }
    }
}

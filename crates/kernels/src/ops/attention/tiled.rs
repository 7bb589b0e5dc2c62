//! Attention in `f32` on register tiles. Scores are computed only up to the last key that a panel
//! of queries sees, so half of the square of a long sequence is never touched.

use super::{AttentionConfig, HeadGradients, Source, visible};
use crate::buffer::Buffer;
use crate::element::Element;
use crate::matmul::Write;
use crate::simd::{self, vectorize};
use crate::tile::{self, Left, Right, Segment, multiply};
use std::ops::Range;

/// Queries below which packing the keys costs more than it saves.
const FEW: usize = 4;

/// One head of one sequence.
struct Head<'a> {
    source: &'a Source<'a, f32>,
    config: AttentionConfig,
    head: usize,
    kv_head: usize,
    width: usize,
    kv_width: usize,
    past: usize,
}

impl<'a> Head<'a> {
    fn new(source: &'a Source<'a, f32>, head: usize, config: AttentionConfig) -> Self {
        let width = config.num_heads * config.head_dim;
        let kv_width = config.num_key_value_heads * config.head_dim;
        let past = source.keys.len() / kv_width - source.queries.len() / width;
        let kv_head = head / (config.num_heads / config.num_key_value_heads);
        Self { source, config, head, kv_head, width, kv_width, past }
    }

    /// Rows `rows` of a query-shaped array, this head's columns.
    fn query_side(&self, data: &'a [f32], rows: &Range<usize>) -> Left<'a> {
        let from = rows.start * self.width + self.head * self.config.head_dim;
        Left { data: &data[from..], row_stride: self.width, col_stride: 1 }
    }

    fn kv<'b>(&self, data: &'b [f32]) -> &'b [f32] {
        data.get(self.kv_head * self.config.head_dim..).unwrap_or_default()
    }

    /// Panels of the transpose of this head's keys or values: `[head_dim, keys]`.
    fn packed(&self, data: &[f32], count: usize) -> Buffer<f32> {
        let dim = self.config.head_dim;
        let mut rows = Buffer::<f32>::scratch(count * dim);
        for (row, from) in rows.chunks_exact_mut(dim).zip(self.kv(data).chunks(self.kv_width)) {
            row.copy_from_slice(&from[..dim]);
        }
        let mut out = Buffer::<f32>::scratch(tile::packed_len(count, dim));
        let panel = tile::panel_width() * dim;
        for (index, out) in out.chunks_mut(panel).enumerate() {
            tile::pack_transposed(&rows, dim, index, out);
        }
        out
    }

    /// `left · dataᵀ` for the first `count` keys or values.
    fn against(&self, left: Left<'_>, rows: usize, packed: &[f32], count: usize, out: &mut [f32]) {
        let dim = self.config.head_dim;
        let segment = Segment { left, right: Right::packed(packed, dim), depth: dim };
        multiply(&[segment], rows, count, out, count, Write::Set);
    }

    /// `out (+)= left · data` over `count` keys or values.
    fn gather(
        &self,
        left: Left<'_>,
        rows: usize,
        data: &[f32],
        count: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let right = Right {
            data: self.kv(data),
            row_stride: self.kv_width,
            panel_stride: tile::panel_width(),
        };
        let segment = Segment { left, right, depth: count };
        multiply(&[segment], rows, self.config.head_dim, out, out_stride, Write::Set);
    }
}

/// One block of queries of one head: its columns of `out`, and the log-sums if they are wanted.
pub(super) fn forward_block(
    source: &Source<'_, f32>,
    block: &Range<usize>,
    out: &mut [f32],
    log_sums: &mut [f32],
    config: AttentionConfig,
) {
    for kv_head in 0..config.num_key_value_heads {
        let group = config.num_heads / config.num_key_value_heads;
        let of_group = Head::new(source, kv_head * group, config);
        let seen = of_group.past + block.end;
        let packed = (block.len() >= FEW).then(|| of_group.packed(source.keys, seen));
        // Query rows whose scores are computed together.
        let panel = tile::tile_rows();
        let mut weights = Buffer::<f32>::scratch(panel * seen);
        for head in kv_head * group..(kv_head + 1) * group {
            let this = Head::new(source, head, config);
            for first in (block.start..block.end).step_by(panel) {
                let rows = first..(first + panel).min(block.end);
                let count = this.past + rows.end;
                let weights = &mut weights[..rows.len() * count];
                match &packed {
                    Some(packed) => {
                        let left = this.query_side(source.queries, &rows);
                        this.against(left, rows.len(), packed, count, weights);
                    }
                    None => this.scores_one_by_one(&rows, count, weights),
                }
                this.softmax(&rows, block, count, weights, log_sums);
                let left = Left::rows(weights, count);
                let at = (first - block.start) * this.width + head * config.head_dim;
                this.gather(left, rows.len(), source.values, count, &mut out[at..], this.width);
            }
        }
    }
}

/// One head of a sequence's only query: `out` has that head's columns.
pub(super) fn one_query(
    source: &Source<'_, f32>,
    head: usize,
    out: &mut [f32],
    config: AttentionConfig,
) {
    let this = Head::new(source, head, config);
    let count = this.past + 1;
    let mut weights = Buffer::<f32>::scratch(count);
    this.scores_one_by_one(&(0..1), count, &mut weights);
    let mut log_sums = vec![0.0; config.num_heads];
    this.softmax(&(0..1), &(0..1), count, &mut weights, &mut log_sums);
    this.gather(Left::rows(&weights, count), 1, source.values, count, out, config.head_dim);
}

impl Head<'_> {
    fn scores_one_by_one(&self, rows: &Range<usize>, count: usize, out: &mut [f32]) {
        let dim = self.config.head_dim;
        vectorize(
            #[inline(always)]
            || {
                for (row, out) in rows.clone().zip(out.chunks_exact_mut(count)) {
                    let from = row * self.width + self.head * dim;
                    let query = &self.source.queries[from..from + dim];
                    for (key, out) in self.kv(self.source.keys).chunks(self.kv_width).zip(out) {
                        *out = simd::dot(query, &key[..dim]);
                    }
                }
            },
        );
    }

    /// Turns the scores of `rows` into probabilities and notes their log-sums.
    fn softmax(
        &self,
        rows: &Range<usize>,
        block: &Range<usize>,
        count: usize,
        weights: &mut [f32],
        log_sums: &mut [f32],
    ) {
        let scale = self.config.scale as f32;
        vectorize(
            #[inline(always)]
            || {
                for (row, weights) in rows.clone().zip(weights.chunks_exact_mut(count)) {
                    let seen = visible(row, self.past, self.config.window);
                    weights[..seen.start].fill(0.0);
                    weights[seen.end..].fill(0.0);
                    let weights = &mut weights[seen];
                    let peak = simd::max(weights);
                    for s in weights.iter_mut() {
                        *s = Element::exp((*s - peak) * scale);
                    }
                    let sum = simd::sum_map(weights, |x| x);
                    let inverse = 1.0 / sum;
                    for s in weights.iter_mut() {
                        *s *= inverse;
                    }
                    let at = (row - block.start) * self.config.num_heads + self.head;
                    log_sums[at] = peak * scale + sum.ln();
                }
            },
        );
    }
}

/// The gradients of one head of one sequence.
pub(super) fn backward_head(
    source: &Source<'_, f32>,
    [gradient, log_sums]: [&[f32]; 2],
    head: usize,
    config: AttentionConfig,
) -> HeadGradients<f32> {
    let this = Head::new(source, head, config);
    let dim = config.head_dim;
    let rows = source.queries.len() / this.width;
    let keys = this.past + rows;
    let mut part = HeadGradients {
        dq: Buffer::scratch(rows * dim),
        dk: Buffer::zeros(keys * dim),
        dv: Buffer::zeros(keys * dim),
    };
    let (packed_keys, packed_values) =
        (this.packed(source.keys, keys), this.packed(source.values, keys));
    let panel_rows = tile::tile_rows();
    // Panels whose products over rows are joined, for a longer inner dimension.
    let joined = 8 * panel_rows;
    let mut p = Buffer::<f32>::scratch(joined.min(rows) * keys);
    let mut ds = Buffer::<f32>::scratch(joined.min(rows) * keys);
    for first in (0..rows).step_by(joined) {
        let block = first..(first + joined).min(rows);
        let count = this.past + block.end;
        let (p, ds) = (&mut p[..block.len() * count], &mut ds[..block.len() * count]);
        for first in (block.start..block.end).step_by(panel_rows) {
            let panel = first..(first + panel_rows).min(block.end);
            // Columns past the panel's own reach are zeroed below.
            let reach = this.past + panel.end;
            let at = (panel.start - block.start) * count;
            let score = |data: &[f32], packed: &[f32], out: &mut [f32]| {
                let left = this.query_side(data, &panel);
                let segment = Segment { left, right: Right::packed(packed, dim), depth: dim };
                multiply(&[segment], panel.len(), reach, out, count, Write::Set);
            };
            score(source.queries, &packed_keys, &mut p[at..]);
            score(gradient, &packed_values, &mut ds[at..]);
        }
        let scale = config.scale as f32;
        vectorize(
            #[inline(always)]
            || {
                for (i, row) in block.clone().enumerate() {
                    let seen = visible(row, this.past, config.window);
                    let log_sum = log_sums[row * config.num_heads + head];
                    let p = &mut p[i * count..(i + 1) * count];
                    let ds = &mut ds[i * count..(i + 1) * count];
                    for outside in [0..seen.start, seen.end..count] {
                        p[outside.clone()].fill(0.0);
                        ds[outside].fill(0.0);
                    }
                    let (p, ds) = (&mut p[seen.clone()], &mut ds[seen]);
                    for p in p.iter_mut() {
                        *p = Element::exp((*p).mul_add(scale, -log_sum));
                    }
                    let along = simd::dot(p, ds);
                    for (&mut p, ds) in p.iter_mut().zip(ds) {
                        *ds = p * (*ds - along) * scale;
                    }
                }
            },
        );
        let over_rows = |left: &[f32], data: &[f32], out: &mut [f32]| {
            let from = block.start * this.width + head * dim;
            let right = Right {
                data: &data[from..],
                row_stride: this.width,
                panel_stride: tile::panel_width(),
            };
            let segment = Segment { left: Left::columns(left, count), right, depth: block.len() };
            multiply(&[segment], count, dim, out, dim, Write::Add);
        };
        over_rows(p, gradient, &mut part.dv);
        over_rows(ds, source.queries, &mut part.dk);
        for first in (block.start..block.end).step_by(panel_rows) {
            let panel = first..(first + panel_rows).min(block.end);
            let reach = this.past + panel.end;
            let left = Left {
                data: &ds[(panel.start - block.start) * count..],
                row_stride: count,
                col_stride: 1,
            };
            let out = &mut part.dq[panel.start * dim..panel.end * dim];
            this.gather(left, panel.len(), source.keys, reach, out, dim);
        }
    }
    part
}

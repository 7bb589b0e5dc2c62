//! Attention in `f32` on register tiles. Scores are computed only up to the last key that a panel
//! of queries sees, so half of the square of a long sequence is never touched; and only from the first
//! key that a window lets it see, or a little before.

use super::{AttentionConfig, HeadGradients, Source, visible};
use crate::buffer::Buffer;
use crate::element::Element;
use crate::matmul::Write;
use crate::ops::softcap::Softcap;
use crate::simd::{self, vectorize};
use crate::tile::{self, Left, Right, Segment, multiply};
use std::ops::Range;

/// Queries below which packing the keys costs more than it saves.
const FEW: usize = 4;

/// Keys are left out in whole numbers of these, so that the sums over the others are cut into the same
/// stretches as over all of them, and have the same bits. A multiple of every panel's width.
const SKIP: usize = tile::STRETCH;

/// Keys that no query from `row` on sees, of a sequence with `past` keys before its first query.
fn unseen_before(row: usize, past: usize, config: AttentionConfig) -> usize {
    visible(row, past, config.window).start / SKIP * SKIP
}

/// One head of one sequence.
#[derive(Clone, Copy)]
struct Head<'a> {
    source: &'a Source<'a, f32>,
    config: AttentionConfig,
    head: usize,
    kv_head: usize,
    width: usize,
    kv_width: usize,
    past: usize,
    /// Keys that are left out, because no query at hand sees them. Keys are counted from here on.
    skip: usize,
}

impl<'a> Head<'a> {
    fn new(source: &'a Source<'a, f32>, head: usize, config: AttentionConfig) -> Self {
        let width = config.num_heads * config.head_dim;
        let kv_width = config.num_key_value_heads * config.head_dim;
        let past = source.keys.len() / kv_width - source.queries.len() / width;
        let kv_head = head / (config.num_heads / config.num_key_value_heads);
        Self { source, config, head, kv_head, width, kv_width, past, skip: 0 }
    }

    /// The same without the keys that no query from `row` on sees.
    fn seen_from(self, row: usize) -> Self {
        Self { skip: unseen_before(row, self.past, self.config), ..self }
    }

    /// Number of keys up to that of query `end - 1`.
    fn count(&self, end: usize) -> usize {
        self.past + end - self.skip
    }

    /// Keys that query `row` sees.
    #[inline(always)]
    fn visible(&self, row: usize) -> Range<usize> {
        let seen = visible(row, self.past, self.config.window);
        seen.start - self.skip..seen.end - self.skip
    }

    /// Rows `rows` of a query-shaped array, this head's columns.
    fn query_side(&self, data: &'a [f32], rows: &Range<usize>) -> Left<'a> {
        let from = rows.start * self.width + self.head * self.config.head_dim;
        Left { data: &data[from..], row_stride: self.width, col_stride: 1 }
    }

    fn kv<'b>(&self, data: &'b [f32]) -> &'b [f32] {
        let first = self.skip * self.kv_width + self.kv_head * self.config.head_dim;
        data.get(first..).unwrap_or_default()
    }

    /// Panels of the transpose of this head's keys or values: `[head_dim, keys]`.
    fn packed_transpose(&self, data: &[f32], count: usize) -> Buffer<f32> {
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

    /// Panels of this head's keys or values: `[keys, head_dim]`.
    fn packed_rows(&self, data: &[f32], count: usize) -> Buffer<f32> {
        pack_columns(self.kv(data), self.kv_width, count, self.config.head_dim)
    }

    /// `out = left · data` over the first `count` keys or values, their panels in `right`.
    fn gather(
        &self,
        left: Left<'_>,
        rows: usize,
        right: Right<'_>,
        count: usize,
        out: &mut [f32],
        out_stride: usize,
    ) {
        let segment = Segment { left, right, depth: count };
        multiply(&[segment], rows, self.config.head_dim, out, out_stride, Write::Set);
    }
}

/// Panels of the first `cols` columns of `count` rows that start `stride` apart.
fn pack_columns(data: &[f32], stride: usize, count: usize, cols: usize) -> Buffer<f32> {
    let width = tile::panel_width();
    let mut out = Buffer::<f32>::scratch(tile::packed_len(cols, count));
    for (panel, out) in out.chunks_exact_mut((count * width).max(1)).enumerate() {
        let of_panel = panel * width..cols.min((panel + 1) * width);
        for (out, row) in out.chunks_exact_mut(width).zip(data.chunks(stride)) {
            let (filled, rest) = out.split_at_mut(of_panel.len());
            filled.copy_from_slice(&row[of_panel.clone()]);
            rest.fill(0.0);
        }
    }
    out
}

/// `count` keys and those that fill up their last panel, whose scores cost less to compute than to
/// leave out; they are never read.
fn whole_panels(count: usize) -> usize {
    count.next_multiple_of(tile::panel_width())
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
        let of_group = Head::new(source, kv_head * group, config).seen_from(block.start);
        let seen = of_group.count(block.end);
        let packed = (block.len() >= FEW).then(|| {
            (
                of_group.packed_transpose(source.keys, seen),
                of_group.packed_rows(source.values, seen),
            )
        });
        // Query rows whose scores are computed together.
        let panel = tile::tile_rows();
        let mut weights = Buffer::<f32>::scratch(panel * whole_panels(seen));
        for head in kv_head * group..(kv_head + 1) * group {
            let this = Head::new(source, head, config).seen_from(block.start);
            for first in (block.start..block.end).step_by(panel) {
                let rows = first..(first + panel).min(block.end);
                let count = this.count(rows.end);
                let at = (first - block.start) * this.width + head * config.head_dim;
                let out = &mut out[at..];
                let Some((keys, values)) = &packed else {
                    let weights = &mut weights[..rows.len() * count];
                    this.scores_one_by_one(&rows, count, weights);
                    this.softmax(&rows, block, count, weights, log_sums);
                    let left = Left::rows(weights, count);
                    this.gather(left, rows.len(), this.values(), count, out, this.width);
                    continue;
                };
                let stride = whole_panels(count);
                let weights = &mut weights[..rows.len() * stride];
                let dim = config.head_dim;
                let left = this.query_side(source.queries, &rows);
                let segment = Segment { left, right: Right::packed(keys, dim), depth: dim };
                multiply(&[segment], rows.len(), stride, weights, stride, Write::Set);
                this.softmax(&rows, block, stride, weights, log_sums);
                let (left, right) = (Left::rows(weights, stride), Right::packed(values, seen));
                this.gather(left, rows.len(), right, count, out, this.width);
            }
        }
    }
}

impl Head<'_> {
    /// This head's values where they are.
    fn values(&self) -> Right<'_> {
        Right {
            data: self.kv(self.source.values),
            row_stride: self.kv_width,
            panel_stride: tile::panel_width(),
        }
    }

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

    /// Caps the products of `rows`, `stride` apart, with the keys that each sees; they are then scores
    /// that have their scale.
    fn cap(&self, cap: Softcap<f32>, rows: &Range<usize>, stride: usize, products: &mut [f32]) {
        vectorize(
            #[inline(always)]
            || {
                for (row, products) in rows.clone().zip(products.chunks_exact_mut(stride)) {
                    cap.apply_inline(&mut products[self.visible(row)]);
                }
            },
        );
    }

    /// Takes the gradient `ds` of `capped` scores, `stride` apart, back to products with the keys seen.
    fn slope(
        &self,
        cap: Softcap<f32>,
        rows: &Range<usize>,
        stride: usize,
        capped: &[f32],
        ds: &mut [f32],
    ) {
        let scale = self.config.scale as f32;
        let each = capped.chunks_exact(stride).zip(ds.chunks_exact_mut(stride));
        vectorize(
            #[inline(always)]
            || {
                for (row, (capped, ds)) in rows.clone().zip(each) {
                    let seen = self.visible(row);
                    for (ds, &capped) in ds[seen.clone()].iter_mut().zip(&capped[seen]) {
                        *ds *= cap.slope(capped) * scale;
                    }
                }
            },
        );
    }

    /// Turns the products of `rows`, `stride` apart, into probabilities and notes their log-sums.
    fn softmax(
        &self,
        rows: &Range<usize>,
        block: &Range<usize>,
        stride: usize,
        weights: &mut [f32],
        log_sums: &mut [f32],
    ) {
        let scale = match self.config.cap_of_products() {
            None => self.config.scale as f32,
            Some(cap) => {
                self.cap(cap, rows, stride, weights);
                1.0
            }
        };
        vectorize(
            #[inline(always)]
            || {
                for (row, weights) in rows.clone().zip(weights.chunks_exact_mut(stride)) {
                    let seen = self.visible(row);
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

/// The gradients of query heads that share keys and values, of one sequence.
pub(super) fn backward_heads(
    source: &Source<'_, f32>,
    given: [&[f32]; 2],
    heads: Range<usize>,
    config: AttentionConfig,
) -> HeadGradients<f32> {
    let dim = config.head_dim;
    let this = Head::new(source, heads.start, config);
    let rows = source.queries.len() / this.width;
    let keys = this.past + rows;
    let packed = Panels {
        score_keys: this.packed_transpose(source.keys, keys),
        score_values: this.packed_transpose(source.values, keys),
        key_rows: this.packed_rows(source.keys, keys),
    };
    let mut sum = HeadGradients {
        dq: Buffer::scratch(rows * heads.len() * dim),
        dk: Buffer::zeros(keys * dim),
        dv: Buffer::zeros(keys * dim),
    };
    let dq_stride = heads.len() * dim;
    for (at, head) in heads.enumerate() {
        let this = Head::new(source, head, config);
        let HeadGradients { dq, dk, dv } = &mut sum;
        let dq = &mut dq[at * dim..];
        if at == 0 {
            this.backward(given, &packed, [dq, dk, dv], dq_stride);
            continue;
        }
        // Each head's sum by itself, as if it had been a task of its own.
        let [mut own_dk, mut own_dv] = [(); 2].map(|()| Buffer::<f32>::zeros(keys * dim));
        this.backward(given, &packed, [dq, &mut own_dk, &mut own_dv], dq_stride);
        simd::add_scaled(1.0, &own_dk, dk);
        simd::add_scaled(1.0, &own_dv, dv);
    }
    sum
}

/// Keys and values of a head in panels.
struct Panels {
    /// `[head_dim, keys]`.
    score_keys: Buffer<f32>,
    /// `[head_dim, keys]`.
    score_values: Buffer<f32>,
    /// `[keys, head_dim]`.
    key_rows: Buffer<f32>,
}

impl Head<'_> {
    /// Writes the gradient of this head's queries, rows `dq_stride` apart, and adds those of keys and
    /// values.
    fn backward(
        &self,
        [gradient, log_sums]: [&[f32]; 2],
        packed: &Panels,
        [dq, dk, dv]: [&mut [f32]; 3],
        dq_stride: usize,
    ) {
        let Self { source, config, head, .. } = *self;
        let dim = config.head_dim;
        let rows = source.queries.len() / self.width;
        let keys = self.past + rows;
        let panel_rows = tile::tile_rows();
        // Panels whose products over rows are joined, for a longer inner dimension.
        let joined = 8 * panel_rows;
        let mut p = Buffer::<f32>::scratch(joined.min(rows) * whole_panels(keys));
        let mut ds = Buffer::<f32>::scratch(joined.min(rows) * whole_panels(keys));
        let cap = config.cap_of_products();
        let mut capped = Buffer::<f32>::scratch(if cap.is_some() { p.len() } else { 0 });
        for first in (0..rows).step_by(joined) {
            let block = first..(first + joined).min(rows);
            let of_block = self.seen_from(block.start);
            let (skip, count) = (of_block.skip, of_block.count(block.end));
            let stride = whole_panels(count);
            let (p, ds) = (&mut p[..block.len() * stride], &mut ds[..block.len() * stride]);
            for first in (block.start..block.end).step_by(panel_rows) {
                let panel = first..(first + panel_rows).min(block.end);
                // Columns past what a row sees are zeroed below.
                let reach = whole_panels(of_block.count(panel.end));
                let at = (panel.start - block.start) * stride;
                let score = |data: &[f32], packed: &[f32], out: &mut [f32]| {
                    let left = self.query_side(data, &panel);
                    let right = Right::packed(&packed[skip * dim..], dim);
                    let segment = Segment { left, right, depth: dim };
                    multiply(&[segment], panel.len(), reach, out, stride, Write::Set);
                };
                score(source.queries, &packed.score_keys, &mut p[at..]);
                score(gradient, &packed.score_values, &mut ds[at..]);
            }
            let scale = match cap {
                None => config.scale as f32,
                Some(cap) => {
                    of_block.cap(cap, &block, stride, p);
                    capped[..p.len()].copy_from_slice(p);
                    1.0
                }
            };
            vectorize(
                #[inline(always)]
                || {
                    for (i, row) in block.clone().enumerate() {
                        let seen = of_block.visible(row);
                        let log_sum = log_sums[row * config.num_heads + head];
                        let p = &mut p[i * stride..(i + 1) * stride];
                        let ds = &mut ds[i * stride..(i + 1) * stride];
                        for outside in [0..seen.start, seen.end..stride] {
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
            if let Some(cap) = cap {
                of_block.slope(cap, &block, stride, &capped, ds);
            }
            // A key is seen from its own position on: keys before the block by all of its queries, a
            // panel of keys inside it by those from that panel on.
            let over_rows = |left: &[f32], data: &[f32], out: &mut [f32]| {
                let from = block.start * self.width + head * dim;
                let panels = pack_columns(&data[from..], self.width, block.len(), dim);
                let mut product = |keys: Range<usize>, unseen: usize| {
                    let left = Left {
                        data: &left[unseen * stride + keys.start..],
                        row_stride: 1,
                        col_stride: stride,
                    };
                    let right = Right {
                        data: &panels[unseen * tile::panel_width()..],
                        ..Right::packed(&panels, block.len())
                    };
                    let segment = Segment { left, right, depth: block.len() - unseen };
                    let out = &mut out[(skip + keys.start) * dim..(skip + keys.end) * dim];
                    multiply(&[segment], keys.len(), dim, out, dim, Write::Add);
                };
                product(0..of_block.count(block.start), 0);
                for unseen in (0..block.len()).step_by(panel_rows) {
                    let first = of_block.count(block.start) + unseen;
                    product(first..(first + panel_rows).min(count), unseen);
                }
            };
            over_rows(p, gradient, dv);
            over_rows(ds, source.queries, dk);
            for first in (block.start..block.end).step_by(panel_rows) {
                let panel = first..(first + panel_rows).min(block.end);
                let reach = of_block.count(panel.end);
                let left = Left {
                    data: &ds[(panel.start - block.start) * stride..],
                    row_stride: stride,
                    col_stride: 1,
                };
                let out = &mut dq[panel.start * dq_stride..];
                let right = Right {
                    data: &packed.key_rows[skip * tile::panel_width()..],
                    ..Right::packed(&packed.key_rows, keys)
                };
                self.gather(left, panel.len(), right, reach, out, dq_stride);
            }
        }
    }
}

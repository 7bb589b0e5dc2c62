//! Products with few rows, as in decoding: the weight is read once, as it is stored, and reading it
//! is what they cost.

use super::{FrozenLinear, FrozenWeight};
use crate::block::{self, BlockFormat};
use crate::buffer::Buffer;
use crate::simd::{self, vectorize};
use crate::team;
use integer::Rounded;
use std::ops::Range;

pub(crate) mod float;
mod integer;

/// Rows of a weight that are multiplied together.
const TOGETHER: usize = 4;

/// Bytes of weight a task reads.
pub(crate) const TASK_BYTES: usize = 1 << 15;

/// `x Wᵀ + h Uᵀ` for `x: [rows, in]`, `h: [rows, k]` and `U: [out, k]`, giving `[rows, out]`; `k` may
/// be 0.
pub(crate) fn product(
    layer: &FrozenLinear,
    x: &[f32],
    rows: usize,
    update: (&[f32], &[f32]),
) -> Buffer<f32> {
    let [outputs, inputs] = layer.shape();
    if rows == 0 {
        return Buffer::scratch(0);
    }
    crate::profile::product(rows, inputs, outputs);
    let (h, up) = update;
    let inner = h.len() / rows;
    let rounded = match layer.weight() {
        FrozenWeight::Blocks { format, .. } => Rounded::new(*format, x, inputs),
        FrozenWeight::Dense(_) => None,
    };
    let task = task_rows(layer);
    // `[out, rows]`, so that tasks own whole stretches.
    let mut turned = Buffer::<f32>::scratch(outputs * rows);
    team::reads(layer.weight_bytes());
    team::chunks_mut(&mut turned, task * rows, |index, out| {
        let first = index * task;
        let count = out.len() / rows;
        let range = first..first + count;
        out.fill(0.0);
        match layer.weight() {
            FrozenWeight::Dense(weight) => {
                let weight = Rows::whole(weight.data::<f32>(), inputs);
                float::add_products(weight, x, range.clone(), rows, out);
            }
            FrozenWeight::Blocks { format: BlockFormat::F32, .. } => {
                let weight = layer.dense_rows(first, count);
                float::add_products(Rows::whole(&weight, inputs), x, 0..count, rows, out);
            }
            FrozenWeight::Blocks { format, bytes, .. } => match &rounded {
                Some(rounded) => rounded.add_products(bytes, range.clone(), rows, out),
                None => {
                    let row_bytes = format.bytes_for(inputs);
                    let bytes = &bytes[range.start * row_bytes..range.end * row_bytes];
                    widened(*format, bytes, x, inputs, rows, out);
                }
            },
        }
        if inner > 0 {
            float::add_products(Rows::whole(up, inner), h, range, rows, out);
        }
        if let Some(bias) = layer.bias() {
            for (out, &bias) in out.chunks_exact_mut(rows).zip(&bias.data::<f32>()[first..]) {
                out.iter_mut().for_each(|out| *out += bias);
            }
        }
    });
    if rows == 1 {
        return turned;
    }
    let mut out = Buffer::<f32>::scratch(outputs * rows);
    for (o, column) in turned.chunks_exact(rows).enumerate() {
        for (row, &value) in column.iter().enumerate() {
            out[row * outputs + o] = value;
        }
    }
    out
}

/// Rows of the weight that a task reads.
fn task_rows(layer: &FrozenLinear) -> usize {
    let outputs = layer.out_features().max(1);
    let row_bytes = (layer.bytes() / outputs).max(1);
    (TASK_BYTES / row_bytes).next_multiple_of(TOGETHER).clamp(1, outputs)
}

/// What [`product`] reads of the weight.
pub(super) fn stream(layer: &FrozenLinear) -> team::Stream {
    let bytes = layer.weight_bytes();
    team::Stream::new(bytes, task_rows(layer) * bytes.len() / layer.out_features().max(1))
}

/// Rows of a weight.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    pub(crate) data: &'a [T],
    /// Of a row.
    pub(crate) len: usize,
    /// From the start of a row to that of the next.
    pub(crate) stride: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Rows without a gap.
    fn whole(data: &'a [T], len: usize) -> Self {
        Self { data, len, stride: len }
    }
}

/// How many rows ahead memory is called for where `together` rows of `bytes` each are read before the
/// next ones: as many of them as it takes for memory to answer.
#[inline(always)]
fn rows_ahead(bytes: usize, together: usize) -> usize {
    /// Bytes that are read while memory answers.
    const ANSWER: usize = 4096;
    together * ANSWER.div_ceil((together * bytes).max(1))
}

impl Rows<'_, f32> {
    /// [`rows_ahead`] in bytes.
    pub(crate) fn bytes_ahead(&self, together: usize) -> usize {
        rows_ahead(self.len * size_of::<f32>(), together) * self.stride * size_of::<f32>()
    }

    /// Calls for the first rows.
    pub(crate) fn fetch_first(&self) {
        let count = rows_ahead(self.len * size_of::<f32>(), 1);
        for row in self.data.chunks(self.stride.max(1)).take(count) {
            fetch(&row[..self.len.min(row.len())], 0);
        }
    }
}

/// Calls for the memory `distance` bytes past all of `row`.
#[inline(always)]
pub(crate) fn fetch(row: &[f32], distance: usize) {
    /// Numbers of a cache line.
    const LINE: usize = simd::LINE_BYTES / size_of::<f32>();
    row.chunks(LINE).for_each(|line| simd::fetch(line, distance));
}

/// Calls `four_rows(rows of the weight, row of x)` for every four of rows `range` of `weight`, and
/// adds what it gives to `out: [range, rows]`.
#[inline(always)]
fn by_fours<T>(
    weight: Rows<'_, T>,
    range: Range<usize>,
    rows: usize,
    out: &mut [f32],
    four_rows: impl Fn([&[T]; TOGETHER], usize) -> [f32; TOGETHER],
) {
    for (first, out) in range.clone().step_by(TOGETHER).zip(out.chunks_mut(TOGETHER * rows)) {
        // The last group may be short: its last row stands in for those past it.
        let weight_row = |at: usize| {
            let start = (first + at).min(range.end - 1) * weight.stride;
            &weight.data[start..start + weight.len]
        };
        let group = [weight_row(0), weight_row(1), weight_row(2), weight_row(3)];
        for row in 0..rows {
            let sums = four_rows(group, row);
            for (at, sum) in sums.into_iter().enumerate() {
                if let Some(out) = out.get_mut(at * rows + row) {
                    *out += sum;
                }
            }
        }
    }
}

/// Products with rows whose format has none of its own.
fn widened(
    format: BlockFormat,
    bytes: &[u8],
    x: &[f32],
    inputs: usize,
    rows: usize,
    out: &mut [f32],
) {
    let of_rows = out.chunks_exact_mut(rows).zip(bytes.chunks_exact(format.bytes_for(inputs)));
    if format == BlockFormat::BF16 && rows == 1 {
        return vectorize(
            #[inline(always)]
            || {
                for (out, row) in of_rows {
                    out[0] = block::dot_bf16(row, x);
                }
            },
        );
    }
    let mut wide = Buffer::<f32>::scratch(inputs);
    for (out, row) in of_rows {
        block::dequantize(format, row, &mut wide);
        vectorize(
            #[inline(always)]
            || {
                for (out, x) in out.iter_mut().zip(x.chunks_exact(inputs)) {
                    *out = simd::dot(&wide, x);
                }
            },
        );
    }
}

//! Products with few rows, as in decoding: the weight is read once, as it is stored, and reading it
//! is what they cost.

use super::{FrozenLinear, FrozenWeight};
use crate::block::{self, BlockFormat};
use crate::buffer::Buffer;
use crate::simd::{self, vectorize};
use hydralora_runtime::{Stream, each_mut, for_each};
use integer::Rounded;
use std::ops::Range;

pub(crate) mod float;
mod integer;

/// Most rows of a weight that are multiplied together.
const MOST_TOGETHER: usize = 2 * integer::EIGHT;

/// Bytes of weight a task reads.
const TASK_BYTES: usize = 1 << 16;

/// A layer, and what is added to its product.
pub(crate) struct Part<'a> {
    pub(crate) layer: &'a FrozenLinear,
    pub(crate) updates: &'a [Update<'a>],
}

/// `h Uᵀ`, added to some rows of a product.
pub(crate) struct Update<'a> {
    /// The rows.
    pub(crate) rows: Range<usize>,
    /// `U: [out, k]`.
    pub(crate) up: &'a [f32],
    /// Gives `h: [rows, k]`; asked for by every thread, when it has multiplied by some rows of the
    /// weight.
    pub(crate) h: &'a (dyn Fn() -> &'a [f32] + Sync),
}

/// Some outputs of a part.
struct Task<'a, 'p> {
    part: &'a Part<'p>,
    rounded: Option<&'a Rounded>,
    /// Which of the part's tasks this is.
    number: usize,
    /// The first of the outputs.
    first: usize,
    /// `[outputs, rows]`.
    out: &'a mut [f32],
}

/// `x Wᵀ`, and the update, of every part, for `x: [rows, in]`: `[rows, out]` each, in one loop.
pub(crate) fn products(x: &[f32], rows: usize, parts: &[Part<'_>]) -> Vec<Buffer<f32>> {
    if rows == 0 {
        return parts.iter().map(|_| Buffer::scratch(0)).collect();
    }
    let inputs = x.len() / rows;
    let mut rounded: Vec<(BlockFormat, Option<Rounded>)> = Vec::new();
    for part in parts {
        crate::profile::product(rows, inputs, part.layer.out_features());
        if let FrozenWeight::Blocks { format, .. } = part.layer.weight()
            && rounded.iter().all(|(known, _)| known != format)
        {
            rounded.push((*format, Rounded::new(*format, x, inputs)));
        }
    }
    // `[out, rows]`, so that tasks own whole stretches.
    let mut turned: Vec<Buffer<f32>> =
        parts.iter().map(|part| Buffer::scratch(part.layer.out_features() * rows)).collect();
    let mut tasks = Vec::new();
    for (part, turned) in parts.iter().zip(&mut turned) {
        let rounded = match part.layer.weight() {
            FrozenWeight::Blocks { format, .. } => {
                rounded.iter().find(|(known, _)| known == format)
            }
            FrozenWeight::Dense(_) => None,
        };
        let rounded = rounded.and_then(|(_, rounded)| rounded.as_ref());
        let task_rows = task_rows(part.layer);
        let stretches = turned.chunks_mut(task_rows * rows).enumerate();
        tasks.extend(stretches.map(|(number, out)| {
            let first = number * task_rows;
            Task { part, rounded, number, first, out }
        }));
    }
    for_each(each_mut(&mut tasks), |_, task| task.run(x, rows, inputs));
    turned.into_iter().map(|turned| transposed(turned, rows)).collect()
}

/// `[rows, out]` of `[out, rows]`.
pub(crate) fn transposed(turned: Buffer<f32>, rows: usize) -> Buffer<f32> {
    if rows == 1 {
        return turned;
    }
    let outputs = turned.len() / rows.max(1);
    let mut out = Buffer::<f32>::scratch(turned.len());
    // As many outputs at a time as lie in the nearest cache for all rows.
    const TOGETHER: usize = 64;
    for (first, of) in turned.chunks(TOGETHER * rows.max(1)).enumerate() {
        let count = of.len() / rows.max(1);
        for row in 0..rows {
            let out = &mut out[row * outputs + first * TOGETHER..][..count];
            for (out, column) in out.iter_mut().zip(of.chunks_exact(rows)) {
                *out = column[row];
            }
        }
    }
    out
}

impl Task<'_, '_> {
    fn run(&mut self, x: &[f32], rows: usize, inputs: usize) {
        let Self { part: Part { layer, updates }, rounded, number, first, out } = self;
        let count = out.len() / rows;
        let range = *first..*first + count;
        // The first tasks compute one `h` each before anybody waits for it.
        if let Some(update) = updates.get(*number) {
            (update.h)();
        }
        for Update { up, .. } in *updates {
            let inner = up.len() / layer.out_features();
            fetch(&up[range.start * inner..range.end * inner], 0);
        }
        out.fill(0.0);
        match layer.weight() {
            FrozenWeight::Dense(weight) => {
                let weight = Rows::whole(weight.data::<f32>(), inputs);
                float::add_products(weight, x, range.clone(), rows, out);
            }
            FrozenWeight::Blocks { format: BlockFormat::F32, .. } => {
                let weight = layer.dense_rows(range.start, count);
                float::add_products(Rows::whole(&weight, inputs), x, 0..count, rows, out);
            }
            FrozenWeight::Blocks { format, bytes, .. } => match rounded {
                Some(rounded) => rounded.add_products(bytes, range.clone(), rows, out),
                None => {
                    let row_bytes = format.bytes_for(inputs);
                    let bytes = &bytes[range.start * row_bytes..range.end * row_bytes];
                    widened(*format, bytes, x, inputs, rows, out);
                }
            },
        }
        for Update { rows: of, up, h } in updates.iter().filter(|update| !update.rows.is_empty()) {
            let (h, out) = (h(), &mut out[of.start..]);
            float::add_products(Rows::whole(up, h.len() / of.len()), h, range.clone(), rows, out);
        }
        if let Some(bias) = layer.bias() {
            for (out, &bias) in out.chunks_exact_mut(rows).zip(&bias.data::<f32>()[range.start..]) {
                out.iter_mut().for_each(|out| *out += bias);
            }
        }
    }
}

/// Rows of the weight that a task reads.
fn task_rows(layer: &FrozenLinear) -> usize {
    let outputs = layer.out_features().max(1);
    let row_bytes = (layer.bytes() / outputs).max(1);
    (TASK_BYTES / row_bytes).next_multiple_of(MOST_TOGETHER).clamp(1, outputs)
}

/// What [`products`] reads of the layers' weights.
pub(super) fn stream(layers: &[&FrozenLinear]) -> Stream {
    Stream::new(layers.iter().map(|layer| {
        let bytes = layer.weight_bytes();
        (bytes, task_rows(layer) * bytes.len() / layer.out_features().max(1))
    }))
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
    pub(crate) fn whole(data: &'a [T], len: usize) -> Self {
        Self { data, len, stride: len }
    }

    /// The `N` rows `first`, `first + apart`, … to be multiplied together. The last one before `end`
    /// stands in for those past it.
    #[inline(always)]
    fn group<const N: usize>(&self, first: usize, apart: usize, end: usize) -> [&'a [T]; N] {
        let mut rows = [&self.data[..0]; N];
        for (at, row) in rows.iter_mut().enumerate() {
            let start = (first + at * apart).min(end - 1) * self.stride;
            *row = &self.data[start..start + self.len];
        }
        rows
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

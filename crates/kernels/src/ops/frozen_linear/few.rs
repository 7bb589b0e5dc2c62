//! Products with few rows, as in decoding: the weight is read once, as it is stored, and reading it
//! is what they cost.

use super::{FrozenLinear, FrozenWeight};
use crate::block::{self, BlockFormat};
use crate::buffer::Buffer;
use crate::simd::{self, vectorize};
use crate::team;

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
    let sums: Vec<f32> = match layer.weight() {
        FrozenWeight::Blocks { format, .. } => block_sums(*format, x, rows),
        FrozenWeight::Dense(_) => Vec::new(),
    };
    let row_bytes = (layer.bytes() / outputs.max(1)).max(1);
    let task = (TASK_BYTES / row_bytes).clamp(1, outputs.max(1));
    // `[out, rows]`, so that tasks own whole stretches.
    let mut turned = Buffer::<f32>::scratch(outputs * rows);
    team::chunks_mut(&mut turned, task * rows, |index, out| {
        let first = index * task;
        let count = out.len() / rows;
        vectorize(
            #[inline(always)]
            || {
                match layer.weight() {
                    FrozenWeight::Dense(weight) => {
                        let rows_of = first * inputs..(first + count) * inputs;
                        dense(&weight.data::<f32>()[rows_of], x, inputs, rows, out);
                    }
                    FrozenWeight::Blocks { format: BlockFormat::F32, .. } => {
                        dense(&layer.dense_rows(first, count), x, inputs, rows, out);
                    }
                    FrozenWeight::Blocks { format, bytes, .. } => {
                        let row_bytes = format.bytes_for(inputs);
                        let bytes = &bytes[first * row_bytes..(first + count) * row_bytes];
                        packed(*format, bytes, x, &sums, inputs, rows, out);
                    }
                }
                if inner > 0 {
                    let up = up[first * inner..].chunks_exact(inner);
                    for (out, up) in out.chunks_exact_mut(rows).zip(up) {
                        for (out, h) in out.iter_mut().zip(h.chunks_exact(inner)) {
                            *out += simd::dot(up, h);
                        }
                    }
                }
            },
        );
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

/// Sums of `x` over each block, for formats whose numbers are offset from zero.
fn block_sums(format: BlockFormat, x: &[f32], rows: usize) -> Vec<f32> {
    if rows != 1 || format.block_len() == 1 {
        return Vec::new();
    }
    vectorize(
        #[inline(always)]
        || x.chunks(format.block_len()).map(|block| simd::sum_map(block, |x| x)).collect(),
    )
}

#[inline(always)]
fn dense(weight: &[f32], x: &[f32], inputs: usize, rows: usize, out: &mut [f32]) {
    for (out, weight) in out.chunks_exact_mut(rows).zip(weight.chunks_exact(inputs)) {
        let mut rest = out.iter_mut().zip(x.chunks_exact(inputs));
        if let Some((out, x)) = rest.next() {
            *out = simd::dot_streamed(weight, x);
        }
        for (out, x) in rest {
            *out = simd::dot(weight, x);
        }
    }
}

#[inline(always)]
fn packed(
    format: BlockFormat,
    bytes: &[u8],
    x: &[f32],
    sums: &[f32],
    inputs: usize,
    rows: usize,
    out: &mut [f32],
) {
    let row_bytes = format.bytes_for(inputs);
    let of_rows = out.chunks_exact_mut(rows).zip(bytes.chunks_exact(row_bytes));
    // Plain loops: an iterator's closure would be a function of its own, without vectors.
    match (format, rows) {
        (BlockFormat::Q8_0, 1) => {
            for (out, row) in of_rows {
                out[0] = block::dot_q8_0(row, x);
            }
        }
        (BlockFormat::Q4_0, 1) => {
            for (out, row) in of_rows {
                out[0] = block::dot_q4_0(row, x, sums);
            }
        }
        (BlockFormat::Q4_1, 1) => {
            for (out, row) in of_rows {
                out[0] = block::dot_q4_1(row, x, sums);
            }
        }
        (BlockFormat::BF16, 1) => {
            for (out, row) in of_rows {
                out[0] = block::dot_bf16(row, x);
            }
        }
        _ => {
            let mut wide = Buffer::<f32>::scratch(inputs);
            for (out, row) in of_rows {
                block::dequantize(format, row, &mut wide);
                dense(&wide, x, inputs, rows, out);
            }
        }
    }
}

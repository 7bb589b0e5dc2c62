//! Tensors of a GGUF file in Hugging Face's order.

use crate::family::{Layout, Numbers};
use hydralora_kernels::block::{self, BlockFormat};
use hydralora_kernels::buffer::Buffer;
use hydralora_runtime::{chunks, chunks_mut, for_each};
use std::borrow::Cow;

/// Numbers one thread widens at a time.
const CHUNK: usize = 1 << 16;

/// Says why a tensor of the file's `shape` cannot be laid out so, if it cannot.
pub(super) fn fault(layout: &Layout, format: BlockFormat, shape: &[usize]) -> Option<String> {
    if layout.numbers != Numbers::Same && format != BlockFormat::F32 {
        return Some(format!("is {format}; expected F32"));
    }
    if layout.squeezed && shape.len() != 2 {
        return Some(format!("has the shape {shape:?}; expected two extents"));
    }
    let rows = shape.first().copied().unwrap_or(0);
    if let Some(fault) = layout.rows.and_then(|order| order.fault(rows)) {
        return Some(format!("has {fault}"));
    }
    if layout.rows.is_some() && shape.len() == 1 && format.block_len() > 1 {
        return Some(format!(
            "is a list in {format} blocks, whose numbers cannot be put in order; expected F32"
        ));
    }
    let columns = shape.get(1).copied().unwrap_or(0);
    let fault = layout.columns.and_then(|order| order.fault(columns));
    fault.map(|fault| format!("has {fault}"))
}

/// The bytes of a tensor of `shape` in Hugging Face's order, and their format: that of the file,
/// unless numbers change or heads begin within blocks, whose numbers are then widened.
pub(super) fn bytes<'a>(
    layout: &Layout,
    format: BlockFormat,
    shape: &[usize],
    stored: &'a [u8],
) -> (BlockFormat, Cow<'a, [u8]>) {
    if plain(layout) || stored.is_empty() {
        return (format, Cow::Borrowed(stored));
    }
    let block = format.block_len();
    let blocks = layout.columns.map(|order| order.of_blocks(block));
    if layout.numbers != Numbers::Same || blocks == Some(None) {
        let numbers = numbers(layout, format, shape, stored);
        let wide = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        return (BlockFormat::F32, Cow::Owned(wide));
    }
    let rows = shape.first().copied().unwrap_or(1);
    let width = stored.len() / rows;
    let mut ordered = vec![0; stored.len()];
    match layout.rows {
        Some(order) => order.restore(rows, width, stored, &mut ordered),
        None => ordered.copy_from_slice(stored),
    }
    if let Some(order) = blocks.flatten() {
        let size = format.bytes_for(block);
        let mut unordered = vec![0; width];
        for row in ordered.chunks_exact_mut(width) {
            unordered.copy_from_slice(row);
            order.restore(width / size, size, &unordered, row);
        }
    }
    (format, Cow::Owned(ordered))
}

/// The numbers of a tensor of `shape` in Hugging Face's order.
pub(super) fn numbers(
    layout: &Layout,
    format: BlockFormat,
    shape: &[usize],
    stored: &[u8],
) -> Buffer<f32> {
    let len: usize = shape.iter().product();
    let mut out = Buffer::<f32>::scratch(len);
    if len == 0 {
        return out;
    }
    if layout.rows.is_none() && layout.columns.is_none() {
        // Every block length divides the chunk.
        let stored = chunks(stored, format.bytes_for(CHUNK));
        for_each((chunks_mut(&mut out, CHUNK), stored), |_, (out, bytes)| {
            block::dequantize(format, bytes, out);
        });
    } else {
        let rows = shape.first().copied().unwrap_or(1);
        let (width, row_bytes) = (len / rows, stored.len() / rows);
        for_each(chunks_mut(&mut out, width), |row, out| {
            let from = layout.rows.map_or(row, |order| order.position(row, rows)) * row_bytes;
            let stored = &stored[from..from + row_bytes];
            let Some(order) = layout.columns else {
                return block::dequantize(format, stored, out);
            };
            let mut unordered = vec![0.0; width];
            block::dequantize(format, stored, &mut unordered);
            order.restore(width, 1, &unordered, out);
        });
    }
    if layout.numbers != Numbers::Same {
        out.iter_mut().for_each(|number| *number = layout.numbers.read(*number));
    }
    out
}

fn plain(layout: &Layout) -> bool {
    let Layout { rows, columns, numbers, squeezed: _ } = layout;
    rows.is_none() && columns.is_none() && *numbers == Numbers::Same
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Order;

    #[test]
    fn blocks_move_whole_or_are_widened() {
        for (width, stays) in [(32, true), (64, true), (16, false)] {
            let columns = Order::Tiled { start: 0, groups: 2, per: 3, width };
            let rows = Order::Tiled { start: 1, groups: 2, per: 2, width: 1 };
            let layout = Layout { rows: Some(rows), columns: Some(columns), ..Layout::default() };
            let shape = [5, 6 * width];
            let values: Vec<f32> = (0..5 * 6 * width).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut stored = Vec::new();
            block::quantize(BlockFormat::Q8_0, &values, &mut stored);
            let mut unordered = vec![0.0; values.len()];
            block::dequantize(BlockFormat::Q8_0, &stored, &mut unordered);
            let expected = |row: usize, column: usize| {
                unordered[rows.position(row, 5) * shape[1] + columns.position(column, shape[1])]
            };
            let wide = numbers(&layout, BlockFormat::Q8_0, &shape, &stored);
            for (at, &found) in wide.iter().enumerate() {
                assert_eq!(found, expected(at / shape[1], at % shape[1]));
            }
            let (format, bytes) = bytes(&layout, BlockFormat::Q8_0, &shape, &stored);
            assert_eq!(format == BlockFormat::Q8_0, stays);
            let mut again = vec![0.0; values.len()];
            block::dequantize(format, &bytes, &mut again);
            assert_eq!(again[..], wide[..]);
        }
    }
}

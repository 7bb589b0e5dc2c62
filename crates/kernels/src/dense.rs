//! Products with whole weights in `f32`, the rows of the batch shared out among the threads.
//!
//! A weight is packed into panels once per product, then every block of rows runs through all
//! panels while it lies in its core's cache. Each row's result depends on that row alone, so blocks
//! may follow the number of threads.

use crate::buffer::Buffer;
use crate::matmul::Write;
use crate::tile::{self, Left, Right, Segment};
use rayon::prelude::*;
use std::ops::Range;

/// Fewest rows for which packing a weight pays.
pub(crate) const FEWEST_ROWS: usize = 16;

/// Rows of a unit whose sums over rows are kept apart, so that they add up in the same order however
/// units are joined to blocks.
pub(crate) fn unit_rows(rows: usize) -> usize {
    32 * rows.div_ceil(2048).max(1)
}

/// Blocks of rows, four a thread if they get long enough, each a whole number of units.
pub(crate) fn blocks(rows: usize) -> Vec<Range<usize>> {
    let unit = unit_rows(rows);
    let units = rows.div_ceil(unit);
    let count = (4 * rayon::current_num_threads()).min(units.div_ceil(2)).max(1);
    (0..count)
        .map(|i| (i * units / count * unit).min(rows)..((i + 1) * units / count * unit).min(rows))
        .filter(|block| !block.is_empty())
        .collect()
}

/// Cuts `data`, rows of `cols` elements, at the ends of consecutive `blocks`.
pub(crate) fn cut<'a, T>(
    data: &'a mut [T],
    cols: usize,
    blocks: &[Range<usize>],
) -> Vec<&'a mut [T]> {
    let mut rest = data;
    blocks
        .iter()
        .map(|block| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(block.len() * cols);
            rest = after;
            part
        })
        .collect()
}

/// Panels of the transpose of `w: [cols, depth]`: a right-hand side of `depth × cols`.
pub(crate) fn packed_transpose(w: &[f32], depth: usize) -> Buffer<f32> {
    let cols = w.len() / depth.max(1);
    let mut out = Buffer::scratch(tile::packed_len(cols, depth));
    let panel = (tile::panel_width() * depth).max(1);
    out.par_chunks_mut(panel)
        .enumerate()
        .for_each(|(index, out)| tile::pack_transposed(w, depth, index, out));
    out
}

/// Panels of `w: [depth, cols]`: a right-hand side of `depth × cols`.
pub(crate) fn packed_rows(w: &[f32], cols: usize) -> Buffer<f32> {
    let depth = w.len() / cols.max(1);
    let mut out = Buffer::scratch(tile::packed_len(cols, depth));
    let panel = (tile::panel_width() * depth).max(1);
    out.par_chunks_mut(panel)
        .enumerate()
        .for_each(|(index, out)| tile::pack_rows(w, cols, index, out));
    out
}

/// [`packed_rows`] on the calling thread, into the start of `out`.
pub(crate) fn pack_rows(w: &[f32], cols: usize, out: &mut [f32]) {
    let depth = w.len() / cols.max(1);
    let panel = (tile::panel_width() * depth).max(1);
    let panels = out[..tile::packed_len(cols, depth)].chunks_mut(panel);
    panels.enumerate().for_each(|(index, out)| tile::pack_rows(w, cols, index, out));
}

/// `out (+)= x · right` for `x: [rows, depth]` and `out: [rows, cols]`.
pub(crate) fn by_blocks(
    x: &[f32],
    depth: usize,
    right: Right<'_>,
    out: &mut [f32],
    cols: usize,
    write: Write,
) {
    let rows = out.len() / cols.max(1);
    crate::profile::product(rows, depth, cols);
    let blocks = blocks(rows);
    let parts = cut(out, cols, &blocks);
    parts.into_par_iter().zip(&blocks).for_each(|(out, block)| {
        let left = Left::rows(&x[block.start * depth..block.end * depth], depth);
        let segment = Segment { left, right, depth };
        tile::multiply(&[segment], block.len(), cols, out, cols, write);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_rows_in_order() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for rows in [1, 7, 32, 100, 1600, 5000] {
                let blocks = pool.install(|| blocks(rows));
                assert_eq!(blocks[0].start, 0);
                assert_eq!(blocks.last().unwrap().end, rows);
                for pair in blocks.windows(2) {
                    assert_eq!(pair[0].end, pair[1].start);
                    assert_eq!(pair[1].start % unit_rows(rows), 0);
                }
            }
        }
    }
}

//! Products with whole weights in `f32`, the rows of the batch shared out among the threads.
//!
//! A weight is packed into panels once per product, then every block of rows runs through all
//! panels while it lies in its core's cache. Each row's result depends on that row alone, so blocks
//! may follow the number of threads.

use crate::buffer::Buffer;
use crate::matmul::Write;
use crate::tile::{self, Left, Right, Segment};
use hydralora_runtime::{chunks_mut, each_mut, for_each};
use std::cell::Cell;
use std::ops::Range;

/// Fewest rows for which packing a weight pays.
pub(crate) const FEWEST_ROWS: usize = 16;

thread_local! {
    /// Fewest rows for which weights are packed.
    static PACKED_FROM: Cell<usize> = const { Cell::new(FEWEST_ROWS) };
}

/// Has passes of up to `rows` rows computed on this thread as passes of a few rows are, until it is
/// dropped.
///
/// A row of such a pass comes out the same, to the last bit, whatever the other rows are and however
/// many. That is what a server wants for the single tokens of many texts: which of them share a pass
/// must not change them.
#[must_use]
pub fn few_rows(rows: usize) -> FewRows {
    FewRows(PACKED_FROM.replace(FEWEST_ROWS.max(rows + 1)))
}

/// What [`few_rows`] gives.
pub struct FewRows(usize);

impl Drop for FewRows {
    fn drop(&mut self) {
        PACKED_FROM.set(self.0);
    }
}

/// Whether `rows` are few.
pub(crate) fn are_few(rows: usize) -> bool {
    rows < PACKED_FROM.get()
}

/// Blocks of rows, equally many for every thread and equally long but for one tile: up to four a
/// thread, if they get long enough, so that one that is held up can be helped.
pub(crate) fn blocks(rows: usize) -> Vec<Range<usize>> {
    const MOST_PER_THREAD: usize = 4;
    const SHORTEST: usize = 48;
    let threads = hydralora_runtime::threads();
    let per_thread = (rows / (threads * SHORTEST)).clamp(1, MOST_PER_THREAD);
    let tiles = rows.div_ceil(tile::tile_rows());
    let count = (threads * per_thread).min(tiles);
    let end_of = |block: usize| (block * tiles / count * tile::tile_rows()).min(rows);
    (0..count).map(|block| end_of(block)..end_of(block + 1)).collect()
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
    for_each(chunks_mut(&mut out, panel), |index, out| {
        tile::pack_transposed(w, depth, index, out);
    });
    out
}

/// Panels of `w: [depth, cols]`: a right-hand side of `depth × cols`.
pub(crate) fn packed_rows(w: &[f32], cols: usize) -> Buffer<f32> {
    let depth = w.len() / cols.max(1);
    let mut out = Buffer::scratch(tile::packed_len(cols, depth));
    let panel = (tile::panel_width() * depth).max(1);
    for_each(chunks_mut(&mut out, panel), |index, out| tile::pack_rows(w, cols, index, out));
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
    let mut parts = cut(out, cols, &blocks);
    for_each((each_mut(&mut parts), &blocks[..]), |_, (out, block)| {
        let left = Left::rows(&x[block.start * depth..block.end * depth], depth);
        let segment = Segment { left, right, depth };
        tile::multiply(&[segment], block.len(), cols, out, cols, write);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_rows_in_order_and_give_every_thread_as_many_tiles() {
        for threads in [1, 2, 5, 16] {
            let pool = hydralora_runtime::Pool::new(threads);
            for rows in [1, 7, 32, 100, 1600, 5000] {
                let blocks = pool.enter(|| blocks(rows));
                assert_eq!(blocks[0].start, 0);
                assert_eq!(blocks.last().unwrap().end, rows);
                assert!(blocks.windows(2).all(|pair| pair[0].end == pair[1].start));
                let tiles = |block: &Range<usize>| block.len().div_ceil(tile::tile_rows());
                let most = blocks.iter().map(tiles).max().unwrap();
                let fewest = blocks.iter().map(tiles).min().unwrap();
                assert!(fewest > 0 && most - fewest <= 1, "{rows} rows: {fewest} to {most} tiles");
                let tiles = rows.div_ceil(tile::tile_rows());
                assert!(blocks.len().is_multiple_of(threads) || blocks.len() == tiles);
            }
        }
        assert!(blocks(0).is_empty());
    }
}

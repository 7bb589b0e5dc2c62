//! Matrix products in register tiles, for kernels that join several products in one pass.
//!
//! [`multiply`] computes `C (+)= Σ_s L_s R_s` on the calling thread: the segments `s` lie one after
//! the other along the inner dimension, so that a low-rank update is nothing but a few more steps of
//! the base product's inner loop. A tile of `C` (eight rows by three vectors where there are 32
//! vector registers) stays in registers over the whole inner dimension; every number is summed in
//! the order of that dimension, in stretches of one length whatever the blocking, so results depend
//! on no number of threads.

use crate::matmul::Write;
use pulp::{Arch, Simd, WithSimd};
use std::marker::PhantomData;

/// A left-hand side: element `(i, k)` stands at `i · row_stride + k · col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

/// A right-hand side in panels of [`panel_width`] columns: element `(k, j)` of panel `p` stands at
/// `p · panel_stride + k · row_stride + j`.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row_stride: usize,
    pub(crate) panel_stride: usize,
}

impl<'a> Left<'a> {
    /// Rows of `cols` elements each, one after the other.
    pub(crate) fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, row_stride: cols, col_stride: 1 }
    }

    /// The transpose of rows of `cols` elements each.
    pub(crate) fn columns(data: &'a [f32], cols: usize) -> Self {
        Self { data, row_stride: 1, col_stride: cols }
    }
}

impl<'a> Right<'a> {
    /// Rows of `cols` elements each, one after the other.
    pub(crate) fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, row_stride: cols, panel_stride: panel_width() }
    }

    /// Panels made by [`pack_transposed`] or [`pack_rows`] from `depth` inner elements.
    pub(crate) fn packed(data: &'a [f32], depth: usize) -> Self {
        let width = panel_width();
        Self { data, row_stride: width, panel_stride: depth * width }
    }
}

/// One stretch of the inner dimension.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    pub(crate) left: Left<'a>,
    pub(crate) right: Right<'a>,
    pub(crate) depth: usize,
}

/// Rows of a tile on this processor: a product of a multiple of so many rows wastes none of it.
pub(crate) fn tile_rows() -> usize {
    tile().0
}

/// Columns of a panel of a right-hand side on this processor.
pub(crate) fn panel_width() -> usize {
    tile().1
}

/// Rows and columns of a tile.
fn tile() -> (usize, usize) {
    struct Extents;
    impl WithSimd for Extents {
        type Output = (usize, usize);
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
            let (rows, vectors) = if S::REGISTER_COUNT >= 32 { (8, 3) } else { (6, 2) };
            (rows, vectors * S::F32_LANES)
        }
    }
    Arch::new().dispatch(Extents)
}

/// Rows that run through all panels before the next do, where there are 16 vector registers: of
/// SmolLM2's layers they stay in a second cache of 512 KB beside a panel. A multiple of a tile's rows.
const ROWS_AT_ONCE: usize = 48;

/// Steps of the inner dimension that are summed before they join the sums of earlier ones. In a
/// chain of `n` additions the rounding of each grows with what was summed before; cut into stretches of
/// this length, a row of SmolLM2's feed-forward layers ends with a third of the error.
pub(crate) const STRETCH: usize = 192;

/// Length of the panels for `cols` columns and `depth` inner elements.
pub(crate) fn packed_len(cols: usize, depth: usize) -> usize {
    cols.next_multiple_of(panel_width()) * depth
}

/// Panel `panel` of the transpose of `rows: [cols of the panels, depth]`, columns past the end
/// zero; `out` holds that panel.
pub(crate) fn pack_transposed(rows: &[f32], depth: usize, panel: usize, out: &mut [f32]) {
    let width = panel_width();
    let first = panel * width;
    let count = (rows.len() / depth.max(1)).saturating_sub(first).min(width);
    let rows = &rows[first * depth..(first + count) * depth];
    if count < width {
        out.fill(0.0);
    }
    const SIDE: usize = 16;
    /// Bytes along a row: more rows are read side by side than the processor foresees.
    const AHEAD: usize = 4 * SIDE * size_of::<f32>();
    crate::simd::vectorize(
        #[inline(always)]
        || {
            let (whole_rows, whole_depth) = (count / SIDE * SIDE, depth / SIDE * SIDE);
            for k in (0..whole_depth).step_by(SIDE) {
                for j in (0..whole_rows).step_by(SIDE) {
                    let mut square = [[0.0_f32; SIDE]; SIDE];
                    for (i, square) in square.iter_mut().enumerate() {
                        let row = &rows[(j + i) * depth + k..];
                        crate::simd::fetch(row, AHEAD);
                        square.copy_from_slice(&row[..SIDE]);
                    }
                    for (i, out) in out[k * width..].chunks_mut(width).take(SIDE).enumerate() {
                        for (l, out) in out[j..j + SIDE].iter_mut().enumerate() {
                            *out = square[l][i];
                        }
                    }
                }
            }
            for j in 0..count {
                let from = if j < whole_rows { whole_depth } else { 0 };
                for k in from..depth {
                    out[k * width + j] = rows[j * depth + k];
                }
            }
        },
    );
}

/// Panel `panel` of `rows: [depth, cols]`, columns past the end zero; `out` holds that panel.
pub(crate) fn pack_rows(rows: &[f32], cols: usize, panel: usize, out: &mut [f32]) {
    let width = panel_width();
    let first = panel * width;
    let count = cols.saturating_sub(first).min(width);
    for (out, row) in out.chunks_exact_mut(width).zip(rows.chunks_exact(cols.max(1))) {
        out[..count].copy_from_slice(&row[first..first + count]);
        out[count..].fill(0.0);
    }
}

/// `out (+)= Σ_s left_s · right_s` for `out: [rows, cols]` whose rows start `out_stride` apart.
///
/// # Panics
/// If a view reaches past its data.
pub(crate) fn multiply(
    segments: &[Segment<'_>],
    rows: usize,
    cols: usize,
    out: &mut [f32],
    out_stride: usize,
    write: Write,
) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!((rows - 1) * out_stride + cols <= out.len(), "the result reaches past its storage");
    let width = panel_width();
    for Segment { left, right, depth } in segments.iter().filter(|s| s.depth > 0) {
        let last = (rows - 1) * left.row_stride + (depth - 1) * left.col_stride;
        assert!(last < left.data.len(), "the left-hand side reaches past its data");
        let (panel, within) = ((cols - 1) / width, (cols - 1) % width);
        let last = panel * right.panel_stride + (depth - 1) * right.row_stride + within;
        // A panel before the last is used to its full width.
        let before = panel.checked_sub(1).map_or(0, |panel| {
            panel * right.panel_stride + (depth - 1) * right.row_stride + width - 1
        });
        assert!(last.max(before) < right.data.len(), "the right-hand side reaches past its data");
    }
    let (out, borrowed) = (out.as_mut_ptr(), PhantomData);
    Arch::new().dispatch(Multiply { segments, rows, cols, out, borrowed, out_stride, write });
}

struct Multiply<'a> {
    segments: &'a [Segment<'a>],
    rows: usize,
    cols: usize,
    /// Written through by every tile, so it is taken from the unique borrow once.
    out: *mut f32,
    borrowed: PhantomData<&'a mut [f32]>,
    out_stride: usize,
    write: Write,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            self.panels::<S, 8, 3>(simd);
        } else {
            self.panels::<S, 6, 2>(simd);
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn panels<S: Simd, const MR: usize, const NV: usize>(self, simd: S) {
        let width = NV * S::F32_LANES;
        let at_once = if S::REGISTER_COUNT >= 32 { self.rows } else { ROWS_AT_ONCE };
        for start in (0..self.rows).step_by(at_once) {
            let end = self.rows.min(start + at_once);
            for (panel, first) in (0..self.cols).step_by(width).enumerate() {
                let cols = width.min(self.cols - first);
                let mut row = start;
                while row < end {
                    let at = At { panel, row, col: first, skip: 0 };
                    let left = end - row;
                    // SAFETY: `multiply` checked that rows `row..row + height` of every left-hand
                    // side, columns `first..first + cols` of every right-hand side and the same rows
                    // and columns of the result lie inside their slices, for `height` rows that are
                    // left.
                    unsafe {
                        if left >= MR {
                            self.across::<S, MR, NV>(simd, at, cols);
                            row += MR;
                        } else if left >= 4 {
                            self.across::<S, 4, NV>(simd, at, cols);
                            row += 4;
                        } else {
                            self.across::<S, 1, NV>(simd, at, cols);
                            row += 1;
                        }
                    }
                }
            }
        }
    }

    /// `MR` rows of one panel's first `cols` columns.
    ///
    /// # Safety
    /// The rows and columns at `at` lie inside every view.
    #[inline(always)]
    unsafe fn across<S: Simd, const MR: usize, const NV: usize>(
        &self,
        simd: S,
        at: At,
        cols: usize,
    ) {
        let lanes = S::F32_LANES;
        // SAFETY: as promised by the caller; each call covers columns below `cols`.
        unsafe {
            if cols == NV * lanes {
                return self.tile::<S, MR, NV, false>(simd, at, 0);
            }
            let (mut at, mut left) = (at, cols);
            while left >= lanes {
                self.tile::<S, MR, 1, false>(simd, at, 0);
                at.skip += lanes;
                left -= lanes;
            }
            if left > 0 {
                self.tile::<S, MR, 1, true>(simd, at, left);
            }
        }
    }

    /// `MR` rows by `NV` vectors, or by the first `tail` lanes of one vector if `TAIL`.
    ///
    /// # Safety
    /// As for [`across`](Self::across).
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const TAIL: bool>(
        &self,
        simd: S,
        at: At,
        tail: usize,
    ) {
        let lanes = S::F32_LANES;
        let zero = simd.splat_f32s(0.0);
        let mut sums = [[zero; NV]; MR];
        for i in 0..MR {
            for v in 0..NV {
                let row = (at.row + i) * self.out_stride + at.col + at.skip;
                prefetch_for_writing(self.out.wrapping_add(row + v * lanes));
            }
        }
        // Sums of earlier stretches: a long chain of additions rounds worse than a few short ones.
        let mut earlier = sums;
        let mut folded = false;
        let mut left_in_stretch = STRETCH;
        for segment in self.segments {
            let (left, right) = (segment.left, segment.right);
            // The data of a segment without depth may end before these; nothing is read then.
            let mut l = left.data.as_ptr().wrapping_add(at.row * left.row_stride);
            let mut r = right.data.as_ptr().wrapping_add(at.panel * right.panel_stride + at.skip);
            let strides = (left.row_stride, left.col_stride, right.row_stride);
            let mut depth = segment.depth;
            while depth > 0 {
                if left_in_stretch == 0 {
                    for (earlier, sums) in earlier.iter_mut().zip(&mut sums) {
                        for (earlier, sum) in earlier.iter_mut().zip(sums) {
                            *earlier = simd.add_f32s(*earlier, *sum);
                            *sum = zero;
                        }
                    }
                    (folded, left_in_stretch) = (true, STRETCH);
                }
                let steps = depth.min(left_in_stretch);
                // SAFETY: every step of the depth is inside the views.
                unsafe {
                    // Where the panel's step and one of the left strides are known, the loads express
                    // the addresses themselves: on a core that shares its front end with another
                    // thread, counting and adding slow the loop down.
                    match strides {
                        (rows, 1, panel) if !TAIL && panel == NV * lanes => {
                            let strides = (rows, 1, NV * lanes);
                            add_turns::<S, MR, NV, TAIL>(
                                simd, &mut sums, l, r, strides, tail, steps,
                            );
                        }
                        (1, cols, panel) if !TAIL && panel == NV * lanes => {
                            let strides = (1, cols, NV * lanes);
                            add_turns::<S, MR, NV, TAIL>(
                                simd, &mut sums, l, r, strides, tail, steps,
                            );
                        }
                        _ => add_steps::<S, MR, NV, TAIL, 1>(
                            simd, &mut sums, l, r, strides, tail, steps,
                        ),
                    }
                }
                l = l.wrapping_add(steps * left.col_stride);
                r = r.wrapping_add(steps * right.row_stride);
                depth -= steps;
                left_in_stretch -= steps;
            }
        }
        if folded {
            for (sums, earlier) in sums.iter_mut().zip(&earlier) {
                for (sum, &earlier) in sums.iter_mut().zip(earlier) {
                    *sum = simd.add_f32s(earlier, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: row `at.row + i` and these columns lie inside the result, whose pointer comes from
            // a unique borrow that lasts for the whole product.
            unsafe {
                let out = self.out.add((at.row + i) * self.out_stride + at.col + at.skip);
                if TAIL {
                    let out = std::slice::from_raw_parts_mut(out, tail);
                    let sum = match self.write {
                        Write::Set => sums[0],
                        Write::Add => simd.add_f32s(sums[0], simd.partial_load_f32s(out)),
                    };
                    simd.partial_store_f32s(out, sum);
                } else {
                    for (v, &sum) in sums.iter().enumerate() {
                        let out = out.add(v * lanes).cast::<S::f32s>();
                        let sum = match self.write {
                            Write::Set => sum,
                            Write::Add => simd.add_f32s(sum, out.read_unaligned()),
                        };
                        out.write_unaligned(sum);
                    }
                }
            }
        }
    }
}

/// [`add_steps`] with as many steps a turn as are fastest: 8 of 4, 8 and 16 where there are 32 vector
/// registers. With 16 the compiler starts to keep sums in memory at 6, and 4 are a fifth faster than 8.
///
/// # Safety
/// As for [`add_steps`].
#[inline(always)]
unsafe fn add_turns<S: Simd, const MR: usize, const NV: usize, const TAIL: bool>(
    simd: S,
    sums: &mut [[S::f32s; NV]; MR],
    l: *const f32,
    r: *const f32,
    strides: (usize, usize, usize),
    tail: usize,
    depth: usize,
) {
    // SAFETY: as promised by the caller.
    unsafe {
        if S::REGISTER_COUNT >= 32 {
            add_steps::<S, MR, NV, TAIL, 8>(simd, sums, l, r, strides, tail, depth);
        } else {
            add_steps::<S, MR, NV, TAIL, 4>(simd, sums, l, r, strides, tail, depth);
        }
    }
}

/// `depth` times [`step`], `TURN` of them in one turn of the loop. `strides` are those of the left-hand
/// side's rows and columns and of `r`.
///
/// # Safety
/// All that is stepped over can be read.
#[inline(always)]
unsafe fn add_steps<
    S: Simd,
    const MR: usize,
    const NV: usize,
    const TAIL: bool,
    const TURN: usize,
>(
    simd: S,
    sums: &mut [[S::f32s; NV]; MR],
    mut l: *const f32,
    mut r: *const f32,
    strides: (usize, usize, usize),
    tail: usize,
    depth: usize,
) {
    let (row_stride, col_stride, panel_stride) = strides;
    // The pointers move past the end after the last step, and are not read there.
    for _ in 0..depth / TURN {
        for k in 0..TURN {
            // SAFETY: one of `depth` steps; see above.
            unsafe {
                let (l, r) = (l.add(k * col_stride), r.add(k * panel_stride));
                step::<S, MR, NV, TAIL>(simd, sums, l, row_stride, r, tail);
            }
        }
        l = l.wrapping_add(TURN * col_stride);
        r = r.wrapping_add(TURN * panel_stride);
    }
    for _ in 0..depth % TURN {
        // SAFETY: one of `depth` steps; see above.
        unsafe { step::<S, MR, NV, TAIL>(simd, sums, l, row_stride, r, tail) };
        l = l.wrapping_add(col_stride);
        r = r.wrapping_add(panel_stride);
    }
}

/// `sums[i] += l_i · r` for one step of the inner dimension: `MR` numbers `row_stride` apart, and
/// `NV` vectors or the first `tail` lanes of one.
///
/// # Safety
/// All of them can be read.
#[inline(always)]
unsafe fn step<S: Simd, const MR: usize, const NV: usize, const TAIL: bool>(
    simd: S,
    sums: &mut [[S::f32s; NV]; MR],
    l: *const f32,
    row_stride: usize,
    r: *const f32,
    tail: usize,
) {
    let lanes = S::F32_LANES;
    let mut vectors = [simd.splat_f32s(0.0); NV];
    // SAFETY: as promised by the caller.
    unsafe {
        if TAIL {
            vectors[0] = simd.partial_load_f32s(std::slice::from_raw_parts(r, tail));
        } else {
            for (v, vector) in vectors.iter_mut().enumerate() {
                *vector = r.add(v * lanes).cast::<S::f32s>().read_unaligned();
            }
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let factor = simd.splat_f32s(*l.add(i * row_stride));
            for (sum, &vector) in sums.iter_mut().zip(&vectors) {
                *sum = simd.mul_add_e_f32s(factor, vector, *sum);
            }
        }
    }
}

/// Asks for the cache line at `address`, whatever it is; the result's lines arrive while the sums
/// are computed.
#[inline(always)]
fn prefetch_for_writing(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint that cannot fault.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Where a tile stands.
#[derive(Clone, Copy)]
struct At {
    panel: usize,
    row: usize,
    /// First column of the panel.
    col: usize,
    /// Columns of the panel that were done before.
    skip: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729) % 1000) as f32 / 500.0 - 1.0).collect()
    }

    fn naive(l: &[f32], r: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
        let mut out = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                out[i * n + j] = (0..k).map(|p| l[i * k + p] * r[p * n + j]).sum();
            }
        }
        out
    }

    fn transpose(rows: &[f32], cols: usize) -> Vec<f32> {
        let height = rows.len() / cols.max(1);
        (0..rows.len()).map(|i| rows[i % height * cols + i / height]).collect()
    }

    fn close(got: &[f32], expected: &[f32]) {
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-3, "{got} {expected}");
        }
    }

    #[test]
    fn every_layout_and_every_tail_matches_the_definition() {
        let shapes = [(1, 1, 1), (3, 5, 7), (7, 0, 5), (8, 16, 48), (13, 33, 50), (101, 70, 131)];
        let count = if cfg!(miri) { 4 } else { shapes.len() };
        for &(m, k, n) in &shapes[..count] {
            let (l, r) = (values(m * k, 1), values(k * n, 2));
            let mut expected = naive(&l, &r, m, k, n);
            let (lt, rt) = (transpose(&l, k), transpose(&r, n));
            let panels = n.div_ceil(panel_width());
            let mut by_rows = vec![f32::NAN; packed_len(n, k)];
            let mut by_transpose = by_rows.clone();
            for panel in 0..panels {
                let part = panel * k * panel_width()..(panel + 1) * k * panel_width();
                pack_rows(&r, n, panel, &mut by_rows[part.clone()]);
                pack_transposed(&rt, k, panel, &mut by_transpose[part]);
            }
            assert_eq!(by_rows, by_transpose);
            let mut out = vec![0.0; m * n];
            for left in [Left::rows(&l, k), Left::columns(&lt, m)] {
                for right in [Right::rows(&r, n), Right::packed(&by_rows, k)] {
                    let segment = Segment { left, right, depth: k };
                    multiply(&[segment], m, n, &mut out, n, Write::Set);
                    close(&out, &expected);
                }
            }
            let segment = Segment { left: Left::rows(&l, k), right: Right::rows(&r, n), depth: k };
            multiply(&[segment, segment], m, n, &mut out, n, Write::Add);
            expected.iter_mut().for_each(|x| *x *= 3.0);
            close(&out, &expected);
        }
    }

    #[test]
    #[should_panic(expected = "reaches past")]
    fn a_view_past_its_data_is_refused() {
        let data = [0.0; 6];
        let segment =
            Segment { left: Left::rows(&data, 3), right: Right::rows(&data, 2), depth: 3 };
        multiply(&[segment], 3, 2, &mut [0.0; 6], 2, Write::Set);
    }
}

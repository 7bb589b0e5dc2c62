//! The step between `z` and the heads, forward and back: `h = s · (w_1 z, …, w_N z)` row by row.

use super::Plan;
use crate::element::Element;

impl Plan {
    /// Writes `h: [rows, N·r]` from `z: [rows, z_cols]` and `gates: [rows, N]`, which are empty where
    /// gates do not differ by token.
    #[inline(always)]
    pub(super) fn mix<E: Element>(&self, scale: E, z: &[E], gates: &[E], h: &mut [E]) {
        let (h_cols, rank) = (self.h_cols(), self.rank);
        let constant = E::from_f64(self.constant_gate());
        let rows = h.chunks_exact_mut(h_cols).zip(z.chunks_exact(self.z_cols));
        for (row, (h, z)) in rows.enumerate() {
            for (expert, h) in h.chunks_exact_mut(rank).enumerate() {
                let gate = gates.get(row * self.experts + expert).copied().unwrap_or(constant);
                let start = self.z_start(expert);
                for (h, &z) in h.iter_mut().zip(&z[start..start + rank]) {
                    *h = scale * gate * z;
                }
            }
        }
    }

    /// Adds to `dz`, rows of `dz_stride` elements that begin with the gradient of `z`, and writes the
    /// gates' gradient to `dgates` if gates differ by token. `dh` lacks the factor `scale`.
    #[inline(always)]
    pub(super) fn unmix<E: Element>(
        &self,
        scale: E,
        dh: &[E],
        (z, gates): (&[E], &[E]),
        (dz, dz_stride): (&mut [E], usize),
        dgates: &mut [E],
    ) {
        let (rank, experts) = (self.rank, self.experts);
        let constant = E::from_f64(self.constant_gate());
        let rows = dh.chunks_exact(self.h_cols()).zip(z.chunks_exact(self.z_cols));
        for (row, ((dh, z), dz)) in rows.zip(dz.chunks_exact_mut(dz_stride)).enumerate() {
            for (expert, dh) in dh.chunks_exact(rank).enumerate() {
                let gate = gates.get(row * experts + expert).copied().unwrap_or(constant);
                let start = self.z_start(expert);
                let mut along = E::ZERO;
                for i in 0..rank {
                    let dh = scale * dh[i];
                    along += dh * z[start + i];
                    dz[start + i] += gate * dh;
                }
                if let Some(dgate) = dgates.get_mut(row * experts + expert) {
                    *dgate = along;
                }
            }
        }
    }
}

//! Sums over ranks whose bits are the same on every rank and in every run.
//!
//! Each rank adds up one slice of the values, those of rank 0 first, and gives the sums to all: a rank sends
//! and receives twice the values however many ranks there are, and every sum is computed once.

use super::Ranks;
use crate::error::{Error, Result};
use hydralora_kernels::Element;

/// Values that travel together, so that a large adapter needs no second copy of itself.
const PIECE: usize = 1 << 22;

/// Replaces `values` by their sums over all ranks, which have as many each.
///
/// # Errors
/// If a rank is gone, or sent another number of values.
pub(super) fn sum<E: Element>(ranks: &dyn Ranks, values: &mut [E]) -> Result<()> {
    for piece in values.chunks_mut(PIECE) {
        sum_piece(ranks, piece)?;
    }
    Ok(())
}

fn sum_piece<E: Element>(ranks: &dyn Ranks, piece: &mut [E]) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let place = |of: usize| piece.len() * of / size..piece.len() * (of + 1) / size;
    let places: Vec<_> = (0..size).map(place).collect();
    let parts: Vec<&[u8]> =
        places.iter().map(|place| bytemuck::cast_slice(&piece[place.clone()])).collect();
    let mut sums = vec![0.0_f64; places[rank].len()];
    for (of, bytes) in ranks.exchange(&parts)?.iter().enumerate() {
        fits(of, bytes.len(), size_of::<E>() * sums.len())?;
        for (sum, value) in sums.iter_mut().zip(bytes.chunks_exact(size_of::<E>())) {
            *sum += bytemuck::pod_read_unaligned::<E>(value).to_f64();
        }
    }
    let sums: Vec<E> = sums.into_iter().map(E::from_f64).collect();
    let all = ranks.gather(bytemuck::cast_slice(&sums))?;
    for (of, (bytes, place)) in all.iter().zip(places).enumerate() {
        let into: &mut [u8] = bytemuck::cast_slice_mut(&mut piece[place]);
        fits(of, bytes.len(), into.len())?;
        into.copy_from_slice(bytes);
    }
    Ok(())
}

fn fits(rank: usize, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let message = format!("rank {rank} sent {found} bytes of a sum, and {expected} were expected");
    Err(Error::Ranks { message })
}

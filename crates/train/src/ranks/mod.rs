//! Several processes that train together, a rank each: how they reach each other, and how they come to the
//! same decisions.
//!
//! [`Ranks`] moves bytes and knows nothing else: [`Alone`] is a run of one process, [`Threads`] are the
//! ranks of a test, `Mpi` (feature `mpi`) those that `mpirun` or `srun` started. What a [`Team`] does with
//! it is the same for all: it adds up numbers in the order of ranks, so that the bits do not depend on who
//! was first, and lets no rank go on where another could not.

#[cfg(feature = "mpi")]
mod mpi;
mod sum;
mod team;
mod threads;

use crate::error::Result;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use team::{Failure, Team, Traffic};
pub use threads::Threads;

/// Moves bytes between the ranks of a run. All ranks call the same in the same order.
pub trait Ranks {
    /// Number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Gives what every rank gave, in the order of ranks.
    ///
    /// # Errors
    /// If a rank is gone.
    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Sends part `r` to rank `r`; gives what each rank sent to this one, in the order of ranks.
    ///
    /// # Errors
    /// If a rank is gone.
    fn exchange(&self, parts: &[&[u8]]) -> Result<Vec<Vec<u8>>>;
}

/// A run of one process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![own.to_vec()])
    }

    fn exchange(&self, parts: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        Ok(parts.iter().map(|part| part.to_vec()).collect())
    }
}

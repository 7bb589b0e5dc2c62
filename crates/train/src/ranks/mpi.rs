//! Ranks that an MPI started, as `mpirun` and `srun` do.

use super::Ranks;
use crate::error::{Error, Result};
use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};

/// Bytes of a message that travel with its length: what ranks agree on has room in them.
const SHORT: usize = 512;
/// Bytes of the length.
const LENGTH: usize = 8;

/// A rank among the processes that an MPI started.
pub struct Mpi {
    world: SimpleCommunicator,
    // Dropped last: with it MPI ends.
    _universe: Universe,
}

impl Mpi {
    /// Joins the other processes. The thread that calls this makes all later calls.
    ///
    /// # Errors
    /// If it was joined before, or the MPI takes no process with threads.
    pub fn join() -> Result<Self> {
        let refused = |message: &str| Error::Ranks { message: message.to_owned() };
        let (universe, threading) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or_else(|| refused("MPI was started before"))?;
        if threading < Threading::Funneled {
            return Err(refused(
                "the MPI at hand takes no process with threads; expected one that was built for them",
            ));
        }
        Ok(Self { world: universe.world(), _universe: universe })
    }

    /// The name and version of the MPI at hand, in a line.
    pub fn library() -> String {
        let told = mpi::environment::library_version().unwrap_or_default();
        let line = told.lines().next().unwrap_or_default();
        line.split(',').next().unwrap_or_default().trim_end_matches('\0').trim().to_owned()
    }

    /// Ends all ranks at once with this exit status.
    pub fn abort(&self, code: i32) -> ! {
        self.world.abort(code)
    }
}

/// Where parts of these lengths lie one after the other, and their length together.
fn layout(lengths: &[u64]) -> Result<(Vec<i32>, Vec<i32>, usize)> {
    let (mut counts, mut starts, mut total) = (Vec::new(), Vec::new(), 0_u64);
    for &length in lengths {
        let fit = |value: u64| {
            i32::try_from(value).map_err(|_| Error::Ranks {
                message: format!("{value} bytes are more than MPI takes at once"),
            })
        };
        counts.push(fit(length)?);
        starts.push(fit(total)?);
        total += length;
    }
    Ok((counts, starts, total as usize))
}

/// The parts of these lengths that `all` consists of.
fn cut(all: &[u8], lengths: &[u64]) -> Vec<Vec<u8>> {
    let mut rest = all;
    let mut next = |&length: &u64| {
        let (part, more) = rest.split_at(length as usize);
        rest = more;
        part.to_vec()
    };
    lengths.iter().map(&mut next).collect()
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut head = [0_u8; SHORT];
        head[..LENGTH].copy_from_slice(&(own.len() as u64).to_le_bytes());
        let first = own.len().min(SHORT - LENGTH);
        head[LENGTH..LENGTH + first].copy_from_slice(&own[..first]);
        let mut heads = vec![0_u8; SHORT * self.size()];
        self.world.all_gather_into(&head[..], &mut heads[..]);
        let heads = || heads.chunks_exact(SHORT).map(|head| head.split_at(LENGTH));
        let length =
            |(length, _): (&[u8], &[u8])| u64::from_le_bytes(length.try_into().unwrap_or_default());
        let lengths: Vec<u64> = heads().map(length).collect();
        if lengths.iter().all(|&length| length as usize <= SHORT - LENGTH) {
            let short = heads().zip(&lengths);
            return Ok(short.map(|((_, of), &length)| of[..length as usize].to_vec()).collect());
        }
        let (counts, starts, total) = layout(&lengths)?;
        let mut all = vec![0_u8; total];
        let mut into = PartitionMut::new(&mut all[..], counts, starts);
        self.world.all_gather_varcount_into(own, &mut into);
        Ok(cut(&all, &lengths))
    }

    fn exchange(&self, parts: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let sent: Vec<u64> = parts.iter().map(|part| part.len() as u64).collect();
        let mut received = vec![0_u64; self.size()];
        self.world.all_to_all_into(&sent[..], &mut received[..]);
        let own = parts.concat();
        let (counts, starts, _) = layout(&sent)?;
        let from = Partition::new(&own[..], counts, starts);
        let (counts, starts, total) = layout(&received)?;
        let mut all = vec![0_u8; total];
        let mut into = PartitionMut::new(&mut all[..], counts, starts);
        self.world.all_to_all_varcount_into(&from, &mut into);
        Ok(cut(&all, &received))
    }
}

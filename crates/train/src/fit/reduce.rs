//! Reducing: what several processes found of one step becomes what all of them follow.
//!
//! The seam for data parallel training. Each process takes its share of a step's micro-batches; both
//! numbers that the step depends on are combined here: the label tokens, before the first backward
//! pass, since the loss is the mean over all of them; and the gradients, after the last. A run is one
//! process so far.

use super::backward::Summed;
use crate::error::Result;

/// Combines what the processes of a run found.
pub(super) trait Reduce {
    /// Label tokens of a step over all processes, of which this one has `own`.
    ///
    /// # Errors
    /// If another process cannot be reached.
    fn label_tokens(&self, own: usize) -> Result<usize>;

    /// The sums over all processes.
    ///
    /// # Errors
    /// If another process cannot be reached.
    fn sums(&self, own: Summed) -> Result<Summed>;
}

/// A run that is one process: all there is it found itself.
pub(super) struct OneProcess;

impl Reduce for OneProcess {
    fn label_tokens(&self, own: usize) -> Result<usize> {
        Ok(own)
    }

    fn sums(&self, own: Summed) -> Result<Summed> {
        Ok(own)
    }
}

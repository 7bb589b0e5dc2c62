//! Loading: the batches of the next steps are read and packed on a thread of their own, so that no step
//! waits for them.
//!
//! What a step gets follows from the seed and its number alone, whatever the thread is at; so a run that
//! goes on from a checkpoint gets what it would have got. What goes wrong on the thread comes out of
//! [`Loader::next`] in the place of the step that it went wrong for.

use super::deal::Share;
use super::plan::Order;
use crate::error::{Error, Result};
use hydralora_data::{Batch, Example, Examples};
use std::any::Any;
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, Scope, ScopedJoinHandle};

/// Steps that wait beside the one the thread is at.
const AHEAD: usize = 1;

/// The data of one optimizer step.
pub(super) struct StepData {
    /// The epoch, from 0.
    pub(super) epoch: usize,
    /// The number in it of the first micro-batch.
    pub(super) first_batch: usize,
    /// The micro-batches of this rank whose gradients are added up.
    pub(super) micro_batches: Vec<MicroBatch>,
}

/// What goes forward and back in one piece.
pub(super) struct MicroBatch {
    /// The step's micro-batch that its first record is of.
    pub(super) at: usize,
    /// Whether what routers do in it is looked at.
    pub(super) seen: bool,
    pub(super) examples: Vec<Example>,
    pub(super) batch: Batch,
}

/// Records that go forward and back in one piece, before they are read.
pub(super) struct Part {
    /// As [`MicroBatch`] has it.
    pub(super) at: usize,
    pub(super) seen: bool,
    /// Their indices.
    pub(super) examples: Vec<usize>,
}

impl StepData {
    fn read(examples: &Examples, order: &mut Order, share: Share, step: usize) -> Result<Self> {
        let place = order.step(step);
        let read = |part: Part| -> Result<MicroBatch> {
            let found = part.examples.iter().map(|&index| examples.get(index));
            let examples: Vec<Example> = found.collect::<hydralora_data::Result<_>>()?;
            let batch = Batch::pack(&examples.iter().collect::<Vec<_>>());
            Ok(MicroBatch { at: part.at, seen: part.seen, examples, batch })
        };
        let parts = share.deal(place.batches, examples.lengths());
        let micro_batches = parts.into_iter().map(read).collect::<Result<_>>()?;
        Ok(Self { epoch: place.epoch, first_batch: place.first_batch, micro_batches })
    }

    /// Tokens of the step that this rank has.
    pub(super) fn tokens(&self) -> usize {
        self.micro_batches.iter().map(|micro| micro.batch.tokens.len()).sum()
    }

    /// Label tokens among them.
    pub(super) fn label_tokens(&self) -> usize {
        self.micro_batches.iter().map(|micro| micro.batch.label_tokens).sum()
    }
}

/// The thread that reads ahead. It ends with its last step, with the first error, or when the loader is
/// [dropped](Self::end).
pub(super) struct Loader<'scope> {
    steps: Option<Receiver<Result<StepData>>>,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
}

impl<'scope> Loader<'scope> {
    /// Begins to read this rank's share of the steps `steps`, numbered from 0.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        examples: &'env Examples,
        mut order: Order,
        share: Share,
        steps: Range<usize>,
    ) -> Result<Self> {
        let (sender, receiver) = sync_channel(AHEAD);
        let read_on = move || {
            for step in steps {
                let found = StepData::read(examples, &mut order, share, step);
                let last = found.is_err();
                // Nobody listens any more once training has ended.
                if sender.send(found).is_err() || last {
                    break;
                }
            }
        };
        let thread =
            thread::Builder::new().name("batches".to_owned()).spawn_scoped(scope, read_on)?;
        Ok(Self { steps: Some(receiver), thread: Some(thread) })
    }

    /// The data of the next step.
    ///
    /// # Errors
    /// If a record cannot be read, or the thread broke down.
    pub(super) fn next(&mut self) -> Result<StepData> {
        let found = self.steps.as_ref().and_then(|steps| steps.recv().ok());
        found.unwrap_or_else(|| {
            let message = self.join().unwrap_or_else(|| "there are no more steps".to_owned());
            Err(Error::Loader { message })
        })
    }

    /// Lets the thread end, and waits for it.
    pub(super) fn end(mut self) {
        self.steps = None;
        // A panic in data that no step has asked for is nobody's error.
        let _ = self.join();
    }

    /// Waits for the thread; what it panicked with, if it did.
    fn join(&mut self) -> Option<String> {
        let panic: Box<dyn Any + Send> = self.thread.take()?.join().err()?;
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Some(text.unwrap_or("the thread that reads batches broke down").to_owned())
    }
}

#[cfg(test)]
mod tests;

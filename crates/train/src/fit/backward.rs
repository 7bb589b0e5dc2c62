//! The backward passes of one optimizer step.

use super::Run;
use super::files::{kept, name_records};
use super::load::{MicroBatch, StepData};
use super::reduce::Totals;
use crate::error::{Error, Result};
use crate::evaluate::token_domains;
use crate::routing::RoutingLog;
use hydralora_kernels::Gradients;
use hydralora_kernels::ops::dropout::mix;
use hydralora_kernels::ops::elementwise::scale;
use hydralora_model::adapter::{NO_CLUSTER, Pass};
use hydralora_model::{IGNORE_LABEL, Packed, Trained};
use hydralora_peft::Tuned;

/// What micro-batches of a step come to.
#[derive(Default)]
pub(super) struct Summed {
    /// Gradients of the step's loss.
    pub(super) gradients: Gradients,
    /// Mean cross-entropy over the step's label tokens.
    pub(super) loss: f64,
    /// What the method adds to it.
    pub(super) aux_loss: f64,
}

/// One step's way forward and back.
pub(super) struct Backward<'a, 'r> {
    pub(super) run: &'a Run<'r>,
    pub(super) tuned: &'a dyn Tuned,
    /// Steps taken so far.
    pub(super) step: usize,
    /// The whole step: the loss is the mean over its label tokens.
    pub(super) totals: Totals,
    /// Who watches the routers of the first micro-batch.
    pub(super) log: Option<&'a RoutingLog>,
}

impl Backward<'_, '_> {
    /// Goes through this rank's micro-batches of a step, adding up their gradients.
    ///
    /// # Errors
    /// If the loss is not finite, or a sequence does not fit the model.
    pub(super) fn all(&self, data: &StepData) -> Result<Summed> {
        let mut summed = Summed::default();
        // The cross-entropy is a sum over the step's micro-batches, the added term their mean.
        let share = 1.0 / self.totals.micro_batches as f64;
        for micro in &data.micro_batches {
            let found = self.one(micro, share)?;
            summed.loss += found.as_ref().map_or(f64::NAN, |found| found.loss);
            summed.aux_loss += found.as_ref().map_or(f64::NAN, |found| found.added);
            let together = summed.loss + summed.aux_loss;
            let Some(found) = found.filter(|_| together.is_finite()) else {
                return Err(Error::NonFiniteLoss {
                    step: self.step + 1,
                    loss: together,
                    epoch: data.epoch,
                    batch: data.first_batch + micro.at,
                    records: name_records(self.run.dataset, &micro.examples),
                    kept: kept(self.run.folder),
                });
            };
            summed.gradients.accumulate(found.gradients);
        }
        Ok(summed)
    }

    /// Loss and gradients of a micro-batch; none where activations are not finite.
    fn one(&self, micro: &MicroBatch, share: f64) -> Result<Option<Trained>> {
        let MicroBatch { at, seen, examples, batch } = micro;
        let Self { run, tuned, .. } = self;
        let seed = mix(mix(run.config.seed) ^ mix(self.step as u64)) ^ *at as u64;
        let clusters: Vec<u32> = run.clusters.map_or_else(Vec::new, |of| {
            let found = examples.iter().map(|example| of(example.source, example.row));
            found.map(|cluster| cluster.unwrap_or(NO_CLUSTER)).collect()
        });
        let pass = Pass::training(mix(seed))
            .of_sequences(&batch.offsets, &batch.domains)
            .in_clusters(&clusters)
            .checkpointing(run.config.gradient_checkpointing);
        let pass = match self.log.filter(|_| *seen) {
            Some(log) => {
                let labelled = batch.labels.iter().enumerate();
                let labelled = labelled.filter(|(_, label)| **label != IGNORE_LABEL);
                log.next_training_batch(token_domains(batch), labelled.map(|(at, _)| at));
                pass.observed_by(log)
            }
            None => pass,
        };
        let packed = Packed { tokens: &batch.tokens, offsets: &batch.offsets };
        let added = |pass: &Pass<'_>| tuned.aux_loss(pass).map(|term| scale(&term, share));
        let factor = 1.0 / self.totals.label_tokens.max(1) as f64;
        let adapter = tuned.as_adapter();
        match run.decoder.gradients(packed, &batch.labels, factor, adapter, &pass, &added) {
            Err(hydralora_model::Error::NonFiniteActivations) => Ok(None),
            other => Ok(Some(other?)),
        }
    }
}

//! How fast a run is going to be, from a part of a step that is timed beforehand.

use crate::error::Result;
use crate::fit::{Run, planned_steps};
use hydralora_data::{Batch, Example};
use hydralora_kernels::ops::elementwise::scale;
use hydralora_model::Packed;
use hydralora_model::adapter::Pass;
use hydralora_peft::{TrainingPlan, Tuned};
use std::time::Instant;

/// A timed piece of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Tokens that went forward and back.
    pub tokens: usize,
    /// Seconds that took.
    pub seconds: f64,
}

/// Times forward and backward of a run's first sequences, of at most `most` tokens together, once the
/// caches are warm. Nothing that is trained changes.
///
/// # Errors
/// If a sequence does not fit the model.
pub fn time_tokens(run: &Run<'_>, tuned: &mut dyn Tuned, most: usize) -> Result<Timing> {
    let plan = TrainingPlan { total_steps: planned_steps(run)?, domains: &run.dataset.domains };
    tuned.begin(&plan)?;
    let (mut examples, mut tokens): (Vec<Example>, usize) = (Vec::new(), 0);
    for index in 0..run.dataset.train.len().min(run.config.batch_size) {
        let left = most.saturating_sub(tokens);
        if left < 2 {
            break;
        }
        let mut example = run.dataset.train.get(index)?;
        example.tokens.truncate(left);
        example.labels.truncate(left);
        tokens += example.tokens.len();
        examples.push(example);
    }
    let batch = Batch::pack(&examples.iter().collect::<Vec<_>>());
    let packed = Packed { tokens: &batch.tokens, offsets: &batch.offsets };
    let tuned = &*tuned;
    let once = || -> Result<f64> {
        let started = Instant::now();
        let pass = Pass::training(run.config.seed)
            .of_sequences(&batch.offsets, &batch.domains)
            .checkpointing(run.config.gradient_checkpointing);
        let added = |pass: &Pass<'_>| tuned.aux_loss(pass).map(|term| scale(&term, 1.0));
        let factor = 1.0 / batch.label_tokens.max(1) as f64;
        let adapter = tuned.as_adapter();
        run.decoder.gradients(packed, &batch.labels, factor, adapter, &pass, &added)?;
        Ok(started.elapsed().as_secs_f64())
    };
    once()?;
    Ok(Timing { tokens, seconds: once()? })
}

//! Clipping: the whole gradient is made no longer than a limit.

use crate::error::{Error, Result};
use hydralora_kernels::Gradients;
use hydralora_peft::Tuned;
use std::path::Path;

/// Scales the gradients of step `step`, numbered from 1, so that their Euclidean norm, over all together,
/// is at most `most`; no limit if 0. Gives the norm they had.
///
/// # Errors
/// If it is not finite; names a tensor whose gradient is not.
pub(super) fn clip(
    gradients: &mut Gradients,
    most: f64,
    tuned: &dyn Tuned,
    step: usize,
    folder: Option<&Path>,
) -> Result<f64> {
    let norm = gradients.norm();
    if !norm.is_finite() {
        let trainables = tuned.trainables();
        let bad = trainables.iter().find(|trainable| {
            gradients.get(trainable.var()).is_some_and(|gradient| !gradient.is_finite())
        });
        return Err(Error::NonFiniteGradient {
            step,
            name: bad.map_or("all together", |bad| bad.parameter.name()).to_owned(),
            kept: super::files::kept(folder),
        });
    }
    if most > 0.0 && norm > most {
        gradients.scale(most / norm);
    }
    Ok(norm)
}

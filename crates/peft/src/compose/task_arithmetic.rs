//! The weighted sum of the updates, exactly: `Σ w_i s_i B_i A_i`.
//!
//! Ilharco et al., arXiv 2212.04089; PEFT's `cat`, and its `svd` when a rank is given.

use super::{ComposeOptions, Composition, Pair, Part, concatenated};
use hydralora_model::adapter::Site;

pub(super) struct TaskArithmetic;

impl Composition for TaskArithmetic {
    fn name(&self) -> &'static str {
        "task-arithmetic"
    }

    fn summary(&self) -> &'static str {
        "the weighted sum of the updates, exactly"
    }

    fn same_rank(&self) -> bool {
        false
    }

    fn pair(&self, _site: Site, parts: &[Part<'_>], options: &ComposeOptions) -> Pair {
        let factors: Vec<f64> = parts.iter().map(|part| part.weight * part.scale).collect();
        concatenated(parts, &factors, options.rank)
    }
}

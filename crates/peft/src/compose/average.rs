//! The mean of the updates, exactly: `(1/n) Σ s_i B_i A_i`. Weights have no say.

use super::{ComposeOptions, Composition, Pair, Part, concatenated};
use hydralora_model::adapter::Site;

pub(super) struct Average;

impl Composition for Average {
    fn name(&self) -> &'static str {
        "average"
    }

    fn summary(&self) -> &'static str {
        "the mean of the updates, exactly"
    }

    fn same_rank(&self) -> bool {
        false
    }

    fn takes_means(&self) -> bool {
        true
    }

    fn pair(&self, _site: Site, parts: &[Part<'_>], options: &ComposeOptions) -> Pair {
        let factors: Vec<f64> = parts.iter().map(|part| part.scale / part.of as f64).collect();
        concatenated(parts, &factors, options.rank)
    }
}

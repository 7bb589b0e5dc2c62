//! Factor by factor: `A = Σ √(w_i s_i) A_i`, `B = Σ √(w_i s_i) B_i`. Cheap in rank, and rough: the
//! products of one LoRA's `B` with another's `A` come in.

use super::{ComposeOptions, Composition, Pair, Part, factorwise, weighted_sum};
use hydralora_model::adapter::Site;

pub(super) struct Linear;

impl Composition for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn summary(&self) -> &'static str {
        "the weighted sums of all A and of all B"
    }

    fn same_rank(&self) -> bool {
        true
    }

    fn pair(&self, _site: Site, parts: &[Part<'_>], _options: &ComposeOptions) -> Pair {
        factorwise(parts, |tensors, weights, _| weighted_sum(tensors, weights))
    }
}

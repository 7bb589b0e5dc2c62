//! LoRA-Split: several LoRAs of the same total size, `y = W0 x + (alpha / r) Σ_i w_i B_i A_i x`.
//!
//! The baseline of Tian et al., arXiv 2404.19245: each pair has a rank of its own, `N · r` fixed. The
//! paper does not say how the pairs are joined; `combine` chooses between a router per token and
//! their plain sum (which, as a matrix, is a LoRA of rank `N · r`).

use crate::error::{Fault, Result};
use crate::low_rank::{HeadNames, LowRankSpec, Mixing, Router, Start};
use crate::low_rank_options::{
    LowRankOptions, Shared, check_directions, check_segments_or_usual, low_rank_options,
};
use hydralora_model::adapter::SiteShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the pairs are joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Combine {
    /// Weighed per token by a softmax router.
    #[default]
    Routed,
    /// Added up.
    Sum,
}

low_rank_options! {
    /// Options of LoRA-Split in a recipe; the defaults are the paper's four pairs of rank 8.
    rank = 8, alpha = 32.0, targets = "ffn";
    /// Number `N` of pairs.
    num_experts: usize = 4,
    /// How the pairs are joined: `routed` or `sum`.
    combine: Combine = Combine::Routed,
    /// What each `A` and `B` start from: `kaiming` (`B` at zero) or `singular_segments`.
    init_lora_weights: Start = Start::Kaiming,
}

impl LowRankOptions for Options {
    const NAME: &'static str = "lora-split";
    const SUMMARY: &'static str = "several small LoRAs of the same total size, routed or summed";
    const PEFT_TYPE: &'static str = "LORA_SPLIT";
    const OWN_KEYS: &'static [&'static str] = &["combine"];
    const LATER_KEYS: &'static [&'static str] = &["init_lora_weights"];

    fn num_experts(&self) -> Option<usize> {
        Some(self.num_experts)
    }

    fn own_faults(&self) -> Vec<Fault> {
        check_segments_or_usual(self.init_lora_weights, self.num_experts).into_iter().collect()
    }

    fn check_shapes(&self, sites: &[SiteShape]) -> Result<()> {
        check_directions(&self.spec(), sites)
    }

    fn spec(&self) -> LowRankSpec {
        LowRankSpec {
            num_experts: self.num_experts,
            own_a: true,
            mixing: match self.combine {
                Combine::Sum => Mixing::Sum,
                Combine::Routed => Mixing::Routed(Router::default()),
            },
            names: HeadNames::Numbered,
            start: self.init_lora_weights,
            ..LowRankSpec::of(&self.keys())
        }
    }
}

//! LoRAMoE: `N` experts with their own `A_i` and `B_i`, mixed per token by a router, and a penalty
//! that keeps the experts of each kind busy with the data of their kind:
//!
//! ```text
//! y = W0 x + (alpha / r) Σ_i w_i B_i A_i x          w = softmax(W_g x)
//! L += weight · Σ_layers var(Z) / mean(Z)²          Z_si = (1 ± delta) Σ_{t in s} w_ti
//! ```
//!
//! Dou et al., arXiv 2312.09979. In `Z` the sign is plus where expert `i` is of the kind of sequence
//! `s`: the first half of the experts is for the domains named by `knowledge_domains`, the second
//! half for all others. The variance is unbiased and the mean squared, as in the published code
//! (whose script leaves the penalty switched off).
//!
//! With `router_top_k` only the largest gates count, rescaled to sum to 1, and `balance: load` is the
//! usual penalty for that, `N Σ_i f_i P_i` (see [`hydralora_kernels::ops::top_k`]): what MixLoRA (Li
//! et al., arXiv 2404.15159) does, but for each linear layer and not for the feed-forward block. GOAT (Fan et
//! al., arXiv 2502.16894) is that with `init_lora_weights: singular_segments`.

use crate::error::{Fault, Result};
use crate::low_rank::{
    Balance, Evenness, HeadNames, LowRankSpec, Mixing, Penalty, Router, Start, TopKGradient,
};
use crate::low_rank_options::{
    LowRankOptions, Shared, check_directions, check_evenness, check_segments_or_usual, check_top_k,
    check_top_k_gradient, check_weight, low_rank_options,
};
use hydralora_model::adapter::SiteShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the penalty asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum BalanceKind {
    /// Each expert as much of its own kind of data as the others.
    #[default]
    Localized,
    /// Each expert as many tokens as the others.
    Load,
    /// Each expert as much of the gates as the others.
    Importance,
}

low_rank_options! {
    /// Options of LoRAMoE in a recipe; the defaults are the published script's, except that dropout
    /// is off and the penalty on.
    rank = 4, alpha = 32.0, targets = "ffn";
    /// Number `N` of experts.
    num_experts: usize = 8,
    /// How many experts a token goes to; all if not given.
    router_top_k: Option<usize> = None,
    /// Which gates learn from that choice: those that were `kept`, or all (`straight_through`).
    router_top_k_gradient: TopKGradient = TopKGradient::Kept,
    /// What the penalty asks for: `localized`, `load` or `importance`.
    balance: BalanceKind = BalanceKind::Localized,
    /// Factor on the balance penalty; none if 0.
    balance_weight: f64 = 0.01,
    /// How much more an expert should carry of its own kind of data, `0 ≤ delta < 1`.
    balance_delta: f64 = 0.1,
    /// Domains meant for the first half of the experts; without any, all experts are of one kind.
    knowledge_domains: Vec<String> = Vec::new(),
    /// Factor on a penalty on large scores of the routers; none if 0.
    router_z_weight: f64 = 0.0,
    /// What each `A` and `B` start from: `kaiming` (`B` at zero) or `singular_segments`.
    init_lora_weights: Start = Start::Kaiming,
}

impl LowRankOptions for Options {
    const NAME: &'static str = "loramoe";
    const SUMMARY: &'static str =
        "LoRA experts with their own A and B, a router, and a balance penalty";
    const PEFT_TYPE: &'static str = "LORAMOE";
    const OWN_KEYS: &'static [&'static str] =
        &["router_top_k", "balance", "balance_weight", "balance_delta", "knowledge_domains"];
    const LATER_KEYS: &'static [&'static str] =
        &["router_top_k_gradient", "router_z_weight", "init_lora_weights"];

    fn num_experts(&self) -> Option<usize> {
        Some(self.num_experts)
    }

    fn own_faults(&self) -> Vec<Fault> {
        let mut faults: Vec<Fault> =
            check_weight("balance_weight", self.balance_weight).into_iter().collect();
        let delta = self.balance_delta;
        if !(0.0..1.0).contains(&delta) {
            let message = format!("is {delta}; expected 0 ≤ balance_delta < 1");
            faults.push(Fault::new("method.balance_delta", message));
        }
        faults.extend(check_top_k(self.router_top_k, self.num_experts));
        faults.extend(check_top_k_gradient(self.router_top_k_gradient, self.router_top_k));
        faults.extend(check_weight("router_z_weight", self.router_z_weight));
        faults.extend(check_segments_or_usual(self.init_lora_weights, self.num_experts));
        let named = match self.balance {
            BalanceKind::Localized => return faults,
            BalanceKind::Load => "load",
            BalanceKind::Importance => "importance",
        };
        let new = self.balance == BalanceKind::Importance;
        faults.extend(check_evenness(named, new, self.balance_weight));
        if !self.knowledge_domains.is_empty() {
            let message =
                format!("is about `balance: localized`; `{named}` knows no kinds of data");
            faults.push(Fault::new("method.knowledge_domains", message));
        }
        faults
    }

    fn check_shapes(&self, sites: &[SiteShape]) -> Result<()> {
        check_directions(&self.spec(), sites)
    }

    fn spec(&self) -> LowRankSpec {
        LowRankSpec {
            num_experts: self.num_experts,
            own_a: true,
            mixing: Mixing::Routed(Router {
                top_k: self.router_top_k,
                top_k_gradient: self.router_top_k_gradient,
                ..Router::default()
            }),
            start: self.init_lora_weights,
            z_weight: self.router_z_weight,
            names: HeadNames::Numbered,
            ..LowRankSpec::of(&self.keys())
        }
    }

    fn balance(&self) -> Option<Balance> {
        let penalty = match self.balance {
            BalanceKind::Localized => Penalty::Localized {
                delta: self.balance_delta,
                first_half: self.knowledge_domains.clone(),
            },
            BalanceKind::Load => Evenness::Load.penalty(self.router_top_k),
            BalanceKind::Importance => Evenness::Importance.penalty(self.router_top_k),
        };
        Some(Balance { weight: self.balance_weight, penalty })
    }
}

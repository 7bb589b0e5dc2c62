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
//! et al., arXiv 2404.15159) does, but for each linear layer and not for the feed-forward block.

use crate::error::Fault;
use crate::low_rank::{Balance, HeadNames, LowRankSpec, Mixing, Penalty, Router};
use crate::low_rank_options::{
    LowRankOptions, Shared, check_top_k, check_weight, low_rank_options,
};
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
}

low_rank_options! {
    /// Options of LoRAMoE in a recipe; the defaults are the published script's, except that dropout
    /// is off and the penalty on.
    rank = 4, alpha = 32.0, targets = "ffn";
    /// Number `N` of experts.
    num_experts: usize = 8,
    /// How many experts a token goes to; all if not given.
    router_top_k: Option<usize> = None,
    /// What the penalty asks for: `localized` or `load`.
    balance: BalanceKind = BalanceKind::Localized,
    /// Factor on the balance penalty; none if 0.
    balance_weight: f64 = 0.01,
    /// How much more an expert should carry of its own kind of data, `0 ≤ delta < 1`.
    balance_delta: f64 = 0.1,
    /// Domains meant for the first half of the experts; without any, all experts are of one kind.
    knowledge_domains: Vec<String> = Vec::new(),
}

impl LowRankOptions for Options {
    const NAME: &'static str = "loramoe";
    const SUMMARY: &'static str =
        "LoRA experts with their own A and B, a router, and a balance penalty";
    const PEFT_TYPE: &'static str = "LORAMOE";
    const OWN_KEYS: &'static [&'static str] =
        &["router_top_k", "balance", "balance_weight", "balance_delta", "knowledge_domains"];

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
        if self.balance == BalanceKind::Load && !self.knowledge_domains.is_empty() {
            let message = "is about `balance: localized`; `load` knows no kinds of data";
            faults.push(Fault::new("method.knowledge_domains", message));
        }
        faults
    }

    fn spec(&self) -> LowRankSpec {
        LowRankSpec {
            num_experts: self.num_experts,
            own_a: true,
            mixing: Mixing::Routed(Router { top_k: self.router_top_k, ..Router::default() }),
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
            BalanceKind::Load => Penalty::Load { top_k: self.router_top_k.unwrap_or(1) },
        };
        Some(Balance { weight: self.balance_weight, penalty })
    }
}

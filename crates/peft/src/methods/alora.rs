//! ALoRA: several `A_i`, one shared `B`, and a softmax router over the `A_i`, per token:
//! `y = W0 x + (alpha / r) B Σ_i w_i A_i x`, `w = softmax(W_g x)`.
//!
//! Hydra turned round (arXiv 2509.25414, which finds that `A` are alike only where they start from one
//! seed, and that `B` carries what tasks have in common). Every `A_i` and the router start Kaiming-uniform,
//! `B` at zero. Computed as HydraLoRA with `B` in the place of every head.

use crate::error::Fault;
use crate::low_rank::{Balance, Evenness, HeadNames, LowRankSpec, Mixing, Router, TopKGradient};
use crate::low_rank_options::{
    LowRankOptions, Shared, check_evenness, check_top_k, check_top_k_gradient, check_weight,
    low_rank_options,
};

low_rank_options! {
    /// Options of ALoRA in a recipe.
    rank = 4, alpha = 32.0, targets = "ffn";
    /// Number `N` of `A`.
    num_experts: usize = 4,
    /// How many `A` a token uses; all if not given.
    router_top_k: Option<usize> = None,
    /// Which gates learn from that choice: those that were `kept`, or all (`straight_through`).
    router_top_k_gradient: TopKGradient = TopKGradient::Kept,
    /// Factor on a penalty on uneven loads; none if 0.
    balance_weight: f64 = 0.0,
    /// What that penalty evens out: tokens (`load`) or gates (`importance`).
    balance: Evenness = Evenness::Load,
    /// Factor on a penalty on large scores of the routers; none if 0.
    router_z_weight: f64 = 0.0,
}

impl LowRankOptions for Options {
    const NAME: &'static str = "alora";
    const SUMMARY: &'static str = "several A mixed per token by a router, one shared B";
    const PEFT_TYPE: &'static str = "ALORA";
    const OWN_KEYS: &'static [&'static str] = &["router_top_k", "balance_weight"];
    const LATER_KEYS: &'static [&'static str] =
        &["router_top_k_gradient", "balance", "router_z_weight"];

    fn num_experts(&self) -> Option<usize> {
        Some(self.num_experts)
    }

    fn own_faults(&self) -> Vec<Fault> {
        let mut faults: Vec<Fault> =
            check_weight("balance_weight", self.balance_weight).into_iter().collect();
        if self.num_experts == 1 {
            let message = "is 1, which is `lora`; expected 2 or more, or `name: lora`";
            faults.push(Fault::new("method.num_experts", message));
        }
        faults.extend(check_top_k(self.router_top_k, self.num_experts));
        faults.extend(check_top_k_gradient(self.router_top_k_gradient, self.router_top_k));
        let unlike_default = self.balance != Evenness::default();
        faults.extend(check_evenness("importance", unlike_default, self.balance_weight));
        faults.extend(check_weight("router_z_weight", self.router_z_weight));
        faults
    }

    fn spec(&self) -> LowRankSpec {
        LowRankSpec {
            num_experts: self.num_experts,
            own_a: true,
            shared_b: true,
            mixing: Mixing::Routed(Router {
                top_k: self.router_top_k,
                top_k_gradient: self.router_top_k_gradient,
                ..Router::default()
            }),
            z_weight: self.router_z_weight,
            names: HeadNames::Single,
            ..LowRankSpec::of(&self.keys())
        }
    }

    fn balance(&self) -> Option<Balance> {
        let penalty = self.balance.penalty(self.router_top_k);
        Some(Balance { weight: self.balance_weight, penalty })
    }
}

//! Penalties on experts that carry too little, and on routers whose scores grow large, added to the loss of
//! every micro-batch.

use crate::error::{Error, Fault, Result};
use hydralora_kernels::Var;
use hydralora_kernels::ops::balance::squared_variation;
use hydralora_kernels::ops::elementwise::{add, scale};
use hydralora_kernels::ops::top_k::{keep_largest, load_balance};
use hydralora_kernels::ops::z_loss::squared_log_sum;
use hydralora_model::adapter::{Pass, Site};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What makes a load even.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Evenness {
    /// As many tokens for each expert: [`Penalty::Load`].
    #[default]
    Load,
    /// As much of the gates for each expert: [`Penalty::Importance`].
    Importance,
}

impl Evenness {
    /// The penalty where each token goes to its `top_k` largest experts, or to all.
    pub(crate) fn penalty(self, top_k: Option<usize>) -> Penalty {
        match self {
            Evenness::Load => Penalty::Load { top_k: top_k.unwrap_or(1) },
            Evenness::Importance => Penalty::Importance { top_k },
        }
    }
}

/// A penalty on experts that carry too little.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Balance {
    /// Factor on the penalty.
    pub(crate) weight: f64,
    /// What it asks for.
    pub(crate) penalty: Penalty,
}

/// What a [`Balance`] asks for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Penalty {
    /// The squared coefficient of variation of the gates summed over each sequence, where the first
    /// half of the experts should carry more of the sequences of some domains and the second half
    /// more of the others.
    Localized {
        /// An expert's load counts `1 + delta` for sequences meant for it and `1 − delta` for others.
        delta: f64,
        /// Domains meant for the first half; without any, all experts are alike.
        first_half: Vec<String>,
    },
    /// As many tokens for each expert, where each goes to its `top_k` largest.
    Load {
        /// How many experts a token goes to.
        top_k: usize,
    },
    /// The squared coefficient of variation of the gates summed over all tokens (Shazeer et al., arXiv
    /// 1701.06538, equation 7; the variance over `N`, as in its published code).
    Importance {
        /// How many experts a token goes to; all if not given.
        top_k: Option<usize>,
    },
}

/// A balance in a run.
pub(super) struct Balancer {
    balance: Balance,
    num_experts: usize,
    /// Numbers in the run at hand of the domains meant for the first half.
    first_half: Vec<u32>,
}

impl Balancer {
    /// Nothing where the penalty's weight is zero.
    pub(super) fn new(balance: Balance, num_experts: usize) -> Option<Self> {
        (balance.weight > 0.0).then(|| Self { balance, num_experts, first_half: Vec::new() })
    }

    /// Finds the penalty's domains among those of the data.
    ///
    /// # Errors
    /// For every one that is none of `domains`.
    pub(super) fn begin(&mut self, domains: &[String]) -> Result<()> {
        let Penalty::Localized { first_half, .. } = &self.balance.penalty else { return Ok(()) };
        let (mut found, mut faults) = (Vec::new(), Vec::new());
        for name in first_half {
            match domains.iter().position(|domain| domain == name) {
                Some(at) => found.push(at as u32),
                None => {
                    let known = domains.join(", ");
                    let message = format!("`{name}` is no domain of the data; there are {known}");
                    faults.push(Fault::new("method.knowledge_domains", message));
                }
            }
        }
        if !faults.is_empty() {
            return Err(Error::Options { faults });
        }
        self.first_half = found;
        Ok(())
    }

    /// The penalty on the `gates` of each site in `pass`, `[1]`.
    pub(super) fn term(&self, pass: &Pass<'_>, gates: &BTreeMap<Site, Var>) -> Option<Var> {
        let sequences = pass.sequences();
        let terms = gates.values().map(|gates| match &self.balance.penalty {
            Penalty::Load { top_k } => load_balance(gates, *top_k),
            Penalty::Importance { top_k } => importance(gates, *top_k),
            Penalty::Localized { delta, .. } => match sequences {
                Some(found) => {
                    squared_variation(gates, found.offsets, &self.shares(*delta, found.domains))
                }
                None => {
                    let even = vec![1.0; self.num_experts];
                    squared_variation(gates, &[0, gates.value().rows()], &even)
                }
            },
        });
        let total = terms.reduce(|sum, term| add(&sum, term))?;
        Some(scale(&total, self.balance.weight))
    }

    /// What an expert's load counts, for every sequence and expert.
    fn shares(&self, delta: f64, domains: &[u32]) -> Vec<f64> {
        let experts = self.num_experts;
        let share = |domain: &u32, expert: usize| {
            let meant = self.first_half.contains(domain) == (expert < experts / 2);
            match (self.first_half.is_empty(), meant) {
                (true, _) => 1.0,
                (false, true) => 1.0 + delta,
                (false, false) => 1.0 - delta,
            }
        };
        domains.iter().flat_map(|d| (0..experts).map(move |e| share(d, e))).collect()
    }
}

/// The squared coefficient of variation over the experts of the sums of `gates: [T, N]`, cut down to the
/// `top_k` largest of each token.
fn importance(gates: &Var, top_k: Option<usize>) -> Var {
    let (rows, experts) = (gates.value().rows(), gates.value().cols());
    let kept = top_k.filter(|&k| k < experts).map(|k| keep_largest(gates, k));
    let found = squared_variation(kept.as_ref().unwrap_or(gates), &[0, rows], &vec![1.0; experts]);
    // From the unbiased variance to that over `N`.
    scale(&found, (experts - 1) as f64 / experts as f64)
}

/// `weight` times the sum over routers of their z-loss, from the `scores` of each, `[1]`.
pub(super) fn z_loss(weight: f64, scores: &BTreeMap<Site, Var>) -> Option<Var> {
    let terms = scores.values().map(squared_log_sum);
    let total = terms.reduce(|sum, term| add(&sum, term))?;
    Some(scale(&total, weight))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydralora_kernels::check;
    use hydralora_kernels::ops::low_rank::gates_of;
    use hydralora_kernels::{DType, Tensor};

    #[test]
    fn importance_is_the_squared_variation_of_what_experts_carry() {
        let gates = [0.5, 0.25, 0.25, 0.0, 0.75, 0.25, 0.1, 0.6, 0.3];
        let gates = Var::constant(Tensor::from_f64(DType::F64, &gates, [3, 3]));
        let of = |sums: [f64; 3]| {
            let mean = sums.iter().sum::<f64>() / 3.0;
            sums.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / 3.0 / (mean * mean)
        };
        let all = importance(&gates, None).value().item();
        assert!((all - of([0.6, 1.6, 0.8])).abs() < 1e-9, "{all}");
        // Of the two largest: ⅔ and ⅓; ¾ and ¼; ⅔ and ⅓. Of equal gates the earlier counts as larger.
        let two = importance(&gates, Some(2)).value().item();
        let third = 1.0 / 3.0;
        let wanted = of([2.0 * third, third + 0.75 + 2.0 * third, 0.25 + third]);
        assert!((two - wanted).abs() < 1e-9, "{two} {wanted}");
        assert_eq!(importance(&gates, Some(3)).value().item(), all);
    }

    #[test]
    fn gradients_match_finite_differences() {
        for top_k in [None, Some(2)] {
            check::gradients(&[&[5, 3]], |v| importance(&gates_of(&v[0]), top_k));
        }
        check::gradients(&[&[5, 3], &[2, 3]], |v| {
            let q = Site { layer: 0, linear: &hydralora_model::family::kit::Q_PROJ };
            let scores = [(q, v[0].clone()), (Site { layer: 1, ..q }, v[1].clone())].into();
            z_loss(0.3, &scores).unwrap()
        });
    }
}

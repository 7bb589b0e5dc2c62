//! Penalties on experts that carry too little, added to the loss of every micro-batch.

use crate::error::{Error, Fault, Result};
use hydralora_kernels::Var;
use hydralora_kernels::ops::balance::squared_variation;
use hydralora_kernels::ops::elementwise::{add, scale};
use hydralora_kernels::ops::top_k::load_balance;
use hydralora_model::adapter::{Pass, Site};
use std::collections::BTreeMap;

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

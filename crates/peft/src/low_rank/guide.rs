//! Telling routers, in training, which expert a sequence is meant for:
//!
//! ```text
//! L += λ_t · mean over sites, mean over tokens of −ln w_{c(sequence of the token)}
//! λ_t = weight                                    or weight · max(0, 1 − t / (decay · total steps))
//! ```
//!
//! `c` is the sequence's cluster of the training texts, or its domain. Without such a term gates that
//! start nearly even feed all heads the same gradient, and the heads stay alike; once heads differ, the
//! loss alone keeps the gates apart, so that the weight may fall to zero.

use crate::error::{Error, Fault, Result};
use crate::tuned::TrainingPlan;
use hydralora_kernels::Var;
use hydralora_kernels::ops::elementwise::{add, scale};
use hydralora_kernels::ops::guide::cross_entropy_to;
use hydralora_model::adapter::{Pass, Site};
use std::collections::BTreeMap;

/// What says which expert a sequence is meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuidedBy {
    /// Its cluster of the training texts.
    Clusters,
    /// The domain that its record names.
    Domains,
}

/// A guide of routers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct GuideSpec {
    /// What says which expert a sequence is meant for.
    pub(crate) by: GuidedBy,
    /// Factor on the cross-entropy, at first.
    pub(crate) weight: f64,
    /// The share of a run's steps over which it falls to zero; none if it stays.
    pub(crate) decay: Option<f64>,
}

/// A guide in a run.
pub(super) struct Guide {
    spec: GuideSpec,
    num_experts: usize,
    total_steps: usize,
    taken: usize,
}

impl Guide {
    /// Nothing where the weight is zero.
    pub(super) fn new(spec: GuideSpec, num_experts: usize) -> Option<Self> {
        (spec.weight > 0.0).then_some(Self { spec, num_experts, total_steps: 0, taken: 0 })
    }

    /// Takes note of the run's length.
    ///
    /// # Errors
    /// If it is guided by domains and there are more of these than experts.
    pub(super) fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        self.total_steps = plan.total_steps;
        let domains = plan.domains.len();
        if self.spec.by == GuidedBy::Domains && domains > self.num_experts {
            let message = format!(
                "is `domains`, and the data have {domains} ({}) for {} experts; expected num_experts to be at \
                 least the number of domains, or `clusters`",
                plan.domains.join(", "),
                self.num_experts
            );
            return Err(Error::Options {
                faults: vec![Fault::new("method.router_guide", message)],
            });
        }
        Ok(())
    }

    /// Takes note of the steps taken.
    pub(super) fn before_step(&mut self, taken: usize) {
        self.taken = taken;
    }

    /// The factor on the cross-entropy now.
    fn weight(&self) -> f64 {
        let Some(decay) = self.spec.decay else { return self.spec.weight };
        let length = (decay * self.total_steps as f64).max(1.0);
        self.spec.weight * (1.0 - self.taken as f64 / length).max(0.0)
    }

    /// The term for `gates`, those of each site, `[1]`; none where the pass does not say what its
    /// sequences are.
    pub(super) fn term(&self, pass: &Pass<'_>, gates: &BTreeMap<Site, Var>) -> Option<Var> {
        let (weight, sequences) = (self.weight(), pass.sequences()?);
        let meant = match self.spec.by {
            GuidedBy::Clusters => sequences.clusters,
            GuidedBy::Domains => sequences.domains,
        };
        if meant.is_empty() || weight == 0.0 {
            return None;
        }
        let targets = sequences.of_tokens(meant);
        let terms = gates.values().map(|gates| cross_entropy_to(gates, &targets));
        let total = terms.reduce(|sum, term| add(&sum, term))?;
        Some(scale(&total, weight / gates.len() as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weight_falls_to_zero_over_its_share_of_the_run() {
        let spec = GuideSpec { by: GuidedBy::Clusters, weight: 0.4, decay: Some(0.5) };
        let mut guide = Guide::new(spec, 3).unwrap();
        guide.begin(&TrainingPlan { total_steps: 40, domains: &[] }).unwrap();
        for (taken, wanted) in [(0, 0.4), (5, 0.3), (10, 0.2), (20, 0.0), (39, 0.0)] {
            guide.before_step(taken);
            assert!((guide.weight() - wanted).abs() < 1e-12, "{taken}: {}", guide.weight());
        }
        let mut kept = Guide::new(GuideSpec { decay: None, ..spec }, 3).unwrap();
        kept.before_step(1000);
        assert_eq!(kept.weight(), 0.4);
        assert!(Guide::new(GuideSpec { weight: 0.0, ..spec }, 3).is_none());
    }
}

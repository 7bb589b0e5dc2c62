//! Domains that a method treats each in its own way: their names, which of the data's they are, and the one
//! that is chosen outside of training.

use crate::error::{Error, Fault, Result};
use crate::tuned::{DomainAware, TrainingPlan};
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_model::adapter::Pass;
use std::collections::BTreeSet;

/// Every pair of domains may take a number.
const MOST_DOMAINS: usize = 1024;

/// Faults of a list of domains, an option of a recipe.
pub(crate) fn domain_faults(domains: &[String]) -> Option<Fault> {
    let different: BTreeSet<&String> = domains.iter().collect();
    let message = if domains.is_empty() {
        "is empty; expected the names of the data's domains, as [law, math]".to_owned()
    } else if different.len() != domains.len() {
        "names a domain twice".to_owned()
    } else if domains.len() > MOST_DOMAINS {
        format!("names {}; expected at most {MOST_DOMAINS}", domains.len())
    } else {
        return None;
    };
    Some(Fault::new("method.domains", message))
}

/// The domains of an adapter.
pub(crate) struct Domains {
    known: Vec<String>,
    /// The domain here of each domain of the run's data; none before a run begins.
    of_data: Vec<usize>,
    /// The domain that every text counts as.
    chosen: Option<usize>,
}

impl Domains {
    pub(crate) fn new(known: Vec<String>) -> Self {
        Self { known, of_data: Vec::new(), chosen: None }
    }

    /// Whether every text counts as one of them.
    pub(crate) fn is_chosen(&self) -> bool {
        self.chosen.is_some()
    }

    /// Finds the domains of a run's data among them.
    ///
    /// # Errors
    /// For every one that only the data have, or only the options.
    pub(crate) fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        let known = &self.known;
        let mut faults = Vec::new();
        let mut of_data = Vec::new();
        for name in plan.domains {
            match known.iter().position(|domain| domain == name) {
                Some(at) => of_data.push(at),
                None => faults.push(Fault::new(
                    "method.domains",
                    format!(
                        "the data have the domain `{name}` too; there are {}",
                        known.join(", ")
                    ),
                )),
            }
        }
        for name in
            known.iter().filter(|name| !plan.domains.is_empty() && !plan.domains.contains(name))
        {
            let message =
                format!("`{name}` is no domain of the data; there are {}", plan.domains.join(", "));
            faults.push(Fault::new("method.domains", message));
        }
        if !faults.is_empty() {
            return Err(Error::Options { faults });
        }
        if !of_data.is_empty() {
            self.of_data = of_data;
        }
        Ok(())
    }

    /// The domains of a pass in ascending order, and what of them each of `rows` rows belongs to,
    /// `[rows, domains]`, if they are several. Where nothing says which domain it is, all count alike.
    pub(crate) fn of_pass(
        &self,
        pass: &Pass<'_>,
        rows: usize,
        dtype: DType,
    ) -> (Vec<usize>, Option<Var>) {
        if let Some(domain) = self.chosen {
            return (vec![domain], None);
        }
        let count = self.known.len();
        let Some(sequences) = pass.sequences().filter(|_| !self.of_data.is_empty()) else {
            let even = vec![1.0 / count as f64; rows * count];
            let gates = Tensor::from_f64(dtype, &even, [rows, count]);
            return ((0..count).collect(), (count > 1).then(|| Var::constant(gates)));
        };
        let own = |domain: &u32| self.of_data.get(*domain as usize).copied().unwrap_or(0);
        let present: BTreeSet<usize> = sequences.domains.iter().map(own).collect();
        let present: Vec<usize> = present.into_iter().collect();
        if present.len() < 2 {
            return (present, None);
        }
        let mut gates = vec![0.0; rows * present.len()];
        for (span, domain) in sequences.offsets.windows(2).zip(sequences.domains) {
            let column = present.binary_search(&own(domain)).unwrap_or(0);
            for row in span[0]..span[1].min(rows) {
                gates[row * present.len() + column] = 1.0;
            }
        }
        let gates = Tensor::from_f64(dtype, &gates, [rows, present.len()]);
        (present, Some(Var::constant(gates)))
    }

    /// Why the adapter cannot be folded into weights before one is chosen.
    pub(crate) fn refusal(&self) -> String {
        format!(
            "it does something else to the weight for every domain; choose one with --domain: {}",
            self.known.join(", ")
        )
    }
}

impl DomainAware for Domains {
    fn domains(&self) -> &[String] {
        &self.known
    }

    fn choose_domain(&mut self, name: &str) -> Result<()> {
        let found = self.known.iter().position(|domain| domain == name);
        self.chosen = Some(found.ok_or_else(|| Error::UnknownDomain {
            name: name.to_owned(),
            known: self.known.join(", "),
        })?);
        Ok(())
    }
}

//! Keeping what `A` makes of different domains alike:
//!
//! ```text
//! L += weight · mean over sites of the mean divergence between the domains' A x
//! ```
//!
//! over the domains of a micro-batch, see [`divergence`].

use hydralora_kernels::Var;
use hydralora_kernels::ops::align::divergence;
use hydralora_kernels::ops::elementwise::{add, scale};
use hydralora_kernels::ops::linear::linear;
use hydralora_model::adapter::{Pass, Site};
use std::collections::BTreeMap;

/// Keeps `A x` for the term, in training.
pub(super) fn keep(site: Site, x: &Var, a: &Var, pass: &Pass<'_>) {
    pass.set_aside(site, linear(x, a, None));
}

/// The term for `outputs`, the `A x` of each site, `[1]`; none where the pass does not say what its
/// sequences are.
pub(super) fn term(weight: f64, pass: &Pass<'_>, outputs: &BTreeMap<Site, Var>) -> Option<Var> {
    let sequences = pass.sequences()?;
    let groups = sequences.of_tokens(sequences.domains);
    let terms = outputs.values().map(|z| divergence(z, &groups));
    let total = terms.reduce(|sum, term| add(&sum, term))?;
    Some(scale(&total, weight / outputs.len() as f64))
}

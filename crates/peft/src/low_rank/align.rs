//! Keeping what `A` makes of different domains alike:
//!
//! ```text
//! L += weight · mean over sites of the mean divergence between the domains' A x
//! ```
//!
//! over the domains of a micro-batch: the [`divergence`] of Gaussians, or the [`mean_discrepancy`] of samples.

use hydralora_kernels::Var;
use hydralora_kernels::ops::align::divergence;
use hydralora_kernels::ops::discrepancy::mean_discrepancy;
use hydralora_kernels::ops::elementwise::{add, scale};
use hydralora_kernels::ops::linear::linear;
use hydralora_model::adapter::{Aside, Pass, Site};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Tokens of a domain in a micro-batch that samples are made of, at most: what they cost grows with the
/// square of their number.
const SAMPLED: usize = 64;

/// How far apart domains lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Alignment {
    /// By the Kullback-Leibler divergences of Gaussians of diagonal covariance.
    #[default]
    Kl,
    /// By the maximum mean discrepancy under Gaussian kernels.
    Mmd,
}

/// A penalty on how far what `A` makes of different domains lies apart.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Align {
    /// Its factor; none if 0.
    pub(crate) weight: f64,
    /// How far apart they lie.
    pub(crate) by: Alignment,
}

/// Keeps `A x` for the term, in training.
pub(super) fn keep(site: Site, x: &Var, a: &Var, pass: &Pass<'_>) {
    pass.set_aside(site, Aside::LowRank, linear(x, a, None));
}

/// The term for the `A x` of each site, `[1]`; none where the pass does not say what its sequences are.
pub(super) fn term(align: Align, pass: &Pass<'_>) -> Option<Var> {
    let outputs = pass.take_aside(Aside::LowRank);
    let sequences = pass.sequences()?;
    let groups = sequences.of_tokens(sequences.domains);
    let terms = outputs.values().map(|z| match align.by {
        Alignment::Kl => divergence(z, &groups),
        Alignment::Mmd => mean_discrepancy(z, &groups, SAMPLED),
    });
    let total = terms.reduce(|sum, term| add(&sum, term))?;
    Some(scale(&total, align.weight / outputs.len() as f64))
}

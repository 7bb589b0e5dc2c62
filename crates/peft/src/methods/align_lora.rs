//! Align-LoRA: one LoRA, and a penalty on how far what `A` makes of the domains lies apart:
//!
//! ```text
//! y = W0 x + (alpha / r) B A x          L += align_weight · mean over layers and pairs of domains of D
//! ```
//!
//! Liu et al., arXiv 2508.05078: instead of heads that specialise, one space that all tasks share. `D` is
//! the mean of both Kullback-Leibler divergences between Gaussians of diagonal covariance
//! ([`hydralora_kernels::ops::align`]), or the maximum mean discrepancy under Gaussian kernels
//! ([`hydralora_kernels::ops::discrepancy`]). The published code looks at each place in the sequences of a
//! micro-batch that has as many sequences of every task; here all tokens of a domain in the micro-batch,
//! which may have any mixture, are looked at together. A micro-batch of a single domain adds nothing.

use crate::error::{Error, Fault, Result};
use crate::low_rank::{Align, Alignment, LowRankSpec};
use crate::low_rank_options::{LowRankOptions, Shared, check_weight, low_rank_options};

low_rank_options! {
    /// Options of Align-LoRA in a recipe.
    rank = 16, alpha = 32.0, targets = "ffn";
    /// Factor on the divergence between the domains; none if 0.
    align_weight: f64 = 0.01,
    /// What that is measured by: `kl` (of Gaussians) or `mmd` (of samples, by Gaussian kernels).
    alignment: Alignment = Alignment::Kl,
}

impl LowRankOptions for Options {
    const NAME: &'static str = "align-lora";
    const SUMMARY: &'static str = "one low-rank pair whose A is kept alike for all domains";
    const PEFT_TYPE: &'static str = "ALIGN_LORA";
    const OWN_KEYS: &'static [&'static str] = &["align_weight"];
    const LATER_KEYS: &'static [&'static str] = &["alignment"];

    fn own_faults(&self) -> Vec<Fault> {
        let mut faults: Vec<Fault> =
            check_weight("align_weight", self.align_weight).into_iter().collect();
        if self.align_weight == 0.0 && self.alignment != Alignment::default() {
            let message = "is about `align_weight`, which is 0; expected a weight there";
            faults.push(Fault::new("method.alignment", message));
        }
        faults
    }

    fn check_domains(&self, domains: &[String]) -> Result<()> {
        if self.align_weight == 0.0 || domains.len() > 1 {
            return Ok(());
        }
        let message = format!(
            "is {}, and the data have one domain ({}); expected several `domain`s in data.train, or `name: lora`",
            self.align_weight,
            domains.join(", ")
        );
        Err(Error::Options { faults: vec![Fault::new("method.align_weight", message)] })
    }

    fn spec(&self) -> LowRankSpec {
        let align = Align { weight: self.align_weight, by: self.alignment };
        LowRankSpec { align, ..LowRankSpec::of(&self.keys()) }
    }
}

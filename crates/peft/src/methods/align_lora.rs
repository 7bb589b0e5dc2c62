//! Align-LoRA: one LoRA, and a penalty on how far what `A` makes of the domains lies apart:
//!
//! ```text
//! y = W0 x + (alpha / r) B A x          L += align_weight · mean over layers and pairs of domains of KL
//! ```
//!
//! Liu et al., arXiv 2508.05078: instead of heads that specialise, one space that all tasks share. `KL` is
//! the mean of both Kullback-Leibler divergences between Gaussians of diagonal covariance, see
//! [`hydralora_kernels::ops::align`]. The published code fits them to each place in the sequences of a
//! micro-batch that has as many sequences of every task; here they are fitted to all tokens of a
//! domain in the micro-batch, which may have any mixture. A micro-batch of a single domain adds nothing.

use crate::error::{Error, Fault, Result};
use crate::low_rank::LowRankSpec;
use crate::low_rank_options::{LowRankOptions, Shared, check_weight, low_rank_options};

low_rank_options! {
    /// Options of Align-LoRA in a recipe.
    rank = 16, alpha = 32.0, targets = "ffn";
    /// Factor on the divergence between the domains; none if 0.
    align_weight: f64 = 0.01,
}

impl LowRankOptions for Options {
    const NAME: &'static str = "align-lora";
    const SUMMARY: &'static str = "one low-rank pair whose A is kept alike for all domains";
    const PEFT_TYPE: &'static str = "ALIGN_LORA";
    const OWN_KEYS: &'static [&'static str] = &["align_weight"];

    fn own_faults(&self) -> Vec<Fault> {
        check_weight("align_weight", self.align_weight).into_iter().collect()
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
        LowRankSpec { align_weight: self.align_weight, ..LowRankSpec::of(&self.keys()) }
    }
}

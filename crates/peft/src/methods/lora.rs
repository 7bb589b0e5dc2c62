//! LoRA: `y = W0 x + s · B A x`, `s = alpha / r` or, rank-stabilised, `alpha / √r`.
//!
//! Hu et al., arXiv 2106.09685; the rank-stabilised scale is from Kalajdzievski, arXiv 2312.03732.
//! `A` starts Kaiming-uniform, `B` at zero, so that training starts from the base model. Two of its
//! variants are options:
//!
//! - PiSSA (Meng et al., arXiv 2404.02948): `A` and `B` start as the principal part of `W0`, which is
//!   taken out of it: `y = (W0 − s B₀ A₀) x + s B A x`. A file holds the difference, a plain LoRA of
//!   rank `2r`, as PEFT's conversion writes it.
//! - DoRA (Liu et al., arXiv 2402.09353): `y = m ⊙ (W0 + s B A) x / ‖W0 + s B A‖`, norm row by row, with
//!   a learned magnitude `m` that starts as `‖W0‖`.

use crate::error::Fault;
use crate::low_rank::{LowRankSpec, Start};
use crate::low_rank_options::{LowRankOptions, Shared, low_rank_options};
use serde_json::{Map, Value, json};

low_rank_options! {
    /// Options of LoRA in a recipe.
    rank = 8, alpha = 16.0, targets = "all";
    /// Learn magnitude and direction apart (DoRA).
    use_dora: bool = false,
    /// What `A` and `B` start from: `kaiming` or `pissa`.
    init_lora_weights: Start = Start::Kaiming,
}

impl LowRankOptions for Options {
    const NAME: &'static str = "lora";
    const SUMMARY: &'static str = "one low-rank pair A, B per layer (the common baseline)";
    const PEFT_TYPE: &'static str = "LORA";
    const OWN_KEYS: &'static [&'static str] = &["use_dora"];

    fn claims(config: &Map<String, Value>) -> bool {
        config.get("peft_type") == Some(&json!(Self::PEFT_TYPE))
            && !config.contains_key("lora_nums")
    }

    fn own_faults(&self) -> Vec<Fault> {
        let fault = match (self.init_lora_weights, self.use_dora) {
            (start, _) if start.of_several_heads().is_some() => {
                let name = start.of_several_heads().unwrap_or_default();
                format!("`{name}` is for several heads; expected `kaiming` or `pissa`")
            }
            (Start::Pissa, true) => {
                "`pissa` takes its start out of the weight whose norms DoRA learns from; use one of \
                 them"
                .to_owned()
            }
            _ => return Vec::new(),
        };
        vec![Fault::new("method.init_lora_weights", fault)]
    }

    fn spec(&self) -> LowRankSpec {
        LowRankSpec {
            start: self.init_lora_weights,
            decomposed: self.use_dora,
            ..LowRankSpec::of(&self.keys())
        }
    }
}

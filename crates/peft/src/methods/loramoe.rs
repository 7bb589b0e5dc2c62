//! LoRAMoE: `N` experts with their own `A_i` and `B_i`, mixed per token by a router, and a penalty
//! that keeps the experts of each kind busy with the data of their kind:
//!
//! ```text
//! y = W0 x + (alpha / r) Σ_i w_i B_i A_i x          w = softmax(W_g x)
//! L += weight · Σ_layers var(Z) / mean(Z)²          Z_si = (1 ± delta) Σ_{t in s} w_ti
//! ```
//!
//! Dou et al., arXiv 2312.09979. In `Z` the sign is plus where expert `i` is of the kind of sequence
//! `s`: the first half of the experts is for the domains named by `knowledge_domains`, the second
//! half for all others. The variance is unbiased and the mean squared, as in the published code
//! (whose script leaves the penalty switched off).

use crate::error::{Fault, Result};
use crate::low_rank::{
    Balance, DropoutMask, HeadNames, LowRankAdapter, LowRankSpec, Mixing, RouteOn, Router,
    RouterScope,
};
use crate::method::{Method, MethodOptions, Tuned, read_section};
use crate::options::{if_sound, LoraConfigKeys, check_common, check_experts, own_keys, scale, to_map};
use crate::targets::Targets;
use hydralora_kernels::DType;
use hydralora_model::adapter::SiteShape;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub(super) struct LoraMoe;
pub(super) static METHOD: LoraMoe = LoraMoe;

/// Options of LoRAMoE in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Options {
    /// Rank `r` of each expert.
    rank: usize,
    /// Numerator of the scale.
    alpha: f64,
    /// Scale by `alpha / √r` instead of `alpha / r`.
    use_rslora: bool,
    /// Dropout probability on the input of the `A_i`.
    dropout: f64,
    /// The layers to change.
    targets: Targets,
    /// Number `N` of experts.
    num_experts: usize,
    /// Factor on the balance penalty; none if 0.
    balance_weight: f64,
    /// How much more an expert should carry of its own kind of data, `0 ≤ delta < 1`.
    balance_delta: f64,
    /// Domains meant for the first half of the experts; without any, all experts are of one kind.
    knowledge_domains: Vec<String>,
}

impl Default for Options {
    /// The published script's values, except that dropout is off and the penalty on.
    fn default() -> Self {
        Self {
            rank: 4,
            alpha: 32.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::One("ffn".to_owned()),
            num_experts: 8,
            balance_weight: 0.01,
            balance_delta: 0.1,
            knowledge_domains: Vec::new(),
        }
    }
}

impl Options {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_common(self.rank, self.alpha, self.dropout, &self.targets);
        faults.extend(check_experts(self.num_experts));
        let (weight, delta) = (self.balance_weight, self.balance_delta);
        if !(weight.is_finite() && weight >= 0.0) {
            let message = format!("is {weight}; expected 0 or more");
            faults.push(Fault::new("method.balance_weight", message));
        }
        if !(0.0..1.0).contains(&delta) {
            let message = format!("is {delta}; expected 0 ≤ balance_delta < 1");
            faults.push(Fault::new("method.balance_delta", message));
        }
        faults
    }
}

const OWN_KEYS: [&str; 3] = ["balance_weight", "balance_delta", "knowledge_domains"];

impl Method for LoraMoe {
    fn name(&self) -> &'static str {
        "loramoe"
    }

    fn summary(&self) -> &'static str {
        "LoRA experts with their own A and B, a router, and a balance penalty"
    }

    fn claims(&self, config: &Map<String, Value>) -> bool {
        config.get("peft_type") == Some(&json!("LORAMOE"))
    }

    fn defaults(&self) -> Map<String, Value> {
        Options::default().to_recipe()
    }

    fn read_recipe(&self, section: &Map<String, Value>) -> Result<Box<dyn MethodOptions>, Vec<Fault>> {
        let options: Options = read_section("method", section, &self.defaults())?;
        let faults = options.faults();
        if_sound(options, faults)
    }

    fn read_peft(&self, config: &Map<String, Value>) -> Result<Box<dyn MethodOptions>, Vec<Fault>> {
        let keys = LoraConfigKeys::read(config)?;
        let own = own_keys(config, &OWN_KEYS);
        let options: Options = read_section("adapter_config", &own, &self.defaults())?;
        let options = Options {
            rank: keys.rank,
            alpha: keys.alpha,
            use_rslora: keys.use_rslora,
            dropout: keys.dropout,
            targets: keys.targets,
            ..options
        };
        let faults = options.faults();
        if_sound(options, faults)
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut config = LoraConfigKeys {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            targets: self.targets.clone(),
        }
        .write("LORAMOE");
        config.insert("lora_nums".to_owned(), json!(self.num_experts));
        for key in OWN_KEYS {
            config.insert(key.to_owned(), self.to_recipe()[key].clone());
        }
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let router = Router { route_on: RouteOn::X, scope: RouterScope::Linear, bias: false };
        let spec = LowRankSpec {
            rank: self.rank,
            num_experts: self.num_experts,
            own_a: true,
            scale: scale(self.alpha, self.rank, self.use_rslora),
            dropout: self.dropout,
            dropout_mask: DropoutMask::Shared,
            mixing: Mixing::Routed(router),
            names: HeadNames::Numbered,
        };
        let balance = Balance {
            weight: self.balance_weight,
            delta: self.balance_delta,
            first_half: self.knowledge_domains.clone(),
        };
        let adapter = LowRankAdapter::new(Box::new(self.clone()), spec, sites, dtype, seed);
        Box::new(adapter.balanced(balance))
    }
}

//! LoRA-Split: several LoRAs of the same total size, `y = W0 x + (alpha / r) Σ_i w_i B_i A_i x`.
//!
//! The baseline of Tian et al., arXiv 2404.19245: each pair has a rank of its own, `N · r` fixed. The
//! paper does not say how the pairs are joined; `combine` chooses between a router per token and
//! their plain sum (which, as a matrix, is a LoRA of rank `N · r`).

use crate::error::{Fault, Result};
use crate::low_rank::{
    DropoutMask, HeadNames, LowRankAdapter, LowRankSpec, Mixing, RouteOn, Router, RouterScope,
};
use crate::method::{Method, MethodOptions, Tuned, read_section};
use crate::options::{if_sound, LoraConfigKeys, check_common, check_experts, own_keys, scale, to_map};
use crate::targets::Targets;
use hydralora_kernels::DType;
use hydralora_model::adapter::SiteShape;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub(super) struct LoraSplit;
pub(super) static METHOD: LoraSplit = LoraSplit;

/// How the pairs are joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Combine {
    /// Weighed per token by a softmax router.
    #[default]
    Routed,
    /// Added up.
    Sum,
}

/// Options of LoRA-Split in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Options {
    /// Rank `r` of each pair.
    rank: usize,
    /// Numerator of the scale.
    alpha: f64,
    /// Scale by `alpha / √r` instead of `alpha / r`.
    use_rslora: bool,
    /// Dropout probability on the input of the `A_i`.
    dropout: f64,
    /// The layers to change.
    targets: Targets,
    /// Number `N` of pairs.
    num_experts: usize,
    /// How the pairs are joined: `routed` or `sum`.
    combine: Combine,
}

impl Default for Options {
    /// The paper's four pairs of rank 8.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 32.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::One("ffn".to_owned()),
            num_experts: 4,
            combine: Combine::Routed,
        }
    }
}

impl Options {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_common(self.rank, self.alpha, self.dropout, &self.targets);
        faults.extend(check_experts(self.num_experts));
        faults
    }
}

impl Method for LoraSplit {
    fn name(&self) -> &'static str {
        "lora-split"
    }

    fn summary(&self) -> &'static str {
        "several small LoRAs of the same total size, routed or summed"
    }

    fn claims(&self, config: &Map<String, Value>) -> bool {
        config.get("peft_type") == Some(&json!("LORA_SPLIT"))
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
        let own = own_keys(config, &["combine"]);
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
        .write("LORA_SPLIT");
        config.insert("lora_nums".to_owned(), json!(self.num_experts));
        config.insert("combine".to_owned(), json!(self.combine));
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let spec = LowRankSpec {
            rank: self.rank,
            num_experts: self.num_experts,
            own_a: true,
            scale: scale(self.alpha, self.rank, self.use_rslora),
            dropout: self.dropout,
            dropout_mask: DropoutMask::Shared,
            mixing: match self.combine {
                Combine::Sum => Mixing::Sum,
                Combine::Routed => Mixing::Routed(Router {
                    route_on: RouteOn::X,
                    scope: RouterScope::Linear,
                    bias: false,
                }),
            },
            names: HeadNames::Numbered,
        };
        Box::new(LowRankAdapter::new(Box::new(self.clone()), spec, sites, dtype, seed))
    }
}

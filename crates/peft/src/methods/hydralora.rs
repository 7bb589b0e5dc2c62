//! HydraLoRA: one shared `A`, `N` heads `B_i`, and a softmax router over them, per token:
//! `y = W0 x + (alpha / r) Σ_i w_i B_i A x`, `w = softmax(W_g x)`.
//!
//! Tian et al., arXiv 2404.19245, equations 2–4. `A` and the router start Kaiming-uniform, every
//! `B_i` at zero; all three train together and there is no balance loss. Where the paper's text,
//! its formula and the published code disagree, an option chooses.

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

pub(super) struct HydraLora;
pub(super) static METHOD: HydraLora = HydraLora;

/// How the heads are weighed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum GateKind {
    /// By the router, per token.
    #[default]
    Softmax,
    /// `1/N` each, without a router (the paper's ablation "w/o gate").
    Uniform,
    /// All in full, without a router: the plain sum of the heads.
    None,
}

/// Where the routers start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RouterInit {
    /// Kaiming-uniform.
    #[default]
    Random,
    /// Each row towards the mean input of one cluster of the training data.
    Centroids,
}

/// Options of HydraLoRA in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Options {
    /// Rank `r` of `A` and of every head.
    rank: usize,
    /// Numerator of the scale.
    alpha: f64,
    /// Scale by `alpha / √r` instead of `alpha / r`.
    use_rslora: bool,
    /// Dropout probability on the input of `A`.
    dropout: f64,
    /// The layers to change.
    targets: Targets,
    /// Number `N` of B heads.
    num_experts: usize,
    /// How the heads are weighed: `softmax` (the router), `uniform` (`1/N`) or `none` (their sum).
    gate: GateKind,
    /// What the router reads: `x` (text and code of the paper) or `a` (its formula's shape).
    route_on: RouteOn,
    /// One dropout mask for all heads, or one per head as in the published code.
    dropout_mask: DropoutMask,
    /// Whether the router has a bias.
    router_bias: bool,
    /// One router per layer, or one per attention or feed-forward block.
    router_scope: RouterScope,
    /// Where the routers start: at `random`, or from the `centroids` of the training data's clusters.
    router_init: RouterInit,
}

impl Default for Options {
    /// The published script's values, except that dropout is off.
    fn default() -> Self {
        Self {
            rank: 4,
            alpha: 32.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::One("ffn".to_owned()),
            num_experts: 4,
            gate: GateKind::Softmax,
            route_on: RouteOn::X,
            dropout_mask: DropoutMask::Shared,
            router_bias: false,
            router_scope: RouterScope::Linear,
            router_init: RouterInit::Random,
        }
    }
}

impl Options {
    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_common(self.rank, self.alpha, self.dropout, &self.targets);
        faults.extend(check_experts(self.num_experts));
        if self.route_on == RouteOn::A && self.router_scope == RouterScope::Block {
            faults.push(Fault::new(
                "method.router_scope",
                "`block` reads the block's input, so it cannot be combined with `route_on: a`",
            ));
        }
        if self.route_on == RouteOn::A
            && self.dropout_mask == DropoutMask::PerExpert
            && self.dropout > 0.0
        {
            faults.push(Fault::new(
                "method.dropout_mask",
                "`per_expert` gives every head its own A x, so it cannot be combined with `route_on: a`",
            ));
        }
        if self.route_on == RouteOn::A && self.router_init == RouterInit::Centroids {
            faults.push(Fault::new(
                "method.router_init",
                "`centroids` are of layers' inputs, so they cannot be combined with `route_on: a`",
            ));
        }
        let default = Self::default();
        for (option, differs) in [
            ("route_on", self.route_on != default.route_on),
            ("router_bias", self.router_bias != default.router_bias),
            ("router_scope", self.router_scope != default.router_scope),
            ("router_init", self.router_init != default.router_init),
        ] {
            if differs && self.gate != GateKind::Softmax {
                faults.push(Fault::new(
                    format!("method.{option}"),
                    "is about the router, which only `gate: softmax` has",
                ));
            }
        }
        faults
    }
}

/// Options that a file names as a recipe does.
const OWN_KEYS: [&str; 5] = ["gate", "route_on", "dropout_mask", "router_bias", "router_scope"];

impl Method for HydraLora {
    fn name(&self) -> &'static str {
        "hydralora"
    }

    fn summary(&self) -> &'static str {
        "one shared A, several B heads mixed per token by a router"
    }

    fn claims(&self, config: &Map<String, Value>) -> bool {
        let kind = config.get("peft_type");
        kind == Some(&json!("HYDRALORA"))
            || (kind == Some(&json!("LORA")) && config.contains_key("lora_nums"))
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
        .write("HYDRALORA");
        config.insert("lora_nums".to_owned(), json!(self.num_experts));
        for key in OWN_KEYS {
            config.insert(key.to_owned(), self.to_recipe()[key].clone());
        }
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn router_clusters(&self) -> Option<usize> {
        (self.router_init == RouterInit::Centroids).then_some(self.num_experts)
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let spec = LowRankSpec {
            rank: self.rank,
            num_experts: self.num_experts,
            own_a: false,
            scale: scale(self.alpha, self.rank, self.use_rslora),
            dropout: self.dropout,
            dropout_mask: self.dropout_mask,
            mixing: match self.gate {
                GateKind::Softmax => Mixing::Routed(Router {
                    route_on: self.route_on,
                    scope: self.router_scope,
                    bias: self.router_bias,
                }),
                GateKind::Uniform => Mixing::Mean,
                GateKind::None => Mixing::Sum,
            },
            names: HeadNames::Numbered,
        };
        Box::new(LowRankAdapter::new(Box::new(self.clone()), spec, sites, dtype, seed))
    }
}

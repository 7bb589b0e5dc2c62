//! HydraLoRA: one shared `A`, `N` heads `B_i`, and a softmax router over them, per token:
//! `y = W0 x + (alpha / r) Σ_i w_i B_i A x`, `w = softmax(W_g x)`.
//!
//! Tian et al., arXiv 2404.19245, equations 2–4. `A` and the router start Kaiming-uniform, every
//! `B_i` at zero; all three train together and there is no balance loss. Where the paper's text,
//! its formula and the published code disagree, an option chooses; others are its ablations.
//!
//! R-LoRA (Liu et al., arXiv 2502.15455) is `init_lora_weights: rlora` with `dropout_mask: per_expert`:
//! `A ~ N(0, 1/in) · r^¼/√γ` and `B_i ~ N(0, 1/out) · r^¼/√γ` with `γ = 64`, and what the heads add on
//! average at the start is taken out of the weight: `W0 − (alpha / r) mean_i(B_i) A`.

use crate::error::{Fault, Result};
use crate::low_rank::{
    Balance, DropoutMask, Evenness, GuideSpec, GuidedBy, HeadNames, LowRankSpec, Mixing, RouteOn,
    Router, RouterScope, Start, TopKGradient,
};
use crate::low_rank_options::{
    LowRankOptions, Shared, check_directions, check_evenness, check_positive, check_top_k,
    check_top_k_gradient, check_weight, low_rank_options,
};
use crate::method::{ClustersOf, RouterStart};
use hydralora_model::adapter::SiteShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// How the heads are weighed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum GateKind {
    /// By the router, per token.
    #[default]
    Softmax,
    /// `1/N` each, without a router (the paper's ablation "w/o gate").
    Uniform,
    /// All in full, without a router: the plain sum of the heads.
    None,
}

/// Where the routers start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum RouterInit {
    /// Kaiming-uniform.
    #[default]
    Random,
    /// Each row towards the mean input of one cluster of the training texts, which are clustered by
    /// their words.
    Centroids,
    /// Each row towards one cluster of the records' mean inputs, clustered in each layer by itself.
    LayerCentroids,
    /// Each row towards one cluster of the tokens' inputs, clustered in each layer by itself.
    TokenCentroids,
}

/// What tells the routers in training which head a record is meant for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum RouterGuide {
    /// Nothing.
    #[default]
    None,
    /// Its cluster of the training texts.
    Clusters,
    /// Its domain.
    Domains,
}

/// The usual weight of a guide.
const GUIDE_WEIGHT: f64 = 0.3;

low_rank_options! {
    /// Options of HydraLoRA in a recipe; the defaults are the published script's, except that dropout
    /// is off.
    rank = 4, alpha = 32.0, targets = "ffn";
    /// Number `N` of B heads.
    num_experts: usize = 4,
    /// How the heads are weighed: `softmax` (the router), `uniform` (`1/N`) or `none` (their sum).
    gate: GateKind = GateKind::Softmax,
    /// What the router reads: `x` (text and code of the paper), `a` (its formula's shape), or the mean of `x`
    /// over the tokens of the text so far (`sequence`).
    route_on: RouteOn = RouteOn::X,
    /// One dropout mask for all heads, or one per head as in the published code.
    dropout_mask: DropoutMask = DropoutMask::Shared,
    /// Whether the router has a bias.
    router_bias: bool = false,
    /// One router per layer, or one per attention or feed-forward block.
    router_scope: RouterScope = RouterScope::Linear,
    /// Where the routers start: at `random`, from the `centroids` of clusters of the training texts, or from
    /// those of clusters found in each layer, of records (`layer_centroids`) or tokens (`token_centroids`).
    router_init: RouterInit = RouterInit::Random,
    /// Factor on the routers' start: larger ones start with sharper gates.
    router_gain: f64 = 1.0,
    /// What the router's scores are divided by.
    router_temperature: f64 = 1.0,
    /// What they are divided by at the first step, from where it goes to `router_temperature`; that from
    /// the start if not given.
    router_temperature_start: Option<f64> = None,
    /// What tells the routers in training which head a record is meant for: `none`, its cluster of the
    /// training texts (`clusters`) or its domain (`domains`).
    router_guide: RouterGuide = RouterGuide::None,
    /// Factor on the cross-entropy of the gates against the guide's head.
    router_guide_weight: f64 = GUIDE_WEIGHT,
    /// Share of the steps over which that factor falls to zero; it stays if not given.
    router_guide_decay: Option<f64> = None,
    /// How many heads a token uses; all if not given.
    router_top_k: Option<usize> = None,
    /// Which gates learn from that choice: those that were `kept`, or all (`straight_through`).
    router_top_k_gradient: TopKGradient = TopKGradient::Kept,
    /// Factor on a penalty on uneven loads of the heads; none if 0.
    balance_weight: f64 = 0.0,
    /// What that penalty evens out: tokens (`load`) or gates (`importance`).
    balance: Evenness = Evenness::Load,
    /// Factor on a penalty on large scores of the routers; none if 0.
    router_z_weight: f64 = 0.0,
    /// What `A` and the heads start from: `kaiming` (heads at zero), `rlora` (heads at random), `zero_sum`,
    /// `orthogonal` or `singular_slices`.
    init_lora_weights: Start = Start::Kaiming,
}

/// Options that a single head makes senseless and that no earlier build had.
const FOR_SEVERAL_HEADS: [&str; 6] = [
    "router_gain",
    "router_temperature",
    "router_temperature_start",
    "router_guide",
    "balance",
    "router_z_weight",
];

impl Options {
    /// The router; a single head needs none.
    fn router(&self) -> Option<Router> {
        (self.gate == GateKind::Softmax && self.num_experts > 1).then_some(Router {
            route_on: self.route_on,
            scope: self.router_scope,
            bias: self.router_bias,
            top_k: self.router_top_k,
            top_k_gradient: self.router_top_k_gradient,
            gain: self.router_gain,
            temperature: self.router_temperature,
            first_temperature: self.router_temperature_start,
        })
    }
}

impl LowRankOptions for Options {
    const NAME: &'static str = "hydralora";
    const SUMMARY: &'static str = "one shared A, several B heads mixed per token by a router";
    const PEFT_TYPE: &'static str = "HYDRALORA";
    const OWN_KEYS: &'static [&'static str] = &[
        "gate",
        "route_on",
        "dropout_mask",
        "router_bias",
        "router_scope",
        "router_top_k",
        "balance_weight",
        "init_lora_weights",
    ];
    const LATER_KEYS: &'static [&'static str] =
        &["router_temperature", "router_top_k_gradient", "balance", "router_z_weight"];

    fn claims(config: &Map<String, Value>) -> bool {
        let kind = config.get("peft_type");
        kind == Some(&json!(Self::PEFT_TYPE))
            || (kind == Some(&json!("LORA")) && config.contains_key("lora_nums"))
    }

    fn num_experts(&self) -> Option<usize> {
        Some(self.num_experts)
    }

    fn own_faults(&self) -> Vec<Fault> {
        let mut faults: Vec<Fault> =
            check_weight("balance_weight", self.balance_weight).into_iter().collect();
        faults.extend(check_top_k(self.router_top_k, self.num_experts));
        faults.extend(check_top_k_gradient(self.router_top_k_gradient, self.router_top_k));
        let unlike_default = self.balance != Evenness::default();
        faults.extend(check_evenness("importance", unlike_default, self.balance_weight));
        faults.extend(check_weight("router_z_weight", self.router_z_weight));
        let unfit = match self.init_lora_weights {
            Start::Pissa => "`pissa` is for a single pair A, B; expected `kaiming` or `rlora`",
            Start::SingularSegments => {
                "`singular_segments` gives every head an A of its own, and here they share one; expected \
                 `singular_slices`, or `name: lora-split` or `loramoe`"
            }
            _ => "",
        };
        if !unfit.is_empty() {
            faults.push(Fault::new("method.init_lora_weights", unfit));
        }
        let several = self.init_lora_weights.of_several_heads();
        let new = several.filter(|_| self.init_lora_weights != Start::Rlora);
        if let Some(name) = new.filter(|_| self.num_experts == 1) {
            let message = format!(
                "`{name}` makes heads differ, and there is a single one; expected num_experts: 2 or more, or \
                 `kaiming`"
            );
            faults.push(Fault::new("method.init_lora_weights", message));
        }
        let on_a = self.route_on == RouteOn::A;
        if on_a && self.router_scope == RouterScope::Block {
            faults.push(Fault::new(
                "method.router_scope",
                "`block` reads the block's input, so it cannot be combined with `route_on: a`",
            ));
        }
        if on_a && self.dropout_mask == DropoutMask::PerExpert && self.dropout > 0.0 {
            faults.push(Fault::new(
                "method.dropout_mask",
                "`per_expert` gives every head its own A x, so it cannot be combined with `route_on: a`",
            ));
        }
        let default = Self::default();
        for (option, differs, with_a) in [
            ("route_on", self.route_on != default.route_on, true),
            ("router_bias", self.router_bias != default.router_bias, true),
            ("router_scope", self.router_scope != default.router_scope, true),
            ("router_top_k", self.router_top_k.is_some(), false),
            ("router_top_k_gradient", self.router_top_k_gradient != TopKGradient::Kept, false),
            ("balance_weight", self.balance_weight != 0.0, false),
            ("balance", unlike_default, false),
            ("router_z_weight", self.router_z_weight != 0.0, false),
            ("router_init", self.router_init != default.router_init, false),
            ("router_gain", self.router_gain != default.router_gain, true),
            ("router_temperature", self.router_temperature != default.router_temperature, true),
            ("router_temperature_start", self.router_temperature_start.is_some(), true),
            ("router_guide", self.router_guide != default.router_guide, false),
        ] {
            let alone = self.num_experts == 1 && FOR_SEVERAL_HEADS.contains(&option);
            if differs && self.gate != GateKind::Softmax {
                faults.push(Fault::new(
                    format!("method.{option}"),
                    "is about the router, which only `gate: softmax` has",
                ));
            } else if differs && alone {
                faults.push(Fault::new(
                    format!("method.{option}"),
                    "is about the router, and a single head has none; expected num_experts: 2 or more",
                ));
            }
            if differs && on_a && !with_a {
                faults.push(Fault::new(
                    format!("method.{option}"),
                    "is for a router that reads x; it cannot be combined with `route_on: a`",
                ));
            }
        }
        for (option, value) in [
            ("router_gain", Some(self.router_gain)),
            ("router_temperature", Some(self.router_temperature)),
            ("router_temperature_start", self.router_temperature_start),
        ] {
            faults.extend(value.and_then(|value| check_positive(option, value)));
        }
        faults.extend(check_weight("router_guide_weight", self.router_guide_weight));
        let unguided = self.router_guide == RouterGuide::None;
        let only_guided = [
            ("router_guide_weight", self.router_guide_weight != default.router_guide_weight),
            ("router_guide_decay", self.router_guide_decay.is_some()),
        ];
        for (option, _) in only_guided.into_iter().filter(|(_, differs)| unguided && *differs) {
            let message =
                "is about `router_guide`, which is `none`; expected `clusters` or `domains` there";
            faults.push(Fault::new(format!("method.{option}"), message));
        }
        if let Some(decay) =
            self.router_guide_decay.filter(|decay| !(*decay > 0.0 && *decay <= 1.0))
        {
            let message =
                format!("is {decay}; expected a share of the steps, above 0 and at most 1");
            faults.push(Fault::new("method.router_guide_decay", message));
        }
        faults
    }

    fn check_shapes(&self, sites: &[SiteShape]) -> Result<()> {
        check_directions(&self.spec(), sites)
    }

    fn routers_start_from(&self) -> Option<RouterStart> {
        let of = match self.router_init {
            RouterInit::Random => return None,
            RouterInit::Centroids => ClustersOf::Texts,
            RouterInit::LayerCentroids => ClustersOf::Records,
            RouterInit::TokenCentroids => ClustersOf::Tokens,
        };
        Some(RouterStart { clusters: self.num_experts, of })
    }

    fn guide(&self) -> Option<GuideSpec> {
        self.router()?;
        let by = match self.router_guide {
            RouterGuide::None => return None,
            RouterGuide::Clusters => GuidedBy::Clusters,
            RouterGuide::Domains => GuidedBy::Domains,
        };
        let (weight, decay) = (self.router_guide_weight, self.router_guide_decay);
        Some(GuideSpec { by, weight, decay })
    }

    fn spec(&self) -> LowRankSpec {
        LowRankSpec {
            num_experts: self.num_experts,
            dropout_mask: self.dropout_mask,
            mixing: match (self.router(), self.gate) {
                (Some(router), _) => Mixing::Routed(router),
                (None, GateKind::Uniform) => Mixing::Mean,
                (None, _) => Mixing::Sum,
            },
            names: HeadNames::Numbered,
            start: self.init_lora_weights,
            z_weight: self.router().map_or(0.0, |_| self.router_z_weight),
            ..LowRankSpec::of(&self.keys())
        }
    }

    fn balance(&self) -> Option<Balance> {
        let router = self.router()?;
        let penalty = self.balance.penalty(router.top_k);
        Some(Balance { weight: self.balance_weight, penalty })
    }
}

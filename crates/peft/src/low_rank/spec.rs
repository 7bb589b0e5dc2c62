//! What decides the shape and the computation of a [`LowRankAdapter`](super::LowRankAdapter).

use super::align::Align;
use super::ends::{EMBEDDING, EndsSpec, HEAD};
use super::start::Start;
use crate::options::{self, LoraConfigKeys};
use crate::patterns::Patterns;
use hydralora_model::adapter::Site;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the router reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RouteOn {
    /// The layer's input `x` (the paper's text and the official code).
    #[default]
    X,
    /// The low-rank activation `A x` (the shape in the paper's equation 4).
    A,
    /// The mean of the layer's inputs over the tokens of the text so far.
    Sequence,
}

/// How many dropout masks the input of `A` gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DropoutMask {
    /// One for all experts.
    #[default]
    Shared,
    /// One for each expert, as the official code draws them.
    PerExpert,
}

/// Which gates learn from a choice of the largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TopKGradient {
    /// Those that were kept.
    #[default]
    Kept,
    /// All: on the way back the choice counts as the identity.
    StraightThrough,
}

/// What one router serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RouterScope {
    /// One linear layer.
    #[default]
    Linear,
    /// All layers of an attention or feed-forward block, reading the block's input.
    Block,
}

/// A router's kind. By default one for each layer, reading its input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Router {
    pub(crate) route_on: RouteOn,
    pub(crate) scope: RouterScope,
    pub(crate) bias: bool,
    /// How many experts a token goes to; all if not given.
    pub(crate) top_k: Option<usize>,
    /// Which gates learn from that choice.
    pub(crate) top_k_gradient: TopKGradient,
    /// Factor on its start.
    pub(crate) gain: f64,
    /// What its scores are divided by.
    pub(crate) temperature: f64,
    /// What they are divided by at a run's first step, from where that falls to the temperature.
    pub(crate) first_temperature: Option<f64>,
}

impl Default for Router {
    fn default() -> Self {
        Self {
            route_on: RouteOn::X,
            scope: RouterScope::Linear,
            bias: false,
            top_k: None,
            top_k_gradient: TopKGradient::Kept,
            gain: 1.0,
            temperature: 1.0,
            first_temperature: None,
        }
    }
}

impl Router {
    /// The temperature in training after `taken` of `total` steps: a geometric way from the first to
    /// the last step.
    pub(super) fn temperature_at(&self, taken: usize, total: usize) -> f64 {
        let Some(first) = self.first_temperature else { return self.temperature };
        let way = (taken as f64 / total.saturating_sub(1).max(1) as f64).min(1.0);
        first * (self.temperature / first).powf(way)
    }
}

/// How the heads of a site are weighed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mixing {
    /// Each counts whole.
    Sum,
    /// Each counts `1/N`.
    Mean,
    /// A router weighs them per token.
    Routed(Router),
}

impl Mixing {
    /// The router, if there is one.
    pub(super) fn routed(self) -> Option<Router> {
        match self {
            Mixing::Routed(router) => Some(router),
            _ => None,
        }
    }

    pub(super) fn router(self, scope: RouterScope) -> Option<Router> {
        match self {
            Mixing::Routed(router) if router.scope == scope => Some(router),
            _ => None,
        }
    }
}

/// How the heads of a site are named in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadNames {
    /// `lora_B`: one head, as PEFT names it.
    Single,
    /// `lora_B0`, `lora_B1`, …, as HydraLoRA's code names them.
    Numbered,
}

/// Rank of a layer's pair and the factor on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Size {
    pub(crate) rank: usize,
    pub(crate) scale: f64,
}

/// What the sizes of layers follow from.
#[derive(Clone, Debug)]
pub(crate) struct Sizes {
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    rank_pattern: Patterns<usize>,
    alpha_pattern: Patterns<f64>,
}

impl Sizes {
    /// Those of these options.
    pub(crate) fn of(keys: &LoraConfigKeys) -> Self {
        Self {
            rank: keys.rank,
            alpha: keys.alpha,
            use_rslora: keys.use_rslora,
            rank_pattern: keys.rank_pattern.clone(),
            alpha_pattern: keys.alpha_pattern.clone(),
        }
    }

    /// The size of layers that no pattern names.
    pub(crate) fn general(&self) -> Size {
        let scale = options::scale(self.alpha, self.rank, self.use_rslora);
        Size { rank: self.rank, scale }
    }

    /// The size of the layer at `site`.
    pub(crate) fn at(&self, site: Site) -> Size {
        self.named(&site.to_string())
    }

    /// The size of the module of that name.
    fn named(&self, name: &str) -> Size {
        let rank = self.rank_pattern.find(name).copied().unwrap_or(self.rank);
        let alpha = self.alpha_pattern.find(name).copied().unwrap_or(self.alpha);
        Size { rank, scale: options::scale(alpha, rank, self.use_rslora) }
    }
}

/// Everything that decides the shape and the computation of a [`LowRankAdapter`].
#[derive(Clone, Debug)]
pub(crate) struct LowRankSpec {
    pub(crate) sizes: Sizes,
    /// What is trained beside the layers.
    pub(crate) ends: EndsSpec,
    pub(crate) num_experts: usize,
    /// Whether every expert has an `A` of its own.
    pub(crate) own_a: bool,
    /// Whether all experts have one `B`.
    pub(crate) shared_b: bool,
    /// A penalty on how far what `A` makes of different domains lies apart.
    pub(crate) align: Align,
    /// Factor on the routers' z-loss; none if 0.
    pub(crate) z_weight: f64,
    pub(crate) dropout: f64,
    pub(crate) dropout_mask: DropoutMask,
    pub(crate) mixing: Mixing,
    pub(crate) names: HeadNames,
    pub(crate) start: Start,
    /// Whether magnitude and direction are learned apart (DoRA).
    pub(crate) decomposed: bool,
}

impl LowRankSpec {
    /// Plain LoRA with these options.
    pub(crate) fn of(keys: &LoraConfigKeys) -> Self {
        let sizes = Sizes::of(keys);
        Self {
            ends: EndsSpec::of(keys, [EMBEDDING, HEAD].map(|end| sizes.named(end))),
            sizes,
            num_experts: 1,
            own_a: false,
            shared_b: false,
            align: Align::default(),
            z_weight: 0.0,
            dropout: keys.dropout,
            dropout_mask: DropoutMask::Shared,
            mixing: Mixing::Sum,
            names: HeadNames::Single,
            start: Start::Kaiming,
            decomposed: false,
        }
    }

    /// Whether what the method computes at a layer is a single pair, as it can be at the ends too.
    pub(crate) fn takes_pairs(&self) -> bool {
        let single = self.num_experts == 1 && self.names == HeadNames::Single;
        single && !self.decomposed && self.start == Start::Kaiming
    }

    /// How many `B` a site has.
    pub(crate) fn num_b(&self) -> usize {
        if self.shared_b { 1 } else { self.num_experts }
    }

    /// How many `A` a site has.
    pub(super) fn num_a(&self) -> usize {
        if self.own_a { self.num_experts } else { 1 }
    }
}

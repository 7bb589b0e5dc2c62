//! The options that LoRA and its relatives share, written once: a macro puts their five fields
//! before a method's own, and a trait derives recipe, file and registry from the rest.

use crate::described::Described;
use crate::error::{Error, Fault, Result};
use crate::low_rank::{
    Balance, GuideSpec, GuidedBy, LowRankAdapter, LowRankSpec, Start, TopKGradient,
};
use crate::method::{MethodOptions, RouterStart, product};
use crate::options::{LoraConfigKeys, check_common, check_experts, to_map};
use crate::section::read_section;
use crate::targets::Targets;
use crate::tuned::Tuned;
use hydralora_kernels::DType;
use hydralora_model::adapter::SiteShape;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// `struct Options` with the shared fields and, behind them, those given.
macro_rules! low_rank_options {
    (
        $(#[$meta:meta])*
        rank = $rank:expr, alpha = $alpha:expr, targets = $targets:expr;
        $($(#[$field_meta:meta])* $field:ident: $type:ty = $default:expr,)*
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct Options {
            /// Rank `r` of each `A` and `B`.
            rank: usize,
            /// Numerator of the scale.
            alpha: f64,
            /// Scale by `alpha / √r` instead of `alpha / r`.
            use_rslora: bool,
            /// Dropout probability on the input of `A`.
            dropout: f64,
            /// The layers to change.
            targets: crate::targets::Targets,
            /// Other ranks for some of them, by patterns of their names.
            rank_pattern: crate::patterns::Patterns<usize>,
            /// Other numerators of the scale, likewise.
            alpha_pattern: crate::patterns::Patterns<f64>,
            /// Modules of which whole copies are trained: norms, `embed_tokens`, `lm_head`.
            modules_to_save: Vec<String>,
            /// Tokens whose rows of the embedding are trained.
            trainable_token_indices: Option<crate::low_rank::TokenIndices>,
            /// Keep a tied output layer the embedding when that is in `modules_to_save`.
            ensure_weight_tying: bool,
            /// The start that a file named.
            #[serde(skip)]
            start_as_read: Option<serde_json::Value>,
            $($(#[$field_meta])* $field: $type,)*
        }

        impl Default for Options {
            fn default() -> Self {
                Self {
                    rank: $rank,
                    alpha: $alpha,
                    use_rslora: false,
                    dropout: 0.0,
                    targets: crate::targets::Targets::One($targets.to_owned()),
                    rank_pattern: crate::patterns::Patterns::default(),
                    alpha_pattern: crate::patterns::Patterns::default(),
                    modules_to_save: Vec::new(),
                    trainable_token_indices: None,
                    ensure_weight_tying: false,
                    start_as_read: None,
                    $($field: $default,)*
                }
            }
        }

        impl crate::low_rank_options::Shared for Options {
            fn keys(&self) -> crate::options::LoraConfigKeys {
                crate::options::LoraConfigKeys {
                    rank: self.rank,
                    alpha: self.alpha,
                    use_rslora: self.use_rslora,
                    dropout: self.dropout,
                    targets: self.targets.clone(),
                    rank_pattern: self.rank_pattern.clone(),
                    alpha_pattern: self.alpha_pattern.clone(),
                    modules_to_save: self.modules_to_save.clone(),
                    trainable_token_indices: self.trainable_token_indices.clone(),
                    ensure_weight_tying: self.ensure_weight_tying,
                    start: self.start_as_read.clone(),
                }
            }

            fn with_keys(self, keys: crate::options::LoraConfigKeys) -> Self {
                Self {
                    rank: keys.rank,
                    alpha: keys.alpha,
                    use_rslora: keys.use_rslora,
                    dropout: keys.dropout,
                    targets: keys.targets,
                    rank_pattern: keys.rank_pattern,
                    alpha_pattern: keys.alpha_pattern,
                    modules_to_save: keys.modules_to_save,
                    trainable_token_indices: keys.trainable_token_indices,
                    ensure_weight_tying: keys.ensure_weight_tying,
                    start_as_read: keys.start,
                    ..self
                }
            }

            fn targets(&self) -> &crate::targets::Targets {
                &self.targets
            }
        }
    };
}
pub(crate) use low_rank_options;

/// Access to the shared fields.
pub(crate) trait Shared {
    /// Their values.
    fn keys(&self) -> LoraConfigKeys;
    /// The same options with other values of them.
    fn with_keys(self, keys: LoraConfigKeys) -> Self;
    /// The layers to change.
    fn targets(&self) -> &Targets;
}

/// What a relative of LoRA says beyond its options' fields.
pub(crate) trait LowRankOptions:
    Shared + Clone + Default + Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static
{
    /// As [`Described::NAME`].
    const NAME: &'static str;
    /// As [`Described::SUMMARY`].
    const SUMMARY: &'static str;
    /// As [`Described::PEFT_TYPE`].
    const PEFT_TYPE: &'static str;
    /// Options that a file names as a recipe does.
    const OWN_KEYS: &'static [&'static str] = &[];
    /// Those that earlier builds did not have: a file names them only where they say something.
    const LATER_KEYS: &'static [&'static str] = &[];

    /// As [`Described::claims`].
    fn claims(config: &Map<String, Value>) -> bool {
        config.get("peft_type") == Some(&json!(Self::PEFT_TYPE))
    }
    /// Every own option whose value makes no sense.
    fn own_faults(&self) -> Vec<Fault> {
        Vec::new()
    }
    /// How many experts there are, if they are an option.
    fn num_experts(&self) -> Option<usize> {
        None
    }
    /// As [`MethodOptions::router_start`].
    fn routers_start_from(&self) -> Option<RouterStart> {
        None
    }
    /// What tells the routers, in training, which expert a sequence is meant for.
    fn guide(&self) -> Option<GuideSpec> {
        None
    }
    /// Checks the options against the domains of a run's data.
    ///
    /// # Errors
    /// If they cannot be had of these.
    fn check_domains(&self, domains: &[String]) -> Result<()> {
        let _ = domains;
        Ok(())
    }
    /// Checks the options against the layers `sites` that they choose, beyond what all of the family
    /// check.
    ///
    /// # Errors
    /// If they cannot be had of one of the layers.
    fn check_shapes(&self, sites: &[SiteShape]) -> Result<()> {
        let _ = sites;
        Ok(())
    }
    /// What the adapter computes.
    fn spec(&self) -> LowRankSpec;
    /// The penalty on uneven loads, if there is one.
    fn balance(&self) -> Option<Balance> {
        None
    }
}

impl<O: LowRankOptions> MethodOptions for O {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut config = self.keys().write(O::PEFT_TYPE);
        if let Some(experts) = self.num_experts() {
            config.insert("lora_nums".to_owned(), json!(experts));
        }
        let own = self.to_recipe();
        config.extend(O::OWN_KEYS.iter().map(|&key| (key.to_owned(), own[key].clone())));
        let usual = O::default().to_recipe();
        let later = O::LATER_KEYS.iter().filter(|&&key| own[key] != usual[key]);
        config.extend(later.map(|&key| (key.to_owned(), own[key].clone())));
        config
    }

    fn targets(&self) -> &Targets {
        Shared::targets(self)
    }

    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        let spec = self.spec();
        let num_a = if spec.own_a { spec.num_experts } else { 1 };
        let of_site = |shape: &SiteShape| {
            let rank = spec.sizes.at(shape.site).rank;
            let a = product(&[num_a, rank, shape.in_features.max(1)]);
            a.saturating_add(product(&[spec.num_b(), rank, shape.out_features.max(1)]))
        };
        sites.iter().map(of_site).fold(0, usize::saturating_add)
    }

    fn select(&self, sites: &[SiteShape]) -> Result<Vec<SiteShape>> {
        Shared::targets(self).layers().select(sites)
    }

    fn check_layers(&self, sites: &[SiteShape]) -> Result<()> {
        self.keys().check_layers(sites)?;
        self.check_shapes(sites)
    }

    fn check_domains(&self, domains: &[String]) -> Result<()> {
        LowRankOptions::check_domains(self, domains)
    }

    fn router_start(&self) -> Option<RouterStart> {
        self.routers_start_from()
    }

    fn guide_clusters(&self) -> Option<usize> {
        let guide = self.guide().filter(|guide| guide.by == GuidedBy::Clusters)?;
        (guide.weight > 0.0).then(|| self.num_experts()).flatten()
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let options = Box::new(self.clone());
        let adapter = LowRankAdapter::new(options, self.spec(), sites, dtype, seed);
        let adapter = match self.balance() {
            Some(balance) => adapter.balanced(balance),
            None => adapter,
        };
        Box::new(match self.guide() {
            Some(guide) => adapter.guided(guide),
            None => adapter,
        })
    }
}

impl<O: LowRankOptions> Described for O {
    const NAME: &'static str = <O as LowRankOptions>::NAME;
    const SUMMARY: &'static str = <O as LowRankOptions>::SUMMARY;
    const PEFT_TYPE: &'static str = <O as LowRankOptions>::PEFT_TYPE;

    fn claims(config: &Map<String, Value>) -> bool {
        <O as LowRankOptions>::claims(config)
    }

    fn faults(&self) -> Vec<Fault> {
        let keys = self.keys();
        let mut faults = check_common(keys.rank, keys.alpha, keys.dropout, &keys.targets);
        faults.extend(keys.pattern_faults("method."));
        faults.extend(keys.end_faults("method."));
        let ends = keys.targets.ends();
        if !ends.is_empty() && !self.spec().takes_pairs() {
            let message = format!(
                "{} get a single pair A, B with the usual start and scale; expected `name: lora` without \
                 use_dora and another init_lora_weights, or modules_to_save",
                ends.join(" and ")
            );
            faults.push(Fault::new("method.targets", message));
        }
        faults.extend(self.num_experts().and_then(check_experts));
        faults.extend(self.own_faults());
        faults
    }

    /// The number of experts is `lora_nums`, as the published code calls it.
    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        let names = [O::OWN_KEYS, O::LATER_KEYS].concat();
        let keys = LoraConfigKeys::read(config, &names, true)?;
        let own: Map<String, Value> = (names.iter())
            .filter_map(|&key| Some((key.to_owned(), config.get(key)?.clone())))
            .chain(config.get("lora_nums").map(|n| ("num_experts".to_owned(), n.clone())))
            .filter(|(_, value)| !value.is_null())
            // PEFT's word for the usual start.
            .filter(|(key, value)| key != "init_lora_weights" || !value.is_boolean())
            .collect();
        let options: O = read_section("adapter_config", &own, &O::default().to_recipe())?;
        let mut faults: Vec<Fault> =
            options.num_experts().and_then(check_experts).into_iter().collect();
        let options = options.with_keys(keys);
        faults.extend(options.own_faults());
        if faults.is_empty() { Ok(options) } else { Err(faults) }
    }
}

/// Faults of a router that sends each token to its `top_k` largest experts.
pub(crate) fn check_top_k(top_k: Option<usize>, num_experts: usize) -> Option<Fault> {
    let k = top_k.filter(|k| !(2..=num_experts.max(2)).contains(k))?;
    let message = format!(
        "is {k}; expected 2 to num_experts (the gate of a single expert is 1 whatever the router \
         says, so it would not learn)"
    );
    Some(Fault::new("method.router_top_k", message))
}

/// A fault if gates are to learn from a choice that is not made.
pub(crate) fn check_top_k_gradient(gradient: TopKGradient, top_k: Option<usize>) -> Option<Fault> {
    let message = "is about `router_top_k`, which is not given; expected a number there, or `kept`";
    (gradient != TopKGradient::Kept && top_k.is_none())
        .then(|| Fault::new("method.router_top_k_gradient", message))
}

/// A fault if the form of a penalty that is not the usual one is named where there is no penalty.
pub(crate) fn check_evenness(form: &str, named: bool, weight: f64) -> Option<Fault> {
    let message = || {
        format!(
            "is `{form}`, a form of the penalty whose `balance_weight` is 0; expected a weight there"
        )
    };
    (named && weight == 0.0).then(|| Fault::new("method.balance", message()))
}

/// A fault if experts with an `A` and `B` each start from anything but the usual, or segments of the
/// weight's singular values, of which a single one needs none.
pub(crate) fn check_segments_or_usual(start: Start, num_experts: usize) -> Option<Fault> {
    let message = match (start, num_experts) {
        (Start::Kaiming, _) => return None,
        (Start::SingularSegments, 1) => {
            "`singular_segments` makes experts differ, and there is a single one; expected num_experts: 2 or \
             more, or `kaiming`"
        }
        (Start::SingularSegments, _) => return None,
        _ => {
            "is for one pair, or for heads that share one A, and here every expert has its own; expected \
             `kaiming` or `singular_segments`"
        }
    };
    Some(Fault::new("method.init_lora_weights", message))
}

/// Checks that the layers `sites` are wide enough for a start that gives experts directions of their own.
///
/// # Errors
/// For the first one that is not.
pub(crate) fn check_directions(spec: &LowRankSpec, sites: &[SiteShape]) -> Result<()> {
    let wanted = |shape: &SiteShape| spec.num_experts * spec.sizes.at(shape.site).rank;
    let too_narrow = |shape: &&SiteShape| match spec.start {
        Start::Orthogonal => wanted(shape) > shape.out_features,
        Start::SingularSlices | Start::SingularSegments => {
            wanted(shape) > shape.out_features.min(shape.in_features)
        }
        _ => false,
    };
    let Some(shape) = sites.iter().find(too_narrow) else { return Ok(()) };
    let SiteShape { site, in_features, out_features } = *shape;
    let message = format!(
        "`{}` gives {} heads of rank {} directions of their own, {} in all, and {site} is \
         {in_features} wide at its input and {out_features} at its output; expected a lower rank or fewer \
         heads",
        spec.start.of_several_heads().unwrap_or_default(),
        spec.num_experts,
        spec.sizes.at(site).rank,
        wanted(shape)
    );
    Err(Error::Options { faults: vec![Fault::new("method.init_lora_weights", message)] })
}

/// A fault if a penalty's factor is no weight.
pub(crate) fn check_weight(option: &str, weight: f64) -> Option<Fault> {
    (!(weight.is_finite() && weight >= 0.0))
        .then(|| Fault::new(format!("method.{option}"), format!("is {weight}; expected 0 or more")))
}

/// A fault if a factor is not above zero.
pub(crate) fn check_positive(option: &str, value: f64) -> Option<Fault> {
    let message = || format!("is {value}; expected a positive number");
    (!(value.is_finite() && value > 0.0)).then(|| Fault::new(format!("method.{option}"), message()))
}

//! MTL-LoRA: one shared `A`, a small matrix and a weighing of the heads for every domain.
//!
//! ```text
//! y = W0 x + s · Σ_i p_ti B_i Λ_t A x        p_t = softmax(w_t / τ),  t the domain of the text
//! ```
//!
//! Yang et al., arXiv 2410.09437, equation 4. The domain is the record's, not found by a router, so
//! outside of training it has to be chosen ([`DomainAware::choose_domain`]); then the update is an ordinary
//! low-rank one that folds into the weight. As in the published code `A` starts Kaiming-uniform,
//! `B_i` at zero, `Λ_t` at the identity and `w_t` uniform in ±1/√N.
//!
//! With `D` domains in a batch the layer is computed as a mixture of `D` experts `B'_t A'_t`,
//! `A'_t = Λ_t A`, `B'_t = Σ_i p_ti B_i`, with gates that are 1 for the row's own domain and 0 for others.

use crate::described::{Described, read_lora_like};
use crate::domains::{Domains, domain_faults};
use crate::error::{Fault, Result};
use crate::low_rank::layout::{head_columns, set_head_columns};
use crate::merge::{Gates, Merge};
use crate::method::{MethodOptions, product};
use crate::options::{LoraConfigKeys, check_common, check_experts, scale, to_map};
use crate::random::{kaiming_bound, layer_dropout, uniform};
use crate::targets::Targets;
use crate::trainable::{Role, TensorMap, Trainable, take_tensor};
use crate::tuned::{DomainAware, Mergeable, Parameters, Persist, TrainHooks, TrainingPlan, Tuned};
use hydralora_kernels::ops::domain_update::{matrix_product, weighted_heads};
use hydralora_kernels::ops::low_rank::{Mask, router_gates};
use hydralora_kernels::ops::rows::take_rows;
use hydralora_kernels::{DType, Tensor, Var, no_grad};
use hydralora_model::adapter::{Adapter, HeadGates, LowRankUpdate, Pass, Site, SiteShape, Update};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Options that a file names as a recipe does.
const OWN_KEYS: [&str; 2] = ["domains", "temperature"];

/// Options of MTL-LoRA in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Rank `r` of `A` and of each head.
    rank: usize,
    /// Numerator of the scale.
    alpha: f64,
    /// Scale by `alpha / √r` instead of `alpha / r`.
    use_rslora: bool,
    /// Dropout probability on the input of `A`.
    dropout: f64,
    /// The layers to change.
    targets: Targets,
    /// Number `N` of heads.
    num_experts: usize,
    /// Names of the domains, as the data name them.
    domains: Vec<String>,
    /// `τ`: the smaller, the more a domain keeps to one head.
    temperature: f64,
}

impl Default for Options {
    /// Those of the published script for LLaMA2-7B.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::One("attention".to_owned()),
            num_experts: 3,
            domains: Vec::new(),
            temperature: 0.1,
        }
    }
}

impl Described for Options {
    const NAME: &'static str = "mtl-lora";
    const SUMMARY: &'static str = "one shared A, heads weighed by the domain that a record names";
    const PEFT_TYPE: &'static str = "MTL_LORA";

    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_common(self.rank, self.alpha, self.dropout, &self.targets);
        faults.extend(check_experts(self.num_experts));
        let temperature = self.temperature;
        if !(temperature.is_finite() && temperature > 0.0) {
            let message = format!("is {temperature}; expected a positive number");
            faults.push(Fault::new("method.temperature", message));
        }
        faults.extend(domain_faults(&self.domains));
        faults
    }

    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        read_lora_like(config, &OWN_KEYS)
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let keys = LoraConfigKeys {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            targets: self.targets.clone(),
            ..LoraConfigKeys::default()
        };
        let mut config = keys.write(Self::PEFT_TYPE);
        config.insert("lora_nums".to_owned(), json!(self.num_experts));
        let own = self.to_recipe();
        config.extend(OWN_KEYS.map(|key| (key.to_owned(), own[key].clone())));
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        let (rank, experts, domains) = (self.rank, self.num_experts, self.domains.len());
        let of_site = |shape: &SiteShape| {
            [
                product(&[rank, shape.in_features.max(1)]),
                product(&[experts, rank, shape.out_features.max(1)]),
                product(&[experts, domains]),
            ]
            .into_iter()
            .fold(0, usize::saturating_add)
        };
        let own = sites.iter().map(of_site).fold(0, usize::saturating_add);
        own.saturating_add(product(&[sites.len().max(1), domains, rank, rank]))
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let (rank, experts, domains) = (self.rank, self.num_experts, self.domains.len());
        let identities: Vec<f64> = (0..domains * rank * rank)
            .map(|at| f64::from(u8::from(at / rank % rank == at % rank)))
            .collect();
        let tensors = |shape: &SiteShape| {
            let SiteShape { site, in_features, out_features } = *shape;
            let name = |part: &str| format!("{site}.{part}.weight");
            let (a, weighing) = (name("lora_A"), name("lora_shares"));
            let start = uniform(seed, &a, kaiming_bound(in_features), dtype, [rank, in_features]);
            let weights =
                uniform(seed, &weighing, kaiming_bound(experts), dtype, [experts, domains]);
            let lambdas = Tensor::from_f64(dtype, &identities, [domains * rank, rank]);
            let b = Tensor::zeros(dtype, [out_features, experts * rank]);
            let own = [
                Trainable::new(a, Role::A, start),
                Trainable::new(name("lora_lambdas"), Role::Scale, lambdas),
                Trainable::new(name("lora_B"), Role::B, b),
                Trainable::new(weighing, Role::Router, weights),
            ];
            (site, SiteTensors { shape: *shape, own })
        };
        let all: Vec<f64> = (0..domains * domains)
            .map(|at| if at / domains == at % domains { 1.0 / self.temperature } else { 0.0 })
            .collect();
        Box::new(MtlLora {
            options: self.clone(),
            sites: sites.iter().map(tensors).collect(),
            sharpen: Var::constant(Tensor::from_f64(dtype, &all, [domains, domains])),
            domains: Domains::new(self.domains.clone()),
        })
    }
}

/// Places in a site's tensors.
const A: usize = 0;
const LAMBDAS: usize = 1;
const B: usize = 2;
const WEIGHTS: usize = 3;

struct SiteTensors {
    shape: SiteShape,
    /// `A: [r, in]`, all `Λ_t: [D·r, r]`, `B: [out, N·r]` (a file holds the heads one by one) and
    /// `w: [N, D]`.
    own: [Trainable; 4],
}

/// A live MTL-LoRA adapter.
struct MtlLora {
    options: Options,
    sites: BTreeMap<Site, SiteTensors>,
    /// `I/τ: [D, D]`, what the weighings are looked up with.
    sharpen: Var,
    domains: Domains,
}

impl MtlLora {
    fn head_name(site: Site, head: usize) -> String {
        format!("{site}.lora_B{head}.weight")
    }

    /// `A'_t` of `domains` one below the other and `B'_t` side by side.
    fn updates(&self, tensors: &SiteTensors, domains: &[usize]) -> (Var, Var) {
        let [a, lambdas, b, weights] = tensors.own.each_ref().map(Trainable::var);
        let rank = self.options.rank;
        let rows: Vec<usize> =
            domains.iter().flat_map(|domain| domain * rank..(domain + 1) * rank).collect();
        let a = matrix_product(&take_rows(lambdas, &rows), a);
        let shares = router_gates(&self.sharpen, weights, None);
        (a, weighted_heads(b, &take_rows(&shares, domains)))
    }
}

impl Adapter for MtlLora {
    /// Which domain a row is of is known by its place in the batch.
    fn rows_stand_alone(&self) -> bool {
        self.domains.is_chosen()
    }

    fn update(&self, site: Site, rows: usize, pass: &Pass<'_>) -> Update<'_> {
        let Some(tensors) = self.sites.get(&site) else { return Update::None };
        let dtype = tensors.own[A].var().value().dtype();
        let (domains, gates) = self.domains.of_pass(pass, rows, dtype);
        if domains.is_empty() {
            return Update::None;
        }
        let (a, b) = self.updates(tensors, &domains);
        Update::LowRank(LowRankUpdate {
            a,
            b,
            num_experts: domains.len(),
            gates: gates.map_or(HeadGates::Sum, HeadGates::Given),
            scale: scale(self.options.alpha, self.options.rank, self.options.use_rslora),
            mask: layer_dropout(site, self.options.dropout, pass).map_or(Mask::None, Mask::Shared),
        })
    }
}

impl Parameters for MtlLora {
    fn options(&self) -> &dyn MethodOptions {
        &self.options
    }

    fn sites(&self) -> Vec<Site> {
        self.sites.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        self.sites.values().flat_map(|tensors| &tensors.own).collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        self.sites.values_mut().flat_map(|tensors| &mut tensors.own).collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        let mut map = TensorMap::new();
        for (&site, tensors) in &self.sites {
            for part in [A, LAMBDAS, WEIGHTS].map(|index| &tensors.own[index]) {
                map.insert(part.parameter.name().to_owned(), pick(part));
            }
            let b = pick(&tensors.own[B]);
            for head in 0..self.options.num_experts {
                let columns = head_columns(&b, head, self.options.rank);
                map.insert(Self::head_name(site, head), columns);
            }
        }
        map
    }
}

impl Persist for MtlLora {
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        let rank = self.options.rank;
        for (&site, own) in &mut self.sites {
            for index in [A, LAMBDAS, WEIGHTS] {
                let parameter = &mut own.own[index].parameter;
                let name = parameter.name().to_owned();
                let shape = parameter.value().shape().to_vec();
                if let Some(found) = take_tensor(tensors, &name, &shape, &mut faults) {
                    parameter.set(found.to_dtype(parameter.value().dtype()));
                }
            }
            for head in 0..self.options.num_experts {
                let name = Self::head_name(site, head);
                let shape = [own.shape.out_features, rank];
                if let Some(found) = take_tensor(tensors, &name, &shape, &mut faults) {
                    set_head_columns(own.own[B].parameter.value_mut(), head, rank, &found);
                }
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }
}

impl TrainHooks for MtlLora {
    fn needs_whole_batches(&self) -> Vec<&'static str> {
        if self.options.dropout > 0.0 { vec!["method.dropout"] } else { Vec::new() }
    }

    fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        self.domains.begin(plan)
    }
}

impl Mergeable for MtlLora {
    fn merge(&self, site: Site, gates: &Gates) -> Merge<'_> {
        if !self.domains.is_chosen() && self.sites.contains_key(&site) {
            return Merge::Refused(self.domains.refusal());
        }
        let _guard = no_grad();
        Merge::of(site, self.update(site, 0, &Pass::inference()), gates)
    }
}

impl Tuned for MtlLora {
    fn as_domain_aware(&self) -> Option<&dyn DomainAware> {
        Some(&self.domains)
    }

    fn as_domain_aware_mut(&mut self) -> Option<&mut dyn DomainAware> {
        Some(&mut self.domains)
    }
}

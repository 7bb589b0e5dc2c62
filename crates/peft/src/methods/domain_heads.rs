//! One shared `A` and one head for each domain: `y = W0 x + (alpha / r) B_t A x`, `t` the domain of the text.
//!
//! HydraLoRA with gates that know: 1 for the head of the record's domain and 0 for the others. What is between
//! it and a LoRA of its size is what routing by domain can win at most. Outside of training the domain has to be
//! chosen ([`DomainAware::choose_domain`]); the update is an ordinary low-rank one then. `A` starts
//! Kaiming-uniform, every `B_t` at zero.
//!
//! With `D` domains in a batch the layer is computed as a mixture of their heads.

use crate::described::{Described, read_lora_like};
use crate::domains::{Domains, domain_faults};
use crate::error::{Fault, Result};
use crate::low_rank::layout::{head_columns, set_head_columns};
use crate::merge::{Gates, Merge};
use crate::method::{MethodOptions, product};
use crate::options::{LoraConfigKeys, check_common, scale, to_map};
use crate::random::{kaiming_bound, layer_dropout, uniform};
use crate::targets::Targets;
use crate::trainable::{Role, TensorMap, Trainable, take_tensor};
use crate::tuned::{DomainAware, Mergeable, Parameters, Persist, TrainHooks, TrainingPlan, Tuned};
use hydralora_kernels::ops::domain_update::weighted_heads;
use hydralora_kernels::ops::low_rank::Mask;
use hydralora_kernels::{DType, Tensor, Var, no_grad};
use hydralora_model::adapter::{Adapter, HeadGates, LowRankUpdate, Pass, Site, SiteShape, Update};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Options in a recipe.
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
    /// Names of the domains, as the data name them; each gets a head.
    domains: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rank: 4,
            alpha: 32.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::One("ffn".to_owned()),
            domains: Vec::new(),
        }
    }
}

impl Options {
    fn keys(&self) -> LoraConfigKeys {
        LoraConfigKeys {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            targets: self.targets.clone(),
            ..LoraConfigKeys::default()
        }
    }
}

impl Described for Options {
    const NAME: &'static str = "domain-heads";
    const SUMMARY: &'static str = "one shared A, one head for each domain that a record names";
    const PEFT_TYPE: &'static str = "DOMAIN_HEADS";

    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_common(self.rank, self.alpha, self.dropout, &self.targets);
        faults.extend(domain_faults(&self.domains));
        faults
    }

    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        read_lora_like(config, &["domains"])
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut config = self.keys().write(Self::PEFT_TYPE);
        config.insert("domains".to_owned(), json!(self.domains));
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        let of_site = |shape: &SiteShape| {
            let a = product(&[self.rank, shape.in_features.max(1)]);
            a.saturating_add(product(&[self.domains.len(), self.rank, shape.out_features.max(1)]))
        };
        sites.iter().map(of_site).fold(0, usize::saturating_add)
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let (rank, heads) = (self.rank, self.domains.len());
        let layer = |&shape: &SiteShape| {
            let SiteShape { site, in_features, out_features } = shape;
            let name = format!("{site}.lora_A.weight");
            let a = uniform(seed, &name, kaiming_bound(in_features), dtype, [rank, in_features]);
            let b = Tensor::zeros(dtype, [out_features, heads * rank]);
            let own = [
                Trainable::new(name, Role::A, a),
                Trainable::new(format!("{site}.lora_B.weight"), Role::B, b),
            ];
            (site, Layer { shape, own })
        };
        Box::new(DomainHeads {
            options: self.clone(),
            layers: sites.iter().map(layer).collect(),
            domains: Domains::new(self.domains.clone()),
        })
    }
}

struct Layer {
    shape: SiteShape,
    /// `A: [r, in]` and `B: [out, D·r]`; a file holds the heads one by one.
    own: [Trainable; 2],
}

/// A live adapter.
struct DomainHeads {
    options: Options,
    layers: BTreeMap<Site, Layer>,
    domains: Domains,
}

fn head_name(site: Site, head: usize) -> String {
    format!("{site}.lora_B{head}.weight")
}

impl Adapter for DomainHeads {
    /// Which domain a row is of is known by its place in the batch.
    fn rows_stand_alone(&self) -> bool {
        self.domains.is_chosen()
    }

    fn update(&self, site: Site, rows: usize, pass: &Pass<'_>) -> Update<'_> {
        let Some(layer) = self.layers.get(&site) else { return Update::None };
        let [a, b] = layer.own.each_ref().map(Trainable::var);
        let dtype = a.value().dtype();
        let (present, gates) = self.domains.of_pass(pass, rows, dtype);
        if present.is_empty() {
            return Update::None;
        }
        let heads = self.options.domains.len();
        let mut picked = vec![0.0; present.len() * heads];
        for (row, domain) in present.iter().enumerate() {
            picked[row * heads + domain] = 1.0;
        }
        let picked = Tensor::from_f64(dtype, &picked, [present.len(), heads]);
        let dropout = layer_dropout(site, self.options.dropout, pass);
        Update::LowRank(LowRankUpdate {
            a: a.clone(),
            b: weighted_heads(b, &Var::constant(picked)),
            num_experts: present.len(),
            gates: gates.map_or(HeadGates::Sum, HeadGates::Given),
            scale: scale(self.options.alpha, self.options.rank, self.options.use_rslora),
            mask: dropout.map_or(Mask::None, Mask::Shared),
        })
    }
}

impl Parameters for DomainHeads {
    fn options(&self) -> &dyn MethodOptions {
        &self.options
    }

    fn sites(&self) -> Vec<Site> {
        self.layers.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        self.layers.values().flat_map(|layer| &layer.own).collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        self.layers.values_mut().flat_map(|layer| &mut layer.own).collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        let mut map = TensorMap::new();
        for (&site, Layer { own: [a, b], .. }) in &self.layers {
            map.insert(a.parameter.name().to_owned(), pick(a));
            let b = pick(b);
            for head in 0..self.options.domains.len() {
                map.insert(head_name(site, head), head_columns(&b, head, self.options.rank));
            }
        }
        map
    }
}

impl Persist for DomainHeads {
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        let rank = self.options.rank;
        for (&site, Layer { shape, own: [a, b] }) in &mut self.layers {
            let name = a.parameter.name().to_owned();
            if let Some(found) =
                take_tensor(tensors, &name, &[rank, shape.in_features], &mut faults)
            {
                a.parameter.set(found.to_dtype(a.parameter.value().dtype()));
            }
            for head in 0..self.options.domains.len() {
                let (name, shape) = (head_name(site, head), [shape.out_features, rank]);
                if let Some(found) = take_tensor(tensors, &name, &shape, &mut faults) {
                    set_head_columns(b.parameter.value_mut(), head, rank, &found);
                }
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }
}

impl TrainHooks for DomainHeads {
    fn needs_whole_batches(&self) -> Vec<&'static str> {
        if self.options.dropout > 0.0 { vec!["method.dropout"] } else { Vec::new() }
    }

    fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        self.domains.begin(plan)
    }
}

impl Mergeable for DomainHeads {
    fn merge(&self, site: Site, gates: &Gates) -> Merge<'_> {
        if !self.domains.is_chosen() && self.layers.contains_key(&site) {
            return Merge::Refused(self.domains.refusal());
        }
        let _guard = no_grad();
        Merge::of(site, self.update(site, 0, &Pass::inference()), gates)
    }
}

impl Tuned for DomainHeads {
    fn as_domain_aware(&self) -> Option<&dyn DomainAware> {
        Some(&self.domains)
    }

    fn as_domain_aware_mut(&mut self) -> Option<&mut dyn DomainAware> {
        Some(&mut self.domains)
    }
}

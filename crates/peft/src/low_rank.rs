//! The adapter that LoRA and its multi-head relatives share: per site one `A` (or one per expert),
//! the heads `B_1 … B_N` side by side, and possibly a router, around
//! [`gated_low_rank`](hydralora_kernels::ops::gated_low_rank).

mod fold;

use crate::error::{Error, Fault, Result};
use crate::merge::{Gates, Merge};
use crate::method::{
    MethodOptions, Role, TensorMap, Trainable, TrainingPlan, Tuned, kaiming_bound, take_tensor,
    uniform,
};
use hydralora_kernels::ops::balance::squared_variation;
use hydralora_kernels::ops::dropout::{Dropout, mix};
use hydralora_kernels::ops::elementwise::{add, scale};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::gated_low_rank::{Gate, LowRank, Mask, gated_low_rank, router_gates};
use hydralora_kernels::{DType, Tensor, Var, dispatch};
use hydralora_model::adapter::{Adapter, Pass, Projection, Site, SiteShape};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the router reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RouteOn {
    /// The layer's input `x` (the paper's text and the official code).
    #[default]
    X,
    /// The low-rank activation `A x` (the shape in the paper's equation 4).
    A,
}

/// How many dropout masks the input of `A` gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DropoutMask {
    /// One for all experts.
    #[default]
    Shared,
    /// One for each expert, as the official code draws them.
    PerExpert,
}

/// What one router serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RouterScope {
    /// One linear layer.
    #[default]
    Linear,
    /// All layers of an attention or feed-forward block, reading the block's input.
    Block,
}

/// A router's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Router {
    pub(crate) route_on: RouteOn,
    pub(crate) scope: RouterScope,
    pub(crate) bias: bool,
}

/// How the heads of a site are weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mixing {
    /// Each counts whole.
    Sum,
    /// Each counts `1/N`.
    Mean,
    /// A router weighs them per token.
    Routed(Router),
}

impl Mixing {
    fn router(self, scope: RouterScope) -> Option<Router> {
        match self {
            Mixing::Routed(router) if router.scope == scope => Some(router),
            _ => None,
        }
    }
}

/// A penalty on experts that carry too little: the squared coefficient of variation of the gates
/// summed over each sequence, where the first half of the experts should carry more of the
/// sequences of some domains and the second half more of the others.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Balance {
    /// Factor on the penalty.
    pub(crate) weight: f64,
    /// An expert's load counts `1 + delta` for sequences meant for it and `1 − delta` for others.
    pub(crate) delta: f64,
    /// Domains meant for the first half; without any, all experts are alike.
    pub(crate) first_half: Vec<String>,
}

/// How the heads of a site are named in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadNames {
    /// `lora_B`: one head, as PEFT names it.
    Single,
    /// `lora_B0`, `lora_B1`, …, as HydraLoRA's code names them.
    Numbered,
}

/// Everything that decides the shape and the computation of a [`LowRankAdapter`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowRankSpec {
    pub(crate) rank: usize,
    pub(crate) num_experts: usize,
    /// Whether every expert has an `A` of its own.
    pub(crate) own_a: bool,
    pub(crate) scale: f64,
    pub(crate) dropout: f64,
    pub(crate) dropout_mask: DropoutMask,
    pub(crate) mixing: Mixing,
    pub(crate) names: HeadNames,
}

struct RouterTensors {
    weight: Trainable,
    bias: Option<Trainable>,
}

struct SiteTensors {
    shape: SiteShape,
    /// `[r, in]`, or `[N·r, in]` when every expert has its own; a file holds those one by one.
    a: Trainable,
    /// `[out, N·r]`; a file holds the heads one by one.
    b: Trainable,
    router: Option<RouterTensors>,
}

/// A live LoRA-like adapter.
pub(crate) struct LowRankAdapter {
    options: Box<dyn MethodOptions>,
    spec: LowRankSpec,
    sites: BTreeMap<Site, SiteTensors>,
    /// Routers of whole blocks, by layer and whether the block is attention.
    blocks: BTreeMap<(usize, bool), RouterTensors>,
    balance: Option<Balance>,
    /// Numbers of the balance's domains in the run at hand.
    first_half: Vec<u32>,
}

impl LowRankAdapter {
    pub(crate) fn new(
        options: Box<dyn MethodOptions>,
        spec: LowRankSpec,
        sites: &[SiteShape],
        dtype: DType,
        seed: u64,
    ) -> Self {
        let router = |name: &str, inputs: usize, bias: bool| {
            let experts = spec.num_experts;
            let weight = format!("{name}.lora_route.weight");
            let start = uniform(seed, &weight, kaiming_bound(inputs), dtype, [experts, inputs]);
            RouterTensors {
                weight: Trainable::new(weight, Role::Router, start),
                bias: bias.then(|| {
                    let name = format!("{name}.lora_route.bias");
                    Trainable::new(name, Role::Router, Tensor::zeros(dtype, [experts]))
                }),
            }
        };
        let mut blocks = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for &shape in sites {
            let SiteShape { site, in_features, out_features } = shape;
            let draw = |name: &str| {
                uniform(seed, name, kaiming_bound(in_features), dtype, [spec.rank, in_features])
            };
            let names: Vec<String> =
                (0..spec.num_a()).map(|expert| a_name(spec, site, expert)).collect();
            let a = format!("{site}.lora_A.weight");
            let mut start = Tensor::zeros(dtype, [spec.num_a() * spec.rank, in_features]);
            for (expert, name) in names.iter().enumerate() {
                set_rows(&mut start, expert * spec.rank, &draw(name));
            }
            let b = Tensor::zeros(dtype, [out_features, spec.num_experts * spec.rank]);
            let own_router = spec.mixing.router(RouterScope::Linear).map(|kind| {
                let inputs = match kind.route_on {
                    RouteOn::X => in_features,
                    RouteOn::A => spec.num_a() * spec.rank,
                };
                router(&site.to_string(), inputs, kind.bias)
            });
            if let Some(kind) = spec.mixing.router(RouterScope::Block) {
                let attention = site.projection.is_attention();
                blocks.entry((site.layer, attention)).or_insert_with(|| {
                    let name = format!("model.layers.{}.{}", site.layer, site.projection.block());
                    let hidden = hidden_size(sites, shape);
                    router(&name, hidden, kind.bias)
                });
            }
            tensors.insert(
                site,
                SiteTensors {
                    shape,
                    a: Trainable::new(a, Role::A, start),
                    b: Trainable::new(format!("{site}.lora_B.weight"), Role::B, b),
                    router: own_router,
                },
            );
        }
        Self { options, spec, sites: tensors, blocks, balance: None, first_half: Vec::new() }
    }

    /// The same with a penalty on uneven loads, unless its weight is zero.
    pub(crate) fn balanced(mut self, balance: Balance) -> Self {
        self.balance = Some(balance).filter(|balance| balance.weight > 0.0);
        self
    }

    /// The balance's constants for every sequence and expert.
    fn shares(&self, balance: &Balance, domains: &[u32]) -> Vec<f64> {
        let experts = self.spec.num_experts;
        let share = |domain: &u32, expert: usize| {
            let meant = self.first_half.contains(domain) == (expert < experts / 2);
            match (self.first_half.is_empty(), meant) {
                (true, _) => 1.0,
                (false, true) => 1.0 + balance.delta,
                (false, false) => 1.0 - balance.delta,
            }
        };
        domains.iter().flat_map(|d| (0..experts).map(move |e| share(d, e))).collect()
    }

    fn mask(&self, site: Site, pass: &Pass<'_>) -> Mask {
        let Some(seed) = pass.dropout_seed().filter(|_| self.spec.dropout > 0.0) else {
            return Mask::None;
        };
        let index = (site.layer * Projection::ALL.len()) as u64 + site.projection as u64;
        let dropout = Dropout { probability: self.spec.dropout, seed: mix(seed ^ mix(index)) };
        match self.spec.dropout_mask {
            DropoutMask::Shared => Mask::Shared(dropout),
            DropoutMask::PerExpert => Mask::PerExpert(dropout),
        }
    }

    /// The gates of the block that `site` belongs to; computed where the block's input passes by.
    fn block_gates(&self, site: Site, x: &Var, pass: &Pass<'_>) -> Option<Var> {
        let attention = site.projection.is_attention();
        let router = self.blocks.get(&(site.layer, attention))?;
        let name = site.projection.block();
        Some(pass.shared(site.layer, name, || {
            router_gates(x, router.weight.var(), router.bias.as_ref().map(Trainable::var))
        }))
    }

    fn head_name(&self, site: Site, head: usize) -> String {
        match self.spec.names {
            HeadNames::Single => format!("{site}.lora_B.weight"),
            HeadNames::Numbered => format!("{site}.lora_B{head}.weight"),
        }
    }
}

/// Width of the block's input: that of its first layer, which any query or gate layer reads; a
/// block adapted only at its output layer takes it from that layer's output.
fn hidden_size(sites: &[SiteShape], of: SiteShape) -> usize {
    match of.site.projection {
        Projection::Output | Projection::Down => sites
            .iter()
            .find(|shape| !matches!(shape.site.projection, Projection::Output | Projection::Down))
            .map_or(of.out_features, |shape| shape.in_features),
        _ => of.in_features,
    }
}

impl Adapter for LowRankAdapter {
    fn linear(&self, site: Site, x: &Var, frozen: &FrozenLinear, pass: &Pass<'_>) -> Var {
        let block_gates = self.block_gates(site, x, pass);
        let base = frozen.forward(x);
        let Some(tensors) = self.sites.get(&site) else { return base };
        let own = tensors
            .router
            .as_ref()
            .map(|router| (router.weight.var(), router.bias.as_ref().map(Trainable::var)));
        let counted = self.balance.is_some() && pass.dropout_seed().is_some();
        let own_gates = own.filter(|_| counted).map(|(weight, bias)| router_gates(x, weight, bias));
        if let Some(gates) = own_gates.as_ref().or(block_gates.as_ref()).filter(|_| counted) {
            pass.set_aside(site, gates.clone());
        }
        let gate = match (&own_gates, own, &block_gates, self.spec.mixing) {
            (Some(gates), ..) => Gate::Given(gates),
            (None, Some((weight, bias)), _, Mixing::Routed(kind)) => match kind.route_on {
                RouteOn::X => Gate::Input { weight, bias },
                RouteOn::A => Gate::LowRank { weight, bias },
            },
            (None, _, Some(gates), _) => Gate::Given(gates),
            (None, _, None, Mixing::Mean) => Gate::Uniform,
            (None, ..) => Gate::One,
        };
        let update = LowRank {
            a: tensors.a.var(),
            b: tensors.b.var(),
            num_experts: self.spec.num_experts,
            gate,
            scale: self.spec.scale,
            mask: self.mask(site, pass),
        };
        let output = gated_low_rank(x, base, &update);
        if let Some(gates) = &output.gates {
            pass.report_gates(site, gates);
        }
        output.y
    }
}

impl Tuned for LowRankAdapter {
    fn options(&self) -> &dyn MethodOptions {
        self.options.as_ref()
    }

    fn sites(&self) -> Vec<Site> {
        self.sites.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        let mut all = Vec::new();
        for site in self.sites.values() {
            all.extend([&site.a, &site.b]);
            if let Some(router) = &site.router {
                all.push(&router.weight);
                all.extend(&router.bias);
            }
        }
        for router in self.blocks.values() {
            all.push(&router.weight);
            all.extend(&router.bias);
        }
        all
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        let mut all = Vec::new();
        for site in self.sites.values_mut() {
            all.extend([&mut site.a, &mut site.b]);
            if let Some(router) = &mut site.router {
                all.push(&mut router.weight);
                all.extend(&mut router.bias);
            }
        }
        for router in self.blocks.values_mut() {
            all.push(&mut router.weight);
            all.extend(&mut router.bias);
        }
        all
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        let mut map = TensorMap::new();
        for trainable in self.trainables() {
            if trainable.role == Role::Router {
                map.insert(trainable.parameter.name().to_owned(), pick(trainable));
            }
        }
        let rank = self.spec.rank;
        for (&site, tensors) in &self.sites {
            let a = pick(&tensors.a);
            for expert in 0..self.spec.num_a() {
                map.insert(a_name(self.spec, site, expert), rows(&a, expert * rank, rank));
            }
            let b = pick(&tensors.b);
            for head in 0..self.spec.num_experts {
                map.insert(self.head_name(site, head), head_columns(&b, head, self.spec.rank));
            }
        }
        map
    }

    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        for trainable in self.trainables_mut() {
            if trainable.role != Role::Router {
                continue;
            }
            let parameter = &mut trainable.parameter;
            let name = parameter.name().to_owned();
            if let Some(tensor) =
                take_tensor(tensors, &name, parameter.value().shape(), &mut faults)
            {
                parameter.set(tensor.to_dtype(parameter.value().dtype()));
            }
        }
        let (rank, experts) = (self.spec.rank, self.spec.num_experts);
        let sites: Vec<SiteShape> = self.sites.values().map(|site| site.shape).collect();
        let spec = self.spec;
        for shape in sites {
            for expert in 0..spec.num_a() {
                let name = a_name(spec, shape.site, expert);
                let found = take_tensor(tensors, &name, &[rank, shape.in_features], &mut faults);
                if let (Some(found), Some(site)) = (found, self.sites.get_mut(&shape.site)) {
                    set_rows(site.a.parameter.value_mut(), expert * rank, &found);
                }
            }
            for head in 0..experts {
                let name = self.head_name(shape.site, head);
                let wanted = [shape.out_features, rank];
                let found = take_tensor(tensors, &name, &wanted, &mut faults);
                if let (Some(found), Some(site)) = (found, self.sites.get_mut(&shape.site)) {
                    set_head_columns(site.b.parameter.value_mut(), head, rank, &found);
                }
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn merge(&self, site: Site, gates: &Gates) -> Merge<'_> {
        self.fold(site, gates)
    }

    fn as_adapter(&self) -> &dyn Adapter {
        self
    }

    fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        let Some(balance) = &self.balance else { return Ok(()) };
        let number = |name: &String| {
            plan.domains.iter().position(|domain| domain == name).map(|at| at as u32).ok_or_else(
                || {
                    let message = format!(
                        "`{name}` is no domain of the data; there are {}",
                        plan.domains.join(", ")
                    );
                    Fault::new("method.knowledge_domains", message)
                },
            )
        };
        let (mut found, mut faults) = (Vec::new(), Vec::new());
        for name in &balance.first_half {
            match number(name) {
                Ok(domain) => found.push(domain),
                Err(fault) => faults.push(fault),
            }
        }
        if !faults.is_empty() {
            return Err(Error::Options { faults });
        }
        self.first_half = found;
        Ok(())
    }

    fn aux_loss(&self, pass: &Pass<'_>) -> Option<Var> {
        let balance = self.balance.as_ref()?;
        let sequences = pass.sequences();
        let terms = pass.take_set_aside().into_values().map(|gates| match sequences {
            Some(found) => {
                squared_variation(&gates, found.offsets, &self.shares(balance, found.domains))
            }
            None => {
                let even = vec![1.0; self.spec.num_experts];
                squared_variation(&gates, &[0, gates.value().rows()], &even)
            }
        });
        let total = terms.reduce(|sum, term| add(&sum, term))?;
        Some(scale(&total, balance.weight))
    }
}

impl LowRankSpec {
    /// How many `A` a site has.
    fn num_a(&self) -> usize {
        if self.own_a { self.num_experts } else { 1 }
    }
}

fn a_name(spec: LowRankSpec, site: Site, expert: usize) -> String {
    if spec.own_a {
        format!("{site}.lora_A{expert}.weight")
    } else {
        format!("{site}.lora_A.weight")
    }
}

/// Rows `first .. first + count` of `m`.
fn rows(m: &Tensor, first: usize, count: usize) -> Tensor {
    let width = m.cols();
    dispatch!(m.dtype(), E => {
        Tensor::new(m.data::<E>()[first * width..(first + count) * width].to_vec(), [count, width])
    })
}

fn set_rows(m: &mut Tensor, first: usize, from: &Tensor) {
    let from = from.to_dtype(m.dtype());
    let start = first * m.cols();
    dispatch!(m.dtype(), E => {
        m.data_mut::<E>()[start..start + from.len()].copy_from_slice(from.data::<E>());
    });
}

/// Columns `head · rank ..` of `b: [out, N·r]` as `[out, r]`.
fn head_columns(b: &Tensor, head: usize, rank: usize) -> Tensor {
    let width = b.cols();
    dispatch!(b.dtype(), E => {
        let columns: Vec<E> = b
            .data::<E>()
            .chunks_exact(width)
            .flat_map(|row| row[head * rank..(head + 1) * rank].iter().copied())
            .collect();
        Tensor::new(columns, [b.rows(), rank])
    })
}

fn set_head_columns(b: &mut Tensor, head: usize, rank: usize, columns: &Tensor) {
    let columns = columns.to_dtype(b.dtype());
    let width = b.cols();
    dispatch!(b.dtype(), E => {
        let rows = b.data_mut::<E>().chunks_exact_mut(width);
        for (row, from) in rows.zip(columns.data::<E>().chunks_exact(rank)) {
            row[head * rank..(head + 1) * rank].copy_from_slice(from);
        }
    });
}

//! The adapter that LoRA and its multi-head relatives share: per site one `A` (or one per expert),
//! the heads `B_1 … B_N` side by side, and possibly a router, around
//! [`gated_low_rank`](hydralora_kernels::ops::gated_low_rank).

use crate::method::{MethodOptions, Role, TensorMap, Trainable, Tuned, kaiming_bound, uniform};
use hydralora_kernels::ops::dropout::{Dropout, mix};
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
    pub(crate) scale: f64,
    pub(crate) dropout: f64,
    pub(crate) dropout_mask: DropoutMask,
    pub(crate) router: Option<Router>,
    pub(crate) names: HeadNames,
}

struct RouterTensors {
    weight: Trainable,
    bias: Option<Trainable>,
}

struct SiteTensors {
    shape: SiteShape,
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
            let a = format!("{site}.lora_A.weight");
            let start =
                uniform(seed, &a, kaiming_bound(in_features), dtype, [spec.rank, in_features]);
            let b = Tensor::zeros(dtype, [out_features, spec.num_experts * spec.rank]);
            let own_router = spec.router.filter(|router| router.scope == RouterScope::Linear);
            let own_router = own_router.map(|kind| {
                let inputs = match kind.route_on {
                    RouteOn::X => in_features,
                    RouteOn::A => spec.rank,
                };
                router(&site.to_string(), inputs, kind.bias)
            });
            let block_router = spec.router.filter(|router| router.scope == RouterScope::Block);
            if let Some(kind) = block_router {
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
        Self { options, spec, sites: tensors, blocks }
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
        let gate = match (&tensors.router, &block_gates, self.spec.router) {
            (Some(router), _, Some(kind)) => {
                let (weight, bias) =
                    (router.weight.var(), router.bias.as_ref().map(Trainable::var));
                match kind.route_on {
                    RouteOn::X => Gate::Input { weight, bias },
                    RouteOn::A => Gate::LowRank { weight, bias },
                }
            }
            (_, Some(gates), _) => Gate::Given(gates),
            _ => Gate::One,
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
            if trainable.role != Role::B {
                map.insert(trainable.parameter.name().to_owned(), pick(trainable));
            }
        }
        for (&site, tensors) in &self.sites {
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
            if trainable.role == Role::B {
                continue;
            }
            let parameter = &mut trainable.parameter;
            let name = parameter.name().to_owned();
            if let Some(tensor) = take(tensors, &name, parameter.value().shape(), &mut faults) {
                parameter.set(tensor.to_dtype(parameter.value().dtype()));
            }
        }
        let (rank, experts) = (self.spec.rank, self.spec.num_experts);
        let sites: Vec<SiteShape> = self.sites.values().map(|site| site.shape).collect();
        for shape in sites {
            for head in 0..experts {
                let name = self.head_name(shape.site, head);
                let wanted = [shape.out_features, rank];
                let found = take(tensors, &name, &wanted, &mut faults);
                if let (Some(found), Some(site)) = (found, self.sites.get_mut(&shape.site)) {
                    set_head_columns(site.b.parameter.value_mut(), head, rank, &found);
                }
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn as_adapter(&self) -> &dyn Adapter {
        self
    }
}

fn take(
    tensors: &mut TensorMap,
    name: &str,
    shape: &[usize],
    faults: &mut Vec<String>,
) -> Option<Tensor> {
    match tensors.remove(name) {
        Some(tensor) if tensor.shape() == shape => Some(tensor),
        Some(tensor) => {
            faults.push(format!("`{name}` has shape {:?}, expected {shape:?}", tensor.shape()));
            None
        }
        None => {
            faults.push(format!("`{name}` {shape:?} is missing"));
            None
        }
    }
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

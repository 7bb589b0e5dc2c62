//! The adapter that LoRA and its multi-head relatives share: per site one `A` (or one per expert),
//! the heads `B_1 … B_N` side by side, and possibly a router, around
//! [`adapted_linear`](hydralora_kernels::ops::adapted_linear).

mod fold;
pub(crate) mod layout;
mod spec;

pub(crate) use spec::{
    Balance, DropoutMask, HeadNames, LowRankSpec, Mixing, Penalty, RouteOn, Router, RouterScope,
    Start,
};

use crate::decomposition::{RowNorms, principal};
use crate::error::{Error, Fault, Result};
use crate::io::module_names;
use crate::merge::{Gates, Merge};
use crate::method::{
    Base, MethodOptions, Role, TensorMap, Trainable, TrainingPlan, Tuned, kaiming_bound,
    layer_dropout, normal, take_tensor, uniform,
};
use crate::options::whole_if_possible;
use hydralora_kernels::ops::adapted_linear::{adapted_linear, adapted_linears};
use hydralora_kernels::ops::balance::squared_variation;
use hydralora_kernels::ops::elementwise::{add, scale};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::gated_low_rank::{
    Gate, LowRank, Mask, Output, gated_low_rank, router_gates,
};
use hydralora_kernels::ops::rows::{join_columns, prepend_rows};
use hydralora_kernels::ops::top_k::{keep_largest, load_balance};
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_model::adapter::{Adapter, Kind, Pass, Site, SiteShape};
use hydralora_model::family::kit::{GATE_PROJ, Q_PROJ};
use layout::{a_name, head_columns, head_name, rows, set_head_columns, set_rows, start_names};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// R-LoRA's γ: smaller numbers start larger.
const RLORA_GAMMA: f64 = 64.0;

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
    /// DoRA's magnitude `[out]`, and the norms it is measured against.
    magnitude: Option<(Trainable, RowNorms)>,
    /// What was taken out of the weight, `A₀: [r, in]` and `−B₀: [out, r]`.
    taken_out: Option<[Var; 2]>,
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
    /// Whether the start values from the base model are still to come.
    waiting: bool,
    /// A start value that the tensors last loaded did not hold.
    start_not_found: Option<String>,
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
            let randomized = spec.start == Start::Rlora;
            // Normal numbers of variance 1/width, times r^¼ / √γ.
            let shrunk = (spec.rank as f64).powf(0.25) / RLORA_GAMMA.sqrt();
            let draw = |name: &str| {
                let shape = [spec.rank, in_features];
                let bound = kaiming_bound(in_features);
                if randomized {
                    normal(seed, name, bound * shrunk, dtype, shape)
                } else {
                    uniform(seed, name, bound, dtype, shape)
                }
            };
            let names: Vec<String> =
                (0..spec.num_a()).map(|expert| a_name(spec, site, expert)).collect();
            let a = format!("{site}.lora_A.weight");
            let mut start = Tensor::zeros(dtype, [spec.num_a() * spec.rank, in_features]);
            for (expert, name) in names.iter().enumerate() {
                set_rows(&mut start, expert * spec.rank, &draw(name));
            }
            let mut b = Tensor::zeros(dtype, [out_features, spec.num_experts * spec.rank]);
            if randomized {
                for head in 0..spec.num_experts {
                    let name = head_name(spec, site, head);
                    let deviation = shrunk / (out_features as f64).sqrt();
                    let drawn = normal(seed, &name, deviation, dtype, [out_features, spec.rank]);
                    set_head_columns(&mut b, head, spec.rank, &drawn);
                }
            }
            let own_router = spec.mixing.router(RouterScope::Linear).map(|kind| {
                let inputs = match kind.route_on {
                    RouteOn::X => in_features,
                    RouteOn::A => spec.num_a() * spec.rank,
                };
                router(&site.to_string(), inputs, kind.bias)
            });
            if let Some(kind) = spec.mixing.router(RouterScope::Block) {
                let attention = site.is_attention();
                blocks.entry((site.layer, attention)).or_insert_with(|| {
                    let name = site.block();
                    let hidden = hidden_size(sites, shape);
                    router(&name, hidden, kind.bias)
                });
            }
            let taken_out = randomized.then(|| {
                let share = 1.0 / spec.num_experts as f64;
                let mut mean = Tensor::zeros(dtype, [out_features, spec.rank]);
                for head in 0..spec.num_experts {
                    mean.add_assign(&head_columns(&b, head, spec.rank));
                }
                mean.scale(-share);
                [Var::constant(start.clone()), Var::constant(mean)]
            });
            tensors.insert(
                site,
                SiteTensors {
                    shape,
                    a: Trainable::new(a, Role::A, start),
                    b: Trainable::new(format!("{site}.lora_B.weight"), Role::B, b),
                    router: own_router,
                    magnitude: spec.decomposed.then(|| {
                        let name = format!("{site}.lora_magnitude_vector");
                        let zeros = Tensor::zeros(dtype, [out_features]);
                        (Trainable::new(name, Role::Scale, zeros), RowNorms::default())
                    }),
                    taken_out,
                },
            );
        }
        Self {
            options,
            spec,
            sites: tensors,
            blocks,
            balance: None,
            first_half: Vec::new(),
            waiting: spec.decomposed || spec.start == Start::Pissa,
            start_not_found: None,
        }
    }

    /// The same with a penalty on uneven loads, unless its weight is zero.
    pub(crate) fn balanced(mut self, balance: Balance) -> Self {
        self.balance = Some(balance).filter(|balance| balance.weight > 0.0);
        self
    }

    /// The balance's constants for every sequence and expert.
    fn shares(&self, delta: f64, domains: &[u32]) -> Vec<f64> {
        let experts = self.spec.num_experts;
        let share = |domain: &u32, expert: usize| {
            let meant = self.first_half.contains(domain) == (expert < experts / 2);
            match (self.first_half.is_empty(), meant) {
                (true, _) => 1.0,
                (false, true) => 1.0 + delta,
                (false, false) => 1.0 - delta,
            }
        };
        domains.iter().flat_map(|d| (0..experts).map(move |e| share(d, e))).collect()
    }

    /// Takes the start values out of `tensors`; gives the first one that is not there.
    fn load_starts(&mut self, tensors: &mut TensorMap, faults: &mut Vec<String>) -> Option<String> {
        let rank = self.spec.rank;
        let mut not_found = None;
        for (&site, own) in &mut self.sites {
            let names = start_names(site);
            if let Some(name) = names.iter().find(|name| !tensors.contains_key(*name)) {
                not_found.get_or_insert_with(|| format!("`{name}` is missing"));
                continue;
            }
            let shapes = [[rank, own.shape.in_features], [own.shape.out_features, rank]];
            let a = take_tensor(tensors, &names[0], &shapes[0], faults);
            let b = take_tensor(tensors, &names[1], &shapes[1], faults);
            if let (Some(a), Some(b)) = (a, b) {
                own.take_out(&a, &b);
            }
        }
        not_found
    }

    fn mask(&self, site: Site, pass: &Pass<'_>) -> Mask {
        let dropout = layer_dropout(site, self.spec.dropout, pass);
        dropout.map_or(
            Mask::None,
            match self.spec.dropout_mask {
                DropoutMask::Shared => Mask::Shared,
                DropoutMask::PerExpert => Mask::PerExpert,
            },
        )
    }

    /// The gates of the block that `site` belongs to; computed where the block's input passes by.
    fn block_gates(&self, site: Site, x: &Var, pass: &Pass<'_>) -> Option<Var> {
        let attention = site.is_attention();
        let router = self.blocks.get(&(site.layer, attention))?;
        let name = site.linear.block();
        Some(pass.shared(site.layer, name, || {
            router_gates(x, router.weight.var(), router.bias.as_ref().map(Trainable::var))
        }))
    }

    /// Gates of the layer at `site` that are known before its update is computed.
    fn gates_beforehand(&self, site: Site, x: &Var, pass: &Pass<'_>) -> Option<Var> {
        // A block's gates may be for a later layer of it.
        let block_gates = self.block_gates(site, x, pass);
        let own = self.sites.get(&site)?.router.as_ref();
        let counted = self.balance.is_some() && pass.dropout_seed().is_some();
        let top_k = self.spec.mixing.top_k().filter(|&k| k < self.spec.num_experts);
        let own_gates = own.filter(|_| counted || top_k.is_some()).map(|router| {
            router_gates(x, router.weight.var(), router.bias.as_ref().map(Trainable::var))
        });
        let gates = own_gates.or(block_gates)?;
        if counted {
            pass.set_aside(site, gates.clone());
        }
        Some(top_k.map_or_else(|| gates.clone(), |k| keep_largest(&gates, k)))
    }

    /// The update of the layer at `site`, under `gates` if they are known.
    fn update<'a>(
        &self,
        site: Site,
        tensors: &'a SiteTensors,
        gates: Option<&'a Var>,
        pass: &Pass<'_>,
    ) -> LowRank<'a> {
        let gate = match (gates, &tensors.router, self.spec.mixing) {
            (Some(gates), ..) => Gate::Given(gates),
            (None, Some(router), Mixing::Routed(kind)) => {
                let (weight, bias) =
                    (router.weight.var(), router.bias.as_ref().map(Trainable::var));
                match kind.route_on {
                    RouteOn::X => Gate::Input { weight, bias },
                    RouteOn::A => Gate::LowRank { weight, bias },
                }
            }
            (None, _, Mixing::Mean) => Gate::Uniform,
            (None, ..) => Gate::One,
        };
        LowRank {
            a: tensors.a.var(),
            b: tensors.b.var(),
            num_experts: self.spec.num_experts,
            gate,
            scale: self.spec.scale,
            mask: self.mask(site, pass),
        }
    }

    /// Layers with an update or none.
    fn updated(&self, layers: &[(Site, &FrozenLinear)], x: &Var, pass: &Pass<'_>) -> Vec<Var> {
        let gates: Vec<_> =
            layers.iter().map(|(site, _)| self.gates_beforehand(*site, x, pass)).collect();
        let updated: Vec<_> = (layers.iter().zip(&gates))
            .map(|((site, frozen), gates)| {
                let tensors = self.sites.get(site);
                (*frozen, tensors.map(|own| self.update(*site, own, gates.as_ref(), pass)))
            })
            .collect();
        let outputs = adapted_linears(x, &updated).into_iter().zip(layers);
        outputs.map(|(output, (site, _))| reported(output, *site, pass)).collect()
    }

    /// A layer whose update is not all that it has; nothing for others.
    fn more(&self, site: Site, x: &Var, frozen: &FrozenLinear, pass: &Pass<'_>) -> Option<Var> {
        let tensors = self.sites.get(&site).filter(|tensors| tensors.is_more())?;
        let gates = self.gates_beforehand(site, x, pass);
        let update = self.update(site, tensors, gates.as_ref(), pass);
        if let Some((magnitude, norms)) = &tensors.magnitude {
            let training = pass.dropout_seed().is_some();
            return Some(norms.decomposed(x, frozen, magnitude.var(), &update, training));
        }
        let [a, b] = tensors.taken_out.as_ref()?;
        if self.spec.start == Start::Pissa && update.mask == Mask::None {
            return Some(less_taken_out(x, frozen, &update, a, b));
        }
        let start = LowRank { a, b, num_experts: 1, gate: Gate::One, mask: Mask::None, ..update };
        let output = gated_low_rank(x, adapted_linear(x, frozen, &start).y, &update);
        Some(reported(output, site, pass))
    }

    fn head_name(&self, site: Site, head: usize) -> String {
        head_name(self.spec, site, head)
    }
}

/// Width of the block's input: that of its first layer, which any query or gate layer reads; a
/// block adapted only at its output layer takes it from that layer's output.
fn hidden_size(sites: &[SiteShape], of: SiteShape) -> usize {
    let ends_block = |shape: &SiteShape| shape.site.kind().overlaps(Kind::OUTPUT.and(Kind::DOWN));
    if !ends_block(&of) {
        return of.in_features;
    }
    let entry = sites.iter().find(|shape| !ends_block(shape));
    entry.map_or(of.out_features, |shape| shape.in_features)
}

impl Adapter for LowRankAdapter {
    // The balance penalty looks at whole sequences.
    fn rows_stand_alone(&self) -> bool {
        self.balance.is_none()
    }

    fn linear(&self, site: Site, x: &Var, frozen: &FrozenLinear, pass: &Pass<'_>) -> Var {
        self.more(site, x, frozen, pass)
            .unwrap_or_else(|| self.updated(&[(site, frozen)], x, pass).remove(0))
    }

    fn linears(&self, layers: &[(Site, &FrozenLinear)], x: &Var, pass: &Pass<'_>) -> Vec<Var> {
        let is_more = |site| self.sites.get(site).is_some_and(SiteTensors::is_more);
        if layers.iter().any(|(site, _)| is_more(site)) {
            return layers
                .iter()
                .map(|(site, frozen)| self.linear(*site, x, frozen, pass))
                .collect();
        }
        self.updated(layers, x, pass)
    }
}

/// The output, its gates shown to whoever observes the pass.
fn reported(output: Output, site: Site, pass: &Pass<'_>) -> Var {
    if let Some(gates) = &output.gates {
        pass.report_gates(site, gates);
    }
    output.y
}

/// `W0 x + s (B A − B₀ A₀) x` as the very computation of the LoRA of rank `2r` that a file holds.
fn less_taken_out(x: &Var, frozen: &FrozenLinear, update: &LowRank<'_>, a: &Var, b: &Var) -> Var {
    let a = prepend_rows(update.a, a, &[0, a.value().rows()], &[true]);
    let b = join_columns(update.b, b);
    adapted_linear(x, frozen, &LowRank { a: &a, b: &b, ..*update }).y
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
            all.extend(site.magnitude.as_ref().map(|(magnitude, _)| magnitude));
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
            all.extend(site.magnitude.as_mut().map(|(magnitude, _)| magnitude));
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
            if is_whole(trainable) {
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
            if !is_whole(trainable) {
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
        if spec.start == Start::Rlora {
            // A file holds them; what a checkpoint holds beside it has them in the state.
            self.start_not_found = self.load_starts(tensors, &mut faults);
        }
        self.waiting = false;
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn not_loaded(&self) -> Option<&str> {
        self.start_not_found.as_deref()
    }

    fn file_tensors(&self) -> TensorMap {
        let mut map = self.tensors();
        for (site, tensors) in &self.sites {
            let Some([a, b]) = &tensors.taken_out else { continue };
            if self.spec.start == Start::Rlora {
                continue;
            }
            let (own_a, own_b) = (tensors.a.var().detach(), tensors.b.var().detach());
            let a = prepend_rows(&own_a, a, &[0, a.value().rows()], &[true]);
            map.insert(a_name(self.spec, *site, 0), a.into_value());
            map.insert(self.head_name(*site, 0), join_columns(&own_b, b).into_value());
        }
        if self.spec.start == Start::Rlora {
            map.extend(self.state());
        }
        map
    }

    fn peft_config(&self, all: &[SiteShape]) -> Map<String, Value> {
        let mut config = self.options().to_peft();
        config.insert("target_modules".to_owned(), json!(module_names(&self.sites(), all)));
        let converted = self.sites.values().any(|site| site.taken_out.is_some());
        if converted && self.spec.start == Start::Pissa {
            // Twice the rank at the same scale.
            let rank = 2 * self.spec.rank;
            let stabilised = config.get("use_rslora") == Some(&json!(true));
            let per_rank = if stabilised { (rank as f64).sqrt() } else { rank as f64 };
            config.insert("r".to_owned(), json!(rank));
            config.insert("lora_alpha".to_owned(), whole_if_possible(self.spec.scale * per_rank));
        }
        config
    }

    fn start_from(&mut self, base: &Base<'_>) -> Result<()> {
        for (&site, tensors) in &mut self.sites {
            let frozen = base.decoder.frozen(site);
            let dtype = tensors.a.parameter.value().dtype();
            if let Some((magnitude, norms)) = &mut tensors.magnitude {
                let (a, b) = (tensors.a.parameter.value(), tensors.b.parameter.value());
                magnitude.parameter.set(norms.of(frozen, a, b, self.spec.scale, false));
            }
            if self.spec.start == Start::Pissa {
                let weight = frozen.dense_weight();
                let [a, b] =
                    principal(&weight, self.spec.rank, self.spec.scale).ok_or_else(|| {
                        let message =
                            format!("pissa: the singular values of {site}.weight were not found");
                        let faults = vec![Fault::new("method.init_lora_weights", message)];
                        Error::Options { faults }
                    })?;
                tensors.take_out(&a, &b);
                tensors.a.parameter.set(a.to_dtype(dtype));
                tensors.b.parameter.set(b.to_dtype(dtype));
            }
        }
        self.waiting = false;
        Ok(())
    }

    fn state(&self) -> TensorMap {
        let mut state = TensorMap::new();
        for (&site, tensors) in &self.sites {
            if let Some([a, b]) = &tensors.taken_out {
                let mut b = b.value().clone();
                b.scale(-1.0);
                state.extend(start_names(site).into_iter().zip([a.value().clone(), b]));
            }
        }
        state
    }

    fn load_state(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        if self.spec.start == Start::Kaiming {
            return Ok(());
        }
        let mut faults = Vec::new();
        let not_found = self.load_starts(tensors, &mut faults);
        faults.extend(not_found);
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn merge(&self, site: Site, gates: &Gates) -> Merge<'_> {
        self.fold(site, gates)
    }

    fn as_adapter(&self) -> &dyn Adapter {
        self
    }

    fn router_inputs(&self) -> Vec<Site> {
        let own = self.sites.iter().filter(|(_, tensors)| tensors.router.is_some());
        let blocks = self.blocks.keys().map(|&block| block_entry(block));
        own.map(|(&site, _)| site).chain(blocks).collect()
    }

    fn start_routers(&mut self, means: &BTreeMap<Site, Vec<f64>>) {
        let own = self.sites.iter_mut().filter_map(|(&site, s)| Some((site, s.router.as_mut()?)));
        let blocks = self.blocks.iter_mut().map(|(&block, router)| (block_entry(block), router));
        for (site, router) in own.chain(blocks) {
            if let Some(means) = means.get(&site) {
                point_at(&mut router.weight, means);
            }
        }
    }

    fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        if self.waiting {
            let message = "starts from the base model's weights, which were not given";
            return Err(Error::Options { faults: vec![Fault::new("method", message)] });
        }
        let Some(Balance { penalty: Penalty::Localized { first_half, .. }, .. }) = &self.balance
        else {
            return Ok(());
        };
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
        for name in first_half {
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
        let terms = pass.take_set_aside().into_values().map(|gates| match &balance.penalty {
            Penalty::Load { top_k } => load_balance(&gates, *top_k),
            Penalty::Localized { delta, .. } => match sequences {
                Some(found) => {
                    squared_variation(&gates, found.offsets, &self.shares(*delta, found.domains))
                }
                None => {
                    let even = vec![1.0; self.spec.num_experts];
                    squared_variation(&gates, &[0, gates.value().rows()], &even)
                }
            },
        });
        let total = terms.reduce(|sum, term| add(&sum, term))?;
        Some(scale(&total, balance.weight))
    }
}

/// The layer whose input is the input of its block.
fn block_entry((layer, attention): (usize, bool)) -> Site {
    Site { layer, linear: if attention { &Q_PROJ } else { &GATE_PROJ } }
}

/// Turns each row of a router `[N, in]` towards where a cluster's inputs lie beside the others':
/// `c_i − mean c`, as long as a Kaiming-uniform row is on average, `√(in · bound² / 3) = 1/√3`.
fn point_at(weight: &mut Trainable, means: &[f64]) {
    let shape = weight.parameter.value().shape().to_vec();
    let [experts, inputs] = shape[..] else { return };
    if means.len() != experts * inputs {
        return;
    }
    let mut centre = vec![0.0; inputs];
    for row in means.chunks_exact(inputs) {
        centre.iter_mut().zip(row).for_each(|(sum, value)| *sum += value / experts as f64);
    }
    let mut values = Vec::with_capacity(means.len());
    for row in means.chunks_exact(inputs) {
        let away: Vec<f64> = row.iter().zip(&centre).map(|(value, mean)| value - mean).collect();
        let length = away.iter().map(|value| value * value).sum::<f64>().sqrt();
        let factor = if length > 1e-12 { 1.0 / (3.0_f64.sqrt() * length) } else { 0.0 };
        values.extend(away.iter().map(|value| factor * value));
    }
    let dtype = weight.parameter.value().dtype();
    weight.parameter.set(Tensor::from_f64(dtype, &values, shape));
}

/// Whether a file holds the tensor as it is, and not head by head.
fn is_whole(trainable: &Trainable) -> bool {
    matches!(trainable.role, Role::Router | Role::Scale)
}

impl SiteTensors {
    /// Whether there is more to the layer than its update.
    fn is_more(&self) -> bool {
        self.magnitude.is_some() || self.taken_out.is_some()
    }

    /// Takes `s B A` out of the weight.
    fn take_out(&mut self, a: &Tensor, b: &Tensor) {
        let dtype = self.a.parameter.value().dtype();
        let mut b = b.to_dtype(dtype);
        b.scale(-1.0);
        self.taken_out = Some([Var::constant(a.to_dtype(dtype)), Var::constant(b)]);
    }
}

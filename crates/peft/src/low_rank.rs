//! The adapter that LoRA and its multi-head relatives share: per layer one `A` (or one per expert),
//! the heads `B_1 … B_N` side by side, and possibly a router, around
//! [`adapted_linear`](hydralora_kernels::ops::low_rank).
//!
//! This file has the tensors and the update; what only some of the family do has files of its own:
//! routers, starts other than zero, DoRA's magnitude, the penalty on uneven loads.

mod align;
mod balance;
mod dora;
mod ends;
mod files;
mod fold;
mod guide;
pub(crate) mod layout;
mod router;
mod spec;
mod start;

pub(crate) use align::{Align, Alignment};
pub(crate) use balance::{Balance, Evenness, Penalty};
pub(crate) use ends::{EMBEDDING, HEAD, TokenIndices, is_saved, vocabulary_axis};
pub(crate) use guide::{GuideSpec, GuidedBy};
pub(crate) use spec::{
    DropoutMask, HeadNames, LowRankSpec, Mixing, RouteOn, Router, RouterScope, Size, Sizes,
    TopKGradient,
};
pub(crate) use start::Start;

use crate::error::{Error, Fault, Result};
use crate::method::MethodOptions;
use crate::random::layer_dropout;
use crate::trainable::{Role, Trainable};
use crate::tuned::{Base, Routed, TrainHooks, TrainingPlan, Tuned};
use balance::{Balancer, z_loss};
use dora::Magnitude;
use ends::Ends;
use guide::Guide;
use hydralora_kernels::ops::domain_update::weighted_heads;
use hydralora_kernels::ops::elementwise::add;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::low_rank::{Mask, Output as LayerOutput, adapted_linear};
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_model::adapter::{
    self as model, Adapter, Aside, Choice, CustomLinear, HeadGates, LowRankUpdate, Output,
    OutputLayer, Pass, Site, SiteShape, TensorSite, Update,
};
use router::{Block, RouterWeights};
use start::{Draw, Pair, StartStrategy};
use std::collections::BTreeMap;

/// The tensors of a linear layer.
struct Layer {
    shape: SiteShape,
    size: Size,
    /// `[r, in]`, or `[N·r, in]` when every expert has its own; a file holds those one by one.
    a: Trainable,
    /// `[out, N·r]`; a file holds the heads one by one.
    b: Trainable,
    magnitude: Option<Magnitude>,
    router: Option<RouterWeights>,
}

impl Layer {
    /// A fresh layer; `start` draws its `A` and `B`.
    fn new(shape: SiteShape, draw: &Draw, start: &mut dyn StartStrategy) -> Self {
        let &Draw { ref spec, dtype, seed } = draw;
        let size = spec.sizes.at(shape.site);
        let SiteShape { site, in_features, out_features } = shape;
        let [a, b] = start.draw(shape);
        let router = spec.mixing.router(RouterScope::Linear).map(|kind| {
            let inputs = match kind.route_on {
                RouteOn::X | RouteOn::Sequence => in_features,
                RouteOn::A => spec.num_a() * size.rank,
            };
            let extents = [spec.num_experts, inputs];
            RouterWeights::new(&site.to_string(), extents, &kind, dtype, seed)
        });
        Self {
            shape,
            size,
            a: Trainable::new(format!("{site}.lora_A.weight"), Role::A, a),
            b: Trainable::new(format!("{site}.lora_B.weight"), Role::B, b),
            magnitude: spec.decomposed.then(|| Magnitude::new(site, out_features, dtype)),
            router,
        }
    }

    fn trainables(&self) -> impl Iterator<Item = &Trainable> {
        let magnitude = self.magnitude.iter().map(|magnitude| &magnitude.values);
        let router = self.router.iter().flat_map(RouterWeights::trainables);
        [&self.a, &self.b].into_iter().chain(magnitude).chain(router)
    }

    fn trainables_mut(&mut self) -> impl Iterator<Item = &mut Trainable> {
        let magnitude = self.magnitude.iter_mut().map(|magnitude| &mut magnitude.values);
        let router = self.router.iter_mut().flat_map(RouterWeights::trainables_mut);
        [&mut self.a, &mut self.b].into_iter().chain(magnitude).chain(router)
    }
}

/// A live LoRA-like adapter.
pub(crate) struct LowRankAdapter {
    options: Box<dyn MethodOptions>,
    spec: LowRankSpec,
    layers: BTreeMap<Site, Layer>,
    /// Routers of whole blocks.
    blocks: BTreeMap<Block, RouterWeights>,
    start: Box<dyn StartStrategy>,
    balancer: Option<Balancer>,
    guide: Option<Guide>,
    /// What the routers' scores are divided by in training, where that changes over a run.
    training_temperature: Option<f64>,
    total_steps: usize,
    ends: Ends,
}

impl LowRankAdapter {
    /// A fresh adapter on `sites`, its tensors drawn from `seed`.
    pub(crate) fn new(
        options: Box<dyn MethodOptions>,
        spec: LowRankSpec,
        sites: &[SiteShape],
        dtype: DType,
        seed: u64,
    ) -> Self {
        let draw = Draw { spec, dtype, seed };
        let mut start = draw.spec.start.strategy(draw.clone());
        let layer = |&shape: &SiteShape| (shape.site, Layer::new(shape, &draw, start.as_mut()));
        let layers = sites.iter().map(layer).collect();
        let blocks = block_routers(sites, &draw);
        let ends = Ends::new(&draw.spec, dtype, seed);
        let router = draw.spec.mixing.routed();
        Self {
            options,
            spec: draw.spec,
            layers,
            blocks,
            start,
            balancer: None,
            guide: None,
            training_temperature: router.and_then(|router| router.first_temperature),
            total_steps: 0,
            ends,
        }
    }

    /// The same with a penalty on uneven loads, unless its weight is zero.
    pub(crate) fn balanced(mut self, balance: Balance) -> Self {
        self.balancer = Balancer::new(balance, self.spec.num_experts);
        self
    }

    /// The same with routers that are told which expert a sequence is meant for, unless the guide's
    /// weight is zero.
    pub(crate) fn guided(mut self, guide: GuideSpec) -> Self {
        self.guide = Guide::new(guide, self.spec.num_experts);
        self
    }

    /// Whether gates depend on earlier tokens.
    fn reads_sequences(&self) -> bool {
        let router = self.spec.mixing.routed();
        router.is_some_and(|router| router.route_on == RouteOn::Sequence)
    }

    /// Whether a term of the loss looks at the scores of routers.
    fn looks_at_scores(&self) -> bool {
        self.spec.z_weight > 0.0
    }

    /// Whether a term of the loss looks at the gates of whole sequences.
    fn looks_at_gates(&self) -> bool {
        self.balancer.is_some() || self.guide.is_some()
    }

    /// What the routers' scores are divided by in `pass`. Outside of training it is what it will be at
    /// the end of the run, so that an adapter is judged as it will be used.
    fn temperature(&self, kind: Router, pass: &Pass<'_>) -> f64 {
        let in_training = self.training_temperature.filter(|_| pass.dropout_seed().is_some());
        in_training.unwrap_or(kind.temperature)
    }

    fn is_routed(&self) -> bool {
        !self.blocks.is_empty() || self.layers.values().any(|layer| layer.router.is_some())
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

    /// What a start took out of the layer's weight.
    fn taken_out(&self, site: Site) -> Option<&Pair> {
        self.start.taken_out()?.get(site)
    }

    /// The heads `[out, N·r]` of a layer, side by side: `N` times the one that all share, if they do.
    fn heads_of(&self, layer: &Layer) -> Var {
        let b = layer.b.var();
        if self.spec.num_b() == self.spec.num_experts {
            return b.clone();
        }
        let experts = self.spec.num_experts;
        let ones = Tensor::from_f64(b.value().dtype(), &vec![1.0; experts], [experts, 1]);
        weighted_heads(b, &Var::constant(ones))
    }

    /// Whether training looks at what `A` makes of the domains in `pass`.
    fn is_aligned(&self, pass: &Pass<'_>) -> bool {
        self.spec.align.weight > 0.0 && pass.dropout_seed().is_some()
    }

    /// What the layer at `site` adds, without what a start took out of its weight and without DoRA.
    fn low_rank(&self, layer: &Layer, pass: &Pass<'_>) -> LowRankUpdate {
        let site = layer.shape.site;
        let router = self.spec.mixing.routed();
        let trains = pass.dropout_seed().is_some();
        let choice = Choice {
            top_k: router.and_then(|kind| kind.top_k).filter(|&k| k < self.spec.num_experts),
            straight_through: router
                .is_some_and(|kind| kind.top_k_gradient == TopKGradient::StraightThrough),
            counted: self.looks_at_gates() && trains,
            scored: self.looks_at_scores() && trains,
        };
        let gates = match (&layer.router, self.spec.mixing) {
            (Some(router), Mixing::Routed(kind)) => {
                let temperature = self.temperature(kind, pass);
                HeadGates::Router(router.router(kind.route_on, choice, temperature))
            }
            (None, Mixing::Routed(_)) => HeadGates::Block(choice),
            (_, Mixing::Mean) => HeadGates::Mean,
            (_, Mixing::Sum) => HeadGates::Sum,
        };
        LowRankUpdate {
            a: layer.a.var().clone(),
            b: self.heads_of(layer),
            num_experts: self.spec.num_experts,
            gates,
            scale: layer.size.scale,
            mask: self.mask(site, pass),
        }
    }
}

/// Fresh routers of the blocks that `sites` belong to, if routers serve blocks.
fn block_routers(sites: &[SiteShape], draw: &Draw) -> BTreeMap<Block, RouterWeights> {
    let &Draw { ref spec, dtype, seed } = draw;
    let mut routers = BTreeMap::new();
    let Some(kind) = spec.mixing.router(RouterScope::Block) else { return routers };
    for &shape in sites {
        let block = Block::of(shape.site);
        routers.entry(block).or_insert_with(|| {
            let extents = [spec.num_experts, Block::width(shape, sites)];
            RouterWeights::new(&block.to_string(), extents, &kind, dtype, seed)
        });
    }
    routers
}

impl Adapter for LowRankAdapter {
    fn rows_stand_alone(&self) -> bool {
        let looks_at_all = self.looks_at_gates() || self.looks_at_scores();
        !looks_at_all && !self.reads_sequences() && self.spec.align.weight == 0.0
    }

    fn remembers(&self) -> usize {
        let routers = self.layers.values().filter(|layer| layer.router.is_some()).count();
        let scores = (routers + self.blocks.len()) * self.spec.num_experts;
        if self.reads_sequences() { scores } else { 0 }
    }

    fn update(&self, site: Site, _rows: usize, pass: &Pass<'_>) -> Update<'_> {
        match self.layers.get(&site) {
            None => self.ends.update(site).unwrap_or(Update::None),
            Some(layer)
                if layer.magnitude.is_some()
                    || self.taken_out(site).is_some()
                    || self.is_aligned(pass) =>
            {
                Update::Custom(self)
            }
            Some(layer) => Update::LowRank(self.low_rank(layer, pass)),
        }
    }

    fn embed(&self, tokens: &[u32], frozen: &FrozenLinear) -> Var {
        self.ends.embed(tokens, frozen)
    }

    fn tensor<'a>(&'a self, site: TensorSite, frozen: &'a Var) -> &'a Var {
        self.ends.tensor(site, frozen)
    }

    fn output(&self, hidden: &Var, layer: OutputLayer<'_>, pass: &Pass<'_>) -> Output<'_> {
        self.ends.output(hidden, layer, pass)
    }

    fn shares_in_block(&self, site: Site, _pass: &Pass<'_>) -> bool {
        !self.blocks.is_empty() && self.blocks.contains_key(&Block::of(site))
    }

    fn block_router(&self, site: Site, pass: &Pass<'_>) -> Option<model::Router> {
        let kind = self.spec.mixing.routed()?;
        let router = self.blocks.get(&Block::of(site))?;
        let scored = self.looks_at_scores() && pass.dropout_seed().is_some();
        let choice = Choice { scored, ..Choice::default() };
        Some(router.router(kind.route_on, choice, self.temperature(kind, pass)))
    }
}

/// DoRA, starts that took something out of the weight, and layers whose `A x` a penalty looks at.
impl CustomLinear for LowRankAdapter {
    fn forward(
        &self,
        site: Site,
        x: &Var,
        frozen: &FrozenLinear,
        block_gates: Option<&Var>,
        pass: &Pass<'_>,
    ) -> Var {
        let Some(layer) = self.layers.get(&site) else { return frozen.forward(x) };
        let update = self.low_rank(layer, pass);
        let gates = update.gates_beforehand(site, x, block_gates, pass);
        let update = update.under(gates.as_ref());
        if let Some(magnitude) = &layer.magnitude {
            return magnitude.layer(x, frozen, &update, pass.dropout_seed().is_some());
        }
        if self.is_aligned(pass) {
            align::keep(site, x, layer.a.var(), pass);
        }
        let LayerOutput { y, gates } = match self.taken_out(site) {
            Some(less) => self.start.layer(x, frozen, &update, less),
            None => adapted_linear(x, frozen, &update),
        };
        if let Some(gates) = &gates {
            pass.report_gates(site, gates);
        }
        y
    }
}

impl TrainHooks for LowRankAdapter {
    fn start_from(&mut self, base: &Base<'_>) -> Result<()> {
        for (&site, layer) in &mut self.layers {
            let frozen = base.decoder.frozen(site);
            if let Some([a, b]) = self.start.start_from(site, frozen)? {
                layer.a.parameter.set(a);
                layer.b.parameter.set(b);
            }
            if let Some(magnitude) = &mut layer.magnitude {
                let (a, b) = (layer.a.parameter.value(), layer.b.parameter.value());
                magnitude.measure(frozen, a, b, layer.size.scale);
            }
        }
        self.ends.start_from(base)
    }

    fn starts_from_weights(&self) -> bool {
        self.start.waits()
    }

    fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        let mut magnitudes = self.layers.values().filter_map(|layer| layer.magnitude.as_ref());
        if self.start.waits() || self.ends.waits() || magnitudes.any(Magnitude::waits) {
            let message = "starts from the base model's weights, which were not given";
            return Err(Error::Options { faults: vec![Fault::new("method", message)] });
        }
        self.total_steps = plan.total_steps;
        // Where a pass does not name its domains there are none to check.
        if !plan.domains.is_empty() {
            self.options.check_domains(plan.domains)?;
        }
        if let Some(guide) = &mut self.guide {
            guide.begin(plan)?;
        }
        self.balancer.as_mut().map_or(Ok(()), |balancer| balancer.begin(plan.domains))
    }

    fn before_step(&mut self, taken: usize) {
        let router = self.spec.mixing.routed().filter(|router| router.first_temperature.is_some());
        self.training_temperature =
            router.map(|router| router.temperature_at(taken, self.total_steps));
        if let Some(guide) = &mut self.guide {
            guide.before_step(taken);
        }
    }

    fn needs_whole_batches(&self) -> Vec<&'static str> {
        let spec = &self.spec;
        let all = [
            (spec.dropout > 0.0, "method.dropout"),
            (spec.align.weight > 0.0, "method.align_weight"),
            (self.balancer.is_some(), "method.balance_weight"),
            (self.guide.is_some(), "method.router_guide"),
            (self.looks_at_scores(), "method.router_z_weight"),
        ];
        all.into_iter().filter(|(on, _)| *on).map(|(_, option)| option).collect()
    }

    fn aux_loss(&self, pass: &Pass<'_>) -> Option<Var> {
        let spec = &self.spec;
        let align = (spec.align.weight > 0.0).then(|| align::term(spec.align, pass)).flatten();
        let gates = pass.take_aside(Aside::Gates);
        let balance = self.balancer.as_ref().and_then(|balancer| balancer.term(pass, &gates));
        let guide = self.guide.as_ref().and_then(|guide| guide.term(pass, &gates));
        let scores = pass.take_aside(Aside::Scores);
        let z_loss = self.looks_at_scores().then(|| z_loss(spec.z_weight, &scores)).flatten();
        let terms = [align, balance, guide, z_loss].into_iter().flatten();
        terms.reduce(|sum, term| add(&sum, term))
    }
}

impl Tuned for LowRankAdapter {
    fn as_routed(&self) -> Option<&dyn Routed> {
        if self.is_routed() { Some(self) } else { None }
    }

    fn as_routed_mut(&mut self) -> Option<&mut dyn Routed> {
        if self.is_routed() { Some(self) } else { None }
    }
}

impl Routed for LowRankAdapter {
    fn router_inputs(&self) -> Vec<Site> {
        let own = self.layers.iter().filter(|(_, layer)| layer.router.is_some());
        let of_blocks = self.blocks.keys().flat_map(|block| block.entries());
        own.map(|(&site, _)| site).chain(of_blocks).collect()
    }

    fn start_routers(&mut self, means: &BTreeMap<Site, Vec<f64>>) {
        let own = self
            .layers
            .iter_mut()
            .filter_map(|(&site, layer)| Some((vec![site], layer.router.as_mut()?)));
        let blocks = self.blocks.iter_mut().map(|(block, router)| (block.entries(), router));
        for (sites, router) in own.chain(blocks) {
            if let Some(means) = sites.iter().find_map(|site| means.get(site)) {
                router.point_at(means);
            }
        }
    }
}

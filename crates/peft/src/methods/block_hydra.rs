//! Block-Hydra (mtLoRA): one routed adapter beside a whole attention or feed-forward block.
//!
//! ```text
//! x' = x + F(u) + Δ(u)       u = norm(x), F the block
//! Δ(u)_k = (alpha / r) Σ_i w_ki ⊙ (B_i A u)_k      w_k = softmax(W_k u), k: one of `groups` of dimensions
//! L += balance_weight · mean over blocks of var(w̄) / mean(w̄)²
//! L += spectral_weight · mean over heads of Σ_kl [ω_k ω_l (BᵀB − s² I)_kl]²     ω = exp(−σ/σ̄), s² = ‖B‖²/r
//! ```
//!
//! arXiv 2603.01526. `w̄` are the mean gates over tokens and groups; the singular values `σ` (the largest
//! first, one for each column, as in the published code) and `s` are constants to the gradient. `A` and the
//! routers start Kaiming-uniform, heads at zero.
//!
//! `Δ` is computed where the block's first layer reads `u`, and added to what its last layer gives, under
//! whose name a file holds the tensors. A family that norms a block's output norms `Δ` with it.

use crate::described::{Described, read_lora_like};
use crate::error::{Error, Fault, Result};
use crate::low_rank::layout::{head_columns, set_head_columns};
use crate::low_rank_options::check_weight;
use crate::merge::{Gates, Merge};
use crate::method::{MethodOptions, product};
use crate::options::{LoraConfigKeys, check_common, check_experts, scale, to_map};
use crate::random::{kaiming_bound, layer_dropout, uniform};
use crate::targets::Targets;
use crate::trainable::{Role, TensorMap, Trainable, load_by_name, take_tensor};
use crate::tuned::{Mergeable, Parameters, Persist, TrainHooks, Tuned};
use faer::Mat;
use hydralora_kernels::ops::balance::squared_variation;
use hydralora_kernels::ops::elementwise::{add, scale as times};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::low_rank::{Gate, LowRank, Mask, gated_low_rank, router_gates};
use hydralora_kernels::ops::orthogonality::{Wanted, weighted_orthogonality};
use hydralora_kernels::ops::rows::{join_columns, join_rows, take_rows};
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_model::adapter::{Adapter, Aside, CustomLinear, Kind, Pass, Site, SiteShape, Update};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Options that a file names as a recipe does.
const OWN_KEYS: [&str; 3] = ["groups", "balance_weight", "spectral_weight"];

/// Options in a recipe; the defaults are those of the published scripts, but for the penalties, which are
/// off.
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
    /// The blocks to change, by layers in them: `ffn`, `attention` or `all`.
    targets: Targets,
    /// Number `N` of heads.
    num_experts: usize,
    /// Groups of the block's dimensions, each with gates of its own.
    groups: usize,
    /// Factor on a penalty on uneven loads of the heads; none if 0.
    balance_weight: f64,
    /// Factor on a penalty on heads whose weaker directions are not at right angles; none if 0.
    spectral_weight: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 64.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::One("all".to_owned()),
            num_experts: 16,
            groups: 1,
            balance_weight: 0.0,
            spectral_weight: 0.0,
        }
    }
}

/// Whether a layer's output is its block's.
fn ends_block(site: Site) -> bool {
    site.kind().overlaps(Kind::OUTPUT.and(Kind::DOWN))
}

impl Described for Options {
    const NAME: &'static str = "block-hydra";
    const SUMMARY: &'static str = "one routed adapter beside each attention or feed-forward block";
    const PEFT_TYPE: &'static str = "BLOCK_HYDRA";

    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_common(self.rank, self.alpha, self.dropout, &self.targets);
        faults.extend(check_experts(self.num_experts));
        if self.groups == 0 {
            faults.push(Fault::new("method.groups", "is 0; expected at least 1"));
        }
        faults.extend(check_weight("balance_weight", self.balance_weight));
        faults.extend(check_weight("spectral_weight", self.spectral_weight));
        if self.num_experts == 1 && (self.groups > 1 || self.balance_weight > 0.0) {
            let option = if self.groups > 1 { "groups" } else { "balance_weight" };
            let message =
                "is about the router, and a single head has none; expected num_experts: 2 or more";
            faults.push(Fault::new(format!("method.{option}"), message));
        }
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
        let of_site = |shape: &SiteShape| {
            let heads = product(&[self.num_experts, self.rank]);
            product(&[shape.out_features.max(1), heads.saturating_add(self.rank)])
        };
        sites.iter().map(of_site).fold(0, usize::saturating_add)
    }

    /// The last layers of the blocks that the targets lie in.
    fn select(&self, sites: &[SiteShape]) -> Result<Vec<SiteShape>> {
        let chosen = self.targets.select(sites)?;
        let blocks: Vec<String> = chosen.iter().map(|shape| shape.site.block()).collect();
        let last =
            |shape: &&SiteShape| ends_block(shape.site) && blocks.contains(&shape.site.block());
        let found: Vec<SiteShape> = sites.iter().filter(last).copied().collect();
        if found.is_empty() {
            let message =
                "lie in no attention or feed-forward block; expected ffn, attention or all";
            return Err(Error::Options { faults: vec![Fault::new("method.targets", message)] });
        }
        Ok(found)
    }

    fn check_layers(&self, sites: &[SiteShape]) -> Result<()> {
        let uneven = |shape: &&SiteShape| !shape.out_features.is_multiple_of(self.groups);
        let Some(shape) = sites.iter().find(uneven) else { return Ok(()) };
        let message = format!(
            "is {}, and {} is {} wide; expected a number that divides it",
            self.groups,
            shape.site.block(),
            shape.out_features
        );
        Err(Error::Options { faults: vec![Fault::new("method.groups", message)] })
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let (rank, heads) = (self.rank, self.num_experts);
        let block = |shape: &SiteShape| {
            let (site, width) = (shape.site, shape.out_features);
            let name = |part: &str| format!("{site}.{part}.weight");
            let random = |part: &str, rows: usize| {
                uniform(seed, &name(part), kaiming_bound(width), dtype, [rows, width])
            };
            let router = (heads > 1).then(|| {
                let start = random("lora_route", self.groups * heads);
                Trainable::new(name("lora_route"), Role::Router, start)
            });
            let block = Block {
                width,
                a: Trainable::new(name("lora_A"), Role::A, random("lora_A", rank)),
                b: Trainable::new(
                    name("lora_B"),
                    Role::B,
                    Tensor::zeros(dtype, [width, heads * rank]),
                ),
                router,
            };
            (site, block)
        };
        Box::new(BlockHydra {
            options: self.clone(),
            blocks: sites.iter().filter(|shape| ends_block(shape.site)).map(block).collect(),
        })
    }
}

/// The tensors beside a block of width `d`.
struct Block {
    width: usize,
    /// `[r, d]`.
    a: Trainable,
    /// `[d, N·r]`; a file holds the heads one by one.
    b: Trainable,
    /// `[groups · N, d]`, group by group; a single head needs none.
    router: Option<Trainable>,
}

impl Block {
    fn trainables(&self) -> impl Iterator<Item = &Trainable> {
        [&self.a, &self.b].into_iter().chain(&self.router)
    }

    fn trainables_mut(&mut self) -> impl Iterator<Item = &mut Trainable> {
        [&mut self.a, &mut self.b].into_iter().chain(&mut self.router)
    }
}

/// A live adapter: blocks by their last layer.
struct BlockHydra {
    options: Options,
    blocks: BTreeMap<Site, Block>,
}

fn head_name(site: Site, head: usize) -> String {
    format!("{site}.lora_B{head}.weight")
}

impl BlockHydra {
    /// The last layer and the tensors of the block of a layer.
    fn block_of(&self, site: Site) -> Option<(Site, &Block)> {
        let same = |(last, _): &(&Site, &Block)| {
            last.layer == site.layer
                && last.linear.outside == site.linear.outside
                && last.linear.block() == site.linear.block()
        };
        self.blocks.iter().find(same).map(|(last, block)| (*last, block))
    }

    /// `Δ(u)` `[T, d]` for the block's input `u: [T, d]`.
    fn delta(&self, last: Site, block: &Block, u: &Var, pass: &Pass<'_>) -> Var {
        let options = &self.options;
        let (heads, groups) = (options.num_experts, options.groups);
        let (rows, part) = (u.value().rows(), block.width / groups);
        let dropout = layer_dropout(last, options.dropout, pass);
        let mut of_groups: Vec<Var> = Vec::new();
        let mut whole: Option<Var> = None;
        for group in 0..groups {
            let range = |count: usize| (group * count..(group + 1) * count).collect::<Vec<_>>();
            let gates = block.router.as_ref().map(|router| match groups {
                1 => router_gates(u, router.var(), None),
                _ => router_gates(u, &take_rows(router.var(), &range(heads)), None),
            });
            let b = match groups {
                1 => block.b.var().clone(),
                _ => take_rows(block.b.var(), &range(part)),
            };
            let update = LowRank {
                a: block.a.var(),
                b: &b,
                num_experts: heads,
                gate: gates.as_ref().map_or(Gate::One, Gate::Given),
                scale: scale(options.alpha, options.rank, options.use_rslora),
                mask: dropout.map_or(Mask::None, Mask::Shared),
            };
            let zero = Var::constant(Tensor::zeros(u.value().dtype(), [rows, part]));
            let found = gated_low_rank(u, zero, &update).y;
            whole = Some(match whole {
                Some(before) => join_columns(&before, &found),
                None => found,
            });
            of_groups.extend(gates);
        }
        self.report(last, of_groups, pass);
        whole
            .unwrap_or_else(|| Var::constant(Tensor::zeros(u.value().dtype(), [rows, block.width])))
    }

    /// Shows the gates, the mean over groups, to whoever looks, and keeps them for the penalty.
    fn report(&self, last: Site, of_groups: Vec<Var>, pass: &Pass<'_>) {
        let Some((first, more)) = of_groups.split_first() else { return };
        let mut mean = first.value().clone();
        for gates in more {
            mean.add_assign(gates.value());
        }
        mean.scale(1.0 / of_groups.len() as f64);
        pass.report_gates(last, &mean);
        if self.options.balance_weight > 0.0 && pass.dropout_seed().is_some() {
            let all = if more.is_empty() { first.clone() } else { join_rows(&of_groups) };
            pass.set_aside(last, Aside::Gates, all);
        }
    }

    /// The penalty on the heads' directions.
    fn spectral(&self) -> Option<Var> {
        let (rank, heads) = (self.options.rank, self.options.num_experts);
        let terms = self.blocks.values().map(|block| {
            let b = block.b.var();
            let wanted: Vec<Wanted> =
                (0..heads).map(|head| wanted(&head_columns(b.value(), head, rank))).collect();
            weighted_orthogonality(b, &wanted)
        });
        let total = terms.reduce(|sum, term| add(&sum, term))?;
        Some(times(&total, self.options.spectral_weight / self.blocks.len() as f64))
    }
}

/// What a head `[d, r]` should be, from itself.
fn wanted(head: &Tensor) -> Wanted {
    let (rank, values) = (head.cols(), head.to_f64());
    let norm: f64 = values.iter().map(|value| value * value).sum();
    let matrix = Mat::from_fn(head.rows(), rank, |i, j| values[i * rank + j]);
    let found = matrix.singular_values().unwrap_or_else(|_| vec![0.0; rank]);
    let mean = found.iter().sum::<f64>() / rank as f64 + 1e-8;
    let of = |at: usize| (-found.get(at).copied().unwrap_or(0.0) / mean).exp();
    let length = ((norm / rank as f64).sqrt() + 1e-8).powi(2);
    Wanted { length, weights: (0..rank).map(of).collect() }
}

impl Adapter for BlockHydra {
    // The balance penalty looks at whole sequences.
    fn rows_stand_alone(&self) -> bool {
        self.options.balance_weight == 0.0
    }

    fn update(&self, site: Site, _rows: usize, _pass: &Pass<'_>) -> Update<'_> {
        if self.blocks.contains_key(&site) { Update::Custom(self) } else { Update::None }
    }

    fn shares_in_block(&self, site: Site, _pass: &Pass<'_>) -> bool {
        self.block_of(site).is_some()
    }

    fn of_block(&self, site: Site, x: &Var, pass: &Pass<'_>) -> Var {
        match self.block_of(site) {
            Some((last, block)) => self.delta(last, block, x, pass),
            None => x.clone(),
        }
    }
}

impl CustomLinear for BlockHydra {
    fn forward(
        &self,
        _site: Site,
        x: &Var,
        frozen: &FrozenLinear,
        of_block: Option<&Var>,
        _pass: &Pass<'_>,
    ) -> Var {
        let y = frozen.forward(x);
        match of_block {
            Some(delta) => add(delta, y),
            None => y,
        }
    }
}

impl Parameters for BlockHydra {
    fn options(&self) -> &dyn MethodOptions {
        &self.options
    }

    fn sites(&self) -> Vec<Site> {
        self.blocks.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        self.blocks.values().flat_map(Block::trainables).collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        self.blocks.values_mut().flat_map(Block::trainables_mut).collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        let mut map = TensorMap::new();
        for (&site, block) in &self.blocks {
            for trainable in [Some(&block.a), block.router.as_ref()].into_iter().flatten() {
                map.insert(trainable.parameter.name().to_owned(), pick(trainable));
            }
            let b = pick(&block.b);
            for head in 0..self.options.num_experts {
                map.insert(head_name(site, head), head_columns(&b, head, self.options.rank));
            }
        }
        map
    }
}

impl Persist for BlockHydra {
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let rank = self.options.rank;
        let mut faults = Vec::new();
        for (&site, block) in &mut self.blocks {
            let whole = [Some(&mut block.a), block.router.as_mut()].into_iter().flatten();
            faults.extend(load_by_name(whole, tensors).err().unwrap_or_default());
            for head in 0..self.options.num_experts {
                let (name, shape) = (head_name(site, head), [block.width, rank]);
                if let Some(found) = take_tensor(tensors, &name, &shape, &mut faults) {
                    set_head_columns(block.b.parameter.value_mut(), head, rank, &found);
                }
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }
}

impl TrainHooks for BlockHydra {
    fn needs_whole_batches(&self) -> Vec<&'static str> {
        let options = &self.options;
        let all = [
            (options.dropout > 0.0, "method.dropout"),
            (options.balance_weight > 0.0, "method.balance_weight"),
        ];
        all.into_iter().filter(|(on, _)| *on).map(|(_, option)| option).collect()
    }

    fn aux_loss(&self, pass: &Pass<'_>) -> Option<Var> {
        let options = &self.options;
        let balance = || {
            let gates = pass.take_aside(Aside::Gates);
            let even = vec![1.0; options.num_experts];
            let each = gates
                .values()
                .map(|gates| squared_variation(gates, &[0, gates.value().rows()], &even));
            let total = each.reduce(|sum, term| add(&sum, term))?;
            Some(times(&total, options.balance_weight / gates.len() as f64))
        };
        let balance = (options.balance_weight > 0.0).then(balance).flatten();
        let spectral = (options.spectral_weight > 0.0).then(|| self.spectral()).flatten();
        match (balance, spectral) {
            (Some(balance), Some(spectral)) => Some(add(&balance, spectral)),
            (balance, spectral) => balance.or(spectral),
        }
    }
}

impl Mergeable for BlockHydra {
    fn merge(&self, site: Site, _gates: &Gates) -> Merge<'_> {
        match self.blocks.contains_key(&site) {
            false => Merge::Unchanged,
            true => Merge::Refused(
                "it works beside whole blocks, which no weight of the base can hold".to_owned(),
            ),
        }
    }
}

impl Tuned for BlockHydra {}

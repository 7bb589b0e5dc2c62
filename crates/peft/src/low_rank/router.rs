//! Routers: one for each layer, or one for a whole block.

use super::spec::{RouteOn, Router as RouterKind};
use crate::random::{kaiming_bound, uniform};
use crate::trainable::{Role, Trainable};
use hydralora_kernels::ops::elementwise::scale;
use hydralora_kernels::{DType, Tensor};
use hydralora_model::adapter::{Choice, Kind, Reads, Router, Site, SiteShape};
use hydralora_model::family;
use std::fmt;

/// A router's tensors: weight `[N, in]` and perhaps a bias `[N]`.
pub(super) struct RouterWeights {
    weight: Trainable,
    bias: Option<Trainable>,
    /// Factor on its start.
    gain: f64,
}

impl RouterWeights {
    /// A fresh router of the layer or block `module`: Kaiming-uniform times the gain, its bias zero.
    pub(super) fn new(
        module: &str,
        [experts, inputs]: [usize; 2],
        kind: &RouterKind,
        dtype: DType,
        seed: u64,
    ) -> Self {
        let weight = format!("{module}.lora_route.weight");
        let bound = kaiming_bound(inputs) * kind.gain;
        let start = uniform(seed, &weight, bound, dtype, [experts, inputs]);
        Self {
            weight: Trainable::new(weight, Role::Router, start),
            gain: kind.gain,
            bias: kind.bias.then(|| {
                let name = format!("{module}.lora_route.bias");
                Trainable::new(name, Role::Router, Tensor::zeros(dtype, [experts]))
            }),
        }
    }

    pub(super) fn trainables(&self) -> impl Iterator<Item = &Trainable> {
        std::iter::once(&self.weight).chain(&self.bias)
    }

    pub(super) fn trainables_mut(&mut self) -> impl Iterator<Item = &mut Trainable> {
        std::iter::once(&mut self.weight).chain(&mut self.bias)
    }

    /// The router as the base model applies it, its scores divided by `temperature`.
    pub(super) fn router(&self, route_on: RouteOn, choice: Choice, temperature: f64) -> Router {
        let over = |tensor: &Trainable| match temperature {
            1.0 => tensor.var().clone(),
            _ => scale(tensor.var(), 1.0 / temperature),
        };
        Router {
            weight: over(&self.weight),
            bias: self.bias.as_ref().map(over),
            reads: match route_on {
                RouteOn::X => Reads::Input,
                RouteOn::A => Reads::LowRank,
                RouteOn::Sequence => Reads::Sequence,
            },
            choice,
        }
    }

    /// Turns each row of a router `[N, in]` towards where a cluster's inputs lie beside the others':
    /// `c_i − mean c`, the gain times as long as a Kaiming-uniform row is on average,
    /// `√(in · bound² / 3) = 1/√3`.
    pub(super) fn point_at(&mut self, means: &[f64]) {
        let weight = &mut self.weight.parameter;
        let shape = weight.value().shape().to_vec();
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
            let away: Vec<f64> =
                row.iter().zip(&centre).map(|(value, mean)| value - mean).collect();
            let length = away.iter().map(|value| value * value).sum::<f64>().sqrt();
            let factor = if length > 1e-12 { self.gain / (3.0_f64.sqrt() * length) } else { 0.0 };
            values.extend(away.iter().map(|value| factor * value));
        }
        let dtype = weight.value().dtype();
        weight.set(Tensor::from_f64(dtype, &values, shape));
    }
}

/// An attention or feed-forward block of a decoder layer, displayed as its checkpoint name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Block {
    layer: usize,
    name: &'static str,
    outside: bool,
}

impl Block {
    /// The block that a linear layer belongs to.
    pub(super) fn of(site: Site) -> Self {
        let linear = site.linear;
        Self { layer: site.layer, name: linear.block(), outside: linear.outside }
    }

    /// Linear layers whose input is the block's input, of which a model has some: families name the
    /// first layers of their blocks differently.
    pub(super) fn entries(self) -> Vec<Site> {
        let mut found: Vec<Site> = Vec::new();
        for linear in family::linears().filter(|linear| linear.block() == self.name) {
            let site = Site { layer: self.layer, linear };
            if reads_block_input(site) && !found.contains(&site) {
                found.push(site);
            }
        }
        found
    }

    /// Width of the input of the block of `of`, one of the adapted layers `all`: that of its first
    /// layers; a block adapted only at its output layer takes it from that layer's output.
    pub(super) fn width(of: SiteShape, all: &[SiteShape]) -> usize {
        if reads_block_input(of.site) {
            return of.in_features;
        }
        let first = all.iter().find(|shape| reads_block_input(shape.site));
        first.map_or(of.out_features, |shape| shape.in_features)
    }
}

/// Whether a linear layer's input is that of its block, as all but the last layer's of a block is.
fn reads_block_input(site: Site) -> bool {
    !site.kind().overlaps(Kind::OUTPUT.and(Kind::DOWN))
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.outside {
            true => write!(f, "model.{}", self.name),
            false => write!(f, "model.layers.{}.{}", self.layer, self.name),
        }
    }
}

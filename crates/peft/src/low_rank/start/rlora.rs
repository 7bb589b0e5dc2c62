//! R-LoRA: `A` and every head start at random, so that heads differ from the first step on; what they
//! add together on average is taken out of the weight. A file holds that beside the adapter.

use super::{Draw, Pair, StartStrategy, TakenOut};
use crate::low_rank::Layer;
use crate::low_rank::layout::head_columns;
use crate::random::{kaiming_bound, normal};
use crate::trainable::TensorMap;
use hydralora_kernels::Tensor;
use hydralora_model::adapter::{Site, SiteShape};
use std::collections::BTreeMap;

/// R-LoRA's γ: smaller numbers start larger.
const GAMMA: f64 = 64.0;

/// `r^¼ / √γ`, how much smaller than usual random heads start.
pub(super) fn shrunk(rank: usize) -> f64 {
    (rank as f64).powf(0.25) / GAMMA.sqrt()
}

/// The mean `[out, r]` of the heads side by side in `b: [out, N·r]`.
pub(super) fn mean_head(b: &Tensor, heads: usize, rank: usize) -> Tensor {
    let mut mean = Tensor::zeros(b.dtype(), [b.rows(), rank]);
    for head in 0..heads {
        mean.add_assign(&head_columns(b, head, rank));
    }
    mean.scale(1.0 / heads as f64);
    mean
}

pub(super) struct Rlora {
    draw: Draw,
    taken_out: TakenOut,
}

impl Rlora {
    pub(super) fn new(draw: Draw) -> Self {
        Self { draw, taken_out: TakenOut::default() }
    }
}

impl StartStrategy for Rlora {
    fn draw(&mut self, shape: SiteShape) -> [Tensor; 2] {
        let &Draw { ref spec, dtype, seed } = &self.draw;
        let SiteShape { site, in_features, out_features } = shape;
        let rank = spec.sizes.at(site).rank;
        // Normal numbers of variance 1/width, times r^¼ / √γ.
        let shrunk = shrunk(rank);
        let a = self.draw.each_a(shape, &|name| {
            let deviation = kaiming_bound(in_features) * shrunk;
            normal(seed, name, deviation, dtype, [rank, in_features])
        });
        let b = self.draw.each_head(shape, &|name| {
            let deviation = shrunk / (out_features as f64).sqrt();
            normal(seed, name, deviation, dtype, [out_features, rank])
        });
        let mean = mean_head(&b, spec.num_experts, rank);
        self.taken_out.insert(site, Pair::less(&a, &mean, dtype));
        [a, b]
    }

    fn taken_out(&self) -> Option<&TakenOut> {
        Some(&self.taken_out)
    }

    fn to_file(&self, map: &mut TensorMap, _layers: &BTreeMap<Site, Layer>) {
        map.extend(self.taken_out.export());
    }

    fn load_file(&mut self, tensors: &mut TensorMap, shapes: &[SiteShape]) -> Vec<String> {
        self.taken_out.load(tensors, shapes, &self.draw, 1)
    }

    fn load_state(&mut self, tensors: &mut TensorMap, shapes: &[SiteShape]) -> Vec<String> {
        self.taken_out.load(tensors, shapes, &self.draw, 1)
    }
}

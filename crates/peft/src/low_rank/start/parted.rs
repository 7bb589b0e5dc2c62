//! Heads that differ from the first step on, `A` Kaiming-uniform as usual:
//!
//! | start | heads |
//! | --- | --- |
//! | zero sum | normal, less their mean: `Σ_i B_i = 0`, so that even gates add nothing |
//! | orthogonal | `[B_1 … B_N] = c Q` with orthonormal columns, `N r ≤ out` |
//! | SVD slices | `B_i = c U_i`: head `i` has the left singular vectors `i·r … (i+1)·r` of the weight |
//!
//! The last two cannot sum to zero; what they add on average is taken out of the weight, as R-LoRA does.
//! The slices are Ortho-Hydra's (arXiv 2605.03252), of which its rotations are left out: here heads train
//! freely. Columns are as long as R-LoRA's, `r^¼/√γ` with `γ = 64`.

use super::pissa::principal;
use super::rlora::{mean_head, shrunk};
use super::{Draw, Pair, StartStrategy, TakenOut};
use crate::error::{Error, Fault, Result};
use crate::low_rank::Layer;
use crate::low_rank::layout::{head_name, set_head_columns};
use crate::random::normal;
use crate::trainable::TensorMap;
use faer::Mat;
use hydralora_kernels::Tensor;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_model::adapter::{Site, SiteShape};
use std::collections::BTreeMap;

/// Normal heads that sum to zero: nothing to remember.
pub(super) struct ZeroSum(pub(super) Draw);

impl StartStrategy for ZeroSum {
    fn draw(&mut self, shape: SiteShape) -> [Tensor; 2] {
        let &Draw { ref spec, dtype, seed } = &self.0;
        let [a, _] = self.0.kaiming(shape);
        let rank = spec.sizes.at(shape.site).rank;
        let deviation = shrunk(rank) / (shape.out_features as f64).sqrt();
        let mut b = self.0.each_head(shape, &|name| {
            normal(seed, name, deviation, dtype, [shape.out_features, rank])
        });
        let mean = mean_head(&b, spec.num_experts, rank);
        let of_mean = mean.to_f64();
        let less = b.to_f64().into_iter().enumerate().map(|(at, value)| {
            let (row, column) = (at / b.cols(), at % b.cols());
            value - of_mean[row * rank + column % rank]
        });
        b = Tensor::from_f64(dtype, &less.collect::<Vec<f64>>(), b.shape());
        [a, b]
    }
}

/// Which directions the heads take.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Directions {
    /// Random ones.
    Random,
    /// The weight's left singular vectors.
    Singular,
}

/// Heads in directions of their own.
pub(super) struct Parted {
    draw: Draw,
    directions: Directions,
    /// Empty until the base's weights, or a checkpoint, say what was taken out of them.
    taken_out: TakenOut,
}

impl Parted {
    pub(super) fn new(draw: Draw, directions: Directions) -> Self {
        Self { draw, directions, taken_out: TakenOut::default() }
    }

    /// Takes out of the weight what the heads `[out, N·r]` add on average with `a`.
    fn take_out(&mut self, site: Site, a: &Tensor, b: &Tensor) {
        let spec = &self.draw.spec;
        let mean = mean_head(b, spec.num_experts, spec.sizes.at(site).rank);
        self.taken_out.insert(site, Pair::less(a, &mean, self.draw.dtype));
    }

    /// Heads whose columns are `columns` of unit length, one after the other.
    fn heads(&self, shape: SiteShape, columns: &dyn Fn(usize, usize) -> f64) -> Tensor {
        let (spec, outputs) = (&self.draw.spec, shape.out_features);
        let rank = spec.sizes.at(shape.site).rank;
        let length = shrunk(rank);
        let mut b = Tensor::zeros(self.draw.dtype, [outputs, spec.num_experts * rank]);
        for head in 0..spec.num_experts {
            let values: Vec<f64> = (0..outputs * rank)
                .map(|at| length * columns(at / rank, head * rank + at % rank))
                .collect();
            let own = Tensor::from_f64(self.draw.dtype, &values, [outputs, rank]);
            set_head_columns(&mut b, head, rank, &own);
        }
        b
    }
}

impl StartStrategy for Parted {
    fn draw(&mut self, shape: SiteShape) -> [Tensor; 2] {
        let [a, zero] = self.draw.kaiming(shape);
        if self.directions == Directions::Singular {
            return [a, zero];
        }
        let (outputs, width) = (shape.out_features, zero.cols());
        let name = head_name(&self.draw.spec, shape.site, 0);
        let random = normal(
            self.draw.seed,
            &name,
            1.0,
            hydralora_kernels::DType::F64,
            [outputs, width.min(outputs)],
        );
        let values = random.to_f64();
        let drawn = Mat::from_fn(outputs, random.cols(), |i, j| values[i * random.cols() + j]);
        let basis = drawn.qr().compute_thin_Q();
        let b = self.heads(shape, &|i, j| if j < basis.ncols() { basis[(i, j)] } else { 0.0 });
        self.take_out(shape.site, &a, &b);
        [a, b]
    }

    fn start_from(&mut self, site: Site, frozen: &FrozenLinear) -> Result<Option<[Tensor; 2]>> {
        if self.directions == Directions::Random {
            return Ok(None);
        }
        let shape = SiteShape {
            site,
            in_features: frozen.in_features(),
            out_features: frozen.out_features(),
        };
        let [a, zero] = self.draw.kaiming(shape);
        let width = zero.cols();
        // The columns of `B` are the singular vectors times a length of their own.
        let found = principal(&frozen.dense_weight(), width, 1.0);
        let [_, vectors] = found.ok_or_else(|| {
            let message =
                format!("singular_slices: the singular values of {site}.weight were not found");
            Error::Options { faults: vec![Fault::new("method.init_lora_weights", message)] }
        })?;
        let values = vectors.to_f64();
        let lengths: Vec<f64> = (0..width)
            .map(|j| values.iter().skip(j).step_by(width).map(|v| v * v).sum::<f64>().sqrt())
            .map(|length| length.max(f64::MIN_POSITIVE))
            .collect();
        let b = self.heads(shape, &|i, j| values[i * width + j] / lengths[j]);
        self.take_out(site, &a, &b);
        Ok(Some([a, b]))
    }

    fn waits(&self) -> bool {
        self.directions == Directions::Singular && self.taken_out.is_empty()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::low_rank::layout::head_columns;
    use crate::low_rank::start::tests::product;
    use crate::low_rank::{HeadNames, LowRankSpec};
    use crate::options::LoraConfigKeys;
    use hydralora_kernels::DType;
    use hydralora_kernels::check::inputs;
    use hydralora_model::family::kit::Q_PROJ;

    fn draw() -> Draw {
        let keys = LoraConfigKeys { rank: 2, alpha: 4.0, ..LoraConfigKeys::default() };
        let spec =
            LowRankSpec { num_experts: 3, names: HeadNames::Numbered, ..LowRankSpec::of(&keys) };
        Draw { spec, dtype: DType::F64, seed: 5 }
    }

    const SHAPE: SiteShape =
        SiteShape { site: Site { layer: 0, linear: &Q_PROJ }, in_features: 8, out_features: 7 };

    #[test]
    fn heads_that_sum_to_zero_differ() {
        let [_, b] = ZeroSum(draw()).draw(SHAPE);
        let mean = mean_head(&b, 3, 2);
        assert!(mean.to_f64().iter().all(|value| value.abs() < 1e-15));
        assert!(b.norm() > 0.1);
        let heads: Vec<Vec<f64>> = (0..3).map(|i| head_columns(&b, i, 2).to_f64()).collect();
        assert!(heads[0] != heads[1] && heads[1] != heads[2]);
    }

    /// `[B_1 … B_N]ᵀ [B_1 … B_N]` is `c²` times the identity.
    fn is_orthogonal(b: &Tensor) {
        let (values, width) = (b.to_f64(), b.cols());
        let length = shrunk(2).powi(2);
        for i in 0..width {
            for j in 0..width {
                let dot: f64 =
                    (0..b.rows()).map(|k| values[k * width + i] * values[k * width + j]).sum();
                let wanted = if i == j { length } else { 0.0 };
                assert!((dot - wanted).abs() < 1e-9, "{i} {j}: {dot}");
            }
        }
    }

    #[test]
    fn orthogonal_heads_share_no_direction_and_their_mean_is_taken_out() {
        let mut start = Parted::new(draw(), Directions::Random);
        let [a, b] = start.draw(SHAPE);
        is_orthogonal(&b);
        let [less_a, less_b] = start.taken_out().unwrap().get(SHAPE.site).unwrap().values();
        let out = product(&less_b, &less_a);
        for (got, want) in out.iter().zip(product(&mean_head(&b, 3, 2), &a)) {
            assert!((got + want).abs() < 1e-12);
        }
    }

    #[test]
    fn slices_are_the_weights_singular_vectors() {
        let w = inputs(&[&[7, 8]]);
        let frozen = FrozenLinear::dense(w[0].value().clone());
        let mut start = Parted::new(draw(), Directions::Singular);
        assert!(start.waits());
        let [_, b] = start.start_from(SHAPE.site, &frozen).unwrap().unwrap();
        is_orthogonal(&b);
        assert!(!start.waits());
        // The first column is that of the largest singular value: `Wᵀ` leaves most of it.
        let (values, weight) = (b.to_f64(), w[0].value().to_f64());
        let image = |column: usize| -> f64 {
            let entry = |j: usize| -> f64 {
                (0..7).map(|i| weight[i * 8 + j] * values[i * 6 + column]).sum()
            };
            (0..8).map(|j| entry(j).powi(2)).sum()
        };
        let images: Vec<f64> = (0..6).map(image).collect();
        assert!(images.windows(2).all(|pair| pair[0] >= pair[1] - 1e-12), "{images:?}");
    }
}

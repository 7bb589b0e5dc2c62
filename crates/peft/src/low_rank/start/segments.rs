//! Experts that start in different parts of the weight's spectrum. The singular values, the largest first,
//! are cut into `N` segments of `⌊h/N⌋` each, `h` the weight's smaller side; expert `i` starts with the first
//! `r` of segment `i`:
//!
//! ```text
//! A_i = √(S_i / sρ) V_iᵀ        B_i = U_i √(S_i / sρ)        ρ = 10
//! y = (W0 − (s/N) Σ_i B_i A_i, as they start) x + s Σ_i w_i B_i A_i x
//! ```
//!
//! GOAT (Fan et al., arXiv 2502.16894), as its published code has it. What is taken out is what even gates, or
//! the mean over tokens of a balanced choice, add at the start; of experts that are summed up it is all. A
//! file holds it as one pair of rank `N·r`.

use super::pissa::singular_parts;
use super::{Draw, Pair, StartStrategy, TakenOut};
use crate::error::{Error, Fault, Result};
use crate::low_rank::{Layer, Mixing};
use crate::trainable::TensorMap;
use hydralora_kernels::Tensor;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_model::adapter::{Site, SiteShape};
use std::collections::BTreeMap;

/// The published code's ρ: larger numbers start smaller.
const RHO: f64 = 10.0;

pub(super) struct Segments {
    draw: Draw,
    /// Empty until the base's weights, or a checkpoint, say what was taken out of them.
    taken_out: TakenOut,
}

impl Segments {
    pub(super) fn new(draw: Draw) -> Self {
        Self { draw, taken_out: TakenOut::default() }
    }

    /// The places of the singular values that the experts start with, one expert after the other.
    fn places(&self, shortest: usize, rank: usize) -> Vec<usize> {
        let experts = self.draw.spec.num_experts;
        let segment = shortest / experts;
        (0..experts).flat_map(|i| i * segment..i * segment + rank).collect()
    }

    fn load(&mut self, tensors: &mut TensorMap, shapes: &[SiteShape]) -> Vec<String> {
        self.taken_out.load(tensors, shapes, &self.draw, self.draw.spec.num_experts)
    }
}

impl StartStrategy for Segments {
    fn draw(&mut self, shape: SiteShape) -> [Tensor; 2] {
        self.draw.kaiming(shape)
    }

    fn start_from(&mut self, site: Site, frozen: &FrozenLinear) -> Result<Option<[Tensor; 2]>> {
        let (spec, dtype) = (&self.draw.spec, self.draw.dtype);
        let size = spec.sizes.at(site);
        let places = self.places(frozen.in_features().min(frozen.out_features()), size.rank);
        let found = singular_parts(&frozen.dense_weight(), &places, size.scale * RHO);
        let [a, b] = found.ok_or_else(|| {
            let message =
                format!("singular_segments: the singular values of {site}.weight were not found");
            Error::Options { faults: vec![Fault::new("method.init_lora_weights", message)] }
        })?;
        let mut added = b.clone();
        if spec.mixing != Mixing::Sum {
            added.scale(1.0 / spec.num_experts as f64);
        }
        self.taken_out.insert(site, Pair::less(&a, &added, dtype));
        Ok(Some([a.to_dtype(dtype), b.to_dtype(dtype)]))
    }

    fn waits(&self) -> bool {
        self.taken_out.is_empty()
    }

    fn taken_out(&self) -> Option<&TakenOut> {
        Some(&self.taken_out)
    }

    fn to_file(&self, map: &mut TensorMap, _layers: &BTreeMap<Site, Layer>) {
        map.extend(self.taken_out.export());
    }

    fn load_file(&mut self, tensors: &mut TensorMap, shapes: &[SiteShape]) -> Vec<String> {
        self.load(tensors, shapes)
    }

    fn load_state(&mut self, tensors: &mut TensorMap, shapes: &[SiteShape]) -> Vec<String> {
        self.load(tensors, shapes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::low_rank::layout::{head_columns, rows};
    use crate::low_rank::start::tests::product;
    use crate::low_rank::{HeadNames, LowRankSpec, Router};
    use crate::options::LoraConfigKeys;
    use hydralora_kernels::DType;
    use hydralora_model::family::kit::Q_PROJ;

    fn start(mixing: Mixing) -> Segments {
        let keys = LoraConfigKeys { rank: 2, alpha: 6.0, ..LoraConfigKeys::default() };
        let spec = LowRankSpec {
            num_experts: 3,
            own_a: true,
            names: HeadNames::Numbered,
            mixing,
            ..LowRankSpec::of(&keys)
        };
        Segments::new(Draw { spec, dtype: DType::F64, seed: 5 })
    }

    const SITE: Site = Site { layer: 0, linear: &Q_PROJ };

    /// Of a diagonal weight the singular vectors are the axes: every expert has the two first values of a
    /// third of the nine, divided by `sρ = 30`.
    #[test]
    fn every_expert_has_the_head_of_its_segment() {
        let mut w = vec![0.0; 9 * 10];
        for i in 0..9 {
            w[i * 10 + i] = 20.0 - i as f64;
        }
        let frozen = FrozenLinear::dense(Tensor::from_f64(DType::F64, &w, [9, 10]));
        let mut start = start(Mixing::Routed(Router::default()));
        assert!(start.waits());
        let [a, b] = start.start_from(SITE, &frozen).unwrap().unwrap();
        assert!(!start.waits());
        assert_eq!((a.shape(), b.shape()), (&[6, 10][..], &[9, 6][..]));
        let mut sum = vec![0.0; 90];
        for expert in 0..3 {
            let own = product(&head_columns(&b, expert, 2), &rows(&a, expert * 2, 2));
            for (at, value) in own.iter().enumerate() {
                let (i, j) = (at / 10, at % 10);
                let within = i == j && (expert * 3..expert * 3 + 2).contains(&i);
                let wanted = if within { (20.0 - i as f64) / 30.0 } else { 0.0 };
                assert!((value - wanted).abs() < 1e-12, "{expert} {i} {j}: {value} {wanted}");
                sum[at] += value;
            }
        }
        // Taken out is what even gates add.
        let [less_a, less_b] = start.taken_out().unwrap().get(SITE).unwrap().values();
        for (taken, added) in product(&less_b, &less_a).iter().zip(&sum) {
            assert!((taken + added / 3.0).abs() < 1e-12);
        }
    }

    #[test]
    fn of_experts_that_are_summed_up_all_is_taken_out() {
        let w = hydralora_kernels::check::inputs(&[&[7, 8]]).remove(0);
        let mut start = start(Mixing::Sum);
        let [a, b] =
            start.start_from(SITE, &FrozenLinear::dense(w.value().clone())).unwrap().unwrap();
        let [less_a, less_b] = start.taken_out().unwrap().get(SITE).unwrap().values();
        for (taken, added) in product(&less_b, &less_a).iter().zip(product(&b, &a)) {
            assert!((taken + added).abs() < 1e-12);
        }
    }
}

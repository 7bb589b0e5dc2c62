//! PiSSA: `A` and `B` start as the principal part of the weight, which is taken out of the weight.
//!
//! A file holds the LoRA of twice the rank that does the same to the weight as it is, which any program
//! can read.

use super::{Draw, Pair, StartStrategy, TakenOut};
use crate::error::{Error, Fault, Result};
use crate::low_rank::Layer;
use crate::low_rank::layout::{a_name, head_name};
use crate::options::whole_if_possible;
use crate::trainable::TensorMap;
use faer::{Mat, Side};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::low_rank::adapted_linear;
use hydralora_kernels::ops::low_rank::{LowRank, Mask, Output};
use hydralora_kernels::{Tensor, Var};
use hydralora_model::adapter::{Site, SiteShape};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

pub(super) struct Pissa {
    draw: Draw,
    /// Empty until the base's weights, or a checkpoint, say what was taken out of them.
    taken_out: TakenOut,
}

impl Pissa {
    pub(super) fn new(draw: Draw) -> Self {
        Self { draw, taken_out: TakenOut::default() }
    }
}

impl StartStrategy for Pissa {
    fn draw(&mut self, shape: SiteShape) -> [Tensor; 2] {
        self.draw.kaiming(shape)
    }

    fn start_from(&mut self, site: Site, frozen: &FrozenLinear) -> Result<Option<[Tensor; 2]>> {
        let (size, dtype) = (self.draw.spec.sizes.at(site), self.draw.dtype);
        let found = principal(&frozen.dense_weight(), size.rank, size.scale);
        let [a, b] = found.ok_or_else(|| {
            let message = format!("pissa: the singular values of {site}.weight were not found");
            Error::Options { faults: vec![Fault::new("method.init_lora_weights", message)] }
        })?;
        self.taken_out.insert(site, Pair::less(&a, &b, dtype));
        Ok(Some([a.to_dtype(dtype), b.to_dtype(dtype)]))
    }

    fn waits(&self) -> bool {
        self.taken_out.is_empty()
    }

    fn taken_out(&self) -> Option<&TakenOut> {
        Some(&self.taken_out)
    }

    fn layer(&self, x: &Var, frozen: &FrozenLinear, update: &LowRank<'_>, less: &Pair) -> Output {
        if update.mask != Mask::None {
            return less.beside(x, frozen, update);
        }
        // As the very computation of the LoRA of rank `2r` that a file holds.
        let [a, b] = less.joined(update.a, update.b);
        adapted_linear(x, frozen, &LowRank { a: &a, b: &b, ..*update })
    }

    fn to_file(&self, map: &mut TensorMap, layers: &BTreeMap<Site, Layer>) {
        let spec = &self.draw.spec;
        for (&site, less) in self.taken_out.iter() {
            let Some(layer) = layers.get(&site) else { continue };
            let [a, b] = less.joined(&layer.a.var().detach(), &layer.b.var().detach());
            map.insert(a_name(spec, site, 0), a.into_value());
            map.insert(head_name(spec, site, 0), b.into_value());
        }
    }

    fn to_config(&self, config: &mut Map<String, Value>) {
        if self.taken_out.is_empty() {
            return;
        }
        // Twice the rank at the same scale.
        let stabilised = config.get("use_rslora") == Some(&json!(true));
        let alphas = if stabilised { 2f64.sqrt() } else { 2.0 };
        for (key, factor) in
            [("r", 2.0), ("rank_pattern", 2.0), ("lora_alpha", alphas), ("alpha_pattern", alphas)]
        {
            match config.get_mut(key) {
                Some(Value::Object(patterns)) => {
                    patterns.values_mut().for_each(|value| multiply(value, factor));
                }
                Some(value) => multiply(value, factor),
                None => {}
            }
        }
    }

    fn load_state(&mut self, tensors: &mut TensorMap, shapes: &[SiteShape]) -> Vec<String> {
        self.taken_out.load(tensors, shapes, &self.draw, 1)
    }
}

fn multiply(value: &mut Value, factor: f64) {
    if let Some(number) = value.as_f64() {
        *value = whole_if_possible(factor * number);
    }
}

/// The principal part of `weight: [out, in]` as `scale · B A` with `A: [r, in]`, `B: [out, r]`:
/// `A = √(S/scale) Vᵀ`, `B = U √(S/scale)` of the `rank` largest singular values (Meng et al.,
/// PiSSA, arXiv 2404.02948). None if the decomposition does not converge.
pub(super) fn principal(weight: &Tensor, rank: usize, scale: f64) -> Option<[Tensor; 2]> {
    singular_parts(weight, &(0..rank).collect::<Vec<_>>(), scale)
}

/// The same of other singular values, by their places among all of them, the largest first; those beyond
/// the last are zero.
///
/// Found from the eigenvectors of the smaller of `W Wᵀ` and `Wᵀ W`, in double precision.
pub(super) fn singular_parts(weight: &Tensor, places: &[usize], scale: f64) -> Option<[Tensor; 2]> {
    let rank = places.len();
    let (outputs, inputs, dtype) = (weight.rows(), weight.cols(), weight.dtype());
    let values = weight.to_f64();
    let w = Mat::from_fn(outputs, inputs, |i, j| values[i * inputs + j]);
    let tall = outputs >= inputs;
    let gram = if tall { w.transpose() * &w } else { &w * w.transpose() };
    let found = gram.self_adjoint_eigen(Side::Lower).ok()?;
    let (vectors, size) = (found.U(), gram.nrows());
    let mut a = vec![0.0; rank * inputs];
    let mut b = vec![0.0; outputs * rank];
    for (k, &place) in places.iter().enumerate().filter(|(_, place)| **place < size) {
        // Eigenvalues ascend.
        let v = vectors.col(size - 1 - place).to_owned();
        let image = if tall { &w * &v } else { w.transpose() * &v };
        let singular = image.norm_l2();
        if singular == 0.0 {
            continue;
        }
        let root = (singular / scale).sqrt();
        let (right, left) = if tall { (v, image / singular) } else { (image / singular, v) };
        for j in 0..inputs {
            a[k * inputs + j] = root * right[j];
        }
        for i in 0..outputs {
            b[i * rank + k] = root * left[i];
        }
    }
    let a = Tensor::from_f64(dtype, &a, [rank, inputs]);
    Some([a, Tensor::from_f64(dtype, &b, [outputs, rank])])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::low_rank::start::tests::product;
    use hydralora_kernels::DType;
    use hydralora_kernels::check::inputs;

    #[test]
    fn the_principal_part_of_a_low_rank_weight_is_the_weight() {
        for (outputs, inputs_) in [(6, 9), (9, 6), (5, 5)] {
            let v = inputs(&[&[outputs, 3], &[3, inputs_]]);
            let w = product(v[0].value(), v[1].value());
            let weight = Tensor::from_f64(DType::F64, &w, [outputs, inputs_]);
            let [a, b] = principal(&weight, 3, 2.0).unwrap();
            for (got, want) in product(&b, &a).iter().zip(&w) {
                assert!((2.0 * got - want).abs() < 1e-10, "{got} {want}");
            }
            // Balanced: A and B share each singular value evenly, so their norms agree.
            assert!((a.norm() - b.norm()).abs() < 1e-10);
        }
    }

    #[test]
    fn a_rank_above_the_weights_own_leaves_the_rest_zero() {
        let v = inputs(&[&[4, 1], &[1, 3]]);
        let w = product(v[0].value(), v[1].value());
        let weight = Tensor::from_f64(DType::F64, &w, [4, 3]);
        let [a, b] = principal(&weight, 5, 1.0).unwrap();
        assert_eq!((a.shape(), b.shape()), (&[5, 3][..], &[4, 5][..]));
        for (got, want) in product(&b, &a).iter().zip(&w) {
            assert!((got - want).abs() < 1e-7, "{got} {want}");
        }
    }
}

//! DoRA: the magnitude of each row of a weight, learned apart from its direction.

use crate::merge::Factors;
use crate::trainable::{Role, Trainable};
use hydralora_kernels::ops::dropout::dropout;
use hydralora_kernels::ops::elementwise::{
    add, scale, scale_columns, scale_columns_in_place, shift_columns,
};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::low_rank::adapted_linear;
use hydralora_kernels::ops::low_rank::{LowRank, Mask, gated_low_rank};
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_model::adapter::Site;
use std::sync::{Mutex, OnceLock, PoisonError};

/// A layer's learned magnitude `m: [out]`, and the norms it is measured against.
pub(super) struct Magnitude {
    pub(super) values: Trainable,
    norms: RowNorms,
    /// Whether the values are known, which start as norms of the base's weight.
    known: bool,
}

impl Magnitude {
    /// The magnitude of a fresh layer, still to be measured.
    pub(super) fn new(site: Site, outputs: usize, dtype: DType) -> Self {
        let name = format!("{site}.lora_magnitude_vector");
        let values = Trainable::new(name, Role::Scale, Tensor::zeros(dtype, [outputs]));
        Self { values, norms: RowNorms::default(), known: false }
    }

    /// Whether the values are still to come.
    pub(super) fn waits(&self) -> bool {
        !self.known
    }

    /// Notes that the values were loaded.
    pub(super) fn loaded(&mut self) {
        self.known = true;
    }

    /// Starts from the norms of the rows of `W + s B A`.
    pub(super) fn measure(&mut self, frozen: &FrozenLinear, a: &Tensor, b: &Tensor, scale: f64) {
        self.values.parameter.set(self.norms.of(frozen, a, b, scale, false));
        self.known = true;
    }

    /// Computes `m ⊙ (W0 + s B A) x / ‖W0 + s B A‖`, the norm of each row taken as a constant
    /// (Liu et al., arXiv 2402.09353, section 4.3). As in PEFT, dropout acts on the input of the
    /// change to the layer alone:
    ///
    /// ```text
    /// y = W0 x + b + (g − 1) ⊙ W0 x' + g ⊙ s B A x'       g = m / ‖W0 + s B A‖
    /// ```
    pub(super) fn layer(
        &self,
        x: &Var,
        frozen: &FrozenLinear,
        update: &LowRank<'_>,
        training: bool,
    ) -> Var {
        let (a, b) = (update.a.value(), update.b.value());
        let norms = self.norms.of(frozen, a, b, update.scale, !training).to_f64();
        let inverse: Vec<f64> = norms.iter().map(|n| 1.0 / n).collect();
        let inverse = Tensor::from_f64(a.dtype(), &inverse, [inverse.len()]);
        let factors = scale_columns(self.values.var(), &Var::constant(inverse));
        let plain = frozen.without_bias();
        let unmasked = LowRank { mask: Mask::None, ..*update };
        let (Mask::Shared(mask) | Mask::PerExpert(mask)) = update.mask else {
            let sum = adapted_linear(x, &plain, &unmasked).y;
            let y = scale_columns_in_place(sum, &factors);
            return match frozen.bias() {
                Some(bias) => shift_columns(y, bias),
                None => y,
            };
        };
        let dropped = dropout(x, mask);
        let base = plain.forward(&dropped);
        let sum = gated_low_rank(&dropped, base.clone(), &unmasked).y;
        let change = add(&scale_columns_in_place(sum, &factors), scale(&base, -1.0));
        add(&frozen.forward(x), change)
    }

    /// The weight of that layer: the rows of `weight: [out, in]` (`f32`) with `change` added, each as
    /// long as the magnitude says. Rows of zeros stay as they are.
    pub(super) fn fold(&self, mut weight: Tensor, change: &Factors) -> Tensor {
        weight.add_assign(&change.product());
        let width = weight.cols();
        let rows = weight.data_mut::<f32>().chunks_exact_mut(width);
        for (row, wanted) in rows.zip(self.values.parameter.value().to_f64()) {
            let norm = row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
            if norm > 0.0 {
                row.iter_mut().for_each(|w| *w = (f64::from(*w) * wanted / norm) as f32);
            }
        }
        weight
    }
}

/// Norms of the rows of `W + s B A`, without forming it.
///
/// ```text
/// ‖W_i + s B_i A‖² = ‖W_i‖² + 2 s (W Aᵀ)_i · B_i + s² B_i (A Aᵀ) B_iᵀ
/// ```
#[derive(Default)]
struct RowNorms {
    /// `‖W_i‖²`, found at the first use.
    squared: OnceLock<Vec<f64>>,
    /// The last result outside of training, with the tensors it is for.
    last: Mutex<Option<(Tensor, Tensor, Tensor)>>,
}

impl RowNorms {
    fn squared(&self, frozen: &FrozenLinear) -> &[f64] {
        self.squared.get_or_init(|| {
            let weight = frozen.dense_weight();
            let width = weight.cols().max(1);
            let values = weight.to_f64();
            values.chunks_exact(width).map(|row| row.iter().map(|w| w * w).sum()).collect()
        })
    }

    /// `[out]` for `a: [r, in]` and `b: [out, r]`. With `keep` the result is kept until either of
    /// them changes, as decoding token by token asks for the same again and again.
    fn of(&self, frozen: &FrozenLinear, a: &Tensor, b: &Tensor, scale: f64, keep: bool) -> Tensor {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, _, norms)) =
            last.as_ref().filter(|(last_a, last_b, _)| same(last_a, a) && same(last_b, b))
        {
            return norms.clone();
        }
        let along = frozen.without_bias().apply(a).to_f64();
        let (rank, outputs) = (a.rows(), b.rows());
        let (rows, heads) = (a.to_f64(), b.to_f64());
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let row = |k: usize| &rows[k * a.cols()..(k + 1) * a.cols()];
        let products: Vec<f64> =
            (0..rank * rank).map(|at| dot(row(at / rank), row(at % rank))).collect();
        let squared = self.squared(frozen);
        let norms: Vec<f64> = (0..outputs)
            .map(|i| {
                let b = &heads[i * rank..(i + 1) * rank];
                let linear: f64 = (0..rank).map(|k| along[k * outputs + i] * b[k]).sum();
                let square: f64 =
                    (0..rank).map(|k| b[k] * dot(&products[k * rank..(k + 1) * rank], b)).sum();
                (squared[i] + 2.0 * scale * linear + scale * scale * square).max(0.0).sqrt()
            })
            .collect();
        let norms = Tensor::from_f64(a.dtype(), &norms, [outputs]);
        *last = keep.then(|| (a.clone(), b.clone(), norms.clone()));
        norms
    }
}

/// Whether two tensors share their memory. Both being alive, that means they are equal.
fn same(a: &Tensor, b: &Tensor) -> bool {
    a.dtype() == b.dtype()
        && hydralora_kernels::dispatch!(a.dtype(), |E| std::ptr::eq(a.data::<E>(), b.data::<E>()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::low_rank::start::tests::product;
    use hydralora_kernels::check::inputs;

    #[test]
    fn row_norms_match_the_definition_and_follow_the_tensors() {
        let v = inputs(&[&[7, 5], &[2, 5], &[7, 2]]);
        let [w, a, b] = [0, 1, 2].map(|i: usize| v[i].value().clone());
        let frozen = FrozenLinear::dense(w.clone());
        let norms = RowNorms::default();
        let check = |a: &Tensor, b: &Tensor| {
            let got = norms.of(&frozen, a, b, 1.5, true).to_f64();
            let update = product(b, a);
            let sum: Vec<f64> = w.to_f64().iter().zip(&update).map(|(w, u)| w + 1.5 * u).collect();
            for (got, row) in got.iter().zip(sum.chunks(5)) {
                let want = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                assert!((got - want).abs() < 1e-12);
            }
        };
        check(&a, &b);
        check(&a, &b);
        let mut moved = b.clone();
        moved.data_mut::<f64>()[3] += 1.0;
        check(&a, &moved);
        check(&a, &b);
    }
}

//! What DoRA and PiSSA need to know about a frozen weight: the norms of its rows with an update
//! added, and its principal singular vectors.

use faer::{Mat, Side};
use hydralora_kernels::ops::adapted_linear::adapted_linear;
use hydralora_kernels::ops::dropout::dropout;
use hydralora_kernels::ops::elementwise::{
    add, scale, scale_columns, scale_columns_in_place, shift_columns,
};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::gated_low_rank::{LowRank, Mask, gated_low_rank};
use hydralora_kernels::{Tensor, Var};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Norms of the rows of `W + s B A`, without forming it.
///
/// ```text
/// ‖W_i + s B_i A‖² = ‖W_i‖² + 2 s (W Aᵀ)_i · B_i + s² B_i (A Aᵀ) B_iᵀ
/// ```
#[derive(Default)]
pub(crate) struct RowNorms {
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
    pub(crate) fn of(
        &self,
        frozen: &FrozenLinear,
        a: &Tensor,
        b: &Tensor,
        scale: f64,
        keep: bool,
    ) -> Tensor {
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

    /// DoRA's layer: `m ⊙ (W0 + s B A) x / ‖W0 + s B A‖`, the norm of each row taken as a constant
    /// (Liu et al., arXiv 2402.09353, section 4.3). As in PEFT, dropout acts on the input of the
    /// change to the layer alone:
    ///
    /// ```text
    /// y = W0 x + b + (g − 1) ⊙ W0 x' + g ⊙ s B A x'       g = m / ‖W0 + s B A‖
    /// ```
    pub(crate) fn decomposed(
        &self,
        x: &Var,
        frozen: &FrozenLinear,
        magnitude: &Var,
        update: &LowRank<'_>,
        training: bool,
    ) -> Var {
        let (a, b) = (update.a.value(), update.b.value());
        let norms = self.of(frozen, a, b, update.scale, !training).to_f64();
        let inverse: Vec<f64> = norms.iter().map(|n| 1.0 / n).collect();
        let inverse = Tensor::from_f64(a.dtype(), &inverse, [inverse.len()]);
        let factors = scale_columns(magnitude, &Var::constant(inverse));
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
}

/// Whether two tensors share their memory. Both being alive, that means they are equal.
fn same(a: &Tensor, b: &Tensor) -> bool {
    a.dtype() == b.dtype()
        && hydralora_kernels::dispatch!(a.dtype(), |E| std::ptr::eq(a.data::<E>(), b.data::<E>()))
}

/// The principal part of `weight: [out, in]` as `scale · B A` with `A: [r, in]`, `B: [out, r]`:
/// `A = √(S/scale) Vᵀ`, `B = U √(S/scale)` of the `rank` largest singular values (Meng et al.,
/// PiSSA, arXiv 2404.02948). None if the decomposition does not converge.
///
/// Found from the eigenvectors of the smaller of `W Wᵀ` and `Wᵀ W`, in double precision.
pub(crate) fn principal(weight: &Tensor, rank: usize, scale: f64) -> Option<[Tensor; 2]> {
    let (outputs, inputs, dtype) = (weight.rows(), weight.cols(), weight.dtype());
    let values = weight.to_f64();
    let w = Mat::from_fn(outputs, inputs, |i, j| values[i * inputs + j]);
    let tall = outputs >= inputs;
    let gram = if tall { w.transpose() * &w } else { &w * w.transpose() };
    let found = gram.self_adjoint_eigen(Side::Lower).ok()?;
    let (vectors, size) = (found.U(), gram.nrows());
    let mut a = vec![0.0; rank * inputs];
    let mut b = vec![0.0; outputs * rank];
    for k in 0..rank.min(size) {
        // Eigenvalues ascend.
        let v = vectors.col(size - 1 - k).to_owned();
        let image = if tall { &w * &v } else { w.transpose() * &v };
        let singular = image.norm_l2();
        if singular == 0.0 {
            break;
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
    use hydralora_kernels::DType;
    use hydralora_kernels::check::inputs;

    fn product(b: &Tensor, a: &Tensor) -> Vec<f64> {
        let (rank, inputs) = (a.rows(), a.cols());
        let (a, b) = (a.to_f64(), b.to_f64());
        (0..b.len() / rank * inputs)
            .map(|at| {
                let (i, j) = (at / inputs, at % inputs);
                (0..rank).map(|k| b[i * rank + k] * a[k * inputs + j]).sum()
            })
            .collect()
    }

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

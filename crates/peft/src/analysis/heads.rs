//! What the heads of an adapter's layers have in common, cheaply enough to be looked at while it is trained.
//!
//! Everything follows from one matrix a layer, `[B_1 … B_N]ᵀ [B_1 … B_N]` (or that of the `A_i` where the
//! heads share `B`), which is `N·r` wide.

use super::factors;
use crate::trainable::TensorMap;
use faer::{Mat, Side};
use hydralora_kernels::Tensor;
use hydralora_model::adapter::Site;
use std::collections::BTreeMap;

/// The heads of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteHeads {
    /// Their number `N`.
    pub num_heads: usize,
    /// Mean cosine of two heads' `B`, flattened (of their `A` where they share `B`); none while they are
    /// zero.
    pub cosine: Option<f64>,
    /// The effective rank of `[B_1 … B_N]`: the exponential of the entropy of its singular values over
    /// their sum; none while it is zero.
    pub rank: Option<f64>,
    /// What it could be at most, `N·r` or the layer's width.
    pub full_rank: usize,
    /// `[N][N]`: `⟨D_i, D_j⟩` of the heads' updates `D_i = B_i A_i`.
    pub products: Vec<Vec<f64>>,
}

impl SiteHeads {
    /// `E‖Σ_i (w_i − 1/N) D_i x‖² / E‖Σ_i w_i D_i x‖²`: the share of the update's energy that the heads'
    /// differences carry, for gates of which `gates: [N · N]` are the mean products `E w_i w_j`, and inputs
    /// that are as strong in all directions, whatever the gates. None while all heads are zero, or where
    /// there are not so many gates.
    ///
    /// It may be above 1 where differences cancel the mean.
    pub fn difference_share(&self, gates: &[f64]) -> Option<f64> {
        let heads = self.num_heads;
        if gates.len() != heads * heads {
            return None;
        }
        // Gates sum to 1, so a row of the products sums to a gate's mean.
        let means: Vec<f64> = gates.chunks_exact(heads).map(|row| row.iter().sum()).collect();
        let even = 1.0 / heads as f64;
        let (mut apart, mut all) = (0.0, 0.0);
        for i in 0..heads {
            for j in 0..heads {
                let both = gates[i * heads + j];
                let centred = both - even * (means[i] + means[j]) + even * even;
                apart += centred * self.products[i][j];
                all += both * self.products[i][j];
            }
        }
        (all > 0.0).then(|| (apart / all).max(0.0))
    }
}

/// Looks at the heads of every layer that has several; `tensors` are an adapter's, by their names in its
/// file.
pub fn heads(tensors: TensorMap) -> BTreeMap<Site, SiteHeads> {
    let of_site = |(site, [a, b]): (Site, [Vec<Tensor>; 2])| Some((site, of_factors(&a, &b)?));
    factors(tensors).into_iter().filter_map(of_site).collect()
}

fn of_factors(a: &[Tensor], b: &[Tensor]) -> Option<SiteHeads> {
    let num_heads = a.len().max(b.len());
    let fits = |factors: &[Tensor]| factors.len() == 1 || factors.len() == num_heads;
    if num_heads < 2 || !fits(a) || !fits(b) {
        return None;
    }
    let grams = [gram(a, false)?, gram(b, true)?];
    let rank = a.first()?.rows();
    if b.iter().any(|b| b.cols() != rank) || a.iter().any(|a| a.rows() != rank) {
        return None;
    }
    let [of_a, of_b] = &grams;
    // `Σ_kl (A_i A_jᵀ)_kl (B_iᵀ B_j)_kl`
    let places = |i: usize, j: usize| (0..rank * rank).map(move |at| (i, j, at / rank, at % rank));
    let entry = |gram: &Mat<f64>, heads: usize, (i, j, k, l): (usize, usize, usize, usize)| {
        gram[(i % heads * rank + k, j % heads * rank + l)]
    };
    let product = |i: usize, j: usize| -> f64 {
        places(i, j).map(|at| entry(of_a, a.len(), at) * entry(of_b, b.len(), at)).sum()
    };
    let each = |of: &dyn Fn(usize, usize) -> f64| -> Vec<Vec<f64>> {
        (0..num_heads).map(|i| (0..num_heads).map(|j| of(i, j)).collect()).collect()
    };
    // The factor of which there are several.
    let (several, count) = if b.len() > 1 { (of_b, b.len()) } else { (of_a, a.len()) };
    let inner = each(&|i, j| (0..rank).map(|k| entry(several, count, (i, j, k, k))).sum());
    let cosines: Vec<f64> = (0..num_heads)
        .flat_map(|i| (0..i).map(move |j| (i, j)))
        .filter(|&(i, j)| inner[i][i] > 0.0 && inner[j][j] > 0.0)
        .map(|(i, j)| inner[i][j] / (inner[i][i] * inner[j][j]).sqrt())
        .collect();
    let width = if b.len() > 1 { b.first()?.rows() } else { a.first()?.cols() };
    Some(SiteHeads {
        num_heads,
        cosine: (!cosines.is_empty()).then(|| cosines.iter().sum::<f64>() / cosines.len() as f64),
        rank: effective_rank(several),
        full_rank: (num_heads * rank).min(width),
        products: each(&product),
    })
}

/// The products of all columns of the factors side by side, or of all rows of them one below the other.
fn gram(factors: &[Tensor], columns: bool) -> Option<Mat<f64>> {
    let first = factors.first()?;
    let (rows, cols) = (first.rows(), first.cols());
    if factors.iter().any(|factor| factor.shape() != first.shape()) {
        return None;
    }
    let values: Vec<Vec<f64>> = factors.iter().map(Tensor::to_f64).collect();
    let (rank, width) = if columns { (cols, rows) } else { (rows, cols) };
    let tall = Mat::from_fn(width, factors.len() * rank, |at, column| {
        let (head, k) = (column / rank, column % rank);
        if columns { values[head][at * cols + k] } else { values[head][k * cols + at] }
    });
    Some(tall.transpose() * &tall)
}

/// From the eigenvalues of the matrix of products, which are the squares of the singular values.
fn effective_rank(gram: &Mat<f64>) -> Option<f64> {
    let found = gram.self_adjoint_eigenvalues(Side::Lower).ok()?;
    let singular: Vec<f64> = found.into_iter().map(|value| value.max(0.0).sqrt()).collect();
    super::Spectrum::from_values(singular).effective_rank
}

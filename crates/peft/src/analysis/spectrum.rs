//! What a layer's update consists of: its singular values, and what its heads do together and apart.

use super::SiteWeights;
use super::likeness::{Factor, Likeness, inner};
use faer::Mat;
use hydralora_kernels::Tensor;
use serde::{Deserialize, Serialize};

/// The singular values of an update.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spectrum {
    /// The singular values, the largest first.
    pub singular_values: Vec<f64>,
    /// The exponential of the entropy of the singular values over their sum (Roy and Vetterli 2007);
    /// none for an update of zero.
    pub effective_rank: Option<f64>,
    /// The Frobenius norm.
    pub norm: f64,
}

impl Spectrum {
    /// Finds the singular values of `scale · B A` for `A: [k, in]` and `B: [out, k]` from the triangles of
    /// `B` and `Aᵀ`, which are `k` wide, without forming the product; none if they are not found.
    pub fn of(a: &Tensor, b: &Tensor, scale: f64) -> Option<Self> {
        let (inputs, k) = (a.cols(), a.rows());
        let (a, b) = (a.to_f64(), b.to_f64());
        let right = Mat::from_fn(inputs, k, |i, j| a[j * inputs + i]);
        let left = Mat::from_fn(b.len() / k.max(1), k, |i, j| b[i * k + j]);
        let (right, left) = (right.qr(), left.qr());
        let core = left.thin_R() * right.thin_R().transpose();
        let found = core.singular_values().ok()?;
        Some(Self::from_values(found.into_iter().map(|value| value * scale.abs()).collect()))
    }

    /// The measures of these singular values.
    pub fn from_values(singular_values: Vec<f64>) -> Self {
        let sum: f64 = singular_values.iter().sum();
        let entropy = || {
            let shares = singular_values.iter().map(|value| value / sum);
            shares.filter(|share| *share > 0.0).map(|share| -share * share.ln()).sum::<f64>()
        };
        let effective_rank = (sum > 0.0).then(|| entropy().exp());
        let norm = singular_values.iter().map(|value| value * value).sum::<f64>().sqrt();
        Self { singular_values, effective_rank, norm }
    }
}

/// What the heads of a layer do together and apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadMeasures {
    /// How alike the `B` are, the mean over pairs of heads.
    pub b: Likeness,
    /// How alike the `A` are where every head has its own.
    pub a: Option<Likeness>,
    /// `Σ‖D_i‖²` of the heads' updates `D_i = B_i A_i`.
    pub energy: f64,
    /// Mean cosine of two heads' updates.
    pub update_cosine: Option<f64>,
    /// `Σ‖D_i − D̄‖² / Σ‖D_i‖²` with the mean `D̄` of the heads' updates: the share of their energy that
    /// even gates do away with, 0 for heads that are all the same and `1 − 1/N` for `N` equally strong
    /// ones that have nothing in common.
    pub difference_share: Option<f64>,
}

impl HeadMeasures {
    /// Measures the heads of a layer; none where there is one alone.
    pub fn of(weights: &SiteWeights) -> Option<Self> {
        let b: Vec<Factor> = weights.b.iter().map(Factor::of_b).collect();
        let a: Vec<Factor> = weights.a.iter().map(Factor::of_a).collect();
        let products = products(&weights.a, &weights.b);
        let own: f64 = (0..products.len()).map(|i| products[i][i]).sum();
        let all: f64 = products.iter().flatten().sum();
        let cosines: Vec<f64> = (0..products.len())
            .flat_map(|i| (0..i).map(move |j| (i, j)))
            .filter(|&(i, j)| products[i][i] > 0.0 && products[j][j] > 0.0)
            .map(|(i, j)| products[i][j] / (products[i][i] * products[j][j]).sqrt())
            .collect();
        Some(Self {
            b: Likeness::within(&b)?,
            a: Likeness::within(&a),
            energy: own,
            update_cosine: (!cosines.is_empty())
                .then(|| cosines.iter().sum::<f64>() / cosines.len() as f64),
            difference_share: (own > 0.0)
                .then(|| (1.0 - all / (products.len() as f64 * own)).clamp(0.0, 1.0)),
        })
    }
}

/// `⟨B_i A_i, B_j A_j⟩ = Σ_kl (B_iᵀ B_j)_kl (A_i A_jᵀ)_kl` of every two heads.
fn products(a: &[Tensor], b: &[Tensor]) -> Vec<Vec<f64>> {
    let matrix = |tensor: &Tensor| {
        let (width, values) = (tensor.cols(), tensor.to_f64());
        Mat::from_fn(tensor.rows(), width, |i, j| values[i * width + j])
    };
    let a: Vec<Mat<f64>> = a.iter().map(matrix).collect();
    let b: Vec<Mat<f64>> = b.iter().map(matrix).collect();
    let of_a = |head: usize| &a[head % a.len()];
    let shared = (a.len() == 1).then(|| &a[0] * a[0].transpose());
    let product = |i: usize, j: usize| {
        let right = match &shared {
            Some(shared) => shared.clone(),
            None => of_a(i) * of_a(j).transpose(),
        };
        inner(&(b[i].transpose() * &b[j]), &right)
    };
    (0..b.len()).map(|i| (0..b.len()).map(|j| product(i, j)).collect()).collect()
}

//! How alike two factors of one layer are.

use faer::Mat;
use hydralora_kernels::Tensor;
use serde::{Deserialize, Serialize};

/// A factor with its rank along the columns, `Aᵀ: [in, r]` or `B: [out, r]`, and what its comparisons
/// need.
#[derive(Clone, Debug)]
pub struct Factor {
    values: Mat<f64>,
    norm: f64,
    /// Orthonormal columns that span the space of the factor's: `[n, k]`, `k ≤ r`.
    basis: Mat<f64>,
    /// The values less each column's mean.
    centred: Mat<f64>,
    /// `‖XᵀX‖` of the centred values.
    own: f64,
}

impl Factor {
    /// Prepares an `A: [r, in]`, whose row space counts.
    pub fn of_a(a: &Tensor) -> Self {
        let (width, values) = (a.cols(), a.to_f64());
        Self::new(Mat::from_fn(width, a.rows(), |i, j| values[j * width + i]))
    }

    /// Prepares a `B: [out, r]`, whose column space counts.
    pub fn of_b(b: &Tensor) -> Self {
        let (width, values) = (b.cols(), b.to_f64());
        Self::new(Mat::from_fn(b.rows(), width, |i, j| values[i * width + j]))
    }

    fn new(values: Mat<f64>) -> Self {
        let (rows, columns) = (values.nrows(), values.ncols());
        let means: Vec<f64> = (0..columns)
            .map(|j| (0..rows).map(|i| values[(i, j)]).sum::<f64>() / rows.max(1) as f64)
            .collect();
        let centred = Mat::from_fn(rows, columns, |i, j| values[(i, j)] - means[j]);
        let own = (centred.transpose() * &centred).norm_l2();
        Self { norm: values.norm_l2(), basis: basis(&values), own, centred, values }
    }
}

/// Orthonormal columns that span those of `values`; directions that are nothing but rounding are left
/// out.
fn basis(values: &Mat<f64>) -> Mat<f64> {
    let (rows, columns) = (values.nrows(), values.ncols());
    let Ok(svd) = values.thin_svd() else { return Mat::zeros(rows, 0) };
    let sizes = svd.S().column_vector();
    let largest = if sizes.nrows() == 0 { 0.0 } else { sizes[0] };
    let least = largest * f64::EPSILON * rows.max(columns) as f64;
    let kept = (0..sizes.nrows()).filter(|&k| sizes[k] > least).count();
    svd.U().subcols(0, kept).to_owned()
}

/// How alike two factors are. What makes no sense for them is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Likeness {
    /// Cosine of the two matrices, flattened; none for different ranks.
    pub cosine: Option<f64>,
    /// Linear CKA: 1 for factors that differ by a rotation of their rank, 0 for unrelated ones.
    pub cka: Option<f64>,
    /// Mean cosine of the principal angles between their spaces.
    pub angle_cosine: Option<f64>,
    /// The largest principal angle, in degrees.
    pub largest_angle: Option<f64>,
    /// Root mean square cosine of the principal angles between random spaces of these dimensions.
    pub chance: Option<f64>,
}

impl Likeness {
    /// Compares two factors of as many rows; all is none where these differ.
    ///
    /// CKA is that of Kornblith et al., arXiv 1905.00414, with the rows as examples; angles are those of
    /// Björck and Golub 1973, small ones from their sine.
    pub fn between(x: &Factor, y: &Factor) -> Self {
        let rows = x.values.nrows();
        if rows != y.values.nrows() {
            return Self::default();
        }
        let cosine = (x.values.ncols() == y.values.ncols() && x.norm > 0.0 && y.norm > 0.0)
            .then(|| inner(&x.values, &y.values) / (x.norm * y.norm));
        let cka = (x.own > 0.0 && y.own > 0.0)
            .then(|| (y.centred.transpose() * &x.centred).squared_norm_l2() / (x.own * y.own));
        let (angle_cosine, largest_angle) = angles(&x.basis, &y.basis).unzip();
        let dimensions = x.basis.ncols().max(y.basis.ncols()) as f64;
        let chance = angle_cosine.map(|_| (dimensions / rows as f64).sqrt().min(1.0));
        Self { cosine, cka, angle_cosine, largest_angle, chance }
    }

    /// The mean of every measure over those of `all` that have it.
    pub fn mean<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let all: Vec<&Self> = all.into_iter().collect();
        let of = |pick: fn(&Self) -> Option<f64>| {
            let found: Vec<f64> = all.iter().filter_map(|likeness| pick(likeness)).collect();
            (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
        };
        Self {
            cosine: of(|l| l.cosine),
            cka: of(|l| l.cka),
            angle_cosine: of(|l| l.angle_cosine),
            largest_angle: of(|l| l.largest_angle),
            chance: of(|l| l.chance),
        }
    }

    /// The mean over all pairs of a factor of `first` and one of `second`: numbers of heads mean nothing
    /// beyond their adapter.
    pub fn across(first: &[Factor], second: &[Factor]) -> Self {
        let pairs = first.iter().flat_map(|x| second.iter().map(move |y| Self::between(x, y)));
        Self::mean(&pairs.collect::<Vec<_>>())
    }

    /// The mean over all pairs of different factors; none if there is no pair.
    pub fn within(factors: &[Factor]) -> Option<Self> {
        let pairs: Vec<Self> = factors
            .iter()
            .enumerate()
            .flat_map(|(at, x)| factors[at + 1..].iter().map(move |y| Self::between(x, y)))
            .collect();
        (!pairs.is_empty()).then(|| Self::mean(&pairs))
    }
}

/// `Σ_ij x_ij y_ij`.
pub(super) fn inner(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
    (0..x.ncols()).map(|j| (0..x.nrows()).map(|i| x[(i, j)] * y[(i, j)]).sum::<f64>()).sum()
}

/// Mean cosine and largest angle, in degrees, between the spaces of two bases; none if one is empty.
fn angles(x: &Mat<f64>, y: &Mat<f64>) -> Option<(f64, f64)> {
    let (wide, thin) = if x.ncols() >= y.ncols() { (x, y) } else { (y, x) };
    if thin.ncols() == 0 {
        return None;
    }
    let across = wide.transpose() * thin;
    let cosines = across.singular_values().ok()?;
    let cosines: Vec<f64> = cosines.iter().map(|cosine| cosine.clamp(0.0, 1.0)).collect();
    let smallest = cosines.iter().copied().fold(1.0, f64::min);
    let largest = if smallest * smallest > 0.5 {
        // An angle near 0 is lost in its cosine.
        let rest = thin - wide * &across;
        let sine = rest.singular_values().ok()?.into_iter().fold(0.0, f64::max);
        sine.min(1.0).asin()
    } else {
        smallest.acos()
    };
    Some((cosines.iter().sum::<f64>() / cosines.len() as f64, largest.to_degrees()))
}

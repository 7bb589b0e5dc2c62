//! Folding an adapter into the base's weights.
//!
//! ```text
//! Delta   W' = W + scale · (Σ_i w_i B_i A_i − B₀ A₀)       − B₀ A₀ where a start was taken out of W
//! Map     W'_o = m_o (W + Delta)_o / ‖(W + Delta)_o‖        DoRA
//! Scale   W'_oj = l_o W_oj, b'_o = l_o b_o       or       W'_oj = W_oj l_j
//! ```
//!
//! A router's gates depend on the token, so a routed layer has no such `W'` unless its gates are
//! held fixed; [`Gates`] says at which values.

use crate::error::{Error, Result};
use crate::tuned::Tuned;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::{DType, Tensor};
use hydralora_model::adapter::{HeadGates, LowRankUpdate, Side, Site, SiteShape, Update};
use std::collections::BTreeMap;
use std::fmt;

/// At which values the gates of routed layers are held.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Gates {
    /// At none: they are computed per token, and a routed layer cannot be folded.
    #[default]
    PerToken,
    /// At `1/N` for each of `N` experts.
    Uniform,
    /// At these values for each layer, in the order of the experts.
    Fixed(BTreeMap<Site, Vec<f64>>),
}

/// What an adapter does to a layer's weight.
pub enum Merge<'a> {
    /// Nothing.
    Unchanged,
    /// Adds a product of thin matrices.
    Delta(Box<Factors>),
    /// Multiplies every output (row of the weight) by `l: [out]`, the bias too.
    ScaleOutput(Tensor),
    /// Multiplies every input (column of the weight) by `l: [in]`.
    ScaleInput(Tensor),
    /// Replaces the weight `[out, in]` by what this makes of it.
    Map(Box<dyn Fn(Tensor) -> Tensor + 'a>),
    /// Nothing that a weight could do instead, for this reason.
    Refused(String),
}

impl fmt::Debug for Merge<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Merge::Unchanged => f.write_str("Unchanged"),
            Merge::Delta(factors) => f.debug_tuple("Delta").field(factors).finish(),
            Merge::ScaleOutput(l) => f.debug_tuple("ScaleOutput").field(l).finish(),
            Merge::ScaleInput(l) => f.debug_tuple("ScaleInput").field(l).finish(),
            Merge::Map(_) => f.write_str("Map"),
            Merge::Refused(why) => f.debug_tuple("Refused").field(why).finish(),
        }
    }
}

/// `scale · Σ_i B_i A_i`, the gates already in the `B_i`, and a further pair beside them.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `[r, in]` if all experts share it, else `[N·r, in]`.
    pub a: Tensor,
    /// `[out, N·r]`: the experts' `B_i`, each times its gate, side by side.
    pub b: Tensor,
    /// The factor on the product.
    pub scale: f64,
    /// Number `N` of experts.
    pub num_experts: usize,
    /// A pair `[k, in]`, `[out, k]` whose product is added too, at the same scale: `A₀` and `−B₀` of a
    /// start that was taken out of the weight.
    pub beside: Option<[Tensor; 2]>,
}

const PER_TOKEN: &str = "its heads are weighed anew for every token, by a router that reads the token, \
                         so no single matrix does what they do together";

impl Factors {
    /// The update of the layer at `site` with routed heads weighed as `gates` says.
    ///
    /// # Errors
    /// If heads are weighed per token, or not by as many gates as there are heads.
    pub(crate) fn of(site: Site, update: &LowRankUpdate, gates: &Gates) -> Result<Self, String> {
        let experts = update.num_experts;
        let even = || vec![1.0 / experts as f64; experts];
        let weights = match (&update.gates, gates) {
            (HeadGates::Sum, _) => vec![1.0; experts],
            (HeadGates::Mean, _) | (_, Gates::Uniform) => even(),
            (_, Gates::PerToken) => return Err(PER_TOKEN.to_owned()),
            (_, Gates::Fixed(found)) => match found.get(&site) {
                Some(weights) if weights.len() == experts => weights.clone(),
                Some(weights) => {
                    return Err(format!("{site} has {experts} heads, not {}", weights.len()));
                }
                None => return Err(format!("no gates are known for {site}")),
            },
        };
        let b = update.b.value();
        let rank = b.cols() / experts;
        let weighed = b.to_f64().into_iter().enumerate();
        let weighed: Vec<f64> =
            weighed.map(|(at, value)| value * weights[at % b.cols() / rank]).collect();
        Ok(Self {
            a: update.a.value().clone(),
            b: Tensor::from_f64(b.dtype(), &weighed, b.shape()),
            scale: update.scale,
            num_experts: experts,
            beside: None,
        })
    }

    /// Whether all experts use the same `A`.
    fn shared_a(&self) -> bool {
        self.num_experts > 1 && self.a.rows() < self.b.cols()
    }

    /// The pair `[N·r, in]`, `[out, N·r]` of the same product, a shared `A` repeated for every head;
    /// `k` more where there is a pair beside them.
    pub fn stacked(&self) -> (Tensor, Tensor) {
        if !self.shared_a() {
            return self.with_beside(self.a.clone(), self.b.clone());
        }
        let one = self.a.to_f64();
        let stack: Vec<f64> = (0..self.num_experts).flat_map(|_| one.iter().copied()).collect();
        let shape = [self.b.cols(), self.a.cols()];
        self.with_beside(Tensor::from_f64(self.a.dtype(), &stack, shape), self.b.clone())
    }

    /// The pair of lowest rank of the same product: the heads of a shared `A` added up.
    pub fn compact(&self) -> (Tensor, Tensor) {
        if !self.shared_a() {
            return self.with_beside(self.a.clone(), self.b.clone());
        }
        let rank = self.a.rows();
        let sums: Vec<f64> = self
            .b
            .to_f64()
            .chunks_exact(self.b.cols())
            .flat_map(|row| {
                (0..rank).map(|k| row.iter().skip(k).step_by(rank).sum::<f64>()).collect::<Vec<_>>()
            })
            .collect();
        let b = Tensor::from_f64(self.b.dtype(), &sums, [self.b.rows(), rank]);
        self.with_beside(self.a.clone(), b)
    }

    /// `a` with the rows of the pair beside it below, `b` with its columns to the right.
    fn with_beside(&self, a: Tensor, b: Tensor) -> (Tensor, Tensor) {
        let Some([more_a, more_b]) = &self.beside else { return (a, b) };
        let rank = a.rows() + more_a.rows();
        let rows = [a.to_f64(), more_a.to_f64()].concat();
        let (left, right) = (b.to_f64(), more_b.to_f64());
        let columns: Vec<f64> = left
            .chunks_exact(b.cols())
            .zip(right.chunks_exact(more_b.cols()))
            .flat_map(|(left, right)| left.iter().chain(right).copied())
            .collect();
        (
            Tensor::from_f64(a.dtype(), &rows, [rank, a.cols()]),
            Tensor::from_f64(b.dtype(), &columns, [b.rows(), rank]),
        )
    }

    /// `scale · B A` as `[out, in]` in `f32`.
    pub fn product(&self) -> Tensor {
        let (a, b) = self.compact();
        let (rank, inputs) = (a.rows(), a.cols());
        let values = a.to_f32();
        let transposed: Vec<f32> = (0..inputs)
            .flat_map(|column| (0..rank).map(move |row| row * inputs + column))
            .map(|at| values[at])
            .collect();
        let layer = FrozenLinear::dense(Tensor::new(transposed, [inputs, rank]));
        let mut product = layer.apply(&b.to_dtype(DType::F32));
        product.scale(self.scale);
        product
    }
}

impl Merge<'_> {
    /// What an update of the layer at `site` comes to, with routed heads weighed as `gates` says.
    pub(crate) fn of(site: Site, update: Update<'_>, gates: &Gates) -> Self {
        match update {
            Update::None => Merge::Unchanged,
            Update::LowRank(update) => match Factors::of(site, &update, gates) {
                Ok(factors) => Merge::Delta(Box::new(factors)),
                Err(why) => Merge::Refused(why),
            },
            Update::Scale(side, factors) => {
                let factors = factors.value().clone();
                let len = factors.len();
                match side {
                    Side::Input => Merge::ScaleInput(factors.reshape([len])),
                    Side::Output => Merge::ScaleOutput(factors.reshape([len])),
                }
            }
            Update::Replace(..) | Update::Custom(_) => Merge::Refused(
                "its method does not change weights in a way that is known here".to_owned(),
            ),
        }
    }

    /// What becomes of the weight `[out, in]`, in `f32`.
    pub fn weight(&self, mut weight: Tensor) -> Tensor {
        match self {
            Merge::Unchanged | Merge::Refused(_) => {}
            Merge::Delta(factors) => weight.add_assign(&factors.product()),
            Merge::ScaleOutput(l) => {
                let width = weight.cols();
                let l = l.to_f32();
                for (row, l) in weight.data_mut::<f32>().chunks_exact_mut(width).zip(l) {
                    row.iter_mut().for_each(|w| *w *= l);
                }
            }
            Merge::ScaleInput(l) => {
                let width = weight.cols();
                let l = l.to_f32();
                for row in weight.data_mut::<f32>().chunks_exact_mut(width) {
                    row.iter_mut().zip(&l).for_each(|(w, l)| *w *= l);
                }
            }
            Merge::Map(map) => weight = map(weight),
        }
        weight
    }

    /// What becomes of the bias `[out]`, in `f32`.
    pub fn bias(&self, mut bias: Tensor) -> Tensor {
        if let Merge::ScaleOutput(l) = self {
            let l = l.to_f32();
            bias.data_mut::<f32>().iter_mut().zip(l).for_each(|(b, l)| *b *= l);
        }
        bias
    }
}

/// An adapter ready to be folded.
pub struct MergePlan<'a> {
    sites: BTreeMap<Site, Merge<'a>>,
    tuned: &'a dyn Tuned,
}

impl fmt::Debug for MergePlan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MergePlan").field("sites", &self.sites).finish_non_exhaustive()
    }
}

impl<'a> MergePlan<'a> {
    /// What `tuned` does to each layer of `all` with the gates of routed layers held at `gates`.
    ///
    /// # Errors
    /// If a layer cannot be folded, with the reason.
    pub fn new(tuned: &'a dyn Tuned, all: &[SiteShape], gates: &Gates) -> Result<Self> {
        let mut sites = BTreeMap::new();
        for shape in all {
            match tuned.merge(shape.site, gates) {
                Merge::Unchanged => {}
                Merge::Refused(reason) => return Err(Error::CannotMerge { reason }),
                merge => {
                    sites.insert(shape.site, merge);
                }
            }
        }
        Ok(Self { sites, tuned })
    }

    /// What happens at each layer that changes.
    pub fn sites(&self) -> &BTreeMap<Site, Merge<'a>> {
        &self.sites
    }

    /// Whether a tied output layer gets another weight than the embedding.
    pub fn unties(&self) -> bool {
        self.tuned.unties()
    }

    /// What becomes of the base's tensor `name`, given in `f32`.
    pub fn edit(&self, name: &str, tensor: Tensor) -> Tensor {
        let tensor = self.tuned.merge_tensor(name, tensor);
        let of = |suffix: &str| {
            let site = name.strip_suffix(suffix)?.parse::<Site>().ok()?;
            self.sites.get(&site)
        };
        if let Some(merge) = of(".weight") {
            merge.weight(tensor)
        } else if let Some(merge) = of(".bias") {
            merge.bias(tensor)
        } else {
            tensor
        }
    }
}

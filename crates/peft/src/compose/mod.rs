//! One LoRA out of several that were trained apart, one file a way.
//!
//! Names and formulas are those of PEFT's `add_weighted_adapter` where it has them. With `s_i` the
//! scales and `w_i` the weights:
//!
//! | way | update |
//! | --- | --- |
//! | `average` | `(1/n) Σ s_i B_i A_i`, exactly |
//! | `task-arithmetic` | `Σ w_i s_i B_i A_i`, exactly (PEFT's `cat`; with a rank, its `svd`) |
//! | `linear` | `(Σ √(w_i s_i) B_i)(Σ √(w_i s_i) A_i)` |
//! | `ties`, `dare-linear`, `dare-ties` | as `linear`, each factor thinned out first |
//! | `lorahub` | `s (Σ w_i B_i)(Σ w_i A_i)`, the `w_i` found on a few examples |

mod average;
mod dare;
mod linear;
pub mod lorahub;
mod search;
mod svd;
mod task_arithmetic;
mod ties;

use crate::error::{Error, Fault, Result};
use crate::exchange::{Lora, Pair, weighted_sum};
use crate::trainable::TensorMap;
use crate::tuned::Beside;
use hydralora_kernels::Tensor;
use hydralora_model::adapter::Site;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// What the ways have in common.
#[derive(Clone, Debug, Default)]
pub struct ComposeOptions {
    /// A weight for each LoRA.
    pub weights: Vec<f64>,
    /// Share of the numbers that `ties` and `dare` keep, in (0, 1].
    pub density: f64,
    /// Seed of `dare`'s draws.
    pub seed: u64,
    /// Rank of the result of an exact way; the sum of all ranks if not given.
    pub rank: Option<usize>,
}

/// A way to compose LoRAs.
pub trait Composition: Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;
    /// One line for `--help`.
    fn summary(&self) -> &'static str;
    /// Whether all LoRAs need the same rank.
    fn same_rank(&self) -> bool;
    /// Whether it takes means, so that whole tensors can be put together too.
    fn takes_means(&self) -> bool {
        false
    }
    /// The pair of a layer from those of the LoRAs that have it, each with its scale and weight; the
    /// result's scale is 1.
    fn pair(&self, site: Site, parts: &[Part<'_>], options: &ComposeOptions) -> Pair;
}

/// One LoRA's share of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Its matrices.
    pub pair: &'a Pair,
    /// Its scale.
    pub scale: f64,
    /// Its weight.
    pub weight: f64,
    /// How many LoRAs there are in all.
    pub of: usize,
}

/// Every way but `lorahub`, which needs a model.
pub static COMPOSITIONS: &[&dyn Composition] = &[
    &average::Average,
    &task_arithmetic::TaskArithmetic,
    &linear::Linear,
    &ties::Ties,
    &dare::DareLinear,
    &dare::DareTies,
];

/// Composes `loras`.
///
/// # Errors
/// If the number of weights differs from that of the LoRAs, an option is out of range, or ranks
/// differ where they may not.
pub fn compose(way: &dyn Composition, loras: &[Lora], options: &ComposeOptions) -> Result<Lora> {
    check(way, loras, options)?;
    let all: BTreeSet<Site> = loras.iter().flat_map(|lora| lora.sites.keys().copied()).collect();
    let mut sites: BTreeMap<Site, Pair> = BTreeMap::new();
    for site in all {
        let parts: Vec<Part<'_>> = loras
            .iter()
            .zip(&options.weights)
            .filter_map(|(lora, &weight)| {
                let pair = lora.sites.get(&site)?;
                Some(Part { pair, scale: lora.scale(), weight, of: loras.len() })
            })
            .collect();
        sites.insert(site, way.pair(site, &parts, options));
    }
    let rank = sites.values().map(|pair| pair.a.rows()).max().unwrap_or(0);
    // For layers that fewer LoRAs have.
    sites.values_mut().for_each(|pair| pair.widen(rank));
    let mut composed = Lora {
        path: PathBuf::new(),
        rank,
        alpha: rank as f64,
        use_rslora: false,
        sites,
        beside: beside(way, loras)?,
        target_modules: serde_json::Value::Null,
        base_model: String::new(),
        metadata: None,
    };
    composed.inherit(loras);
    Ok(composed)
}

fn check(way: &dyn Composition, loras: &[Lora], options: &ComposeOptions) -> Result<()> {
    let mut faults = Vec::new();
    let mut fault = |field: &str, message: String| faults.push(Fault::new(field, message));
    let count = options.weights.len();
    if loras.len() < 2 {
        fault("adapters", format!("{} given; expected at least 2", loras.len()));
    }
    if count != loras.len() {
        fault("weights", format!("{count} given for {} adapters", loras.len()));
    }
    if let Some(weight) = options.weights.iter().find(|weight| !weight.is_finite()) {
        fault("weights", format!("{weight}; expected finite numbers"));
    }
    if !(options.density > 0.0 && options.density <= 1.0) {
        fault("density", format!("is {}; expected 0 < density ≤ 1", options.density));
    }
    if options.rank == Some(0) {
        fault("rank", "is 0; expected at least 1".to_owned());
    }
    if options.rank.is_some() && way.same_rank() {
        fault("rank", format!("{} keeps the adapters' rank", way.name()));
    }
    if !faults.is_empty() {
        return Err(Error::Options { faults });
    }
    if way.same_rank() {
        same_rank(way.name(), loras)?;
    }
    Ok(())
}

/// Refuses LoRAs that train anything beside their layers.
fn nothing_beside(loras: &[Lora]) -> Result<()> {
    let found = |lora: &Lora| Some((lora.path.clone(), lora.beside.tensors.keys().next()?.clone()));
    match loras.iter().find_map(found) {
        None => Ok(()),
        Some((path, name)) => Err(Error::Malformed {
            path,
            message: format!(
                "trains `{name}` beside its layers: whole rows, and no change to add up; expected \
                 `average`, or merge it into the base first"
            ),
        }),
    }
}

/// What the LoRAs train beside their layers, put together: their mean, if that is what the way is and
/// they train the same.
fn beside(way: &dyn Composition, loras: &[Lora]) -> Result<Beside> {
    let Some(first) = loras.iter().find(|lora| !lora.beside.is_empty()) else {
        return Ok(Beside::default());
    };
    let name = first.beside.tensors.keys().next().cloned().unwrap_or_default();
    if !way.takes_means() {
        nothing_beside(loras)?;
    }
    let same = |other: &&Lora| {
        other.beside.config == first.beside.config
            && other.beside.tensors.keys().eq(first.beside.tensors.keys())
    };
    if let Some(other) = loras.iter().find(|other| !same(other)) {
        return Err(Error::Incompatible {
            first: first.path.clone(),
            second: other.path.clone(),
            message: format!("only one of them trains `{name}`, or they train other tokens"),
        });
    }
    let share = vec![1.0 / loras.len() as f64; loras.len()];
    let mut tensors = TensorMap::new();
    for (name, own) in &first.beside.tensors {
        let all: Vec<&Tensor> =
            loras.iter().filter_map(|lora| lora.beside.tensors.get(name)).collect();
        if let Some(other) = all.iter().find(|other| other.shape() != own.shape()) {
            let message = format!("{name}: {:?} and {:?}", own.shape(), other.shape());
            let second = loras.last().map(|lora| lora.path.clone()).unwrap_or_default();
            return Err(Error::Incompatible { first: first.path.clone(), second, message });
        }
        tensors.insert(name.clone(), weighted_sum(&all, &share));
    }
    Ok(Beside { tensors, config: first.beside.config.clone() })
}

fn same_rank(name: &str, loras: &[Lora]) -> Result<()> {
    match loras.iter().find(|other| other.rank != loras[0].rank) {
        None => Ok(()),
        Some(other) => Err(Error::Incompatible {
            first: loras[0].path.clone(),
            second: other.path.clone(),
            message: format!(
                "ranks {} and {}; {name} adds the factors themselves, so it needs the same \
                 (`average` and `task-arithmetic` do not)",
                loras[0].rank, other.rank
            ),
        }),
    }
}

/// Both factors put through `combine`, which gets the tensors and their weights: `√|w s|` for either
/// factor, the sign of `w s` with `A`. The last argument tells the two apart.
fn factorwise(parts: &[Part<'_>], combine: impl Fn(&[&Tensor], &[f64], usize) -> Tensor) -> Pair {
    let root = |part: &Part<'_>| (part.weight * part.scale).abs().sqrt();
    let signed = |part: &Part<'_>| {
        if part.weight * part.scale < 0.0 { -root(part) } else { root(part) }
    };
    let of_a: Vec<f64> = parts.iter().map(signed).collect();
    let of_b: Vec<f64> = parts.iter().map(root).collect();
    let a: Vec<&Tensor> = parts.iter().map(|part| &part.pair.a).collect();
    let b: Vec<&Tensor> = parts.iter().map(|part| &part.pair.b).collect();
    Pair { a: combine(&a, &of_a, 0), b: combine(&b, &of_b, 1) }
}

/// `Σ f_i B_i A_i` as one pair: `A` rows below each other, each times its `f_i`, `B` columns side by
/// side; cut to `rank` by singular value decomposition if that is given and smaller.
fn concatenated(parts: &[Part<'_>], factors: &[f64], rank: Option<usize>) -> Pair {
    let total: usize = parts.iter().map(|part| part.pair.a.rows()).sum();
    let (inputs, outputs) = (parts[0].pair.a.cols(), parts[0].pair.b.rows());
    let mut a = Vec::with_capacity(total * inputs);
    for (part, factor) in parts.iter().zip(factors) {
        a.extend(part.pair.a.to_f64().iter().map(|value| value * factor));
    }
    let columns: Vec<Vec<f64>> = parts.iter().map(|part| part.pair.b.to_f64()).collect();
    let mut b = Vec::with_capacity(total * outputs);
    for row in 0..outputs {
        for (part, values) in parts.iter().zip(&columns) {
            let width = part.pair.b.cols();
            b.extend_from_slice(&values[row * width..(row + 1) * width]);
        }
    }
    let dtype = parts[0].pair.a.dtype();
    match rank.filter(|&rank| rank < total) {
        None => Pair {
            a: Tensor::from_f64(dtype, &a, [total, inputs]),
            b: Tensor::from_f64(dtype, &b, [outputs, total]),
        },
        Some(rank) => {
            let (a, b) = svd::truncated(&a, &b, total, rank);
            Pair {
                a: Tensor::from_f64(dtype, &a, [rank, inputs]),
                b: Tensor::from_f64(dtype, &b, [outputs, rank]),
            }
        }
    }
}

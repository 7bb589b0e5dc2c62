//! LoRAHub: `A = Σ w_i A_i`, `B = Σ w_i B_i`, with weights that a search without gradients finds on a
//! few examples: the least `loss(w) + 0.05 · mean |w_i|` over `-1.5 ≤ w_i ≤ 1.5`, from zero.
//!
//! Huang et al., arXiv 2307.13269. The published code searches with nevergrad's `NGOpt`; here it is
//! BOBYQA, which needs no seed.

use super::search::minimise;
use super::{same_rank, weighted_sum};
use crate::error::{Error, Result};
use crate::exchange::{Lora, Pair};
use hydralora_kernels::Tensor;
use std::path::PathBuf;

/// Weights lie between this and its negative.
pub const BOUND: f64 = 1.5;
/// Factor on the mean magnitude of the weights.
pub const PENALTY: f64 = 0.05;
/// Most evaluations, as in the published code.
pub const BUDGET: usize = 40;

/// What the search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// One weight per LoRA.
    pub weights: Vec<f64>,
    /// The loss without any of them, that is, of the base.
    pub base_loss: f64,
    /// The loss with these weights, the penalty not counted.
    pub loss: f64,
}

/// The LoRA of these weights.
///
/// # Errors
/// If the LoRAs differ in layers, rank or scale.
pub fn weighted(loras: &[Lora], weights: &[f64]) -> Result<Lora> {
    let [first, rest @ ..] = loras else {
        let fault = crate::error::Fault::new("adapters", "none given; expected at least 1");
        return Err(Error::Options { faults: vec![fault] });
    };
    same_rank("lorahub", loras)?;
    for other in rest {
        let same_layers = first.sites.keys().eq(other.sites.keys());
        let same_scale = (first.scale() - other.scale()).abs() <= 1e-9 * first.scale().abs();
        if !(same_layers && same_scale) {
            let what = if same_layers { "scale" } else { "layers" };
            return Err(Error::Incompatible {
                first: first.path.clone(),
                second: other.path.clone(),
                message: format!("their {what} differ; lorahub needs the same"),
            });
        }
    }
    super::nothing_beside(loras)?;
    let sites = first.sites.keys().map(|site| {
        let pairs: Vec<&Pair> = loras.iter().filter_map(|lora| lora.sites.get(site)).collect();
        let a: Vec<&Tensor> = pairs.iter().map(|pair| &pair.a).collect();
        let b: Vec<&Tensor> = pairs.iter().map(|pair| &pair.b).collect();
        (*site, Pair { a: weighted_sum(&a, weights), b: weighted_sum(&b, weights) })
    });
    let mut lora = Lora { path: PathBuf::new(), sites: sites.collect(), ..first.clone() };
    lora.inherit(loras);
    Ok(lora)
}

/// Searches weights for `loras` with at most `budget` evaluations of `loss`.
///
/// # Errors
/// If the LoRAs cannot be added, or whatever `loss` says.
pub fn search<E: From<Error>>(
    loras: &[Lora],
    budget: usize,
    loss: &mut dyn FnMut(&Lora) -> Result<f64, E>,
) -> Result<Found, E> {
    let mut losses: Vec<(Vec<f64>, f64)> = Vec::new();
    let mut objective = |weights: &[f64]| -> Result<f64, E> {
        let found = loss(&weighted(loras, weights)?)?;
        losses.push((weights.to_vec(), found));
        let size = weights.iter().map(|w| w.abs()).sum::<f64>() / weights.len() as f64;
        let value = found + PENALTY * size;
        // A loss that is no number must not count as an improvement.
        Ok(if value.is_nan() { f64::INFINITY } else { value })
    };
    let best = minimise(&vec![0.0; loras.len()], BOUND, budget.max(1), &mut objective)?;
    let of = |point: &[f64]| losses.iter().find(|(w, _)| w == point).map_or(f64::NAN, |(_, l)| *l);
    let (base_loss, loss) = (losses.first().map_or(f64::NAN, |(_, l)| *l), of(&best.point));
    Ok(Found { weights: best.point, base_loss, loss })
}

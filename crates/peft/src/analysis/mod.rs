//! What the weights of trained adapters have in common, measured without the base model.
//!
//! | measure | of | where |
//! | --- | --- | --- |
//! | cosine, linear CKA, principal angles | two `A` or two `B` of a layer | [`Likeness`] |
//! | singular values, effective rank | a layer's update | [`Spectrum`] |
//! | share of the differences between heads | a layer's heads | [`HeadMeasures`] |
//! | cosine and rank of a layer's heads, cheaply | a layer's heads | [`SiteHeads`] |
//! | coordinates for a map | any `A` and `B` | [`coordinates`] |

mod heads;
mod likeness;
mod map;
mod spectrum;
#[cfg(test)]
mod tests;

pub use heads::{SiteHeads, heads};
pub use likeness::{Factor, Likeness};
pub use map::coordinates;
pub use spectrum::{HeadMeasures, Spectrum};

use crate::error::{Error, Result};
use crate::io;
use crate::merge::{Gates, Merge};
use crate::method::MethodOptions;
use crate::trainable::TensorMap;
use crate::tuned::Tuned;
use hydralora_kernels::{DType, Tensor};
use hydralora_model::adapter::{Site, SiteShape};
use std::collections::BTreeMap;
use std::path::Path;

/// The factors of a layer's update.
#[derive(Clone, Debug)]
pub struct SiteWeights {
    /// Every `A: [r, in]`: one that all heads share, or one a head.
    pub a: Vec<Tensor>,
    /// Every head `B: [out, r]`.
    pub b: Vec<Tensor>,
    /// The whole update, heads weighed evenly.
    pub update: Result<Spectrum, String>,
}

/// The factors of an adapter by layer.
pub type Weights = BTreeMap<Site, SiteWeights>;

/// Takes the `A` and `B` of every layer of `tuned`, with its update under even gates.
///
/// # Errors
/// If the method has no `A` and `B`; `folder` is named in the message.
pub fn weights(folder: &Path, tuned: &dyn Tuned) -> Result<Weights> {
    let mut sites: Weights = factors(tuned.tensors())
        .into_iter()
        .filter(|(_, [a, b])| !a.is_empty() && !b.is_empty())
        .map(|(site, [a, b])| (site, SiteWeights { a, b, update: update(tuned, site) }))
        .collect();
    let fits = |a: usize, b: usize| b.is_multiple_of(a) || b == 1;
    sites.retain(|_, weights| fits(weights.a.len(), weights.b.len()));
    if sites.is_empty() {
        return Err(without_factors(folder)?);
    }
    Ok(sites)
}

/// What is wrong with the folder of a method that has no `A` and `B`.
///
/// # Errors
/// If the folder cannot be read.
pub fn without_factors(folder: &Path) -> Result<Error> {
    let method = io::method_of(folder)?;
    Ok(Error::Malformed {
        path: folder.to_path_buf(),
        message: format!(
            "{method} has no A and B to look at; expected a low-rank adapter (lora, hydralora, \
             lora-split, loramoe, mtl-lora, adalora)"
        ),
    })
}

/// The `A` that a fresh adapter of these options has at `sites`, drawn from `seed`; or why that is not
/// known.
///
/// # Errors
/// With the reason.
pub fn initial_a(
    options: &dyn MethodOptions,
    sites: &[SiteShape],
    seed: u64,
) -> Result<BTreeMap<Site, Vec<Tensor>>, String> {
    if options.whole_model() {
        return Err("the method's tensors belong to no single layer".to_owned());
    }
    let fresh = options.build(sites, DType::F32, seed);
    if fresh.starts_from_weights() {
        return Err("A started from the base model's weights".to_owned());
    }
    Ok(factors(fresh.tensors()).into_iter().map(|(site, [a, _])| (site, a)).collect())
}

/// Every `A` and every `B` by layer, in the order of their numbers.
fn factors(tensors: TensorMap) -> BTreeMap<Site, [Vec<Tensor>; 2]> {
    let mut numbered: BTreeMap<Site, [BTreeMap<usize, Tensor>; 2]> = BTreeMap::new();
    for (name, tensor) in tensors {
        let Some(site) = io::site_of(&name) else { continue };
        let part = name.strip_prefix(&format!("{site}.")).unwrap_or_default();
        // AdaLoRA's are parameters of their own and no layers' weights.
        let part = part.strip_suffix(".weight").unwrap_or(part);
        let number = |letter: &str| -> Option<usize> {
            let number = part.strip_prefix("lora_")?.strip_prefix(letter)?;
            if number.is_empty() { Some(0) } else { number.parse().ok() }
        };
        for (at, letter) in ["A", "B"].into_iter().enumerate() {
            if let Some(number) = number(letter) {
                numbered.entry(site).or_default()[at].insert(number, tensor.clone());
            }
        }
    }
    let listed = |map: BTreeMap<usize, Tensor>| map.into_values().collect();
    numbered.into_iter().map(|(site, parts)| (site, parts.map(listed))).collect()
}

fn update(tuned: &dyn Tuned, site: Site) -> Result<Spectrum, String> {
    match tuned.merge(site, &Gates::Uniform) {
        Merge::Delta(factors) => {
            let (a, b) = factors.compact();
            Spectrum::of(&a, &b, factors.scale)
                .ok_or_else(|| "its singular values were not found".to_owned())
        }
        Merge::Refused(reason) => Err(reason),
        Merge::Unchanged => Err("nothing is added to the weight".to_owned()),
        Merge::ScaleOutput(_) | Merge::ScaleInput(_) | Merge::Map(_) => Err(
            "what it does to the weight is no product of A and B alone; that takes the base model"
                .to_owned(),
        ),
    }
}

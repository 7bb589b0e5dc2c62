//! DARE: drop a random share of each factor's numbers and scale up the rest by `1 / density`, then
//! go on as `linear` or as `ties` (without its trimming).
//!
//! Yu et al., arXiv 2311.03099, in PEFT's reading.

use super::{ComposeOptions, Composition, Pair, Part, factorwise, ties, weighted_sum};
use crate::random::random_stream;
use hydralora_kernels::Tensor;
use hydralora_model::adapter::Site;
use rand::Rng;

pub(super) struct DareLinear;
pub(super) struct DareTies;

impl Composition for DareLinear {
    fn name(&self) -> &'static str {
        "dare-linear"
    }

    fn summary(&self) -> &'static str {
        "drop at random and rescale, then as linear"
    }

    fn same_rank(&self) -> bool {
        true
    }

    fn pair(&self, site: Site, parts: &[Part<'_>], options: &ComposeOptions) -> Pair {
        factorwise(parts, |tensors, weights, factor| {
            let kept: Vec<Tensor> = thinned(site, tensors, factor, options)
                .into_iter()
                .zip(tensors)
                .map(|(values, like)| Tensor::from_f64(like.dtype(), &values, like.shape()))
                .collect();
            weighted_sum(&kept.iter().collect::<Vec<_>>(), weights)
        })
    }
}

impl Composition for DareTies {
    fn name(&self) -> &'static str {
        "dare-ties"
    }

    fn summary(&self) -> &'static str {
        "drop at random and rescale, then elect signs"
    }

    fn same_rank(&self) -> bool {
        true
    }

    fn pair(&self, site: Site, parts: &[Part<'_>], options: &ComposeOptions) -> Pair {
        factorwise(parts, |tensors, weights, factor| {
            ties::elect(&thinned(site, tensors, factor, options), weights, tensors[0])
        })
    }
}

/// Each number kept with probability `density` and divided by it; the draws depend on the seed, the
/// layer, the factor and the LoRA's place.
fn thinned(
    site: Site,
    tensors: &[&Tensor],
    factor: usize,
    options: &ComposeOptions,
) -> Vec<Vec<f64>> {
    let density = options.density;
    let thin = |(index, tensor): (usize, &&Tensor)| {
        let mut random = random_stream(options.seed, &format!("{site}.{factor}.{index}"));
        let mut keep = || f64::from(random.next_u32()) < density * 4_294_967_296.0;
        tensor.to_f64().into_iter().map(|v| if keep() { v / density } else { 0.0 }).collect()
    };
    tensors.iter().enumerate().map(thin).collect()
}

//! What is random about an adapter: the start of its tensors, and the masks of its dropout. Both follow
//! from a seed and a name or place alone, so neither a further target nor a resumed run changes them.

use hydralora_kernels::ops::dropout::{Dropout, mix};
use hydralora_kernels::{DType, Tensor};
use hydralora_model::adapter::{Pass, Site, name_hash};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Random numbers whose stream depends on `seed` and `name` alone, so adding a target does not
/// change the start of the others.
pub(crate) fn random_stream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(name_hash(name));
    random
}

/// Uniform in `(-bound, bound)`.
pub(crate) fn uniform(
    seed: u64,
    name: &str,
    bound: f64,
    dtype: DType,
    shape: impl AsRef<[usize]>,
) -> Tensor {
    let mut random = random_stream(seed, name);
    let values: Vec<f64> = (0..shape.as_ref().iter().product())
        .map(|_| {
            let unit = f64::from(random.next_u32()) / f64::from(u32::MAX);
            (2.0 * unit - 1.0) * bound
        })
        .collect();
    Tensor::from_f64(dtype, &values, shape)
}

/// Normal with mean 0 and standard deviation `deviation` (Box and Muller's transform).
pub(crate) fn normal(
    seed: u64,
    name: &str,
    deviation: f64,
    dtype: DType,
    shape: impl AsRef<[usize]>,
) -> Tensor {
    let mut random = random_stream(seed, name);
    let mut unit = || (f64::from(random.next_u32()) + 0.5) / 4_294_967_296.0;
    let values: Vec<f64> = (0..shape.as_ref().iter().product())
        .map(|_| {
            let radius = (-2.0 * unit().ln()).sqrt();
            deviation * radius * (std::f64::consts::TAU * unit()).cos()
        })
        .collect();
    Tensor::from_f64(dtype, &values, shape)
}

/// The bound of Kaiming's uniform start with `a = √5`, as PyTorch's linear layers use it:
/// `1/√fan_in`.
pub(crate) fn kaiming_bound(fan_in: usize) -> f64 {
    1.0 / (fan_in as f64).sqrt()
}

/// What drops inputs of the low-rank part of the layer at `site`, under a mask of that layer's own;
/// nothing outside of training.
pub(crate) fn layer_dropout(site: Site, probability: f64, pass: &Pass<'_>) -> Option<Dropout> {
    let seed = pass.dropout_seed().filter(|_| probability > 0.0)?;
    Some(Dropout { probability, seed: mix(seed ^ mix(site.name_hash())) })
}

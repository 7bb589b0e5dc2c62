//! Inverted dropout whose mask is a function of `(seed, element index)`: nothing is stored, the
//! backward and a recomputed forward draw the same mask, and it does not depend on threads.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::simd::vectorize;
use crate::tensor::Tensor;
use hydralora_runtime::{chunks_mut, for_each};

const CHUNK: usize = 1 << 14;

/// A reproducible dropout mask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of dropping an element, in `[0, 1)`.
    pub probability: f64,
    /// Names the mask; derive it from the run's seed, the step and the site.
    pub seed: u64,
}

impl Dropout {
    /// The mask of another stream under the same probability, for one mask per expert.
    #[must_use]
    pub fn stream(self, index: u64) -> Self {
        Self { seed: mix(self.seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15)), ..self }
    }

    /// `x ⊙ mask / (1 − p)`; its own adjoint.
    pub fn apply(self, x: &Tensor) -> Tensor {
        let mut out = x.clone();
        self.apply_in_place(&mut out);
        out
    }

    /// [`apply`](Self::apply) in the storage of `x`.
    pub fn apply_in_place(self, x: &mut Tensor) {
        on_device!(pointwise::dropout(x, self));
        dispatch!(x.dtype(), |E| {
            for_each(chunks_mut(x.data_mut::<E>(), CHUNK), |chunk, x| {
                self.apply_at(x, chunk * CHUNK);
            });
        });
    }

    /// Random numbers below this drop their element.
    pub(crate) fn threshold(self) -> u32 {
        (self.probability * f64::from(u32::MAX)) as u32
    }

    /// What kept elements are multiplied by.
    pub(crate) fn factor(self) -> f64 {
        1.0 / (1.0 - self.probability)
    }

    /// Applies the mask to elements that start at index `first` of the whole.
    pub(crate) fn apply_at<E: Element>(self, x: &mut [E], first: usize) {
        let (threshold, keep) = (self.threshold(), E::from_f64(self.factor()));
        vectorize(
            #[inline(always)]
            || {
                for (i, x) in x.iter_mut().enumerate() {
                    let random = (mix(self.seed ^ (first + i) as u64) >> 32) as u32;
                    *x *= if random < threshold { E::ZERO } else { keep };
                }
            },
        );
    }
}

/// [`Dropout::apply`] with a gradient.
pub fn dropout(x: &Var, mask: Dropout) -> Var {
    Var::computed(mask.apply(x.value()), &[x], move |mut gradient, parents| {
        mask.apply_in_place(&mut gradient);
        parents.add(0, gradient);
    })
}

/// The finalizer of SplitMix64: a bijection in which every input bit changes every output bit with
/// probability close to one half.
#[inline(always)]
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A zero-copy helper: `x` itself without dropout, a dropped copy with it.
pub(crate) fn maybe(dropout: Option<Dropout>, x: &Tensor) -> Tensor {
    match dropout {
        Some(dropout) if dropout.probability > 0.0 => dropout.apply(x),
        _ => x.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_mean_and_the_wanted_share() {
        let n = 200_000;
        let x = Tensor::new(vec![1.0_f32; n], [n]);
        let y = Dropout { probability: 0.1, seed: 7 }.apply(&x).to_f64();
        let dropped = y.iter().filter(|&&v| v == 0.0).count() as f64 / n as f64;
        let mean = y.iter().sum::<f64>() / n as f64;
        assert!((dropped - 0.1).abs() < 0.005, "{dropped}");
        assert!((mean - 1.0).abs() < 0.005, "{mean}");
    }

    #[test]
    fn gradients_match_finite_differences() {
        let mask = Dropout { probability: 0.4, seed: 5 };
        crate::check::gradients(&[&[5, 7]], |x| dropout(&x[0], mask));
    }

    #[test]
    fn masks_repeat_by_seed_and_differ_by_stream() {
        let x = Tensor::new(vec![1.0_f32; 1000], [1000]);
        let dropout = Dropout { probability: 0.5, seed: 3 };
        assert_eq!(dropout.apply(&x).to_f64(), dropout.apply(&x).to_f64());
        assert_ne!(dropout.apply(&x).to_f64(), dropout.stream(1).apply(&x).to_f64());
    }
}

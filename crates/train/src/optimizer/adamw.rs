//! AdamW.
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²
//! θ ← θ − η λ θ − η m̂ / (√v̂ + ε),   m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)
//! ```
//!
//! Loshchilov & Hutter, arXiv 1711.05101.

use super::{
    Described, Optimizer, StateTensor, Step, Trained, unless_decay, unless_positive,
    unless_weight_decay,
};
use hydralora_kernels::simd::vectorize;
use hydralora_kernels::{Element, Tensor, TensorElement, dispatch};
use hydralora_runtime::{chunks, chunks_mut, for_each};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Numbers one thread updates at a time.
pub(super) const CHUNK: usize = 1 << 14;

/// Constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Decoupled weight decay.
    pub(super) weight_decay: f64,
    /// Decay of the first moment.
    pub(super) beta1: f64,
    /// Decay of the second moment.
    pub(super) beta2: f64,
    /// The ε that is added to the root of the second moment.
    pub(super) epsilon: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { weight_decay: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

impl Described for Options {
    const NAME: &'static str = "adamw";
    const SUMMARY: &'static str = "AdamW: both moments of every parameter";

    fn faults(&self) -> Vec<(&'static str, String)> {
        [
            unless_weight_decay(self.weight_decay),
            unless_decay("beta1", self.beta1),
            unless_decay("beta2", self.beta2),
            unless_positive("epsilon", self.epsilon),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl Optimizer for Options {
    fn state(&self, of: Trained<'_>) -> Vec<StateTensor> {
        ["exp_avg", "exp_avg_sq"].map(|name| StateTensor::new(name, of.shape)).into()
    }

    fn update(
        &self,
        step: Step,
        _: Trained<'_>,
        value: &mut Tensor,
        gradient: &Tensor,
        state: &mut [Tensor],
    ) {
        let [first, second] = state else { return };
        dispatch!(value.dtype(), |E| update(
            self,
            step,
            value.data_mut::<E>(),
            gradient.data::<E>(),
            first.data_mut::<E>(),
            second.data_mut::<E>(),
        ));
    }
}

fn update<E: TensorElement>(
    options: &Options,
    of: Step,
    value: &mut [E],
    gradient: &[E],
    first: &mut [E],
    second: &mut [E],
) {
    let [beta1, beta2, epsilon] = [options.beta1, options.beta2, options.epsilon].map(E::from_f64);
    let (rest1, rest2) = (E::from_f64(1.0 - options.beta1), E::from_f64(1.0 - options.beta2));
    let weight_decay = if of.decayed { options.weight_decay } else { 0.0 };
    let decay = E::from_f64(1.0 - of.learning_rate * weight_decay);
    let correction = |beta: f64| 1.0 - beta.powf(of.number as f64);
    let step = E::from_f64(of.learning_rate / correction(options.beta1));
    let root = E::from_f64(correction(options.beta2).sqrt());
    let state = (chunks_mut(first, CHUNK), chunks_mut(second, CHUNK));
    let parts = (chunks_mut(value, CHUNK), chunks(gradient, CHUNK), state);
    for_each(parts, |_, (value, gradient, (first, second))| {
        vectorize(
            #[inline(always)]
            || {
                let state = value.iter_mut().zip(gradient).zip(first.iter_mut().zip(second));
                for ((value, &g), (m, v)) in state {
                    *m = beta1 * *m + rest1 * g;
                    *v = beta2 * *v + rest2 * g * g;
                    *value = *value * decay - step * *m / (Element::sqrt(*v) / root + epsilon);
                }
            },
        );
    });
}

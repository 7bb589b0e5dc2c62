//! Lion.
//!
//! ```text
//! θ ← θ − η λ θ − η sign(β₁ m + (1 − β₁) g)
//! m ← β₂ m + (1 − β₂) g
//! ```
//!
//! Chen et al., arXiv 2302.06675. Every entry moves by the learning rate, which should be three to ten
//! times smaller than AdamW's.

use super::adamw::CHUNK;
use super::{Described, Optimizer, StateTensor, Step, Trained, unless_decay, unless_weight_decay};
use hydralora_kernels::simd::vectorize;
use hydralora_kernels::{Tensor, TensorElement, dispatch};
use hydralora_runtime::{chunks, chunks_mut, for_each};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Constants of Lion.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Decoupled weight decay.
    weight_decay: f64,
    /// The share of the momentum in the direction of a step.
    beta1: f64,
    /// Decay of the momentum.
    beta2: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { weight_decay: 0.0, beta1: 0.9, beta2: 0.99 }
    }
}

impl Described for Options {
    const NAME: &'static str = "lion";
    const SUMMARY: &'static str = "Lion: the sign of a momentum, half of AdamW's state";

    fn faults(&self) -> Vec<(&'static str, String)> {
        [
            unless_weight_decay(self.weight_decay),
            unless_decay("beta1", self.beta1),
            unless_decay("beta2", self.beta2),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl Optimizer for Options {
    fn state(&self, of: Trained<'_>) -> Vec<StateTensor> {
        vec![StateTensor::new("exp_avg", of.shape)]
    }

    fn update(
        &self,
        step: Step,
        _: Trained<'_>,
        value: &mut Tensor,
        gradient: &Tensor,
        state: &mut [Tensor],
    ) {
        let [momentum] = state else { return };
        dispatch!(value.dtype(), |E| update(
            self,
            step,
            value.data_mut::<E>(),
            gradient.data::<E>(),
            momentum.data_mut::<E>(),
        ));
    }
}

fn update<E: TensorElement>(
    options: &Options,
    of: Step,
    value: &mut [E],
    gradient: &[E],
    momentum: &mut [E],
) {
    let [beta1, beta2] = [options.beta1, options.beta2].map(E::from_f64);
    let [rest1, rest2] = [1.0 - options.beta1, 1.0 - options.beta2].map(E::from_f64);
    let weight_decay = if of.decayed { options.weight_decay } else { 0.0 };
    let decay = E::from_f64(1.0 - of.learning_rate * weight_decay);
    let step = E::from_f64(of.learning_rate);
    let parts = (chunks_mut(value, CHUNK), chunks(gradient, CHUNK), chunks_mut(momentum, CHUNK));
    for_each(parts, |_, (value, gradient, momentum)| {
        vectorize(
            #[inline(always)]
            || {
                for ((value, &g), m) in value.iter_mut().zip(gradient).zip(momentum) {
                    let direction = beta1 * *m + rest1 * g;
                    // Nothing moves where the direction is zero, as a gradient that never was.
                    let up = E::from_f64(f64::from(u8::from(direction > E::ZERO)));
                    let down = E::from_f64(f64::from(u8::from(direction < E::ZERO)));
                    *value = *value * decay - step * (up - down);
                    *m = beta2 * *m + rest2 * g;
                }
            },
        );
    });
}

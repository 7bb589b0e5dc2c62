//! AdamW over an adapter's tensors.
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²
//! θ ← θ − η λ θ − η m̂ / (√v̂ + ε),   m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)
//! ```
//!
//! Loshchilov & Hutter, arXiv 1711.05101. The heads `B` may learn faster than the rest by a fixed
//! ratio (LoRA+, arXiv 2402.12354), and so may routers.

use hydralora_kernels::simd::vectorize;
use hydralora_kernels::{Element, Gradients, Tensor, TensorElement, dispatch};
use hydralora_peft::{Role, TensorMap, Tuned};
use hydralora_runtime::{chunks, chunks_mut, for_each};
use serde::{Deserialize, Serialize};

/// Numbers one thread updates at a time.
const CHUNK: usize = 1 << 14;

/// Constants of AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// How many times faster `B` learns than the rest.
    pub b_learning_rate_ratio: f64,
    /// How many times faster routers learn than the rest.
    #[serde(default = "same_rate")]
    pub router_learning_rate_ratio: f64,
}

fn same_rate() -> f64 {
    1.0
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            b_learning_rate_ratio: 1.0,
            router_learning_rate_ratio: 1.0,
        }
    }
}

/// The optimizer's state: both moments of every tensor, in the adapter's order.
pub struct AdamW {
    config: AdamWConfig,
    steps: u64,
    moments: Vec<[Tensor; 2]>,
}

impl AdamW {
    /// A fresh state for `tuned`.
    pub fn new(config: AdamWConfig, tuned: &dyn Tuned) -> Self {
        let moments = tuned
            .trainables()
            .iter()
            .map(|trainable| {
                let value = trainable.parameter.value();
                let zeros = || Tensor::zeros(value.dtype(), value.shape());
                [zeros(), zeros()]
            })
            .collect();
        Self { config, steps: 0, moments }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Moves every tensor that has a gradient.
    pub fn step(&mut self, tuned: &mut dyn Tuned, gradients: &Gradients, learning_rate: f64) {
        self.steps += 1;
        let config = self.config;
        let corrections = [
            1.0 - config.beta1.powf(self.steps as f64),
            1.0 - config.beta2.powf(self.steps as f64),
        ];
        for (trainable, [first, second]) in
            tuned.trainables_mut().into_iter().zip(&mut self.moments)
        {
            let Some(gradient) = gradients.get(trainable.var()) else { continue };
            let ratio = match trainable.role {
                Role::B => config.b_learning_rate_ratio,
                Role::Router => config.router_learning_rate_ratio,
                _ => 1.0,
            };
            // As transformers' trainer does it.
            let decayed = trainable.role != Role::Norm;
            let config = AdamWConfig {
                weight_decay: if decayed { config.weight_decay } else { 0.0 },
                ..config
            };
            let value = trainable.parameter.value_mut();
            dispatch!(value.dtype(), |E| update(
                value.data_mut::<E>(),
                gradient.data::<E>(),
                first.data_mut::<E>(),
                second.data_mut::<E>(),
                config,
                learning_rate * ratio,
                corrections,
            ));
        }
    }

    /// Both moments under the adapter's file names, for a checkpoint.
    pub fn state(&self, tuned: &dyn Tuned) -> [TensorMap; 2] {
        let moments: std::collections::HashMap<String, &[Tensor; 2]> = tuned
            .trainables()
            .iter()
            .map(|trainable| trainable.parameter.name().to_owned())
            .zip(&self.moments)
            .collect();
        [0, 1].map(|which| {
            tuned.export(&|trainable| moments[trainable.parameter.name()][which].clone())
        })
    }

    /// Takes over a state saved by [`state`](Self::state): `shadow` is an adapter of the same shape
    /// that has loaded the moment as if it were its values.
    pub fn restore(&mut self, steps: u64, shadows: [&dyn Tuned; 2]) {
        self.steps = steps;
        for (which, shadow) in shadows.into_iter().enumerate() {
            for (moments, trainable) in self.moments.iter_mut().zip(shadow.trainables()) {
                moments[which] = trainable.parameter.value().clone();
            }
        }
    }
}

fn update<E: TensorElement>(
    value: &mut [E],
    gradient: &[E],
    first: &mut [E],
    second: &mut [E],
    config: AdamWConfig,
    learning_rate: f64,
    corrections: [f64; 2],
) {
    let [beta1, beta2, epsilon] = [config.beta1, config.beta2, config.epsilon].map(E::from_f64);
    let (rest1, rest2) = (E::from_f64(1.0 - config.beta1), E::from_f64(1.0 - config.beta2));
    let decay = E::from_f64(1.0 - learning_rate * config.weight_decay);
    let step = E::from_f64(learning_rate / corrections[0]);
    let root = E::from_f64(corrections[1].sqrt());
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

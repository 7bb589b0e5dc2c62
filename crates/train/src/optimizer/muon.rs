//! Muon for matrices, AdamW for the rest.
//!
//! ```text
//! m ← μ m + (1 − μ) g,   u = (1 − μ) g + μ m  (nesterov), or m
//! X = u / ‖u‖;  ns_steps times:  X ← a X + (b X Xᵀ + c (X Xᵀ)²) X,  (a, b, c) = (3.4445, −4.7750, 2.0315)
//! θ ← θ − η λ θ − η r X,   r = 0.2 √max(rows, cols)  (match_rms_adamw), or √max(1, rows / cols)  (original)
//! ```
//!
//! Keller Jordan, Muon: an optimizer for hidden layers (2024); Liu et al., arXiv 2502.16982, for the factor
//! that makes updates as large as AdamW's, so that one learning rate is right for both. A matrix is what has
//! two dimensions and is no embedding, output layer or virtual token.

use super::adamw::{self, CHUNK};
use super::{
    Described, Optimizer, StateTensor, Step, Trained, unless, unless_decay, unless_positive,
    unless_weight_decay,
};
use hydralora_kernels::buffer::Buffer;
use hydralora_kernels::matmul::{Mat, MatMut, Threads, Write, gemm};
use hydralora_kernels::simd::dot;
use hydralora_kernels::{Tensor, TensorElement, dispatch};
use hydralora_peft::Role;
use hydralora_runtime::{chunks, chunks_mut, for_each};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The coefficients of an iteration, which rises steeply at 0.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// The least norm that a matrix is divided by.
const LEAST_NORM: f64 = 1e-7;
/// The most iterations, as `torch` has it.
const MOST_STEPS: usize = 99;
/// Parts of the names of tensors that stand at the model's ends.
const ENDS: [&str; 2] = ["embed", "lm_head"];

/// The factor on the learning rate of a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum AdjustLr {
    /// As large as AdamW's updates usually are.
    #[default]
    MatchRmsAdamw,
    /// The root of rows over columns, at least 1.
    Original,
}

/// Constants of Muon, and of AdamW for the rest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Decoupled weight decay.
    weight_decay: f64,
    /// Decay of the momentum of matrices.
    momentum: f64,
    /// Whether a step looks ahead of the momentum.
    nesterov: bool,
    /// Newton-Schulz iterations.
    ns_steps: usize,
    /// The factor on the learning rate of a matrix.
    adjust_lr_fn: AdjustLr,
    /// AdamW's decay of the first moment.
    beta1: f64,
    /// AdamW's decay of the second moment.
    beta2: f64,
    /// AdamW's ε.
    epsilon: f64,
}

impl Default for Options {
    fn default() -> Self {
        let adamw::Options { weight_decay, beta1, beta2, epsilon } = adamw::Options::default();
        Self {
            weight_decay,
            momentum: 0.95,
            nesterov: true,
            ns_steps: 5,
            adjust_lr_fn: AdjustLr::default(),
            beta1,
            beta2,
            epsilon,
        }
    }
}

impl Described for Options {
    const NAME: &'static str = "muon";
    const SUMMARY: &'static str = "Muon: orthogonal updates of matrices, AdamW for the rest";

    fn faults(&self) -> Vec<(&'static str, String)> {
        let steps = self.ns_steps;
        [
            unless_weight_decay(self.weight_decay),
            unless_decay("momentum", self.momentum),
            unless((1..=MOST_STEPS).contains(&steps), "ns_steps", steps, "1 to 99"),
            unless_decay("beta1", self.beta1),
            unless_decay("beta2", self.beta2),
            unless_positive("epsilon", self.epsilon),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Whether Muon is for it.
fn is_matrix(of: Trained<'_>) -> bool {
    let inside = matches!(of.role, Role::A | Role::B | Role::Router | Role::Weight);
    of.shape.len() == 2 && inside && !ENDS.iter().any(|end| of.name.contains(end))
}

impl Optimizer for Options {
    fn state(&self, of: Trained<'_>) -> Vec<StateTensor> {
        match is_matrix(of) {
            true => vec![StateTensor::new("momentum_buffer", of.shape)],
            false => self.adamw().state(of),
        }
    }

    fn update(
        &self,
        step: Step,
        of: Trained<'_>,
        value: &mut Tensor,
        gradient: &Tensor,
        state: &mut [Tensor],
    ) {
        match (state, of.shape) {
            ([momentum], &[rows, cols]) if !value.is_empty() => {
                dispatch!(value.dtype(), |E| self.follow(
                    step,
                    [rows, cols],
                    value.data_mut::<E>(),
                    gradient.data::<E>(),
                    momentum.data_mut::<E>(),
                ));
            }
            (state, _) => self.adamw().update(step, of, value, gradient, state),
        }
    }
}

impl Options {
    fn adamw(&self) -> adamw::Options {
        let Self { weight_decay, beta1, beta2, epsilon, .. } = *self;
        adamw::Options { weight_decay, beta1, beta2, epsilon }
    }

    fn follow<E: TensorElement>(
        &self,
        step: Step,
        [rows, cols]: [usize; 2],
        value: &mut [E],
        gradient: &[E],
        momentum: &mut [E],
    ) {
        let mut update = Buffer::<E>::scratch(value.len());
        let (kept, rest) = (E::from_f64(self.momentum), E::from_f64(1.0 - self.momentum));
        let parts = (chunks(gradient, CHUNK), chunks_mut(momentum, CHUNK));
        for_each((chunks_mut(&mut update, CHUNK), parts), |_, (update, (gradient, momentum))| {
            for ((update, &g), m) in update.iter_mut().zip(gradient).zip(momentum) {
                *m = kept * *m + rest * g;
                *update = if self.nesterov { rest * g + kept * *m } else { *m };
            }
        });
        let update = orthogonal(update, [rows, cols], self.ns_steps);
        let ratio = match self.adjust_lr_fn {
            AdjustLr::MatchRmsAdamw => 0.2 * (rows.max(cols) as f64).sqrt(),
            AdjustLr::Original => (rows as f64 / cols as f64).max(1.0).sqrt(),
        };
        let weight_decay = if step.decayed { self.weight_decay } else { 0.0 };
        let decay = E::from_f64(1.0 - step.learning_rate * weight_decay);
        let rate = E::from_f64(step.learning_rate * ratio);
        for_each((chunks_mut(value, CHUNK), chunks(&update, CHUNK)), |_, (value, update)| {
            for (value, &update) in value.iter_mut().zip(update) {
                *value = *value * decay - rate * update;
            }
        });
    }
}

/// The matrix with its singular values brought near 1 by so many Newton-Schulz iterations.
fn orthogonal<E: TensorElement>(
    mut x: Buffer<E>,
    [rows, cols]: [usize; 2],
    steps: usize,
) -> Buffer<E> {
    let [a, b, c] = COEFFICIENTS.map(E::from_f64);
    let norm = dot(&x, &x).to_f64().sqrt().max(LEAST_NORM);
    let scale = |values: &mut [E], factor: E| {
        for_each(chunks_mut(values, CHUNK), |_, values| {
            values.iter_mut().for_each(|value| *value *= factor);
        });
    };
    scale(&mut x, E::from_f64(1.0 / norm));
    // The product of the shorter side with itself: a tall matrix is multiplied from the other side.
    let (side, tall) = (rows.min(cols), rows > cols);
    let mut gram = Buffer::<E>::scratch(side * side);
    let mut inner = Buffer::<E>::scratch(side * side);
    let mut next = Buffer::<E>::scratch(x.len());
    for _ in 0..steps {
        let whole = Mat::new(&x, rows, cols);
        let (left, right) = if tall { (whole.t(), whole) } else { (whole, whole.t()) };
        let out = MatMut::new(&mut gram, side, side);
        gemm(out, left, right, E::ONE, Write::Set, Threads::All);
        inner.copy_from_slice(&gram);
        scale(&mut inner, b);
        let square = Mat::new(&gram, side, side);
        gemm(MatMut::new(&mut inner, side, side), square, square, c, Write::Add, Threads::All);
        next.copy_from_slice(&x);
        scale(&mut next, a);
        let inner = Mat::new(&inner, side, side);
        let (left, right) = if tall { (whole, inner) } else { (inner, whole) };
        let out = MatMut::new(&mut next, rows, cols);
        gemm(out, left, right, E::ONE, Write::Add, Threads::All);
        std::mem::swap(&mut x, &mut next);
    }
    x
}

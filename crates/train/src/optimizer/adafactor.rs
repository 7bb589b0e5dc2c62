//! Adafactor with a learning rate from outside.
//!
//! The second moment of a matrix is held as the means of its rows, `R`, and of its columns, `C`:
//!
//! ```text
//! β₂ = 1 − t^(−decay_rate)
//! R ← β₂ R + (1 − β₂) mean over columns of (g² + ε)      C likewise over rows
//! u = g / √(R C / mean(R)),   u ← u / max(1, RMS(u) / clip_threshold)
//! α = η, or with scale_parameter η max(epsilon_scale, RMS(θ))
//! θ ← θ − α λ θ − α u       (with β₁: the moving average of α u in the place of α u)
//! ```
//!
//! Shazeer & Stern, arXiv 1804.04235; the variant of fairseq and `transformers` with `relative_step` off.
//! Tensors of one dimension keep the whole second moment, those of more are matrices side by side.

use super::adamw::CHUNK;
use super::{
    Described, Optimizer, StateTensor, Step, Trained, unless, unless_decay, unless_positive,
    unless_weight_decay,
};
use hydralora_kernels::buffer::Buffer;
use hydralora_kernels::simd::{dot, rows_per_task};
use hydralora_kernels::{Element, Tensor, TensorElement, dispatch};
use hydralora_runtime::{chunks, chunks_mut, for_each};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Columns whose squares one thread sums.
const COLUMNS: usize = 256;

/// Constants of Adafactor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Decoupled weight decay.
    weight_decay: f64,
    /// Decay of a moving average of the updates; none without one, which saves its memory.
    beta1: Option<f64>,
    /// The ε that is added to squared gradients.
    epsilon: f64,
    /// The decay of the second moment at step `t` is `1 - t^-decay_rate`.
    decay_rate: f64,
    /// Updates of a larger root mean square are made that short.
    clip_threshold: f64,
    /// Whether the learning rate is one for a tensor whose root mean square is 1, and in proportion
    /// for others.
    scale_parameter: bool,
    /// The least root mean square that a tensor counts as under `scale_parameter`.
    epsilon_scale: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            weight_decay: 0.0,
            beta1: None,
            epsilon: 1e-30,
            decay_rate: 0.8,
            clip_threshold: 1.0,
            scale_parameter: false,
            epsilon_scale: 1e-3,
        }
    }
}

impl Described for Options {
    const NAME: &'static str = "adafactor";
    const SUMMARY: &'static str = "Adafactor: second moments by row and column, next to no state";

    fn faults(&self) -> Vec<(&'static str, String)> {
        let rate = self.decay_rate;
        [
            unless_weight_decay(self.weight_decay),
            self.beta1.and_then(|beta| unless_decay("beta1", beta)),
            unless_positive("epsilon", self.epsilon),
            unless(rate > 0.0 && rate <= 1.0, "decay_rate", rate, "0 < decay_rate ≤ 1"),
            unless_positive("clip_threshold", self.clip_threshold),
            unless_positive("epsilon_scale", self.epsilon_scale),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

impl Optimizer for Options {
    fn state(&self, of: Trained<'_>) -> Vec<StateTensor> {
        let mut state = match of.shape {
            [batch @ .., rows, cols] => vec![
                StateTensor::new("exp_avg_sq_row", [batch, &[*rows]].concat()),
                StateTensor::new("exp_avg_sq_col", [batch, &[*cols]].concat()),
            ],
            shape => vec![StateTensor::new("exp_avg_sq", shape)],
        };
        state.extend(self.beta1.map(|_| StateTensor::new("exp_avg", of.shape)));
        state
    }

    fn update(
        &self,
        step: Step,
        of: Trained<'_>,
        value: &mut Tensor,
        gradient: &Tensor,
        state: &mut [Tensor],
    ) {
        if !value.is_empty() {
            dispatch!(value.dtype(), |E| self.follow::<E>(step, of, value, gradient, state));
        }
    }
}

/// The root of the mean of the squares.
fn root_mean_square<E: TensorElement>(values: &[E]) -> f64 {
    (dot(values, values).to_f64() / values.len() as f64).sqrt()
}

impl Options {
    fn follow<E: TensorElement>(
        &self,
        step: Step,
        of: Trained<'_>,
        value: &mut Tensor,
        gradient: &Tensor,
        state: &mut [Tensor],
    ) {
        let kept = 1.0 - (step.number as f64).powf(-self.decay_rate);
        let mut update = Buffer::<E>::scratch(value.len());
        let (gradient, value) = (gradient.data::<E>(), value.data_mut::<E>());
        let first = match (of.shape, state) {
            ([.., rows, cols], [row_means, col_means, first @ ..]) => {
                let size = rows * cols;
                let means = row_means.data_mut::<E>().chunks_mut(*rows);
                let means = means.zip(col_means.data_mut::<E>().chunks_mut(*cols));
                let parts = gradient.chunks(size).zip(update.chunks_mut(size)).zip(means);
                for ((gradient, update), (row_means, col_means)) in parts {
                    self.factored(kept, gradient, row_means, col_means, update);
                }
                first
            }
            (_, [squares, first @ ..]) => {
                self.whole(kept, gradient, squares.data_mut::<E>(), &mut update);
                first
            }
            _ => return,
        };
        let scale = match self.scale_parameter {
            true => root_mean_square(value).max(self.epsilon_scale),
            false => 1.0,
        };
        let rate = step.learning_rate * scale;
        let clipped = (root_mean_square(&update) / self.clip_threshold).max(1.0);
        let factor = E::from_f64(rate / clipped);
        for_each(chunks_mut(&mut update, CHUNK), |_, update| {
            update.iter_mut().for_each(|update| *update *= factor);
        });
        if let (Some(beta), [first]) = (self.beta1, first) {
            let (beta, rest) = (E::from_f64(beta), E::from_f64(1.0 - beta));
            let parts = (chunks_mut(&mut update, CHUNK), chunks_mut(first.data_mut::<E>(), CHUNK));
            for_each(parts, |_, (update, first)| {
                for (update, first) in update.iter_mut().zip(first) {
                    *first = beta * *first + rest * *update;
                    *update = *first;
                }
            });
        }
        let weight_decay = if step.decayed { self.weight_decay } else { 0.0 };
        let decay = E::from_f64(1.0 - rate * weight_decay);
        for_each((chunks_mut(value, CHUNK), chunks(&update, CHUNK)), |_, (value, update)| {
            for (value, &update) in value.iter_mut().zip(update) {
                *value = *value * decay - update;
            }
        });
    }

    /// Updates a vector's second moment, of which `kept` stays, and writes the gradient over its root.
    fn whole<E: TensorElement>(
        &self,
        kept: f64,
        gradient: &[E],
        squares: &mut [E],
        update: &mut [E],
    ) {
        let (kept, rest) = (E::from_f64(kept), E::from_f64(1.0 - kept));
        let epsilon = E::from_f64(self.epsilon);
        for ((square, &gradient), update) in squares.iter_mut().zip(gradient).zip(update) {
            *square = kept * *square + rest * (gradient * gradient + epsilon);
            *update = gradient / Element::sqrt(*square);
        }
    }

    /// The same for a matrix, whose second moment is one of rows and one of columns.
    fn factored<E: TensorElement>(
        &self,
        kept: f64,
        gradient: &[E],
        row_means: &mut [E],
        col_means: &mut [E],
        update: &mut [E],
    ) {
        let (rows, cols) = (row_means.len(), col_means.len());
        let (kept, rest) = (E::from_f64(kept), E::from_f64(1.0 - kept));
        let epsilon = E::from_f64(self.epsilon);
        let [of_row, of_col] = [cols, rows].map(|count| E::from_f64(1.0 / count as f64));
        for_each((chunks_mut(row_means, 1), chunks(gradient, cols)), |_, (mean, row)| {
            mean[0] = kept * mean[0] + rest * (dot(row, row) * of_row + epsilon);
        });
        for_each(chunks_mut(col_means, COLUMNS), |index, means| {
            let first = index * COLUMNS;
            let mut sums = [E::ZERO; COLUMNS];
            for row in gradient.chunks_exact(cols) {
                for (sum, &value) in sums.iter_mut().zip(&row[first..first + means.len()]) {
                    *sum += value * value;
                }
            }
            for (mean, &sum) in means.iter_mut().zip(&sums) {
                *mean = kept * *mean + rest * (sum * of_col + epsilon);
            }
        });
        let all: f64 = row_means.iter().map(|mean| mean.to_f64()).sum();
        let all = E::from_f64(all / rows as f64);
        let inverse = |value: E| E::ONE / Element::sqrt(value);
        let columns: Vec<E> = col_means.iter().map(|mean| inverse(*mean)).collect();
        let size = rows_per_task(cols) * cols;
        let several = size / cols;
        for_each(
            (chunks_mut(update, size), chunks(gradient, size)),
            |index, (update, gradient)| {
                let rows = update.chunks_exact_mut(cols).zip(gradient.chunks_exact(cols));
                for (at, (update, gradient)) in rows.enumerate() {
                    let row = inverse(row_means[index * several + at] / all);
                    for ((update, &gradient), &column) in
                        update.iter_mut().zip(gradient).zip(&columns)
                    {
                        *update = row * column * gradient;
                    }
                }
            },
        );
    }
}

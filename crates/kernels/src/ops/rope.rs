//! Rotary position embedding in Llama's half-split layout:
//! `(x_i, x_{i+d/2}) ← (x_i cos θ − x_{i+d/2} sin θ, x_{i+d/2} cos θ + x_i sin θ)`,
//! `θ = position · inverse_frequency_i`.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::DType;
use crate::graph::Var;
use crate::simd::{rows_per_task, vectorize};
use crate::tensor::Tensor;
use hydralora_runtime::{chunks, chunks_mut, for_each};

/// Cosines and sines of one packed batch, computed in `f64` and shared by all layers.
#[derive(Clone)]
pub struct RopeTable {
    /// `[T, head_dim]`: `head_dim/2` cosines, then as many sines.
    table: Tensor,
}

impl RopeTable {
    /// Angles for `positions` (one per token) and `inverse_frequencies` (`head_dim / 2`).
    pub fn new(dtype: DType, positions: &[u32], inverse_frequencies: &[f64]) -> Self {
        let half = inverse_frequencies.len();
        let table = dispatch!(dtype, |E| {
            let mut table = Buffer::<E>::scratch(positions.len() * 2 * half);
            for (row, &position) in table.chunks_exact_mut(2 * half).zip(positions) {
                for (i, frequency) in inverse_frequencies.iter().enumerate() {
                    let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                    row[i] = cos as E;
                    row[half + i] = sin as E;
                }
            }
            Tensor::new(table, [positions.len(), 2 * half])
        });
        Self { table }
    }
}

/// Rotates every head of `x: [T, heads · head_dim]`. Works in the storage of `x` when nobody else
/// holds it.
pub fn rope(x: Var, table: &RopeTable) -> Var {
    let (mut value, x) = x.take();
    rotate(&mut value, table, 1.0);
    let table = table.clone();
    Var::computed(value, &[&x], move |mut gradient, parents| {
        rotate(&mut gradient, &table, -1.0);
        parents.add(0, gradient);
    })
}

/// Rotates by `direction · θ`; the inverse rotation is the backward.
fn rotate(x: &mut Tensor, table: &RopeTable, direction: f64) {
    let _part = crate::profile::part("rope");
    let (rows, cols, head_dim) = (x.rows(), x.cols(), table.table.cols());
    assert_eq!(rows, table.table.rows(), "one position per token");
    assert_eq!(cols % head_dim, 0, "width is a whole number of heads");
    on_device!(pointwise::rotate(x, &table.table, direction));
    dispatch!(x.dtype(), |E| {
        let (half, direction) = (head_dim / 2, direction as E);
        let task = rows_per_task(cols);
        let table = chunks(table.table.data::<E>(), task * head_dim);
        for_each((chunks_mut(x.data_mut::<E>(), task * cols), table), |_, (x, table)| {
            vectorize(
                #[inline(always)]
                || {
                    for (x, table) in x.chunks_exact_mut(cols).zip(table.chunks_exact(head_dim)) {
                        let (cos, sin) = table.split_at(half);
                        for head in x.chunks_exact_mut(head_dim) {
                            let (low, high) = head.split_at_mut(half);
                            for i in 0..half {
                                let (a, b, sin) = (low[i], high[i], direction * sin[i]);
                                low[i] = a * cos[i] - b * sin;
                                high[i] = b * cos[i] + a * sin;
                            }
                        }
                    }
                },
            );
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        let table = RopeTable::new(DType::F64, &[0, 1, 7], &[1.0, 0.1]);
        check::gradients(&[&[3, 8]], |x| rope(x[0].clone(), &table));
    }

    #[test]
    fn position_zero_changes_nothing() {
        let table = RopeTable::new(DType::F64, &[0], &[1.0, 0.5, 0.25]);
        let x = Tensor::from_f64(DType::F64, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1, 6]);
        assert_eq!(rope(Var::constant(x.clone()), &table).value().to_f64(), x.to_f64());
    }
}

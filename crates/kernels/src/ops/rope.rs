//! Rotary position embedding. With `θ = position · inverse_frequency_i` a pair of numbers of a head turns:
//! `(a, b) ← (a cos θ − b sin θ, b cos θ + a sin θ)`.
//!
//! The pairs are `(x_i, x_{i+n})` of the first `2n` numbers of a head, or its neighbours `(x_{2i}, x_{2i+1})`;
//! the rest of the head stays as it is. Cosines and sines may carry a factor, as YaRN's and LongRoPE's do.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::DType;
use crate::graph::Var;
use crate::simd::{rows_per_task, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks, chunks_mut, for_each};

/// Which numbers of a head turn together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pairs {
    /// The first half of those that turn with the second: Llama's layout.
    #[default]
    Halves,
    /// Neighbours: GLM's layout.
    Neighbours,
}

/// The frequencies `n` of a row, and the factor on its cosines and sines.
#[derive(Clone, Copy, Debug)]
pub struct Frequencies<'a> {
    /// `1 / θ_i`, half as many as numbers that turn.
    pub inverse: &'a [f64],
    /// The factor, usually 1.
    pub factor: f64,
}

/// Cosines and sines of one packed batch, computed in `f64` and shared by all layers.
#[derive(Clone)]
pub struct RopeTable {
    /// `[T, 2n]`: `n` cosines, then as many sines.
    table: Tensor,
    head_dim: usize,
    pairs: Pairs,
}

impl RopeTable {
    /// Computes the angles of `positions`, one per token, whose frequencies `of_row` gives; heads are
    /// `head_dim` wide.
    ///
    /// # Panics
    /// If rows have different numbers of frequencies, or more than half of a head.
    pub fn new<'a>(
        dtype: DType,
        positions: &[u32],
        head_dim: usize,
        pairs: Pairs,
        of_row: impl Fn(usize) -> Frequencies<'a>,
    ) -> Self {
        let half = if positions.is_empty() { head_dim / 2 } else { of_row(0).inverse.len() };
        assert!(2 * half <= head_dim, "at most the whole head turns");
        let table = dispatch!(dtype, |E| {
            let mut table = Buffer::<E>::scratch(positions.len() * 2 * half);
            let rows = table.chunks_exact_mut((2 * half).max(1)).zip(positions);
            for (index, (row, &position)) in rows.enumerate() {
                let Frequencies { inverse, factor } = of_row(index);
                assert_eq!(inverse.len(), half, "every row has as many frequencies");
                for (i, frequency) in inverse.iter().enumerate() {
                    let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                    row[i] = (factor * cos) as E;
                    row[half + i] = (factor * sin) as E;
                }
            }
            Tensor::new(table, [positions.len(), 2 * half])
        });
        Self { table, head_dim, pairs }
    }

    /// Gives the angles if whole heads turn by halves: all that devices know.
    #[cfg(feature = "gpu")]
    pub(crate) fn of_whole_heads(&self) -> Option<&Tensor> {
        let whole = self.pairs == Pairs::Halves && self.table.cols() == self.head_dim;
        whole.then_some(&self.table)
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

/// Rotates by `direction · θ`; turning back, with the same factor, is the backward.
fn rotate(x: &mut Tensor, table: &RopeTable, direction: f64) {
    let _part = crate::profile::part("rope");
    let (rows, cols, head_dim) = (x.rows(), x.cols(), table.head_dim);
    assert_eq!(rows, table.table.rows(), "one position per token");
    assert_eq!(cols % head_dim, 0, "width is a whole number of heads");
    on_device!(pointwise::rotate(x, table, direction));
    let turning = table.table.cols();
    dispatch!(x.dtype(), |E| {
        let (half, direction) = (turning / 2, direction as E);
        let task = rows_per_task(cols);
        let by_task = chunks(table.table.data::<E>(), task * turning);
        for_each((chunks_mut(x.data_mut::<E>(), task * cols), by_task), |_, (x, angles)| {
            vectorize(
                #[inline(always)]
                || {
                    let rows = x.chunks_exact_mut(cols).zip(angles.chunks_exact(turning));
                    for (x, angles) in rows {
                        let (cos, sin) = angles.split_at(half);
                        for head in x.chunks_exact_mut(head_dim) {
                            let head = &mut head[..turning];
                            match table.pairs {
                                Pairs::Halves => by_halves(head, cos, sin, direction),
                                Pairs::Neighbours => by_neighbours(head, cos, sin, direction),
                            }
                        }
                    }
                },
            );
        });
    });
}

#[inline(always)]
fn by_halves<E: TensorElement>(head: &mut [E], cos: &[E], sin: &[E], direction: E) {
    let half = cos.len();
    let (low, high) = head.split_at_mut(half);
    for i in 0..half {
        let (a, b, sin) = (low[i], high[i], direction * sin[i]);
        low[i] = a * cos[i] - b * sin;
        high[i] = b * cos[i] + a * sin;
    }
}

#[inline(always)]
fn by_neighbours<E: TensorElement>(head: &mut [E], cos: &[E], sin: &[E], direction: E) {
    for (pair, (&cos, &sin)) in head.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
        let (a, b, sin) = (pair[0], pair[1], direction * sin);
        pair[0] = a * cos - b * sin;
        pair[1] = b * cos + a * sin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    fn table(positions: &[u32], head_dim: usize, pairs: Pairs, inverse: &[f64]) -> RopeTable {
        let of_row = |_| Frequencies { inverse, factor: 1.0 };
        RopeTable::new(DType::F64, positions, head_dim, pairs, of_row)
    }

    #[test]
    fn gradients_match_finite_differences() {
        for pairs in [Pairs::Halves, Pairs::Neighbours] {
            let whole = table(&[0, 1, 7], 4, pairs, &[1.0, 0.1]);
            check::gradients(&[&[3, 8]], |x| rope(x[0].clone(), &whole));
            let part = table(&[0, 1, 7], 6, pairs, &[1.0, 0.1]);
            check::gradients(&[&[3, 12]], |x| rope(x[0].clone(), &part));
        }
        // Rows with frequencies and factors of their own.
        let of_row = |row: usize| Frequencies {
            inverse: if row == 0 { &[1.0, 0.5] } else { &[0.25, 0.125] },
            factor: 1.0 + row as f64,
        };
        let mixed = RopeTable::new(DType::F64, &[3, 4], 6, Pairs::Halves, of_row);
        check::gradients(&[&[2, 6]], |x| rope(x[0].clone(), &mixed));
    }

    #[test]
    fn position_zero_changes_nothing() {
        let table = table(&[0], 6, Pairs::Halves, &[1.0, 0.5, 0.25]);
        let x = Tensor::from_f64(DType::F64, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1, 6]);
        assert_eq!(rope(Var::constant(x.clone()), &table).value().to_f64(), x.to_f64());
    }

    #[test]
    fn pairs_turn_and_the_rest_stays() {
        let quarter = std::f64::consts::FRAC_PI_2;
        let x = Tensor::from_f64(DType::F64, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1, 6]);
        let turned = |pairs| {
            let table = table(&[1], 6, pairs, &[quarter, 2.0 * quarter]);
            let turned = rope(Var::constant(x.clone()), &table).value().to_f64();
            turned.iter().map(|x| x.round()).collect::<Vec<_>>()
        };
        assert_eq!(turned(Pairs::Halves), [-3.0, -2.0, 1.0, -4.0, 5.0, 6.0]);
        assert_eq!(turned(Pairs::Neighbours), [-2.0, 1.0, -3.0, -4.0, 5.0, 6.0]);
    }
}

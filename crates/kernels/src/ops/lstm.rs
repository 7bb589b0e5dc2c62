//! One direction of an LSTM layer (Hochreiter & Schmidhuber, 1997, with forget gates):
//!
//! ```text
//! (i, f, g, o) = W_x x_t + b_x + W_h h_{t−1} + b_h        σ on i, f, o and tanh on g
//! c_t = f ⊙ c_{t−1} + i ⊙ g         h_t = o ⊙ tanh(c_t)
//! ```
//!
//! The order of the gates is PyTorch's.

use crate::dispatch;
use crate::element::Element;
use crate::graph::Var;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::ops::activation::sigmoid;
use crate::ops::product::{add_product, column_sums, product};
use crate::tensor::{Tensor, TensorElement};

/// The trainable tensors of one direction of a layer of width `h`.
#[derive(Clone, Copy)]
pub struct Lstm<'a> {
    /// `[4h, in]`.
    pub input_weight: &'a Var,
    /// `[4h, h]`.
    pub hidden_weight: &'a Var,
    /// `[4h]`.
    pub input_bias: &'a Var,
    /// `[4h]`.
    pub hidden_bias: &'a Var,
}

/// The layer over the rows of `x: [T, in]` as one sequence, from the first row to the last or, if
/// `reverse`, from the last to the first; gives `[T, h]` with the rows in their own order.
///
/// # Panics
/// If the extents disagree.
pub fn lstm(x: &Var, layer: &Lstm<'_>, reverse: bool) -> Var {
    let width = layer.hidden_weight.value().cols();
    assert_eq!(layer.hidden_weight.value().rows(), 4 * width, "four gates per unit");
    for bias in [layer.input_bias, layer.hidden_bias] {
        assert_eq!(bias.value().len(), 4 * width, "one bias per gate and unit");
    }
    let from_input = product(x.value(), layer.input_weight.value());
    let (y, states) = dispatch!(x.value().dtype(), |E| forward::<E>(&from_input, layer, reverse));
    let parents = [x, layer.input_weight, layer.hidden_weight, layer.input_bias, layer.hidden_bias];
    let saved = Saved {
        x: x.value().clone(),
        y: y.clone(),
        states,
        input_weight: layer.input_weight.value().clone(),
        hidden_weight: layer.hidden_weight.value().clone(),
        reverse,
    };
    Var::computed(y, &parents, move |gradient, parents| {
        dispatch!(gradient.dtype(), |E| saved.backward::<E>(&gradient, parents));
    })
}

fn order(rows: usize, reverse: bool) -> Vec<usize> {
    if reverse { (0..rows).rev().collect() } else { (0..rows).collect() }
}

fn tanh<E: Element>(x: E) -> E {
    E::from_f64(x.to_f64().tanh())
}

/// The outputs `[T, h]`, and per row the gates `i, f, g, o` and the cell `c`: `[T, 5h]`.
fn forward<E: TensorElement>(
    from_input: &Tensor,
    layer: &Lstm<'_>,
    reverse: bool,
) -> (Tensor, Tensor) {
    let (rows, width) = (from_input.rows(), layer.hidden_weight.value().cols());
    let weight = layer.hidden_weight.value().data::<E>();
    let biases = [layer.input_bias, layer.hidden_bias].map(|bias| bias.value().data::<E>());
    let (mut y, mut states) = (vec![E::ZERO; rows * width], vec![E::ZERO; rows * 5 * width]);
    let (mut hidden, mut cell) = (vec![E::ZERO; width], vec![E::ZERO; width]);
    for row in order(rows, reverse) {
        let mut gates: Vec<E> =
            from_input.data::<E>()[row * 4 * width..(row + 1) * 4 * width].to_vec();
        gemm(
            MatMut::new(&mut gates, 1, 4 * width),
            Mat::new(&hidden, 1, width),
            Mat::new(weight, 4 * width, width).t(),
            E::ONE,
            Write::Add,
            Threads::One,
        );
        for (index, gate) in gates.iter_mut().enumerate() {
            let sum = *gate + biases[0][index] + biases[1][index];
            *gate = if index / width == 2 { tanh(sum) } else { sigmoid(sum) };
        }
        for unit in 0..width {
            let [i, f, g, o] = [0, 1, 2, 3].map(|gate| gates[gate * width + unit]);
            cell[unit] = f * cell[unit] + i * g;
            hidden[unit] = o * tanh(cell[unit]);
        }
        let states = &mut states[row * 5 * width..(row + 1) * 5 * width];
        states[..4 * width].copy_from_slice(&gates);
        states[4 * width..].copy_from_slice(&cell);
        y[row * width..(row + 1) * width].copy_from_slice(&hidden);
    }
    (Tensor::new(y, [rows, width]), Tensor::new(states, [rows, 5 * width]))
}

struct Saved {
    x: Tensor,
    y: Tensor,
    states: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    reverse: bool,
}

impl Saved {
    fn backward<E: TensorElement>(
        &self,
        dy: &Tensor,
        parents: &mut crate::graph::ParentGradients<'_>,
    ) {
        let (rows, width, inputs) = (self.y.rows(), self.y.cols(), self.x.cols());
        let (y, dy) = (self.y.data::<E>(), dy.data::<E>());
        let steps = order(rows, self.reverse);
        // Gradients of the sums inside the gates, and the state each row started from.
        let mut sums = vec![E::ZERO; rows * 4 * width];
        let mut earlier = vec![E::ZERO; rows * width];
        let (mut dh, mut dc) = (vec![E::ZERO; width], vec![E::ZERO; width]);
        for (step, &row) in steps.iter().enumerate().rev() {
            let before = step.checked_sub(1).map(|step| steps[step]);
            let state = |row: usize, part: usize, unit: usize| {
                self.states.data::<E>()[row * 5 * width + part * width + unit]
            };
            let out = &mut sums[row * 4 * width..(row + 1) * 4 * width];
            for unit in 0..width {
                let [i, f, g, o, c] = [0, 1, 2, 3, 4].map(|part| state(row, part, unit));
                let c_before = before.map_or(E::ZERO, |before| state(before, 4, unit));
                let dh = dh[unit] + dy[row * width + unit];
                let squashed = tanh(c);
                let d_cell = dc[unit] + dh * o * (E::ONE - squashed * squashed);
                out[unit] = d_cell * g * i * (E::ONE - i);
                out[width + unit] = d_cell * c_before * f * (E::ONE - f);
                out[2 * width + unit] = d_cell * i * (E::ONE - g * g);
                out[3 * width + unit] = dh * squashed * o * (E::ONE - o);
                dc[unit] = d_cell * f;
            }
            gemm(
                MatMut::new(&mut dh, 1, width),
                Mat::new(out, 1, 4 * width),
                Mat::new(self.hidden_weight.data::<E>(), 4 * width, width),
                E::ONE,
                Write::Set,
                Threads::One,
            );
            if let Some(before) = before {
                earlier[row * width..(row + 1) * width]
                    .copy_from_slice(&y[before * width..(before + 1) * width]);
            }
        }
        for bias in [3, 4] {
            if parents.needs(bias) {
                parents.add(bias, column_sums::<E>(&sums, 4 * width));
            }
        }
        let sums = Mat::new(&sums, rows, 4 * width);
        if parents.needs(2) {
            add_product(parents, 2, [4 * width, width], sums.t(), Mat::new(&earlier, rows, width));
        }
        if parents.needs(1) {
            let x = Mat::new(self.x.data::<E>(), rows, inputs);
            add_product(parents, 1, [4 * width, inputs], sums.t(), x);
        }
        if parents.needs(0) {
            let weight = Mat::new(self.input_weight.data::<E>(), 4 * width, inputs);
            add_product(parents, 0, [rows, inputs], sums, weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences_in_both_directions() {
        for rows in [1, 4] {
            for reverse in [false, true] {
                check::gradients(&[&[rows, 3], &[8, 3], &[8, 2], &[8], &[8]], |v| {
                    let layer = Lstm {
                        input_weight: &v[1],
                        hidden_weight: &v[2],
                        input_bias: &v[3],
                        hidden_bias: &v[4],
                    };
                    lstm(&v[0], &layer, reverse)
                });
            }
        }
    }
}

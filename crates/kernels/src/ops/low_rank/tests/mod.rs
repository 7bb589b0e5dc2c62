mod layer;
mod rows;
mod update;

use crate::ops::frozen_linear::{FrozenLinear, FrozenWeight};
use crate::tensor::Tensor;

const INPUTS: usize = 37;
const OUTPUTS: usize = 51;

/// A number in [-1, 1] for every index.
fn number(i: usize) -> f32 {
    ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0
}

fn frozen(bias: bool) -> FrozenLinear {
    let weight: Vec<f32> = (0..OUTPUTS * INPUTS).map(number).collect();
    let bias = bias.then(|| Tensor::new((0..OUTPUTS).map(number).collect::<Vec<_>>(), [OUTPUTS]));
    FrozenLinear::new(FrozenWeight::Dense(Tensor::new(weight, [OUTPUTS, INPUTS])), bias)
}

//! Operations element by element.

use super::{DeviceBuffer, Kernel, bits, device_of};
use crate::ops::dropout::Dropout;
use crate::tensor::Tensor;

const fn kernel(name: &'static str) -> Kernel {
    Kernel { source: include_str!("shaders/pointwise.wgsl"), name }
}
const ADD: Kernel = kernel("add");
const SCALE: Kernel = kernel("scale");
const ADD_COLUMNS: Kernel = kernel("add_columns");
const TIMES_COLUMNS: Kernel = kernel("times_columns");
const SWIGLU: Kernel = kernel("swiglu");
const SWIGLU_BACKWARD: Kernel = kernel("swiglu_backward");
const ROPE: Kernel = kernel("rope");
const DROPOUT: Kernel = kernel("dropout");

/// The kernels' parameters: length, columns, width of a head, factor.
fn parameters(len: usize, cols: usize, head: usize, factor: f64) -> [u32; 4] {
    [len as u32, cols as u32, head as u32, bits(factor)]
}

/// `sum + other`, in place of `sum`.
pub(crate) fn add_assign(sum: &mut Tensor, other: &Tensor) -> Option<()> {
    let device = device_of(&[sum, other], &[])?;
    let inputs = [sum as &Tensor, other].map(|tensor| device.holding(tensor));
    let len = sum.len();
    let [out] =
        device.each(&ADD, &parameters(len, 0, 0, 0.0), &[&inputs[0], &inputs[1]], [len], len);
    *sum = out.tensor(sum.shape());
    Some(())
}

/// `factor · x`, in place of `x`.
pub(crate) fn scale(x: &mut Tensor, factor: f64) -> Option<()> {
    let device = device_of(&[x], &[])?;
    let len = x.len();
    let given = parameters(len, 0, 0, factor);
    let [out] = device.each(&SCALE, &given, &[&device.holding(x)], [len], len);
    *x = out.tensor(x.shape());
    Some(())
}

fn with_columns(kernel: &Kernel, x: &Tensor, factors: &Tensor) -> Option<Tensor> {
    let device = device_of(&[x, factors], &[])?;
    let inputs = [x, factors].map(|tensor| device.holding(tensor));
    let given = parameters(x.len(), factors.len(), 0, 0.0);
    let [out] = device.each(kernel, &given, &[&inputs[0], &inputs[1]], [x.len()], x.len());
    Some(out.tensor(x.shape()))
}

/// `x_tj + s_j`.
pub(crate) fn add_columns(x: &Tensor, shift: &Tensor) -> Option<Tensor> {
    with_columns(&ADD_COLUMNS, x, shift)
}

/// `x_tj · l_j`.
pub(crate) fn times_columns(x: &Tensor, factors: &Tensor) -> Option<Tensor> {
    with_columns(&TIMES_COLUMNS, x, factors)
}

/// SwiGLU.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Option<Tensor> {
    let device = device_of(&[gate, up], &[])?;
    let inputs = [gate, up].map(|tensor| device.holding(tensor));
    let len = gate.len();
    let [out] =
        device.each(&SWIGLU, &parameters(len, 0, 0, 0.0), &[&inputs[0], &inputs[1]], [len], len);
    Some(out.tensor(gate.shape()))
}

/// The gradients of gate and up.
pub(crate) fn swiglu_backward(
    gate: &Tensor,
    up: &Tensor,
    gradient: &Tensor,
) -> Option<(Tensor, Tensor)> {
    let device = device_of(&[gate, up, gradient], &[])?;
    let inputs = [gate, up, gradient].map(|tensor| device.holding(tensor));
    let inputs: Vec<&DeviceBuffer> = inputs.iter().collect();
    let len = gate.len();
    let given = parameters(len, 0, 0, 0.0);
    let [dg, du] = device.each(&SWIGLU_BACKWARD, &given, &inputs, [len, len], len);
    Some((dg.tensor(gate.shape()), du.tensor(up.shape())))
}

/// Rotates `x` by `direction · θ` of a table of cosines and sines.
pub(crate) fn rotate(x: &mut Tensor, table: &Tensor, direction: f64) -> Option<()> {
    let device = device_of(&[x, table], &[])?;
    let inputs = [x as &Tensor, table].map(|tensor| device.holding(tensor));
    let len = x.len();
    let given = parameters(len, x.cols(), table.cols(), direction);
    let [out] = device.each(&ROPE, &given, &[&inputs[0], &inputs[1]], [len], len);
    *x = out.tensor(x.shape());
    Some(())
}

/// Applies a dropout mask, the same as on the host.
pub(crate) fn dropout(x: &mut Tensor, mask: Dropout) -> Option<()> {
    let device = device_of(&[x], &[])?;
    let len = x.len();
    let mut given = parameters(len, 0, 0, mask.factor()).to_vec();
    given.extend([mask.seed as u32, (mask.seed >> 32) as u32, mask.threshold()]);
    let [out] = device.each(&DROPOUT, &given, &[&device.holding(x)], [len], len);
    *x = out.tensor(x.shape());
    Some(())
}

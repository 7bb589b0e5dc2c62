//! Operations element by element.

use super::{DeviceBuffer, Kernel, bits, device_of};
use crate::ops::dropout::Dropout;
use crate::ops::rope::RopeTable;
use crate::tensor::Tensor;

const fn kernel(name: &'static str) -> Kernel {
    Kernel {
        source: concat!(
            include_str!("shaders/element.wgsl"),
            include_str!("shaders/pointwise.wgsl")
        ),
        name,
    }
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

/// `kernel` on every element of the first of `tensors`; the result has its shape.
fn on_each(kernel: &Kernel, given: &[u32], tensors: &[&Tensor]) -> Option<Tensor> {
    let device = device_of(tensors, &[])?;
    let inputs: Vec<DeviceBuffer> = tensors.iter().map(|tensor| device.holding(tensor)).collect();
    let inputs: Vec<&DeviceBuffer> = inputs.iter().collect();
    let len = tensors[0].len();
    let [out] = device.each(kernel, given, &inputs, [len], len);
    Some(out.tensor(tensors[0].shape()))
}

/// `sum + other`, in place of `sum`.
pub(crate) fn add_assign(sum: &mut Tensor, other: &Tensor) -> Option<()> {
    *sum = on_each(&ADD, &parameters(sum.len(), 0, 0, 0.0), &[sum, other])?;
    Some(())
}

/// `factor · x`, in place of `x`.
pub(crate) fn scale(x: &mut Tensor, factor: f64) -> Option<()> {
    *x = on_each(&SCALE, &parameters(x.len(), 0, 0, factor), &[x])?;
    Some(())
}

/// `x_tj + s_j`.
pub(crate) fn add_columns(x: &Tensor, shift: &Tensor) -> Option<Tensor> {
    on_each(&ADD_COLUMNS, &parameters(x.len(), shift.len(), 0, 0.0), &[x, shift])
}

/// `x_tj · l_j`.
pub(crate) fn times_columns(x: &Tensor, factors: &Tensor) -> Option<Tensor> {
    on_each(&TIMES_COLUMNS, &parameters(x.len(), factors.len(), 0, 0.0), &[x, factors])
}

/// SwiGLU.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Option<Tensor> {
    on_each(&SWIGLU, &parameters(gate.len(), 0, 0, 0.0), &[gate, up])
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
pub(crate) fn rotate(x: &mut Tensor, table: &RopeTable, direction: f64) -> Option<()> {
    let table = table.of_whole_heads()?;
    let given = parameters(x.len(), x.cols(), table.cols(), direction);
    *x = on_each(&ROPE, &given, &[x, table])?;
    Some(())
}

/// Applies a dropout mask, the same as on the host.
pub(crate) fn dropout(x: &mut Tensor, mask: Dropout) -> Option<()> {
    let mut given = parameters(x.len(), 0, 0, mask.factor()).to_vec();
    given.extend([mask.seed as u32, (mask.seed >> 32) as u32, mask.threshold()]);
    *x = on_each(&DROPOUT, &given, &[x])?;
    Some(())
}

//! Operations on whole rows.

use super::{Device, DeviceBuffer, Kernel, bits, device_of};
use crate::tensor::Tensor;

const fn kernel(name: &'static str) -> Kernel {
    Kernel {
        source: concat!(
            include_str!("shaders/element.wgsl"),
            include_str!("shaders/reduce.wgsl"),
            include_str!("shaders/rows.wgsl")
        ),
        name,
    }
}
const GATHER_ROWS: Kernel = kernel("gather_rows");
const RMS_NORM: Kernel = kernel("rms_norm");
const RMS_NORM_BACKWARD: Kernel = kernel("rms_norm_backward");
const INVERSE_RMS: Kernel = kernel("inverse_rms_of_rows");
const RMS_NORM_WEIGHT_GRADIENT: Kernel = kernel("rms_norm_weight_gradient");
const COLUMN_SUMS: Kernel = kernel("column_sums");

/// Marks a row that has no source.
const NONE: u32 = u32::MAX;

fn parameters(x: &Tensor, epsilon: f64, carries: bool) -> [u32; 4] {
    [x.rows() as u32, x.cols() as u32, bits(epsilon), u32::from(carries)]
}

/// One row for every source: that row of `x`, or zeros for [`NONE`].
fn gather(x: &Tensor, sources: &[u32]) -> Option<Tensor> {
    let (rows, cols) = (sources.len(), x.cols());
    let device = device_of(&[x], &[rows * cols])?;
    let sources = DeviceBuffer::upload(&device, sources);
    let inputs = [&device.holding(x), &sources];
    let given = [rows as u32, cols as u32, 0, 0];
    let [out] = device.each(&GATHER_ROWS, &given, &inputs, [rows * cols], rows * cols);
    Some(out.tensor([rows, cols]))
}

/// The given rows of `x`, in order.
pub(crate) fn select(x: &Tensor, rows: &[usize]) -> Option<Tensor> {
    x.device()?;
    assert!(rows.iter().all(|&row| row < x.rows()), "rows out of range");
    gather(x, &rows.iter().map(|&row| row as u32).collect::<Vec<u32>>())
}

/// Row `i` of `x` as row `rows[i]` of a tensor of that shape, zeros elsewhere; no row twice.
pub(crate) fn scatter(x: &Tensor, rows: &[usize], shape: &[usize]) -> Option<Tensor> {
    x.device()?;
    let (_, outer) = shape.split_last()?;
    let mut sources = vec![NONE; outer.iter().product()];
    for (source, &row) in rows.iter().enumerate() {
        sources[row] = source as u32;
    }
    Some(gather(x, &sources)?.reshape(shape))
}

/// RMS normalisation.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Option<Tensor> {
    let device = device_of(&[x, weight], &[])?;
    let inputs = [&device.holding(x), &device.holding(weight)];
    let given = parameters(x, epsilon, false);
    let [out] = device.compute(&RMS_NORM, &given, &inputs, [x.len()], device.spread(x.rows()));
    Some(out.tensor(x.shape()))
}

/// The gradient of its input, added to `carried`.
pub(crate) fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    epsilon: f64,
    carried: Option<&Tensor>,
) -> Option<Tensor> {
    let device = device_of(&[x, weight, gradient], &[])?;
    let x_here = device.holding(x);
    let (weight, gradient) = (device.holding(weight), device.holding(gradient));
    // Where nothing is carried the kernel does not read it.
    let sum = carried.map_or_else(|| x_here.clone(), |carried| device.holding(carried));
    let inputs = [&x_here, &weight, &gradient, &sum];
    let given = parameters(x, epsilon, carried.is_some());
    let grid = device.spread(x.rows());
    let [out] = device.compute(&RMS_NORM_BACKWARD, &given, &inputs, [x.len()], grid);
    Some(out.tensor(x.shape()))
}

/// The gradient of its weight.
pub(crate) fn rms_norm_weight_gradient(
    x: &Tensor,
    weight: &Tensor,
    gradient: &Tensor,
    epsilon: f64,
) -> Option<Tensor> {
    let device = device_of(&[x, weight, gradient], &[])?;
    let (x_here, gradient) = (device.holding(x), device.holding(gradient));
    let given = parameters(x, epsilon, false);
    let grid = device.spread(x.rows());
    let [inverses] = device.compute(&INVERSE_RMS, &given, &[&x_here], [x.rows()], grid);
    let inputs = [&x_here, &inverses, &gradient];
    let grid = columns_grid(x.cols());
    let [out] = device.compute(&RMS_NORM_WEIGHT_GRADIENT, &given, &inputs, [x.cols()], grid);
    Some(out.tensor(weight.shape()))
}

fn columns_grid(cols: usize) -> [u32; 3] {
    [cols.div_ceil(64) as u32, 1, 1]
}

impl Device {
    /// The sum over all rows of `x`: `[cols]`.
    pub(super) fn column_sums(&self, x: &Tensor) -> Tensor {
        let given = parameters(x, 0.0, false);
        let grid = columns_grid(x.cols());
        let [sums] = self.compute(&COLUMN_SUMS, &given, &[&self.holding(x)], [x.cols()], grid);
        sums.tensor([x.cols()])
    }
}

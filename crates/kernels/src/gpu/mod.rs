//! Computing on a graphics device, through `wgpu` and kernels in WGSL.
//!
//! A [`Tensor`] may lie on a [`Device`]. Asked for its numbers, it fetches them and keeps them beside;
//! changed in place, it comes back to the host. So every operation works on such tensors, and those
//! that matter have a version here: an operation runs on the device if one of its inputs lies there,
//! and leaves its results there. What is put on a device to begin with are the frozen weights
//! ([`FrozenLinear::to_device`](crate::ops::frozen_linear::FrozenLinear::to_device) keeps a second
//! copy of its weight there), and everything computed from them follows.
//!
//! An operation stays on the host if one of its tensors is empty or larger than the device can bind.
//! Nothing on a device is ever changed once an operation has given it out. Sums are formed in an
//! order of their own, so results agree with the CPU's up to rounding, and repeat exactly on one
//! device.

pub(crate) mod attention;
pub(crate) mod cross_entropy;
mod device;
pub(crate) mod frozen;
pub(crate) mod low_rank;
pub(crate) mod pointwise;
mod product;
pub(crate) mod rows;

pub use device::{Backend, Device};

use crate::buffer::Buffer;
use crate::element::DType;
use crate::tensor::Tensor;
use device::Kernel;
use std::sync::{Arc, OnceLock};

/// Why there is no device, or why it stopped computing. An operation has no way to say the latter:
/// it unwinds with this as its panic's payload.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No device was found, or none that can run the kernels.
    #[error("no GPU adapter for `{backend}` here{}", of_found(.found))]
    NoAdapter {
        /// What was looked for.
        backend: Backend,
        /// Names of devices that cannot run the kernels.
        found: Vec<String>,
    },
    /// The device was found, but its driver does not open it.
    #[error("cannot open the GPU {name}: {why}")]
    NotOpened {
        /// The device.
        name: String,
        /// What its driver says.
        why: String,
    },
    /// Something went wrong while it computed.
    #[error("the GPU {name} failed: {why}")]
    Failed {
        /// The device.
        name: String,
        /// What its driver says.
        why: String,
    },
}

fn of_found(found: &[String]) -> String {
    if found.is_empty() {
        return String::new();
    }
    format!(" that can run the kernels; found {}", found.join(", "))
}

/// Numbers on a device, and on the host too once somebody has asked for them there.
#[derive(Clone)]
pub(crate) struct DeviceBuffer(Arc<Shared>);

struct Shared {
    device: Device,
    buffer: wgpu::Buffer,
    len: usize,
    host: OnceLock<Arc<Buffer<f32>>>,
}

impl DeviceBuffer {
    fn new(device: &Device, buffer: wgpu::Buffer, len: usize) -> Self {
        Self(Arc::new(Shared { device: device.clone(), buffer, len, host: OnceLock::new() }))
    }

    /// Numbers of 32 bits, whatever they mean.
    fn upload<T: bytemuck::Pod>(device: &Device, data: &[T]) -> Self {
        Self::new(device, device.upload(data), data.len())
    }

    /// Room for results; nobody else may have it before they are written.
    fn room(device: &Device, len: usize) -> Self {
        Self::new(device, device.room(len), len)
    }

    /// The numbers on the host.
    pub(crate) fn host(&self) -> &Arc<Buffer<f32>> {
        let fetch = || Arc::new(self.0.device.download(&self.0.buffer, self.0.len));
        self.0.host.get_or_init(fetch)
    }

    pub(crate) fn device(&self) -> &Device {
        &self.0.device
    }

    fn raw(&self) -> &wgpu::Buffer {
        &self.0.buffer
    }

    fn tensor(self, shape: impl AsRef<[usize]>) -> Tensor {
        Tensor::on_device(self, shape)
    }
}

impl Tensor {
    /// The device this tensor lies on; none if it lies on the host.
    pub fn device(&self) -> Option<&Device> {
        self.device_buffer().map(DeviceBuffer::device)
    }

    /// A copy on `device`; itself if it lies there. A tensor that is empty, too large or not `f32`
    /// stays where it is.
    #[must_use]
    pub fn to_device(&self, device: &Device) -> Self {
        if self.dtype() != DType::F32 || !fits(device, self.len()) {
            return self.clone();
        }
        device.holding(self).tensor(self.shape())
    }
}

fn fits(device: &Device, len: usize) -> bool {
    (1..=device.largest()).contains(&len)
}

/// Where an operation on `tensors` with results of so many elements has to run: on the device of the
/// first that lies on one; on the host if none does, or if one does not fit.
fn device_of(tensors: &[&Tensor], results: &[usize]) -> Option<Device> {
    let device = tensors.iter().find_map(|tensor| tensor.device())?;
    let mut lens = tensors.iter().map(|tensor| tensor.len()).chain(results.iter().copied());
    lens.all(|len| fits(device, len)).then(|| device.clone())
}

impl Device {
    /// The numbers of `tensor` here.
    fn holding(&self, tensor: &Tensor) -> DeviceBuffer {
        match tensor.device_buffer() {
            Some(buffer) if buffer.device() == self => buffer.clone(),
            _ => DeviceBuffer::upload(self, tensor.data::<f32>()),
        }
    }

    /// The results of `kernel`, of so many elements each.
    fn compute<const N: usize>(
        &self,
        kernel: &Kernel,
        parameters: &[u32],
        inputs: &[&DeviceBuffer],
        results: [usize; N],
        grid: [u32; 3],
    ) -> [DeviceBuffer; N] {
        let out = results.map(|len| DeviceBuffer::room(self, len));
        let inputs: Vec<&wgpu::Buffer> = inputs.iter().map(|buffer| buffer.raw()).collect();
        let outputs: Vec<&wgpu::Buffer> = out.iter().map(DeviceBuffer::raw).collect();
        self.run(kernel, parameters, &inputs, &outputs, grid);
        out
    }

    /// [`compute`](Self::compute) for kernels with one invocation an element, 256 a workgroup.
    fn each<const N: usize>(
        &self,
        kernel: &Kernel,
        parameters: &[u32],
        inputs: &[&DeviceBuffer],
        results: [usize; N],
        elements: usize,
    ) -> [DeviceBuffer; N] {
        self.compute(kernel, parameters, inputs, results, self.spread(elements.div_ceil(256)))
    }
}

/// `f32` parameters travel as their bits.
fn bits(value: f64) -> u32 {
    (value as f32).to_bits()
}

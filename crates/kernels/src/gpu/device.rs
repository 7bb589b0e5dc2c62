//! The device itself: finding one, running kernels on it, memory there and back.

use super::Error;
use crate::buffer::Buffer;
use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use wgpu::util::{BufferInitDescriptor, DeviceExt};

/// What `wgpu` reaches devices through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// Whatever leads to the best device here.
    #[default]
    Any,
    /// Vulkan.
    Vulkan,
    /// Metal.
    Metal,
    /// Direct3D 12.
    Dx12,
    /// OpenGL ES 3.1, or OpenGL 4.3.
    Gl,
}

impl Backend {
    fn flags(self) -> wgpu::Backends {
        match self {
            Backend::Any => wgpu::Backends::all(),
            Backend::Vulkan => wgpu::Backends::VULKAN,
            Backend::Metal => wgpu::Backends::METAL,
            Backend::Dx12 => wgpu::Backends::DX12,
            Backend::Gl => wgpu::Backends::GL,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Any => "gpu",
            Backend::Vulkan => "vulkan",
            Backend::Metal => "metal",
            Backend::Dx12 => "dx12",
            Backend::Gl => "gl",
        })
    }
}

impl FromStr for Backend {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let all = [Backend::Any, Backend::Vulkan, Backend::Metal, Backend::Dx12, Backend::Gl];
        all.into_iter().find(|backend| backend.to_string() == name).ok_or(())
    }
}

/// A compute kernel: an entry point of a WGSL source. The name tells kernels apart.
pub(crate) struct Kernel {
    pub(crate) source: &'static str,
    pub(crate) name: &'static str,
}

/// What a tensor's buffer is for.
const STORAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::COPY_SRC)
    .union(wgpu::BufferUsages::COPY_DST);

/// Where a kernel's results are bound; its inputs start at 1.
const FIRST_OUTPUT: u32 = 8;
/// Numbers of 32 bits in a kernel's parameters, at most.
const PARAMETERS: usize = 16;
/// Dispatches that are handed to the device together.
const TOGETHER: usize = 64;
/// Such bundles that may wait there; more would hold on to memory that nobody needs any more.
const WAITING: usize = 4;
/// What the kernels ask of a device beyond the least that `wgpu` runs on.
const STORAGE_BUFFERS: u32 = 8;
const INVOCATIONS: u32 = 256;
const WORKGROUP_BYTES: u32 = 16 << 10;

/// A device that computes in `f32`. Clones are the same device.
#[derive(Clone)]
pub struct Device {
    shared: Arc<Inner>,
    /// Most elements of a tensor: a kernel sees a tensor as one binding.
    largest: usize,
}

struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    /// Most workgroups along a dimension of a grid.
    widest: u32,
    pipelines: Mutex<BTreeMap<&'static str, wgpu::ComputePipeline>>,
    pending: Mutex<Pending>,
    /// The first thing that went wrong.
    fault: Arc<OnceLock<String>>,
}

#[derive(Default)]
struct Pending {
    encoder: Option<wgpu::CommandEncoder>,
    dispatches: usize,
    submitted: VecDeque<wgpu::SubmissionIndex>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves these as they were between two steps.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The best first: real hardware before software.
fn preference(kind: wgpu::DeviceType) -> usize {
    match kind {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

fn suffices(limits: &wgpu::Limits) -> bool {
    limits.max_storage_buffers_per_shader_stage >= STORAGE_BUFFERS
        && limits.max_compute_invocations_per_workgroup >= INVOCATIONS
        && limits.max_compute_workgroup_storage_size >= WORKGROUP_BYTES
}

impl Device {
    /// Opens the best device that `backend` leads to, of those that their drivers open.
    ///
    /// # Errors
    /// If there is none that computes, or the best of them cannot be opened and neither can another.
    pub fn open(backend: Backend) -> Result<Self, Error> {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = backend.flags();
        let instance = wgpu::Instance::new(descriptor);
        let mut adapters = pollster::block_on(instance.enumerate_adapters(backend.flags()));
        let found = adapters.iter().map(|adapter| adapter.get_info().name).collect();
        adapters.retain(|adapter| suffices(&adapter.limits()));
        adapters.sort_by_key(|adapter| preference(adapter.get_info().device_type));
        let mut first_fault = None;
        for adapter in adapters {
            match Self::of(&adapter) {
                Ok(device) => return Ok(device),
                Err(fault) => first_fault = first_fault.or(Some(fault)),
            }
        }
        Err(first_fault.unwrap_or(Error::NoAdapter { backend, found }))
    }

    fn of(adapter: &wgpu::Adapter) -> Result<Self, Error> {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let largest = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) / 4;
        let widest = limits.max_compute_workgroups_per_dimension;
        let request = wgpu::DeviceDescriptor {
            label: Some("hydralora"),
            required_limits: limits,
            ..wgpu::DeviceDescriptor::default()
        };
        let (device, queue) =
            pollster::block_on(adapter.request_device(&request)).map_err(|error| {
                Error::NotOpened { name: info.name.clone(), why: error.to_string() }
            })?;
        let fault = Arc::new(OnceLock::new());
        let noted = fault.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let why = match &error {
                wgpu::Error::OutOfMemory { .. } => {
                    "its memory does not suffice; try a smaller batch, or --device cpu".to_owned()
                }
                other => other.to_string(),
            };
            let _ = noted.set(why);
        }));
        let shared = Inner {
            device,
            queue,
            info,
            widest,
            pipelines: Mutex::default(),
            pending: Mutex::default(),
            fault,
        };
        // Kernels count elements in 32 bits.
        let largest = usize::try_from(largest).unwrap_or(usize::MAX).min(u32::MAX as usize / 2);
        Ok(Self { shared: Arc::new(shared), largest })
    }

    /// Most elements a tensor on this device can have; operations on larger ones stay on the CPU.
    pub fn largest(&self) -> usize {
        self.largest
    }

    /// Whether it is one of NVIDIA's.
    pub fn is_nvidia(&self) -> bool {
        const NVIDIA: u32 = 0x10DE;
        self.shared.info.vendor == NVIDIA
    }

    /// Its address on the PCI bus, as `0000:3b:00.0`; none where the backend does not say.
    pub fn pci_address(&self) -> Option<&str> {
        Some(self.shared.info.device_pci_bus_id.as_str()).filter(|address| !address.is_empty())
    }

    /// The same device for tensors of at most `largest` elements, as on a device that binds no more.
    #[must_use]
    pub fn limited_to(&self, largest: usize) -> Self {
        Self { largest: largest.min(self.largest), ..self.clone() }
    }

    /// Waits until everything handed to the device is done.
    ///
    /// # Errors
    /// With the first thing that went wrong on the device, if something did.
    pub fn finish(&self) -> Result<(), Error> {
        self.submit(&mut lock(&self.shared.pending));
        let waited = self.shared.device.poll(wgpu::PollType::wait_indefinitely());
        lock(&self.shared.pending).submitted.clear();
        match (self.shared.fault.get(), waited) {
            (Some(why), _) => Err(self.failed(why)),
            (None, Err(error)) => Err(self.failed(error)),
            (None, Ok(_)) => Ok(()),
        }
    }

    fn failed(&self, why: impl fmt::Display) -> Error {
        Error::Failed { name: self.shared.info.name.clone(), why: why.to_string() }
    }

    /// Ends the computation if something went wrong on the device: an operation has no way to say
    /// so, and what it computed is worth nothing. Whoever started the computation finds the
    /// [`Error`] as the panic's payload.
    fn check(&self, result: Result<(), Error>) {
        if let Err(error) = result {
            std::panic::resume_unwind(Box::new(error));
        }
    }

    /// Numbers on the device. Of a length that is not zero and at most [`largest`](Self::largest).
    pub(crate) fn upload<T: bytemuck::Pod>(&self, data: &[T]) -> wgpu::Buffer {
        self.created(data, STORAGE)
    }

    fn created<T: bytemuck::Pod>(&self, data: &[T], usage: wgpu::BufferUsages) -> wgpu::Buffer {
        let contents = bytemuck::cast_slice(data);
        self.shared.device.create_buffer_init(&BufferInitDescriptor {
            label: None,
            contents,
            usage,
        })
    }

    /// Room for `len` numbers of 32 bits.
    pub(crate) fn room(&self, len: usize) -> wgpu::Buffer {
        self.shared.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 4 * len as u64,
            usage: STORAGE,
            mapped_at_creation: false,
        })
    }

    /// Copies `len` numbers from one buffer to the start of another.
    pub(crate) fn copy(&self, from: &wgpu::Buffer, to: &wgpu::Buffer, len: usize) {
        self.encode(|encoder| encoder.copy_buffer_to_buffer(from, 0, to, 0, 4 * len as u64));
    }

    /// The first `len` numbers of a buffer.
    pub(crate) fn download(&self, buffer: &wgpu::Buffer, len: usize) -> Buffer<f32> {
        let staging = self.shared.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 4 * len as u64,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.copy(buffer, &staging, len);
        self.submit(&mut lock(&self.shared.pending));
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        self.check(self.finish());
        let mut out = Buffer::scratch(len);
        match staging.get_mapped_range(..) {
            Ok(view) => out.copy_from_slice(bytemuck::cast_slice(&view)),
            Err(error) => self.check(Err(self.failed(error))),
        }
        staging.unmap();
        out
    }

    /// Runs `kernel` on a grid of workgroups. Numbers among the parameters that are no integers are
    /// given by their bits.
    pub(crate) fn run(
        &self,
        kernel: &Kernel,
        parameters: &[u32],
        inputs: &[&wgpu::Buffer],
        outputs: &[&wgpu::Buffer],
        grid: [u32; 3],
    ) {
        // Entry points of one source declare the same parameters, though not all need the last of them.
        let mut all = [0; PARAMETERS];
        all[..parameters.len()].copy_from_slice(parameters);
        let uniform = self.created(&all, wgpu::BufferUsages::UNIFORM);
        let mut entries =
            vec![wgpu::BindGroupEntry { binding: 0, resource: uniform.as_entire_binding() }];
        for (first, buffers) in [(1, inputs), (FIRST_OUTPUT, outputs)] {
            entries.extend((first..).zip(buffers).map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding,
                resource: buffer.as_entire_binding(),
            }));
        }
        let pipeline = self.pipeline(kernel);
        let group = self.shared.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(kernel.name),
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        self.encode(|encoder| {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        });
    }

    /// A grid of `count` workgroups for kernels that count them along two dimensions.
    pub(crate) fn spread(&self, count: usize) -> [u32; 3] {
        let count = count as u32;
        let width = count.clamp(1, self.shared.widest);
        [width, count.div_ceil(width), 1]
    }

    fn pipeline(&self, kernel: &Kernel) -> wgpu::ComputePipeline {
        let mut pipelines = lock(&self.shared.pipelines);
        let made = pipelines.entry(kernel.name).or_insert_with(|| {
            let device = &self.shared.device;
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(kernel.name),
                source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(kernel.source)),
            });
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(kernel.name),
                layout: None,
                module: &module,
                entry_point: Some(kernel.name),
                // Every kernel writes its workgroup memory before it reads it; zeros written first keep
                // some drivers' compilers busy for minutes.
                compilation_options: wgpu::PipelineCompilationOptions {
                    zero_initialize_workgroup_memory: false,
                    ..wgpu::PipelineCompilationOptions::default()
                },
                cache: None,
            })
        });
        made.clone()
    }

    /// Adds one step to what is handed to the device next.
    fn encode(&self, step: impl FnOnce(&mut wgpu::CommandEncoder)) {
        let mut pending = lock(&self.shared.pending);
        let encoder = pending.encoder.get_or_insert_with(|| {
            self.shared.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
        });
        step(encoder);
        pending.dispatches += 1;
        if pending.dispatches >= TOGETHER {
            self.submit(&mut pending);
            if pending.submitted.len() > WAITING {
                let oldest = pending.submitted.pop_front();
                drop(pending);
                let wait = wgpu::PollType::Wait { submission_index: oldest, timeout: None };
                let waited = self.shared.device.poll(wait).map(|_| ());
                self.check(waited.map_err(|error| self.failed(error)));
            }
        }
    }

    fn submit(&self, pending: &mut Pending) {
        pending.dispatches = 0;
        if let Some(encoder) = pending.encoder.take() {
            pending.submitted.push_back(self.shared.queue.submit([encoder.finish()]));
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = &self.shared.info;
        write!(f, "{} ({:?}", info.name, info.backend)?;
        for part in [&info.driver, &info.driver_info] {
            if !part.is_empty() {
                write!(f, ", {part}")?;
            }
        }
        f.write_str(")")
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({self})")
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

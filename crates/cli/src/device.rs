//! What models compute on, chosen once for the whole command.

use crate::args::{Device, Global, spelling};
use crate::failure::bad_input;
use hydralora_energy::Nvidia;
use hydralora_model::Decoder;

/// Opens the device that `--device` names.
pub(crate) fn choose(global: &Global) -> anyhow::Result<()> {
    match global.device {
        Device::Cpu => Ok(()),
        device => open(global, device),
    }
}

/// `decoder` where it is to compute.
#[cfg_attr(not(feature = "gpu"), allow(unused_mut))]
pub(crate) fn placed(mut decoder: Decoder) -> Decoder {
    #[cfg(feature = "gpu")]
    if let Some(device) = chosen::DEVICE.get() {
        decoder.to_device(device);
    }
    decoder
}

/// Whose counters of energy belong to what is computed on.
pub(crate) fn nvidia() -> Nvidia {
    #[cfg(feature = "gpu")]
    if let Some(device) = chosen::DEVICE.get().filter(|device| device.is_nvidia()) {
        return device.pci_address().map_or(Nvidia::All, |address| Nvidia::At(address.to_owned()));
    }
    Nvidia::No
}

#[cfg(not(feature = "gpu"))]
fn open(_: &Global, device: Device) -> anyhow::Result<()> {
    Err(bad_input(format!(
        "--device {}: this build computes on the CPU alone; \
         `cargo build --release --features gpu` makes one that can use a GPU",
        spelling(&device)
    )))
}

#[cfg(feature = "gpu")]
fn open(global: &Global, device: Device) -> anyhow::Result<()> {
    use hydralora_kernels::gpu::Backend;
    let backend = match device {
        Device::Cpu => return Ok(()),
        Device::Gpu => Backend::Any,
        Device::Vulkan => Backend::Vulkan,
        Device::Metal => Backend::Metal,
        Device::Dx12 => Backend::Dx12,
        Device::Gl => Backend::Gl,
    };
    let opened = hydralora_kernels::gpu::Device::open(backend)
        .map_err(|error| bad_input(format!("--device {}: {error}", spelling(&device))))?;
    crate::ui::say(global, format!("computing on {opened}"));
    // Commands run once a process.
    let _ = chosen::DEVICE.set(opened);
    Ok(())
}

#[cfg(feature = "gpu")]
mod chosen {
    use hydralora_kernels::gpu::Device;
    use std::sync::OnceLock;

    pub(super) static DEVICE: OnceLock<Device> = OnceLock::new();
}

/// What a computation that was given up on a device says.
pub(crate) fn failure(panic: &(dyn std::any::Any + Send)) -> Option<String> {
    #[cfg(feature = "gpu")]
    return panic.downcast_ref::<hydralora_kernels::gpu::Error>().map(ToString::to_string);
    #[cfg(not(feature = "gpu"))]
    {
        let _ = panic;
        None
    }
}

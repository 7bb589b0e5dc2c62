//! The counters of NVIDIA's devices, through the driver's own library (NVML), which is opened at run
//! time. They count the whole board since the driver was loaded; Volta and later have them.

use crate::Nvidia;
use crate::counter::Counter;

/// What the sum is called, a part each device, and the counters.
type Found = (Vec<String>, Vec<Box<dyn Counter>>);

#[cfg(not(feature = "nvml"))]
pub(crate) fn open(which: &Nvidia) -> Result<Found, String> {
    match which {
        Nvidia::No => Ok((Vec::new(), Vec::new())),
        Nvidia::All | Nvidia::At(_) => {
            Err("this build does not read the counters of NVIDIA's devices".to_owned())
        }
    }
}

#[cfg(feature = "nvml")]
pub(crate) use with_nvml::open;

#[cfg(feature = "nvml")]
mod with_nvml {
    use super::{Counter, Found, Nvidia};
    use nvml_wrapper::error::NvmlError;
    use nvml_wrapper::{Device, Nvml};
    use std::sync::Arc;

    struct Board {
        nvml: Arc<Nvml>,
        index: u32,
        name: String,
    }

    impl Counter for Board {
        fn read(&self) -> Result<u64, String> {
            let found = self.nvml.device_by_index(self.index).and_then(|device| {
                // In millijoules.
                device.total_energy_consumption()
            });
            let fault = |error: NvmlError| match error {
                NvmlError::NotSupported => {
                    format!("{}: has no counter of energy; Volta and later have", self.name)
                }
                error => format!("{}: {error}", self.name),
            };
            found.map(|millijoules| millijoules.saturating_mul(1000)).map_err(fault)
        }

        fn name(&self) -> String {
            self.name.clone()
        }

        fn range(&self) -> Option<u64> {
            None
        }
    }

    /// The counters of the devices asked for, as `nvml:NAME`.
    ///
    /// # Errors
    /// If the library is not there, knows no such device, or a device has no counter.
    pub(crate) fn open(which: &Nvidia) -> Result<Found, String> {
        if *which == Nvidia::No {
            return Ok((Vec::new(), Vec::new()));
        }
        let nvml = Nvml::init().map_err(|error| match error {
            NvmlError::LibloadingError(error) => format!("NVIDIA's NVML is not there: {error}"),
            error => format!("NVIDIA's NVML: {error}"),
        })?;
        let nvml = Arc::new(nvml);
        let indices = match which {
            Nvidia::At(address) => {
                let device = nvml.device_by_pci_bus_id(address.as_str());
                let index = device.and_then(|device: Device<'_>| device.index());
                vec![index.map_err(|error| format!("NVIDIA's NVML: {address}: {error}"))?]
            }
            _ => {
                let count = nvml.device_count();
                (0..count.map_err(|error| format!("NVIDIA's NVML: {error}"))?).collect()
            }
        };
        let (mut names, mut counters) = (Vec::new(), Vec::<Box<dyn Counter>>::new());
        for index in indices {
            let name = nvml.device_by_index(index).and_then(|device| device.name());
            let name = name.map_err(|error| format!("NVIDIA's NVML: device {index}: {error}"))?;
            let board = Board { nvml: Arc::clone(&nvml), index, name: format!("nvml:{name}") };
            board.read()?;
            names.push(board.name());
            counters.push(Box::new(board));
        }
        if counters.is_empty() {
            return Err("NVIDIA's NVML knows no device".to_owned());
        }
        Ok((names, counters))
    }
}

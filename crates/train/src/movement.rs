//! How far routers have moved from where they started.

use crate::error::Result;
use hydralora_kernels::DType;
use hydralora_peft::{Role, TensorMap, Tuned, io};
use std::path::Path;

/// Where the routers of a run started, in its folder.
pub const ROUTER_START_FILE: &str = "router_start.safetensors";

/// The start of an adapter's routers.
pub(crate) struct RouterStart(TensorMap);

impl RouterStart {
    /// Notes where the routers are now, in the run's folder too; none if there are no routers.
    pub(crate) fn note(tuned: &dyn Tuned, folder: Option<&Path>) -> Result<Option<Self>> {
        let start = routers(tuned);
        if start.is_empty() {
            return Ok(None);
        }
        if let Some(folder) = folder {
            std::fs::create_dir_all(folder)?;
            io::write_tensors(&folder.join(ROUTER_START_FILE), &start)?;
        }
        Ok(Some(Self(start)))
    }

    /// Reads what an earlier part of the run noted; none if it noted nothing.
    pub(crate) fn recall(folder: &Path, dtype: DType) -> Result<Option<Self>> {
        let path = folder.join(ROUTER_START_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        Ok(Some(Self(io::decode(&path, dtype)?)))
    }

    /// The distance of all routers from their start, over the norm of the start.
    pub(crate) fn distance(&self, tuned: &dyn Tuned) -> Option<f64> {
        distance(&self.0, &routers(tuned))
    }
}

/// The distance of the routers among `tensors`, an adapter's by their names in its file, from where they
/// started, over the norm of the start; none where the run in `folder` noted no start of these.
///
/// # Errors
/// If what it noted cannot be read.
pub fn router_movement(folder: &Path, tensors: &TensorMap) -> Result<Option<f64>> {
    let start = RouterStart::recall(folder, DType::F32)?;
    Ok(start.and_then(|start| {
        let of_router = |name: &String| start.0.contains_key(name);
        let now = tensors.iter().filter(|(name, _)| of_router(name));
        let now: TensorMap = now.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        distance(&start.0, &now)
    }))
}

fn distance(start: &TensorMap, now: &TensorMap) -> Option<f64> {
    let (mut moved, mut norm) = (0.0, 0.0);
    for (name, now) in now {
        for (now, start) in now.to_f64().iter().zip(start.get(name)?.to_f64()) {
            moved += (now - start).powi(2);
            norm += start * start;
        }
    }
    (norm > 0.0).then(|| (moved / norm).sqrt())
}

fn routers(tuned: &dyn Tuned) -> TensorMap {
    let trainables = tuned.trainables().into_iter();
    trainables
        .filter(|trainable| trainable.role == Role::Router)
        .map(|trainable| {
            (trainable.parameter.name().to_owned(), trainable.parameter.value().clone())
        })
        .collect()
}

//! Trainable tensors, their roles, and maps of tensors by name.

use crate::tuned::Tuned;
use hydralora_kernels::{Parameter, Tensor, Var};
use serde::Serialize;
use std::collections::BTreeMap;

/// What a trainable tensor is for; decides how it is counted and which learning rate it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Down-projections, `lora_A`.
    A,
    /// Up-projections, `lora_B`.
    B,
    /// Routers.
    Router,
    /// Learned factors: of activations, or the singular values of an update.
    Scale,
    /// Virtual tokens, and the network that makes them.
    Prompt,
    /// Weights of the model itself.
    Weight,
    /// Its norms and biases, which weight decay leaves alone.
    Norm,
}

/// A trainable tensor and its role.
#[derive(Debug)]
pub struct Trainable {
    /// The tensor.
    pub parameter: Parameter,
    /// What it is for.
    pub role: Role,
}

impl Trainable {
    /// A tensor named as in the adapter's file.
    pub fn new(name: String, role: Role, value: Tensor) -> Self {
        Self { parameter: Parameter::new(name, value), role }
    }

    /// The leaf to compute with.
    pub fn var(&self) -> &Var {
        self.parameter.var()
    }
}

/// Tensors of an adapter file by name.
pub type TensorMap = BTreeMap<String, Tensor>;

/// Number of trainable parameters per role.
pub fn count(tuned: &dyn Tuned) -> BTreeMap<Role, usize> {
    let mut counts = BTreeMap::new();
    for trainable in tuned.trainables() {
        *counts.entry(trainable.role).or_default() += trainable.parameter.value().len();
    }
    counts
}

/// Takes tensor `name` out of `tensors`, noting in `faults` if it is missing or misshapen.
pub(crate) fn take_tensor(
    tensors: &mut TensorMap,
    name: &str,
    shape: &[usize],
    faults: &mut Vec<String>,
) -> Option<Tensor> {
    match tensors.remove(name) {
        Some(tensor) if tensor.shape() == shape => Some(tensor),
        Some(tensor) => {
            faults.push(format!("`{name}` has shape {:?}, expected {shape:?}", tensor.shape()));
            None
        }
        None => {
            faults.push(format!("`{name}` {shape:?} is missing"));
            None
        }
    }
}

/// Loads every trainable from the tensor of its name.
pub(crate) fn load_by_name<'a>(
    trainables: impl IntoIterator<Item = &'a mut Trainable>,
    tensors: &mut TensorMap,
) -> Result<(), Vec<String>> {
    let mut faults = Vec::new();
    for trainable in trainables {
        let parameter = &mut trainable.parameter;
        let name = parameter.name().to_owned();
        if let Some(tensor) = take_tensor(tensors, &name, parameter.value().shape(), &mut faults) {
            parameter.set(tensor.to_dtype(parameter.value().dtype()));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

/// One tensor per trainable under its own name.
pub(crate) fn export_by_name(
    trainables: Vec<&Trainable>,
    pick: &dyn Fn(&Trainable) -> Tensor,
) -> TensorMap {
    trainables.into_iter().map(|t| (t.parameter.name().to_owned(), pick(t))).collect()
}

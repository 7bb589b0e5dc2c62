//! A named trainable tensor.

use crate::graph::Var;
use crate::tensor::Tensor;

/// A trainable tensor under the name it has in an adapter file.
///
/// It keeps one graph leaf for life, so gradients are looked up by it from step to step.
pub struct Parameter {
    name: String,
    leaf: Var,
}

impl Parameter {
    /// A parameter that starts at `value`.
    pub fn new(name: impl Into<String>, value: Tensor) -> Self {
        Self { name: name.into(), leaf: Var::leaf(value) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The leaf to compute with.
    pub fn var(&self) -> &Var {
        &self.leaf
    }

    /// The current value.
    pub fn value(&self) -> &Tensor {
        self.leaf.value()
    }

    /// Replaces the value.
    ///
    /// # Panics
    /// If the shape or type changes.
    pub fn set(&mut self, value: Tensor) {
        self.leaf.set_value(value);
    }

    /// The value for writing in place.
    pub fn value_mut(&mut self) -> &mut Tensor {
        self.leaf.value_mut()
    }
}

impl std::fmt::Debug for Parameter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Parameter({} {:?})", self.name, self.value().shape())
    }
}

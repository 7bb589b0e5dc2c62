//! Frozen weights by the names that a family gives them.

use crate::site::{Linear, Site, TensorSite};
use hydralora_kernels::Var;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;

/// The frozen weights of a decoder layer, or of what a decoder has outside its layers.
#[derive(Default)]
pub(crate) struct Modules {
    pub(super) linears: Vec<(Site, FrozenLinear)>,
    pub(super) tensors: Vec<FrozenTensor>,
    /// Tables that tokens are looked up in.
    pub(super) tables: Vec<(&'static str, FrozenLinear)>,
}

/// A frozen tensor that is no linear layer.
pub(crate) struct FrozenTensor {
    pub(crate) site: TensorSite,
    pub(crate) value: Var,
    /// What is added to the weight of a norm before it multiplies.
    pub(crate) shift: f64,
}

impl Modules {
    /// Gives a linear layer.
    ///
    /// # Panics
    /// If the family's plan does not list it.
    pub(crate) fn linear(&self, linear: &Linear) -> (Site, &FrozenLinear) {
        let found = self.linears.iter().find(|(site, _)| site.linear.name == linear.name);
        let (site, frozen) =
            found.unwrap_or_else(|| panic!("the family's plan does not list {}", linear.name));
        (*site, frozen)
    }

    /// Tells whether the family's plan lists a linear layer.
    pub(crate) fn has(&self, linear: &Linear) -> bool {
        self.linears.iter().any(|(site, _)| site.linear.name == linear.name)
    }

    /// Gives the tensor of that name.
    ///
    /// # Panics
    /// If the family's plan does not list it.
    pub(crate) fn tensor(&self, name: &str) -> &FrozenTensor {
        let found = self.tensors.iter().find(|tensor| tensor.site.name == name);
        found.unwrap_or_else(|| panic!("the family's plan does not list {name}"))
    }

    /// Gives the table of that name.
    ///
    /// # Panics
    /// If the family's plan does not list it.
    pub(crate) fn table(&self, name: &str) -> &FrozenLinear {
        let found = self.tables.iter().find(|(known, _)| *known == name);
        &found.unwrap_or_else(|| panic!("the family's plan does not list {name}")).1
    }
}

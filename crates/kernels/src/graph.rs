//! Reverse-mode differentiation over [`Tensor`] values.
//!
//! A [`Var`] is a value plus, when something it was computed from is trainable, the node that
//! knows how to send a gradient back. Nodes are numbered as they are made, so walking them from the
//! highest number down visits every user of a value before the value itself; each node's closure,
//! and with it the activations it saved, is freed as soon as it has run.

use crate::tensor::Tensor;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Sends the gradient of a node's output to the node's parents.
type Backward = Box<dyn FnOnce(Tensor, &mut ParentGradients<'_>) + Send>;

/// One differentiable operation that was run, or a trainable leaf.
struct Node {
    id: u64,
    parents: Vec<Option<Arc<Node>>>,
    backward: Mutex<Option<Backward>>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

/// While alive, operations on this thread record nothing, so that inference keeps no activations.
pub struct NoGrad(bool);

/// Stops recording until the guard is dropped.
pub fn no_grad() -> NoGrad {
    NoGrad(RECORDING.replace(false))
}

impl Drop for NoGrad {
    fn drop(&mut self) {
        RECORDING.set(self.0);
    }
}

/// Computes a value again from what its operation kept anyway.
type Recipe = Arc<dyn Fn() -> Tensor + Send + Sync>;

/// A value in a computation.
#[derive(Clone)]
pub struct Var {
    value: Tensor,
    node: Option<Arc<Node>>,
    recipe: Option<Recipe>,
}

/// A value kept for a backward pass: itself, or how to compute it again.
pub enum Saved {
    /// The value.
    Value(Tensor),
    /// A cheap computation from values that are kept in any case.
    Recipe(Recipe),
}

impl Saved {
    /// The value, computed again if need be.
    pub fn get(&self) -> Tensor {
        match self {
            Saved::Value(value) => value.clone(),
            Saved::Recipe(recipe) => recipe(),
        }
    }
}

impl Var {
    /// A value that needs no gradient.
    pub fn constant(value: Tensor) -> Self {
        Self { value, node: None, recipe: None }
    }

    /// A trainable leaf; its gradient is found in [`Gradients`] after a backward pass.
    pub fn leaf(value: Tensor) -> Self {
        let node = Node {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            parents: Vec::new(),
            backward: Mutex::new(None),
        };
        Self { value, node: Some(Arc::new(node)), recipe: None }
    }

    /// The result of an operation on `parents`. `backward` is given the gradient of `value` and
    /// adds to the gradients of those parents that need one; it is dropped, with all it captured,
    /// when none does.
    pub fn computed(
        value: Tensor,
        parents: &[&Var],
        backward: impl FnOnce(Tensor, &mut ParentGradients<'_>) + Send + 'static,
    ) -> Self {
        if !RECORDING.get() || parents.iter().all(|parent| parent.node.is_none()) {
            return Self::constant(value);
        }
        let node = Node {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            parents: parents.iter().map(|parent| parent.node.clone()).collect(),
            backward: Mutex::new(Some(Box::new(backward))),
        };
        Self { value, node: Some(Arc::new(node)), recipe: None }
    }

    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Lets operations that save this value keep `recipe` instead. For operations whose result is
    /// cheap to compute from what their own backward keeps.
    #[must_use]
    pub fn with_recipe(mut self, recipe: impl Fn() -> Tensor + Send + Sync + 'static) -> Self {
        if self.node.is_some() {
            self.recipe = Some(Arc::new(recipe));
        }
        self
    }

    /// What an operation that needs this value in its backward should keep.
    pub fn save(&self) -> Saved {
        match &self.recipe {
            Some(recipe) => Saved::Recipe(recipe.clone()),
            None => Saved::Value(self.value.clone()),
        }
    }

    /// The value alone; its storage is unique if nobody else kept it.
    pub fn into_value(self) -> Tensor {
        self.value
    }

    /// Splits into the value, whose storage is then unique if nobody else kept it, and a handle to
    /// pass as a parent. For operations that work in place.
    pub fn take(self) -> (Tensor, Var) {
        let empty = Tensor::empty(self.value.dtype());
        let Self { value, node, recipe: _ } = self;
        (value, Var { value: empty, node, recipe: None })
    }

    /// Whether a gradient flows back through this value.
    pub fn needs_grad(&self) -> bool {
        self.node.is_some() && RECORDING.get()
    }

    /// The same value, cut off from what it was computed from.
    pub fn detach(&self) -> Self {
        Self::constant(self.value.clone())
    }

    /// Replaces the value of a leaf, keeping its identity.
    ///
    /// # Panics
    /// If the shape or type changes.
    pub fn set_value(&mut self, value: Tensor) {
        assert_eq!(self.value.shape(), value.shape(), "a parameter's shape is fixed");
        assert_eq!(self.value.dtype(), value.dtype(), "a parameter's type is fixed");
        self.value = value;
    }

    /// The value for writing in place.
    pub fn value_mut(&mut self) -> &mut Tensor {
        &mut self.value
    }

    /// Gradients of this value with respect to every leaf it depends on, starting from
    /// `d self = seed`.
    ///
    /// # Panics
    /// If the shapes of `seed` and the value differ, or if the graph was already consumed.
    pub fn backward_from(&self, seed: Tensor) -> Gradients {
        backward_from([(self.clone(), seed)])
    }

    /// [`backward_from`](Self::backward_from) a one-element value with seed 1.
    pub fn backward(&self) -> Gradients {
        let mut seed = Tensor::zeros(self.value.dtype(), self.value.shape());
        assert_eq!(seed.len(), 1, "backward() starts from a single number");
        crate::dispatch!(seed.dtype(), |E| seed.data_mut::<E>()[0] = 1.0);
        self.backward_from(seed)
    }
}

/// Gradients of every leaf that `outputs` depend on, each starting from its own seed.
///
/// # Panics
/// If the shapes of a seed and its value differ, or if the graph was already consumed.
pub fn backward_from(outputs: impl IntoIterator<Item = (Var, Tensor)>) -> Gradients {
    let mut gradients = Gradients::default();
    backward_onto(outputs, &mut gradients);
    gradients
}

/// The same, added in place to what `gradients` holds already.
///
/// # Panics
/// As [`backward_from`].
pub fn backward_onto(outputs: impl IntoIterator<Item = (Var, Tensor)>, gradients: &mut Gradients) {
    let mut pending: BTreeMap<u64, (Arc<Node>, Tensor)> = BTreeMap::new();
    let leaves = &mut gradients.0;
    for (output, seed) in outputs {
        assert_eq!(output.value.shape(), seed.shape(), "the seed gradient has another shape");
        let Some(node) = output.node else { continue };
        match pending.get_mut(&node.id) {
            Some((_, sum)) => sum.add_assign(&seed),
            None => {
                pending.insert(node.id, (node, seed));
            }
        }
    }
    while let Some((id, (node, gradient))) = pending.pop_last() {
        if node.parents.is_empty() {
            add_to(leaves, id, gradient);
            continue;
        }
        let backward =
            node.backward.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let backward = backward.expect("a graph can be walked back only once");
        let parents = &node.parents;
        backward(gradient, &mut ParentGradients { parents, pending: &mut pending, leaves });
    }
}

fn add_to(sums: &mut BTreeMap<u64, Tensor>, id: u64, gradient: Tensor) {
    match sums.get_mut(&id) {
        Some(sum) => sum.add_assign(&gradient),
        None => {
            sums.insert(id, gradient);
        }
    }
}

/// Where an operation's backward puts the gradients of its inputs.
pub struct ParentGradients<'a> {
    parents: &'a [Option<Arc<Node>>],
    pending: &'a mut BTreeMap<u64, (Arc<Node>, Tensor)>,
    leaves: &'a mut BTreeMap<u64, Tensor>,
}

impl ParentGradients<'_> {
    /// Whether parent `index` wants a gradient.
    pub fn needs(&self, index: usize) -> bool {
        self.parents[index].is_some()
    }

    /// Adds to the gradient of parent `index`; ignored if it wants none.
    pub fn add(&mut self, index: usize, gradient: Tensor) {
        let Some(node) = &self.parents[index] else { return };
        if node.parents.is_empty() {
            return add_to(self.leaves, node.id, gradient);
        }
        match self.pending.get_mut(&node.id) {
            Some((_, sum)) => sum.add_assign(&gradient),
            None => {
                self.pending.insert(node.id, (node.clone(), gradient));
            }
        }
    }

    /// Takes out what has been gathered for parent `index` so far, so that a product can be added
    /// to it in place; give the sum back with [`add`](Self::add).
    pub fn take(&mut self, index: usize) -> Option<Tensor> {
        let node = self.parents[index].as_ref()?;
        if node.parents.is_empty() {
            return self.leaves.remove(&node.id);
        }
        self.pending.remove(&node.id).map(|(_, gradient)| gradient)
    }
}

/// Gradients of the leaves after a backward pass.
#[derive(Default)]
pub struct Gradients(BTreeMap<u64, Tensor>);

impl Gradients {
    /// The gradient of `leaf`, if any path led to it.
    pub fn get(&self, leaf: &Var) -> Option<&Tensor> {
        self.0.get(&leaf.node.as_ref()?.id)
    }

    /// Takes out the gradient of `leaf`, if any path led to it.
    pub fn take(&mut self, leaf: &Var) -> Option<Tensor> {
        self.0.remove(&leaf.node.as_ref()?.id)
    }

    /// Sets the gradient of `leaf`; nothing for a value that is none.
    pub fn put(&mut self, leaf: &Var, gradient: Tensor) {
        if let Some(node) = &leaf.node {
            self.0.insert(node.id, gradient);
        }
    }

    /// Adds another pass's gradients, as accumulation over micro-batches does.
    pub fn accumulate(&mut self, other: Gradients) {
        for (id, gradient) in other.0 {
            add_to(&mut self.0, id, gradient);
        }
    }

    /// All gradients, in the order the leaves were made.
    pub fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.0.values()
    }

    /// Multiplies every gradient by `factor`.
    pub fn scale(&mut self, factor: f64) {
        for gradient in self.0.values_mut() {
            gradient.scale(factor);
        }
    }

    /// The Euclidean norm over all gradients together.
    pub fn norm(&self) -> f64 {
        self.0.values().map(|g| g.norm().powi(2)).sum::<f64>().sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    fn square(x: &Var) -> Var {
        let saved = x.value().clone();
        let v = saved.item();
        Var::computed(Tensor::scalar(DType::F64, v * v), &[x], move |g, parents| {
            parents.add(0, Tensor::scalar(DType::F64, 2.0 * saved.item() * g.item()));
        })
    }

    fn sum(a: &Var, b: &Var) -> Var {
        let value = Tensor::scalar(DType::F64, a.value().item() + b.value().item());
        Var::computed(value, &[a, b], |g, parents| {
            parents.add(0, g.clone());
            parents.add(1, g);
        })
    }

    #[test]
    fn a_value_used_twice_gathers_both_gradients() {
        let x = Var::leaf(Tensor::scalar(DType::F64, 3.0));
        let y = square(&x);
        let z = sum(&square(&y), &sum(&y, &x)); // x^4 + x^2 + x
        let gradients = z.backward();
        assert_eq!(gradients.get(&x).unwrap().item(), 4.0 * 27.0 + 6.0 + 1.0);
    }

    #[test]
    fn a_second_pass_adds_to_the_first() {
        let x = Var::leaf(Tensor::scalar(DType::F64, 3.0));
        let mut gradients = square(&x).backward();
        let one = Tensor::scalar(DType::F64, 1.0);
        backward_onto([(sum(&x, &x), one)], &mut gradients);
        assert_eq!(gradients.get(&x).unwrap().item(), 6.0 + 2.0);
    }

    #[test]
    fn constants_and_no_grad_record_nothing() {
        let x = Var::leaf(Tensor::scalar(DType::F64, 3.0));
        assert!(!square(&x.detach()).needs_grad());
        let guard = no_grad();
        let y = square(&x);
        drop(guard);
        assert!(!y.needs_grad());
        assert!(y.backward().get(&x).is_none());
        assert!(square(&x).needs_grad());
    }
}

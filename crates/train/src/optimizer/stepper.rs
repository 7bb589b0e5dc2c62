//! An optimizer at work on an adapter: the state of every parameter, and the count of steps.

use super::{Chosen, Step, Trained};
use hydralora_kernels::{Gradients, Tensor};
use hydralora_peft::{Role, TensorMap, Trainable, Tuned};

/// How many times faster some parameters learn than the rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Of the heads `B`, by a fixed ratio as LoRA+ has it (arXiv 2402.12354).
    pub b: f64,
    /// Of routers.
    pub router: f64,
}

impl Default for Rates {
    fn default() -> Self {
        Self { b: 1.0, router: 1.0 }
    }
}

impl Rates {
    fn of(self, role: Role) -> f64 {
        match role {
            Role::B => self.b,
            Role::Router => self.router,
            _ => 1.0,
        }
    }
}

/// An optimizer with its state for one adapter.
#[derive(Debug)]
pub struct Stepper {
    optimizer: Chosen,
    rates: Rates,
    steps: u64,
    /// Of every parameter, in the adapter's order.
    states: Vec<Vec<Tensor>>,
}

/// A parameter as an optimizer sees it.
fn seen(trainable: &Trainable) -> Trained<'_> {
    let Trainable { parameter, role } = trainable;
    Trained { name: parameter.name(), role: *role, shape: parameter.value().shape() }
}

/// What a tensor of state is called in a checkpoint.
fn state_name(parameter: &str, state: &str) -> String {
    format!("{parameter}/{state}")
}

impl Stepper {
    /// A fresh state for `tuned`.
    pub fn new(optimizer: &Chosen, rates: Rates, tuned: &dyn Tuned) -> Self {
        let of = |trainable: &Trainable| {
            let dtype = trainable.parameter.value().dtype();
            let state = optimizer.rule().state(seen(trainable)).into_iter();
            state.map(|state| Tensor::zeros(dtype, state.shape)).collect()
        };
        let states = tuned.trainables().into_iter().map(of).collect();
        Self { optimizer: optimizer.clone(), rates, steps: 0, states }
    }

    /// AdamW with its usual constants.
    pub fn adamw(tuned: &dyn Tuned) -> Self {
        Self::new(&Chosen::default(), Rates::default(), tuned)
    }

    /// The optimizer's name.
    pub fn name(&self) -> &'static str {
        self.optimizer.name()
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Numbers of state that a run with this optimizer holds for `tuned`.
    pub fn numbers(optimizer: &Chosen, tuned: &dyn Tuned) -> usize {
        let of = |trainable: &Trainable| -> usize {
            let state = optimizer.rule().state(seen(trainable)).into_iter();
            state.map(|state| state.shape.iter().product::<usize>()).sum()
        };
        tuned.trainables().into_iter().map(of).sum()
    }

    /// Moves every tensor that has a gradient.
    pub fn step(&mut self, tuned: &mut dyn Tuned, gradients: &Gradients, learning_rate: f64) {
        self.steps += 1;
        for (trainable, state) in tuned.trainables_mut().into_iter().zip(&mut self.states) {
            let Some(gradient) = gradients.get(trainable.var()) else { continue };
            let role = trainable.role;
            let step = Step {
                number: self.steps,
                learning_rate: learning_rate * self.rates.of(role),
                // As transformers' trainer does it.
                decayed: role != Role::Norm,
            };
            let name = trainable.parameter.name().to_owned();
            let shape = trainable.parameter.value().shape().to_vec();
            let of = Trained { name: &name, role, shape: &shape };
            let value = trainable.parameter.value_mut();
            self.optimizer.rule().update(step, of, value, gradient, state);
        }
    }

    /// The state for a checkpoint: `PARAMETER/STATE` for every parameter and each of its tensors.
    pub fn state(&self, tuned: &dyn Tuned) -> TensorMap {
        let mut map = TensorMap::new();
        for (trainable, state) in tuned.trainables().into_iter().zip(&self.states) {
            let of = seen(trainable);
            for (named, tensor) in self.optimizer.rule().state(of).iter().zip(state) {
                map.insert(state_name(of.name, named.name), tensor.clone());
            }
        }
        map
    }

    /// Takes a state saved by [`state`](Self::state) out of `tensors`; what is left over does not belong
    /// to it.
    ///
    /// # Errors
    /// Every tensor that is missing or has another shape; nothing has changed then.
    pub fn restore(
        &mut self,
        steps: u64,
        tuned: &dyn Tuned,
        tensors: &mut TensorMap,
    ) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        let mut states = Vec::new();
        for trainable in tuned.trainables() {
            let of = seen(trainable);
            let dtype = trainable.parameter.value().dtype();
            let mut state = Vec::new();
            for wanted in self.optimizer.rule().state(of) {
                let name = state_name(of.name, wanted.name);
                match tensors.remove(&name) {
                    Some(found) if found.shape() == wanted.shape => {
                        state.push(found.to_dtype(dtype));
                    }
                    Some(found) => faults.push(format!(
                        "`{name}` has shape {:?}, expected {:?}",
                        found.shape(),
                        wanted.shape
                    )),
                    None => faults.push(format!("`{name}` {:?} is missing", wanted.shape)),
                }
            }
            states.push(state);
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        (self.steps, self.states) = (steps, states);
        Ok(())
    }

    /// Takes over AdamW's state as earlier builds saved it: each of `moments` is an adapter of the same
    /// shape that has loaded a moment as if it were its values.
    pub(crate) fn restore_moments(&mut self, steps: u64, moments: [&dyn Tuned; 2]) {
        self.steps = steps;
        for (which, moment) in moments.into_iter().enumerate() {
            for (state, trainable) in self.states.iter_mut().zip(moment.trainables()) {
                state[which] = trainable.parameter.value().clone();
            }
        }
    }
}

//! The optimizers: one file each, listed once below.
//!
//! An optimizer is the options of its file: [`Optimizer`] says which tensors of state a parameter needs,
//! by name, and how a step moves it. What all have in common is the [`Stepper`]'s: the state of every
//! parameter, the count of steps, rates by role, and what weight decay leaves alone.

mod stepper;

use hydralora_kernels::Tensor;
use hydralora_peft::{Fault, Role, listed, nearest, read_rest};
use schemars::{JsonSchema, Schema, schema_for};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;
pub use stepper::{Rates, Stepper};

macro_rules! optimizers {
    ($($name:ident),* $(,)?) => {
        $(mod $name;)*
        /// Every optimizer there is; the first is the one that is meant where a recipe names none.
        pub static OPTIMIZERS: &[&dyn Kind] = &[$(&Registered::<$name::Options>::ENTRY),*];
    };
}

optimizers! { adamw, lion, adafactor, muon }

/// The key of a recipe that names the optimizer; its options stand beside it.
pub const OPTIMIZER: &str = "optimizer";

/// A parameter as an optimizer sees it.
#[derive(Clone, Copy, Debug)]
pub struct Trained<'a> {
    /// Its name.
    pub name: &'a str,
    /// What it is for.
    pub role: Role,
    /// Its shape.
    pub shape: &'a [usize],
}

/// A tensor of state that a parameter needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateTensor {
    /// What it is called in checkpoints, in `torch.optim`'s words: `exp_avg`.
    pub name: &'static str,
    /// Its shape; it starts at zero.
    pub shape: Vec<usize>,
}

impl StateTensor {
    /// State of this shape.
    pub fn new(name: &'static str, shape: impl Into<Vec<usize>>) -> Self {
        Self { name, shape: shape.into() }
    }
}

/// One step of one parameter.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Number of the step, from 1.
    pub number: u64,
    /// The learning rate of this parameter.
    pub learning_rate: f64,
    /// Whether weight decay is for it.
    pub decayed: bool,
}

/// How parameters follow their gradients.
pub trait Optimizer: Debug + Send + Sync {
    /// The state that a parameter needs, in the order in which [`update`](Self::update) gets it.
    fn state(&self, of: Trained<'_>) -> Vec<StateTensor>;
    /// Moves a parameter by one step along `gradient`, which has its shape and type, as the state has
    /// the type.
    fn update(
        &self,
        step: Step,
        of: Trained<'_>,
        value: &mut Tensor,
        gradient: &Tensor,
        state: &mut [Tensor],
    );
}

/// Options that describe their optimizer.
trait Described: Optimizer + Default + Serialize + DeserializeOwned + JsonSchema + 'static {
    /// The name in a recipe, `train.optimizer`.
    const NAME: &'static str;
    /// One line on it.
    const SUMMARY: &'static str;

    /// Every option whose value makes no sense, as its name and what is wrong.
    fn faults(&self) -> Vec<(&'static str, String)>;
}

/// The registry's side of an optimizer.
pub trait Kind: Sync {
    /// The name in a recipe.
    fn name(&self) -> &'static str;
    /// One line on it.
    fn summary(&self) -> &'static str;
    /// Its options with their defaults.
    fn defaults(&self) -> Map<String, Value>;
    /// The schema of its options.
    fn schema(&self) -> Schema;
    /// Reads its options; those that are left out stand at their defaults.
    ///
    /// # Errors
    /// Every option that is wrong, as `train.option`.
    fn read(&self, options: &Map<String, Value>) -> Result<Chosen, Vec<Fault>>;
}

/// The registry's entry of the optimizer whose options are `O`.
struct Registered<O>(PhantomData<fn() -> O>);

impl<O> Registered<O> {
    const ENTRY: Self = Self(PhantomData);
}

impl<O: Described> Kind for Registered<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn summary(&self) -> &'static str {
        O::SUMMARY
    }

    fn defaults(&self) -> Map<String, Value> {
        to_map(&O::default())
    }

    fn schema(&self) -> Schema {
        schema_for!(O)
    }

    fn read(&self, options: &Map<String, Value>) -> Result<Chosen, Vec<Fault>> {
        let (found, mut faults) = read_rest::<O>("train", options, &self.defaults());
        let Some(found) = found else { return Err(faults) };
        for (option, message) in found.faults() {
            let field = format!("train.{option}");
            // An option that could not be read stands at its default, of which nothing is to be said.
            if !faults.iter().any(|fault| fault.field == field) {
                faults.push(Fault::new(field, message));
            }
        }
        if faults.is_empty() { Ok(Chosen::of(found)) } else { Err(faults) }
    }
}

fn to_map(options: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(options) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// An optimizer with its options.
#[derive(Clone, Debug)]
pub struct Chosen {
    name: &'static str,
    options: Map<String, Value>,
    rule: Arc<dyn Optimizer>,
}

impl Chosen {
    fn of<O: Described>(options: O) -> Self {
        Self { name: O::NAME, options: to_map(&options), rule: Arc::new(options) }
    }

    /// Reads the optimizer that the section `train` of a recipe names, taking its name and its options
    /// out of it; the first of [`OPTIMIZERS`] where it names none.
    ///
    /// # Errors
    /// Everything that is wrong with them, options of other optimizers among it.
    pub fn take(section: &mut Map<String, Value>) -> Result<Self, Vec<Fault>> {
        let mut faults = Vec::new();
        let named = section.shift_remove(OPTIMIZER);
        let kind = named.as_ref().map_or(Ok(OPTIMIZERS[0]), kind_of);
        let known = kind.as_ref().ok().copied();
        if let Err(message) = kind {
            faults.push(Fault::new(format!("train.{OPTIMIZER}"), message));
        }
        let own = known.map(Kind::defaults).unwrap_or_default();
        let mut options = Map::new();
        let keys: Vec<String> = section.keys().cloned().collect();
        for key in keys {
            let having = OPTIMIZERS.iter().filter(|kind| kind.defaults().contains_key(&key));
            let having: Vec<&str> = having.map(|kind| kind.name()).collect();
            if having.is_empty() {
                continue;
            }
            let Some(value) = section.shift_remove(&key) else { continue };
            if own.contains_key(&key) {
                options.insert(key, value);
            } else if let Some(kind) = known {
                // Of an optimizer that is none nobody knows what its options are.
                let (name, of) = (kind.name(), having.join(", "));
                let message = format!("`{name}` has no such option; it is one of {of}");
                faults.push(Fault::new(format!("train.{key}"), message));
            }
        }
        match known.map(|kind| kind.read(&options)) {
            Some(Ok(chosen)) if faults.is_empty() => return Ok(chosen),
            Some(Err(found)) => faults.extend(found),
            _ => {}
        }
        Err(faults)
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its options as a recipe holds them.
    pub fn options(&self) -> &Map<String, Value> {
        &self.options
    }

    /// The optimizer.
    pub fn rule(&self) -> &dyn Optimizer {
        self.rule.as_ref()
    }

    /// Numbers of state for each number of a large matrix of `role`, rounded down.
    pub fn copies(&self, role: Role) -> usize {
        const SIDE: usize = 1 << 10;
        let of = Trained { name: "", role, shape: &[SIDE, SIDE] };
        let numbers = |state: StateTensor| state.shape.iter().product::<usize>();
        self.rule.state(of).into_iter().map(numbers).sum::<usize>() / (SIDE * SIDE)
    }
}

/// The optimizer that a recipe names.
fn kind_of(named: &Value) -> Result<&'static dyn Kind, String> {
    let names: Vec<&str> = OPTIMIZERS.iter().map(|kind| kind.name()).collect();
    let Value::String(name) = named else {
        return Err(format!("is {named}; expected one of {}", names.join(", ")));
    };
    if let Some(kind) = OPTIMIZERS.iter().find(|kind| kind.name() == name) {
        return Ok(*kind);
    }
    // Others call variants of one after it: `adamw_torch`, `lion_8bit`.
    let lower = name.to_lowercase();
    let inside = names.iter().find(|known| lower.contains(**known)).copied();
    let hint = match inside.or_else(|| nearest(&lower, names.iter().copied())) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("expected one of {}", listed(&names)),
    };
    Err(format!("`{name}` is not known; {hint}"))
}

impl Default for Chosen {
    fn default() -> Self {
        Self::of(adamw::Options::default())
    }
}

impl PartialEq for Chosen {
    fn eq(&self, other: &Self) -> bool {
        (self.name, &self.options) == (other.name, &other.options)
    }
}

/// As the section `train` holds it: its name, and its options beside it.
impl Serialize for Chosen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let name = (OPTIMIZER.to_owned(), Value::from(self.name));
        serializer.collect_map([name].into_iter().chain(self.options.clone()))
    }
}

/// What is wrong with a number, if something is.
fn unless(
    right: bool,
    option: &'static str,
    found: impl ToString,
    expected: &str,
) -> Option<(&'static str, String)> {
    (!right).then(|| (option, format!("is {}; expected {expected}", found.to_string())))
}

/// What is wrong with a positive number, if something is.
fn unless_positive(option: &'static str, found: f64) -> Option<(&'static str, String)> {
    unless(found.is_finite() && found > 0.0, option, found, "a positive number")
}

/// What is wrong with a decay of moments, if something is.
fn unless_decay(option: &'static str, found: f64) -> Option<(&'static str, String)> {
    unless((0.0..1.0).contains(&found), option, found, &format!("0 ≤ {option} < 1"))
}

/// What is wrong with a weight decay, if something is.
fn unless_weight_decay(found: f64) -> Option<(&'static str, String)> {
    unless(found.is_finite() && found >= 0.0, "weight_decay", found, "0 or more")
}

#[cfg(test)]
mod tests;

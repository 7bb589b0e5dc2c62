//! What a fine-tuning method is: an entry of the registry, its options, and the live adapter.

use crate::error::{Fault, Result};
use crate::targets::Targets;
use hydralora_kernels::{DType, Parameter, Tensor, Var};
use hydralora_model::adapter::{Adapter, Site, SiteShape};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// An entry of the registry.
pub trait Method: Sync {
    /// The name in a recipe, `method.name`.
    fn name(&self) -> &'static str;
    /// One line for `--help` and the docs.
    fn summary(&self) -> &'static str;
    /// Whether an `adapter_config.json` describes this method.
    fn claims(&self, config: &Map<String, Value>) -> bool;
    /// The method's options as a recipe gives them, all of them spelt out.
    fn defaults(&self) -> Map<String, Value>;
    /// Reads the options of a recipe's `method` section, without `name`.
    ///
    /// # Errors
    /// Every wrong option.
    fn read_recipe(
        &self,
        section: &Map<String, Value>,
    ) -> Result<Box<dyn MethodOptions>, Vec<Fault>>;
    /// Reads the options out of an `adapter_config.json`.
    ///
    /// # Errors
    /// Every option that is wrong or not supported here.
    fn read_peft(&self, config: &Map<String, Value>) -> Result<Box<dyn MethodOptions>, Vec<Fault>>;
}

/// Options of one method, checked.
pub trait MethodOptions: Send + Sync {
    /// As a recipe writes them, without `name`.
    fn to_recipe(&self) -> Map<String, Value>;
    /// As an `adapter_config.json` holds them, `peft_type` included.
    fn to_peft(&self) -> Map<String, Value>;
    /// Which layers the method changes.
    fn targets(&self) -> &Targets;
    /// A fresh adapter on `sites`, its tensors drawn from `seed`.
    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned>;
}

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

/// A live adapter that can be trained and saved.
pub trait Tuned: Adapter {
    /// The options it was built from.
    fn options(&self) -> &dyn MethodOptions;
    /// The layers it changes.
    fn sites(&self) -> Vec<Site>;
    /// Every trainable tensor, in a fixed order.
    fn trainables(&self) -> Vec<&Trainable>;
    /// The same for writing, in the same order.
    fn trainables_mut(&mut self) -> Vec<&mut Trainable>;
    /// One tensor per trainable, picked by `pick`, as the adapter's file names and shapes them:
    /// values, gradients, or an optimizer's moments.
    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap;
    /// The current values as the adapter's file holds them.
    fn tensors(&self) -> TensorMap {
        self.export(&|trainable| trainable.parameter.value().clone())
    }
    /// Takes the tensors it needs out of `tensors`; what is left over does not belong to it.
    ///
    /// # Errors
    /// Every tensor that is missing or has another shape.
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>>;
    /// This adapter as the decoder sees it.
    fn as_adapter(&self) -> &dyn Adapter;
}

/// Number of trainable parameters per role.
pub fn count(tuned: &dyn Tuned) -> BTreeMap<Role, usize> {
    let mut counts = BTreeMap::new();
    for trainable in tuned.trainables() {
        *counts.entry(trainable.role).or_default() += trainable.parameter.value().len();
    }
    counts
}

/// Uniform in `(-bound, bound)`; the stream depends on `seed` and `name` alone, so adding a target
/// does not change the start of the others.
pub(crate) fn uniform(
    seed: u64,
    name: &str,
    bound: f64,
    dtype: DType,
    shape: impl Into<Vec<usize>>,
) -> Tensor {
    let shape = shape.into();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // FNV-1a, fixed for all time: the standard library's hasher may change between releases.
    let stream = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    random.set_stream(stream);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| {
            let unit = f64::from(random.next_u32()) / f64::from(u32::MAX);
            (2.0 * unit - 1.0) * bound
        })
        .collect();
    Tensor::from_f64(dtype, &values, shape)
}

/// The bound of Kaiming's uniform start with `a = √5`, as PyTorch's linear layers use it:
/// `1/√fan_in`.
pub(crate) fn kaiming_bound(fan_in: usize) -> f64 {
    1.0 / (fan_in as f64).sqrt()
}

/// Reads a section into `T`, finding every wrong option instead of only the first: a bad or unknown
/// one is noted, dropped, and the rest is read again.
///
/// # Errors
/// Every wrong option of `section`, as `prefix.option`.
pub fn read_section<T: DeserializeOwned>(
    prefix: &str,
    section: &Map<String, Value>,
    known: &Map<String, Value>,
) -> Result<T, Vec<Fault>> {
    let mut section = section.clone();
    let mut faults = Vec::new();
    section.retain(|key, _| {
        let found = known.contains_key(key);
        if !found {
            let nearest = nearest(key, known.keys().map(String::as_str));
            let hint = nearest.map_or_else(
                || {
                    format!(
                        "expected one of {}",
                        known.keys().cloned().collect::<Vec<_>>().join(", ")
                    )
                },
                |nearest| format!("did you mean `{nearest}`?"),
            );
            faults.push(Fault::new(format!("{prefix}.{key}"), format!("unknown option; {hint}")));
        }
        found
    });
    loop {
        match serde_path_to_error::deserialize::<_, T>(Value::Object(section.clone())) {
            Ok(value) if faults.is_empty() => return Ok(value),
            Ok(_) => return Err(faults),
            Err(error) => {
                let path = error.path().to_string();
                let key = path.split(['.', '[']).next().unwrap_or_default().to_owned();
                let removed = section.remove(&key).is_some();
                let field = if removed { format!("{prefix}.{path}") } else { prefix.to_owned() };
                faults.push(Fault::new(field, error.inner().to_string()));
                if !removed {
                    return Err(faults);
                }
            }
        }
    }
}

/// The name closest to `word`, if one is close enough to be a slip of the pen.
pub fn nearest<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Someone who stopped typing early is as near as someone who slipped.
    let begun = |name: &str| word.len() >= 3 && name.starts_with(word);
    names
        .into_iter()
        .map(|name| {
            let slips = strsim::damerau_levenshtein(word, name);
            (if begun(name) { slips.min(1) } else { slips }, name)
        })
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min()
        .map(|(_, name)| name)
}

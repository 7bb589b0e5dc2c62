//! What a fine-tuning method is: an entry of the registry, its options, and the live adapter.

use crate::error::{Error, Fault, Result};
use crate::io::module_names;
use crate::merge::{Gates, Merge};
use crate::targets::Targets;
use hydralora_kernels::ops::dropout::{Dropout, mix};
use hydralora_kernels::{DType, Gradients, Parameter, Tensor, Var};
use hydralora_model::adapter::{Adapter, Pass, Site, SiteShape};
use hydralora_model::{Decoder, Tokenizer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

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
    /// Whether [`build`](Self::build) needs the shapes of all layers of the model, because the
    /// method's tensors belong to no single layer.
    fn whole_model(&self) -> bool {
        false
    }
    /// The fewest numbers that a file of such an adapter on `sites` holds, as far as these options
    /// decide it.
    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        let _ = sites;
        0
    }
    /// What a file of such an adapter can be built from, where that is less than what trains it.
    fn as_stored(&self) -> Option<Box<dyn MethodOptions>> {
        None
    }
    /// The number of clusters of the training data that the routers start from; none where they
    /// start at random.
    fn router_clusters(&self) -> Option<usize> {
        None
    }
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

/// The base model an adapter is about to be trained on.
#[derive(Clone, Copy)]
pub struct Base<'a> {
    /// The frozen decoder.
    pub decoder: &'a Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
}

/// What a training run is going to be.
#[derive(Clone, Copy, Debug)]
pub struct TrainingPlan<'a> {
    /// Optimizer steps in all.
    pub total_steps: usize,
    /// Names of the domains that the sequences of a [`Pass`] refer to.
    pub domains: &'a [String],
}

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
    /// What [`load`](Self::load) did not find and a file has to hold, though other maps need not.
    fn not_loaded(&self) -> Option<&str> {
        None
    }
    /// The tensors of the adapter's folder. Unlike [`tensors`](Self::tensors) these may leave out
    /// what only training needs.
    fn file_tensors(&self) -> TensorMap {
        self.tensors()
    }
    /// The `adapter_config.json` of the adapter's folder, for a model whose layers are `all`.
    fn peft_config(&self, all: &[SiteShape]) -> Map<String, Value> {
        let mut config = self.options().to_peft();
        config.insert("target_modules".to_owned(), json!(module_names(&self.sites(), all)));
        config
    }
    /// Whether what is trained is the model itself, so that its folder is a model's folder.
    fn is_model(&self) -> bool {
        false
    }
    /// Whether the base model's weight of that checkpoint name is trained in place, so that the base
    /// may let go of it.
    fn takes_over(&self, name: &str) -> bool {
        let _ = name;
        false
    }
    /// Writes what a model's folder holds beside its weights.
    ///
    /// # Errors
    /// If the file system refuses.
    fn write_model_files(&self, folder: &Path) -> Result<()> {
        let _ = folder;
        Ok(())
    }
    /// Takes the start values that depend on the base model's weights; called once for a fresh
    /// adapter, before training.
    ///
    /// # Errors
    /// If the base model has no such values.
    fn start_from(&mut self, base: &Base<'_>) -> Result<()> {
        let _ = base;
        Ok(())
    }
    /// Names of the domains that are treated each in its own way. Outside of training one of them has
    /// to be [chosen](Self::choose_domain).
    fn domains(&self) -> &[String] {
        &[]
    }
    /// From now on treats every text as one of this domain, whatever a pass says.
    ///
    /// # Errors
    /// If it is none of [`domains`](Self::domains).
    fn choose_domain(&mut self, name: &str) -> Result<()> {
        let known = self.domains().join(", ");
        Err(Error::UnknownDomain { name: name.to_owned(), known })
    }
    /// The layers whose inputs the routers read.
    fn router_inputs(&self) -> Vec<Site> {
        Vec::new()
    }
    /// Starts the routers from the mean input `[clusters, in]` of each of their layers in every
    /// cluster of the training data: called once for a fresh adapter whose options ask for it.
    fn start_routers(&mut self, means: &BTreeMap<Site, Vec<f64>>) {
        let _ = means;
    }
    /// Called once before a run's first step, also of a resumed run.
    ///
    /// # Errors
    /// If the run cannot be what the options need.
    fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        let _ = plan;
        Ok(())
    }
    /// A term of shape `[1]` to add to the loss of the micro-batch that `pass` just ran.
    fn aux_loss(&self, pass: &Pass<'_>) -> Option<Var> {
        let _ = pass;
        None
    }
    /// Called after the optimizer's step number `step` (from 1) with the gradients it followed.
    fn after_step(&mut self, step: usize, gradients: &Gradients) {
        let _ = (step, gradients);
    }
    /// What a checkpoint must hold beside the tensors so that training goes on bit for bit.
    fn state(&self) -> TensorMap {
        TensorMap::new()
    }
    /// Takes what [`state`](Self::state) gave out of `tensors`.
    ///
    /// # Errors
    /// Every tensor that is missing or has another shape.
    fn load_state(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        let _ = tensors;
        Ok(())
    }
    /// What the adapter does to the weight at `site`, the gates of routed layers held at `gates`.
    fn merge(&self, site: Site, gates: &Gates) -> Merge<'_> {
        let _ = (site, gates);
        Merge::Refused("its method does not change weights in a way that is known here".to_owned())
    }
    /// This adapter as the decoder sees it.
    fn as_adapter(&self) -> &dyn Adapter;
}

/// The product of extents that a file names, which may be anything.
pub(crate) fn product(extents: &[usize]) -> usize {
    extents.iter().fold(1, |product, extent| product.saturating_mul(*extent))
}

/// Number of trainable parameters per role.
pub fn count(tuned: &dyn Tuned) -> BTreeMap<Role, usize> {
    let mut counts = BTreeMap::new();
    for trainable in tuned.trainables() {
        *counts.entry(trainable.role).or_default() += trainable.parameter.value().len();
    }
    counts
}

/// Random numbers whose stream depends on `seed` and `name` alone, so adding a target does not
/// change the start of the others.
pub(crate) fn random_stream(seed: u64, name: &str) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // FNV-1a, fixed for all time: the standard library's hasher may change between releases.
    let stream = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    random.set_stream(stream);
    random
}

/// Uniform in `(-bound, bound)`.
pub(crate) fn uniform(
    seed: u64,
    name: &str,
    bound: f64,
    dtype: DType,
    shape: impl AsRef<[usize]>,
) -> Tensor {
    let mut random = random_stream(seed, name);
    let values: Vec<f64> = (0..shape.as_ref().iter().product())
        .map(|_| {
            let unit = f64::from(random.next_u32()) / f64::from(u32::MAX);
            (2.0 * unit - 1.0) * bound
        })
        .collect();
    Tensor::from_f64(dtype, &values, shape)
}

/// Normal with mean 0 and standard deviation `deviation` (Box and Muller's transform).
pub(crate) fn normal(
    seed: u64,
    name: &str,
    deviation: f64,
    dtype: DType,
    shape: impl AsRef<[usize]>,
) -> Tensor {
    let mut random = random_stream(seed, name);
    let mut unit = || (f64::from(random.next_u32()) + 0.5) / 4_294_967_296.0;
    let values: Vec<f64> = (0..shape.as_ref().iter().product())
        .map(|_| {
            let radius = (-2.0 * unit().ln()).sqrt();
            deviation * radius * (std::f64::consts::TAU * unit()).cos()
        })
        .collect();
    Tensor::from_f64(dtype, &values, shape)
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

/// The bound of Kaiming's uniform start with `a = √5`, as PyTorch's linear layers use it:
/// `1/√fan_in`.
pub(crate) fn kaiming_bound(fan_in: usize) -> f64 {
    1.0 / (fan_in as f64).sqrt()
}

/// What drops inputs of the low-rank part of the layer at `site`, under a mask of that layer's own;
/// nothing outside of training.
pub(crate) fn layer_dropout(site: Site, probability: f64, pass: &Pass<'_>) -> Option<Dropout> {
    let seed = pass.dropout_seed().filter(|_| probability > 0.0)?;
    Some(Dropout { probability, seed: mix(seed ^ mix(site.name_hash())) })
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

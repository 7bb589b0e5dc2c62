//! Full fine-tuning: every weight of the model, or those asked for, is trained itself.
//!
//! The weights start as the base model's own, in its memory; a run lets the base go of them
//! ([`Decoder::release`](hydralora_model::Decoder::release)), so that there is one copy. What it
//! leaves is no adapter but a model: a Hugging Face folder with configuration, tokenizer and all
//! weights.

use crate::described::{Described, from_own};
use crate::error::{Error, Fault, Result};
use crate::method::MethodOptions;
use crate::options::to_map;
use crate::targets::Targets;
use crate::trainable::{Role, TensorMap, Trainable, export_by_name, load_by_name};
use crate::tuned::{
    Base, Mergeable, Parameters, Persist, TrainHooks, TrainingPlan, Tuned, WholeModel,
};
use hydralora_files::write_file;
use hydralora_kernels::ops::embedding::embedding;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::{DType, Tensor, Var};
use hydralora_model::adapter::{
    Adapter, Output, OutputLayer, Pass, Site, SiteShape, TensorSite, Update,
};
use hydralora_model::family::{is_constant, is_table};
use hydralora_model::{ModelConfig, Tokenizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Options that a file names as a recipe does.
const OWN_KEYS: [&str; 3] = ["targets", "freeze_embeddings", "freeze_norms"];

/// Options of full fine-tuning in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// The linear layers to train.
    targets: Targets,
    /// Leave the embedding, other tables of tokens and the output layer as they are.
    freeze_embeddings: bool,
    /// Leave the norms as they are.
    freeze_norms: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            targets: Targets::One("all".to_owned()),
            freeze_embeddings: false,
            freeze_norms: false,
        }
    }
}

impl Described for Options {
    const NAME: &'static str = "full";
    const SUMMARY: &'static str = "all weights of the model (full fine-tuning)";
    const PEFT_TYPE: &'static str = "FULL";

    fn faults(&self) -> Vec<Fault> {
        let empty = self.targets.entries().is_empty();
        let message = "is empty; expected at least one layer";
        empty.then(|| Fault::new("method.targets", message)).into_iter().collect()
    }

    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        let own = OWN_KEYS
            .into_iter()
            .filter_map(|key| Some((key.to_owned(), config.get(key)?.clone())))
            .collect();
        from_own(config, &[], &own)
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut config = to_map(self);
        config.insert("peft_type".to_owned(), json!(Self::PEFT_TYPE));
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn replaces_weights(&self) -> bool {
        true
    }

    fn build(&self, sites: &[SiteShape], _dtype: DType, _seed: u64) -> Box<dyn Tuned> {
        let targets: Vec<SiteShape> =
            sites.iter().copied().filter(|shape| self.targets.contain(shape)).collect();
        Box::new(FullModel {
            options: self.clone(),
            layers: targets.iter().map(|shape| shape.site.layer).collect(),
            sites: targets.into_iter().map(|shape| (shape.site, shape)).collect(),
            trained: BTreeMap::new(),
            frozen: TensorMap::new(),
            base: None,
        })
    }
}

/// The weights of a model that is trained whole, by their checkpoint names.
struct FullModel {
    options: Options,
    sites: BTreeMap<Site, SiteShape>,
    /// Layers with a linear layer that is trained, whose norms are too.
    layers: BTreeSet<usize>,
    /// Empty until the weights are known.
    trained: BTreeMap<String, Trainable>,
    /// The rest of the model, for the file.
    frozen: TensorMap,
    /// What else a model's folder needs.
    base: Option<(ModelConfig, Tokenizer)>,
}

impl FullModel {
    /// What a weight is for, if it is to be trained.
    fn role(&self, name: &str) -> Option<Role> {
        if is_table(name) || name == HEAD {
            return (!self.options.freeze_embeddings).then_some(Role::Weight);
        }
        if is_constant(name) {
            return None;
        }
        let (module, kind) = name.rsplit_once('.')?;
        if let Ok(site) = module.parse::<Site>() {
            // Neither biases nor norms are decayed.
            let role = if kind == "bias" { Role::Norm } else { Role::Weight };
            return self.sites.contains_key(&site).then_some(role);
        }
        let of_layer = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let near = match of_layer {
            Some((layer, _)) => layer.parse().is_ok_and(|layer| self.layers.contains(&layer)),
            None => true,
        };
        (near && !self.options.freeze_norms).then_some(Role::Norm)
    }

    fn var(&self, name: &str) -> Option<&Var> {
        self.trained.get(name).map(Trainable::var)
    }
}

impl Adapter for FullModel {
    fn rows_stand_alone(&self) -> bool {
        true
    }

    fn update(&self, site: Site, _rows: usize, _pass: &Pass<'_>) -> Update<'_> {
        match self.var(&format!("{site}.weight")) {
            Some(weight) => Update::Replace(weight, self.var(&format!("{site}.bias"))),
            None => Update::None,
        }
    }

    fn embed(&self, tokens: &[u32], frozen: &FrozenLinear) -> Var {
        self.look_up(EMBEDDING, tokens, frozen)
    }

    fn look_up(&self, name: &str, tokens: &[u32], frozen: &FrozenLinear) -> Var {
        match self.var(name) {
            Some(weight) => embedding(weight, tokens),
            None => Var::constant(frozen.gather(tokens)),
        }
    }

    fn tensor<'a>(&'a self, site: TensorSite, frozen: &'a Var) -> &'a Var {
        self.var(&site.to_string()).unwrap_or(frozen)
    }

    /// Without a weight of its own the output layer is the embedding.
    fn output(&self, _: &Var, _: OutputLayer<'_>, _: &Pass<'_>) -> Output<'_> {
        if self.frozen.contains_key(HEAD) {
            return Output::Frozen;
        }
        let weight = self.var(HEAD).or_else(|| self.var(EMBEDDING));
        weight.map_or(Output::Frozen, Output::Replace)
    }
}

impl Parameters for FullModel {
    fn options(&self) -> &dyn MethodOptions {
        &self.options
    }

    fn sites(&self) -> Vec<Site> {
        self.sites.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        self.trained.values().collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        self.trained.values_mut().collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        export_by_name(self.trainables(), pick)
    }
}

impl Persist for FullModel {
    /// Without weights from a base model the tensors themselves say which there are.
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        if !self.trained.is_empty() {
            load_by_name(self.trained.values_mut(), tensors)?;
            // A file of the whole model holds the others too, as they are.
            tensors.retain(|name, _| !self.frozen.contains_key(name));
            return Ok(());
        }
        let mut faults = Vec::new();
        for shape in self.sites.values() {
            let wanted = [shape.out_features, shape.in_features];
            let name = format!("{}.weight", shape.site);
            match tensors.get(&name) {
                Some(tensor) if tensor.shape() == wanted => {}
                Some(tensor) => faults
                    .push(format!("`{name}` has shape {:?}, expected {wanted:?}", tensor.shape())),
                None => faults.push(format!("`{name}` {wanted:?} is missing")),
            }
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        for (name, tensor) in std::mem::take(tensors) {
            match self.role(&name) {
                Some(role) => {
                    self.trained.insert(name.clone(), Trainable::new(name, role, tensor));
                }
                None => {
                    tensors.insert(name, tensor);
                }
            }
        }
        Ok(())
    }

    fn file_tensors(&self) -> TensorMap {
        let mut all = self.tensors();
        all.extend(self.frozen.iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
        all
    }
}

impl TrainHooks for FullModel {
    fn start_from(&mut self, base: &Base<'_>) -> Result<()> {
        for (name, tensor) in base.decoder.named_weights() {
            match self.role(&name) {
                Some(role) => {
                    self.trained.insert(name.clone(), Trainable::new(name, role, tensor));
                }
                None => {
                    self.frozen.insert(name, tensor);
                }
            }
        }
        self.base = Some((base.decoder.config().clone(), base.tokenizer.clone()));
        Ok(())
    }

    fn begin(&mut self, _plan: &TrainingPlan<'_>) -> Result<()> {
        if self.trained.is_empty() {
            let message = "starts from the base model's weights, which were not given";
            return Err(Error::Options { faults: vec![Fault::new("method", message)] });
        }
        Ok(())
    }
}

impl Mergeable for FullModel {}

impl Tuned for FullModel {
    fn as_whole_model(&self) -> Option<&dyn WholeModel> {
        Some(self)
    }
}

impl WholeModel for FullModel {
    fn takes_over(&self, name: &str) -> bool {
        self.trained.contains_key(name)
    }

    fn write_model_files(&self, folder: &Path) -> Result<()> {
        let Some((config, tokenizer)) = &self.base else {
            let message = "the base model's configuration and tokenizer were not given".to_owned();
            return Err(Error::Malformed { path: folder.to_path_buf(), message });
        };
        let tensors = self.trained.values().map(|trainable| trainable.parameter.value().dtype());
        let double = tensors.chain(self.frozen.values().map(Tensor::dtype)).next();
        let dtype = if double == Some(DType::F64) { "float64" } else { "float32" };
        let text = format!("{:#}\n", config.to_json(dtype));
        write_file(&folder.join("config.json"), text.as_bytes())?;
        Ok(tokenizer.save(folder)?)
    }
}

//! A live adapter, by purpose: what is trained ([`Parameters`]), what its files hold ([`Persist`]), what
//! training does for it beyond following gradients ([`TrainHooks`]) and what it does to the base's
//! weights ([`Mergeable`]). [`Tuned`] is their sum with the base model's
//! [`Adapter`], and shows what only some methods are: [`Routed`], [`DomainAware`], a [`WholeModel`].

use crate::error::Result;
use crate::merge::{Gates, Merge};
use crate::method::MethodOptions;
use crate::targets::module_names;
use crate::trainable::{TensorMap, Trainable};
use hydralora_kernels::{Gradients, Tensor, Var, no_grad};
use hydralora_model::adapter::{Adapter, Pass, Site, SiteShape};
use hydralora_model::{Decoder, ModelConfig, Tokenizer};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The base model an adapter is about to be trained on.
#[derive(Clone, Copy)]
pub struct Base<'a> {
    /// The frozen decoder.
    pub decoder: &'a Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Tokens that it has not been trained with, whose rows start at the mean of the others.
    pub new_tokens: &'a [u32],
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
pub trait Tuned: Adapter + Persist + TrainHooks + Mergeable {
    /// Shows its routers, if it has any.
    fn as_routed(&self) -> Option<&dyn Routed> {
        None
    }
    /// The same for changing them.
    fn as_routed_mut(&mut self) -> Option<&mut dyn Routed> {
        None
    }
    /// Shows its domains, if it treats each in its own way.
    fn as_domain_aware(&self) -> Option<&dyn DomainAware> {
        None
    }
    /// The same for choosing one of them.
    fn as_domain_aware_mut(&mut self) -> Option<&mut dyn DomainAware> {
        None
    }
    /// Shows the model, if what is trained is the model itself.
    fn as_whole_model(&self) -> Option<&dyn WholeModel> {
        None
    }
}

impl dyn Tuned + '_ {
    /// Shows it as the decoder sees it.
    pub fn as_adapter(&self) -> &dyn Adapter {
        self
    }

    /// Whether it certainly leaves every output of its base as it is: all updates are products with a
    /// zero matrix, or factors of one.
    pub fn changes_nothing(&self) -> bool {
        let pass = Pass::inference();
        let beside = self.beside_layers().is_some()
            || self.as_whole_model().is_some()
            || self.prompt(&pass).is_some()
            || self.prefix(0, &pass).is_some();
        let all = |tensor: &Tensor, value: f64| tensor.to_f64().iter().all(|v| *v == value);
        let idle = |site: Site| match self.merge(site, &Gates::Uniform) {
            Merge::Unchanged => true,
            Merge::Delta(of) => of.beside.is_none() && (all(&of.b, 0.0) || all(&of.a, 0.0)),
            Merge::ScaleInput(factors) | Merge::ScaleOutput(factors) => all(&factors, 1.0),
            Merge::Map(_) | Merge::Refused(_) => false,
        };
        !beside && self.sites().into_iter().all(idle)
    }
}

/// What is trained: the options it was built from, the layers it changes, its tensors.
pub trait Parameters {
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
}

/// What the files of an adapter and of its checkpoints hold.
pub trait Persist: Parameters {
    /// Takes the values of its trainables, named and shaped as [`export`](Parameters::export) does,
    /// out of `tensors`; what is left over does not belong to it.
    ///
    /// # Errors
    /// Every tensor that is missing or has another shape.
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>>;
    /// The tensors of the adapter's folder. Unlike [`tensors`](Parameters::tensors) these may leave
    /// out what only training needs, and hold what is not trained.
    fn file_tensors(&self) -> TensorMap {
        self.tensors()
    }
    /// Takes the tensors of an adapter's folder, as [`file_tensors`](Self::file_tensors) gives them,
    /// out of `tensors`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    fn load_file(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        self.load(tensors)
    }
    /// The `adapter_config.json` of the adapter's folder, for a model whose layers are `all`.
    fn peft_config(&self, all: &[SiteShape]) -> Map<String, Value> {
        let mut config = self.options().to_peft();
        config.insert("target_modules".to_owned(), json!(module_names(&self.sites(), all)));
        config
    }
    /// Makes sure that what was loaded fits a model of these dimensions, as far as it is no matter of
    /// single linear layers.
    ///
    /// # Errors
    /// Every tensor that does not.
    fn belong_to(&mut self, config: &ModelConfig) -> Result<(), Vec<String>> {
        let _ = config;
        Ok(())
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
}

/// What training does for an adapter beyond following gradients.
pub trait TrainHooks {
    /// Takes the start values that depend on the base model's weights; called once for a fresh
    /// adapter, before training.
    ///
    /// # Errors
    /// If the base model has no such values.
    fn start_from(&mut self, base: &Base<'_>) -> Result<()> {
        let _ = base;
        Ok(())
    }
    /// Whether values of a fresh adapter's `A` and `B` are still to come from the base's weights.
    fn starts_from_weights(&self) -> bool {
        false
    }
    /// Called once before a run's first step, also of a resumed run.
    ///
    /// # Errors
    /// If the run cannot be what the options need.
    fn begin(&mut self, plan: &TrainingPlan<'_>) -> Result<()> {
        let _ = plan;
        Ok(())
    }
    /// Called before every step of a run, also of a resumed one, with the number of steps taken so far;
    /// what falls or rises over a run follows from it.
    fn before_step(&mut self, taken: usize) {
        let _ = taken;
    }
    /// A term of shape `[1]` to add to the loss of the micro-batch that `pass` just ran.
    fn aux_loss(&self, pass: &Pass<'_>) -> Option<Var> {
        let _ = pass;
        None
    }
    /// The options in force that make the loss of a micro-batch more than the sum over its sequences, as
    /// dropout masks do and penalties on the mean over its tokens: by their names in a recipe. Ranks of a
    /// run share a micro-batch's sequences where there are none.
    fn needs_whole_batches(&self) -> Vec<&'static str> {
        Vec::new()
    }
    /// What is counted over a step's tokens for [`after_step`](Self::after_step); ranks of a run add them up.
    fn tallies(&mut self) -> Vec<&mut [u64]> {
        Vec::new()
    }
    /// Called after the optimizer's step number `step` (from 1) with the gradients it followed.
    fn after_step(&mut self, step: usize, gradients: &Gradients) {
        let _ = (step, gradients);
    }
}

/// What an adapter does to the weights of the base model.
pub trait Mergeable: Adapter {
    /// What it does to the weight at `site`, the gates of routed layers held at `gates`: by default
    /// what its [`update`](Adapter::update) comes to.
    fn merge(&self, site: Site, gates: &Gates) -> Merge<'_> {
        let _guard = no_grad();
        Merge::of(site, self.update(site, 0, &Pass::inference()), gates)
    }
    /// What becomes of the base's tensor `name`, in `f32`, beside that; of a tied output layer too, which
    /// comes as the embedding's weight.
    fn merge_tensor(&self, name: &str, tensor: Tensor) -> Tensor {
        let _ = name;
        tensor
    }
    /// Whether a tied output layer gets another weight than the embedding.
    fn unties(&self) -> bool {
        false
    }
    /// What it changes that is no linear layer inside the decoder's, in words.
    fn beside_layers(&self) -> Option<String> {
        None
    }
    /// The same as a plain LoRA's folder holds it, if such a folder can say the same.
    fn beside(&self) -> Option<Beside> {
        self.beside_layers().is_none().then(Beside::default)
    }
}

/// What is trained beside a LoRA's pairs.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    /// Tensors under PEFT's names, without its prefix.
    pub tensors: TensorMap,
    /// Entries of the `adapter_config.json` that say what they are.
    pub config: Map<String, Value>,
}

impl Beside {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

/// An adapter with routers that read the inputs of layers.
pub trait Routed {
    /// The layers whose inputs the routers read.
    fn router_inputs(&self) -> Vec<Site>;
    /// Starts the routers from the mean input `[clusters, in]` of each of their layers in every
    /// cluster of the training data: called once for a fresh adapter whose options ask for it by
    /// [`router_start`](MethodOptions::router_start).
    fn start_routers(&mut self, means: &BTreeMap<Site, Vec<f64>>);
}

/// An adapter that treats every domain in its own way. Outside of training one of them has to be
/// [chosen](Self::choose_domain).
pub trait DomainAware {
    /// Names of the domains.
    fn domains(&self) -> &[String];
    /// From now on treats every text as one of this domain, whatever a pass says.
    ///
    /// # Errors
    /// If it is none of [`domains`](Self::domains).
    fn choose_domain(&mut self, name: &str) -> Result<()>;
}

/// An adapter whose trainables are weights of the model itself, so that its folder is a model's folder.
pub trait WholeModel {
    /// Whether the base model's weight of that checkpoint name is trained in place, so that the base
    /// may let go of it.
    fn takes_over(&self, name: &str) -> bool;
    /// Writes what a model's folder holds beside its weights.
    ///
    /// # Errors
    /// If the file system refuses.
    fn write_model_files(&self, folder: &Path) -> Result<()>;
}

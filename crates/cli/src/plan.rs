//! From a recipe to everything a run needs, opened and checked.

use crate::adapter;
use crate::clusters::Clusters;
use crate::device::placed;
use crate::encoder::ModelEncoder;
use crate::failure::bad_input;
use crate::grown::{add_of_adapters, add_of_recipe};
use crate::in_force::own_template;
use crate::memory;
use crate::recipe::{ModelDtype, Recipe, faults_with, newer};
use crate::sources;
use crate::ui::{tell, thousands};
use anyhow::Context;
use hydralora_data::heads::{Corpus, DIMENSIONS, Features, HeadsOptions, HeadsReport, find_heads};
use hydralora_data::{ChatTemplate, Dataset, LoadOptions, Message, builtin_template_names};
use hydralora_kernels::DType;
use hydralora_kernels::ops::cross_entropy::working_len;
use hydralora_model::adapter::SiteShape;
use hydralora_model::{Decoder, ModelConfig, ModelSource, Tokenizer, hub};
use hydralora_peft::io::{self, LoadedAdapter, Metadata};
use hydralora_peft::{Fault, INIT_FROM, MethodOptions, Role, Tuned, count, start_from_adapter};
use hydralora_run::{ends, start_ids};
use hydralora_train::ranks::Team;
use hydralora_train::{Chosen, Run, Stepper, planned_steps};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// An opened base model.
pub(crate) struct Base {
    pub(crate) source: ModelSource,
    pub(crate) decoder: Decoder,
}

/// Finds and opens a model's files, but not its decoder.
pub(crate) fn open_source(spec: &str) -> anyhow::Result<ModelSource> {
    let reference = hub::reference(spec);
    let path = hub::resolve(spec, &mut |line| tell(line))?;
    let mut source = ModelSource::open(&path)?;
    if !Path::new(spec).exists() && path.is_dir() {
        // The folder of a cache is named after a revision.
        let id = reference.split(['@', ':']).next().unwrap_or_default();
        source.identity.name = id.rsplit('/').next().unwrap_or_default().to_owned();
    }
    source.identity.reference = reference;
    Ok(source)
}

/// What a model's configuration says, before anything large of it is fetched or read: that it can be
/// computed, and its weights held.
pub(crate) fn configuration(spec: &str, dtype: ModelDtype) -> anyhow::Result<Option<ModelConfig>> {
    let hub = hub::Hub::from_environment();
    let config = hub.configuration(spec, &mut |line| tell(line))?;
    if let Some(config) = &config {
        memory::refuse_too_large(config, dtype)?;
    }
    Ok(config)
}

/// Finds and opens a base model.
pub(crate) fn open_base(spec: &str, dtype: ModelDtype) -> anyhow::Result<Base> {
    open_base_of(spec, dtype, &[])
}

/// Finds and opens a base model with what these adapters need of it, and refuses adapters of another
/// one before its weights are read.
pub(crate) fn open_base_of(
    spec: &str,
    dtype: ModelDtype,
    adapters: &[&Path],
) -> anyhow::Result<Base> {
    Base::of(source_for(spec, dtype, adapters)?, dtype)
}

/// The same without the decoder.
pub(crate) fn source_for(
    spec: &str,
    dtype: ModelDtype,
    adapters: &[&Path],
) -> anyhow::Result<ModelSource> {
    configuration(spec, dtype)?;
    let mut source = open_source(spec)?;
    add_of_adapters(&mut source, adapters)?;
    Ok(source)
}

/// Refuses an adapter whose files say that it was trained on another model than `source`.
pub(crate) fn check_base(source: &ModelSource, folder: &Path) -> anyhow::Result<()> {
    if let Some(metadata) = io::read_metadata(folder)? {
        let identity = &source.identity;
        io::check_base(folder, &metadata, &identity.reference, &identity.fingerprint)?;
    }
    Ok(())
}

/// Reads an adapter for a model of this source, which it has to belong to.
pub(crate) fn load_on(
    source: &ModelSource,
    folder: &Path,
    dtype: DType,
) -> anyhow::Result<LoadedAdapter> {
    check_base(source, folder)?;
    let loaded = io::load(folder, &source.config, dtype);
    adapter::naming_base(loaded, folder, &source.identity.reference)
}

impl Base {
    /// The decoder of `source` beside it.
    pub(crate) fn of(source: ModelSource, dtype: ModelDtype) -> anyhow::Result<Self> {
        let (dtype, held) = dtype.plan();
        let decoder = Decoder::load_held(&source.config, &source.weights, dtype, held)?;
        Ok(Self { source, decoder: placed(decoder) })
    }

    /// The model's own chat template.
    pub(crate) fn template(&self) -> anyhow::Result<Option<ChatTemplate>> {
        own_template(&self.source)
    }

    /// Reads an adapter and makes sure it belongs to this model.
    pub(crate) fn load_adapter(&self, folder: &Path) -> anyhow::Result<LoadedAdapter> {
        load_on(&self.source, folder, self.decoder.dtype())
    }

    /// What tells its tokenizer from others.
    fn tokenizer_identity(&self) -> String {
        let added = self.source.added.iter().map(|token| format!(" {:?}", token.content));
        self.source.identity.fingerprint.clone() + &added.collect::<String>()
    }

    /// The tokenizer's files, where tokens were added.
    fn added_files(&self) -> anyhow::Result<Vec<(String, Arc<[u8]>)>> {
        if self.source.added.is_empty() {
            return Ok(Vec::new());
        }
        let files = self.tokenizer().files()?.into_iter();
        Ok(files.map(|(name, bytes)| (name.to_owned(), bytes.into())).collect())
    }

    /// The tokenizer.
    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.source.tokenizer
    }
}

/// Token ids of a conversation put through a template, ready to be answered.
pub(crate) fn encode_chat(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> anyhow::Result<Vec<u32>> {
    let [bos, eos] = ends::marks(tokenizer);
    let messages = template.adapt(messages, &serde_json::Map::new(), &bos, &eos);
    let rendered = template.render(&messages, true, &bos, &eos)?;
    Ok(start_ids(tokenizer, &rendered)?)
}

/// Options of methods that came after the first release; empty ones are the default.
const LATER_OPTIONS: [&str; 5] = [
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
];

/// Likewise of the data.
const LATER_DATA_OPTIONS: [&str; 3] = ["template_arguments", "thinking", "add_tokens"];

/// A recipe with everything it names opened.
pub(crate) struct Plan {
    pub(crate) recipe: Recipe,
    pub(crate) base: Base,
    pub(crate) dataset: Dataset,
    pub(crate) sites: Vec<SiteShape>,
    pub(crate) tuned: Box<dyn Tuned>,
    pub(crate) metadata: Metadata,
    /// How the number of experts was found, where the recipe said `auto`.
    pub(crate) heads: Option<HeadsReport>,
    /// Clusters of the training texts, once they were looked for and are of use.
    pub(crate) clusters: Option<Clusters>,
    /// Why it cannot be trained, though it can be looked at.
    pub(crate) refused: Option<String>,
}

/// Looks at the training files for the number of experts.
fn count_experts(recipe: &Recipe) -> anyhow::Result<HeadsReport> {
    let seed = recipe.train.seed;
    let count = || {
        let corpus = Corpus::read(&recipe.data.train, &recipe.base)?;
        let features = Features::tfidf(&corpus, DIMENSIONS, seed)?;
        find_heads(&features, &corpus, &HeadsOptions { seed, ..HeadsOptions::default() })
    };
    count().context("method.num_experts: auto")
}

/// Refuses an adapter that the system would not even promise memory for.
pub(crate) fn refuse_larger_than_memory(
    method: &dyn MethodOptions,
    sites: &[SiteShape],
    optimizer: &Chosen,
) -> anyhow::Result<()> {
    // The value, its gradient and the optimizer's state, as far as it is one number for each or more.
    let each = 2 + optimizer.copies(Role::A);
    let numbers = method.stored_numbers(sites).saturating_mul(each);
    let mut probe = Vec::<f32>::new();
    let promised = probe.try_reserve_exact(numbers);
    // Unless somebody sees the memory, the compiler leaves out asking for it.
    std::hint::black_box(&mut probe);
    if promised.is_ok() {
        return Ok(());
    }
    let gigabytes = numbers as f64 * size_of::<f32>() as f64 / 1e9;
    Err(bad_input(format!(
        "method: training it takes {gigabytes:.0} GB for the adapter alone, more than this machine has; choose \
         a lower rank or fewer targets, experts or virtual tokens"
    )))
}

impl Plan {
    /// Opens what `recipe` names. The model is loaded once and can be shared by giving it.
    pub(crate) fn open(mut recipe: Recipe, base: Option<Base>) -> anyhow::Result<Self> {
        if base.is_none() {
            let config = configuration(&recipe.model.path, recipe.model.dtype);
            let config = config.with_context(|| format!("model.path: {}", recipe.model.path))?;
            let (method, length) = (recipe.method.as_ref(), recipe.data.max_seq_len);
            let faults = config.map(|config| faults_with(&config, Some(method), Some(length)));
            if let Some(faults) = faults.filter(|faults| !faults.is_empty()) {
                return Err(recipe.origin.error(&faults));
            }
        }
        sources::locate(&mut recipe.data, &recipe.base)?;
        let heads = recipe.auto_experts.then(|| count_experts(&recipe)).transpose()?;
        if let Some(found) = &heads {
            recipe.set_num_experts(found.num_experts)?;
        }
        let path = format!("model.path: {}", recipe.model.path);
        let grows = !recipe.data.add_tokens.is_empty();
        let (base, new_tokens) = match base {
            Some(base) if !grows => (base, Vec::new()),
            base => {
                let mut source = match base {
                    Some(base) => base.source,
                    None => open_source(&recipe.model.path).with_context(|| path.clone())?,
                };
                let new_tokens = add_of_recipe(&mut source, &mut recipe)?;
                (Base::of(source, recipe.model.dtype).context(path)?, new_tokens)
            }
        };
        let method = recipe.method.as_ref();
        let length = recipe.data.max_seq_len;
        let faults = faults_with(&base.source.config, Some(method), Some(length));
        if !faults.is_empty() {
            return Err(recipe.origin.error(&faults));
        }
        let all = base.decoder.sites();
        let sites = if recipe.method.whole_model() { all } else { recipe.method.select(&all)? };
        refuse_larger_than_memory(recipe.method.as_ref(), &sites, &recipe.train.optimizer)?;
        let mut tuned = recipe.method.build(&sites, base.decoder.dtype(), recipe.train.seed);
        tuned.start_from(&hydralora_peft::Base {
            decoder: &base.decoder,
            tokenizer: base.tokenizer(),
            new_tokens: &new_tokens,
        })?;
        if let Some(folder) = &recipe.init_from {
            check_base(&base.source, folder)?;
            let (name, dtype) = (recipe.method_name, base.decoder.dtype());
            match start_from_adapter(folder, name, tuned.as_mut(), dtype) {
                Err(hydralora_peft::Error::Options { faults }) => {
                    return Err(recipe.origin.error(&faults));
                }
                other => other?,
            }
        }
        let train = &recipe.train;
        for (option, ratio, role, what) in [
            ("b_learning_rate_ratio", train.b_learning_rate_ratio, Role::B, "`B`"),
            (
                "router_learning_rate_ratio",
                train.router_learning_rate_ratio,
                Role::Router,
                "router with these options",
            ),
        ] {
            if ratio != 1.0 && !tuned.trainables().iter().any(|trained| trained.role == role) {
                let message = format!(
                    "is {ratio}; `{}` trains no {what} that could learn faster; leave the option out",
                    recipe.method_name
                );
                return Err(recipe.origin.error(&[Fault::new(format!("train.{option}"), message)]));
            }
        }
        let template = base.template()?;
        let encoder = ModelEncoder(base.tokenizer());
        let options = LoadOptions {
            cache: sources::cache_folder(),
            tokenizer: base.tokenizer_identity(),
            ..LoadOptions::new(recipe.train.seed)
        };
        let (data, folder) = (&recipe.data, &recipe.base);
        let mut dataset = Dataset::load_with(data, folder, &encoder, template.as_ref(), &options)?;
        let mut refused = None;
        let chats = dataset.report.has_conversations();
        let in_force = dataset.template.as_ref().filter(|_| chats);
        if let Some(template) = in_force {
            let (fault, note) = ends::template_fault(base.tokenizer(), template)?;
            if let Some(fault) = fault {
                let fault = format!("data.template: {fault}");
                let name = template.name();
                if builtin_template_names().contains(&name) {
                    return Err(bad_input(fault));
                }
                // What a file of one's own makes of the records can be looked at all the same, and a
                // model may come with a template that it was not made with.
                let of_model = recipe.data.template.is_none();
                let what = if of_model { "" } else { "cannot be trained with: " };
                dataset.report.notes.push(format!("{what}{fault}"));
                refused = (!of_model).then_some(fault);
            }
            dataset.report.notes.extend(note);
        }
        let trained = dataset.report.answer_ends();
        let end_ids = ends::end_ids(base.tokenizer(), in_force, &[], &trained)?;
        let end_ids = end_ids.iter();
        let metadata = Metadata {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            base_model: base.source.identity.reference.clone(),
            base_fingerprint: base.source.identity.fingerprint.clone(),
            chat_template: dataset.template.as_ref().map(|t| t.source().to_owned()),
            template_arguments: dataset
                .template
                .as_ref()
                .map_or_else(Default::default, |t| t.arguments().clone()),
            end_tokens: end_ids.filter_map(|&id| base.tokenizer().id_to_token(id)).collect(),
            added_tokens: base.source.added.clone(),
            tokenizer: base.added_files()?,
        };
        let plan =
            Self { recipe, base, dataset, sites, tuned, metadata, heads, clusters: None, refused };
        plan.check_steps()?;
        Ok(plan)
    }

    /// Refuses a run without steps, or one whose steps all warm up.
    fn check_steps(&self) -> anyhow::Result<()> {
        let weights = self.dataset.report.weights();
        let run = Run {
            decoder: &self.base.decoder,
            dataset: &self.dataset,
            weights: &weights,
            shuffle: self.recipe.data.shuffle,
            config: &self.recipe.train,
            metadata: &self.metadata,
            fingerprint: "",
            continues: None,
            settings: &serde_json::Value::Null,
            folder: None,
            meter: None,
            clusters: None,
            stop: &AtomicBool::new(false),
            team: &Team::alone(),
        };
        planned_steps(&run)?;
        Ok(())
    }

    /// Hash of everything that decides how a run goes: settings, base model, token ids.
    pub(crate) fn fingerprint(&self) -> String {
        let mut resolved = self.recipe.resolved();
        newer::leave_out(&mut resolved);
        // Where the result goes and how often it is saved change nothing in it.
        resolved["output"] = serde_json::Value::Null;
        resolved["model"]["path"] = serde_json::Value::Null;
        for key in ["save_every", "keep_checkpoints"] {
            resolved["train"][key] = serde_json::Value::Null;
        }
        // Options that earlier builds did not have count where they say something, so that runs of those
        // builds go on.
        let says = |value: &serde_json::Value| match value {
            serde_json::Value::Null => false,
            serde_json::Value::Array(items) => !items.is_empty(),
            serde_json::Value::Object(entries) => !entries.is_empty(),
            _ => true,
        };
        if let Some(method) = resolved["method"].as_object_mut() {
            method.retain(|key, value| {
                !LATER_OPTIONS.contains(&key.as_str()) || says(value) && *value != false
            });
        }
        if let Some(data) = resolved["data"].as_object_mut() {
            data.retain(|key, value| !LATER_DATA_OPTIONS.contains(&key.as_str()) || says(value));
        }
        // Nor does where token ids are kept, nor where a run started that goes on from a checkpoint.
        if let Some(method) = resolved["method"].as_object_mut() {
            method.remove(INIT_FROM);
        }
        resolved["data"]["streaming"] = serde_json::Value::Null;
        let mut hash = Sha256::new();
        hash.update(resolved.to_string());
        hash.update(&self.metadata.base_fingerprint);
        hash.update(self.dataset.fingerprint());
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Parameters of the run.
    pub(crate) fn parameters(&self) -> Parameters {
        Parameters::of(self.base.decoder.num_parameters(), self.tuned.as_ref())
    }

    /// Bytes a training step is expected to need.
    pub(crate) fn memory(&self) -> MemoryPlan {
        let config = &self.base.source.config;
        let element = self.base.decoder.dtype().size();
        let lengths = self.dataset.train.lengths().iter().map(|&length| length as usize);
        let mut lengths: Vec<usize> = lengths.collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let longest: usize = lengths.iter().take(self.recipe.train.batch_size).sum();
        let tokens =
            self.recipe.train.max_tokens_per_batch.map_or(longest, |most| {
                longest.min(most.max(lengths.first().copied().unwrap_or(0)))
            });
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        // Kept per token and layer: residual before and after attention, q, k, v, gate and up; the
        // rest is computed again. With checkpointing a layer's input alone, and all of one layer.
        let of_layer =
            2 * config.hidden_size + query + 2 * key_value + 2 * config.intermediate_size;
        let layers = config.num_hidden_layers;
        let kept = if self.recipe.train.gradient_checkpointing {
            config.hidden_size * layers + of_layer
        } else {
            of_layer * layers
        };
        let whole = self.recipe.method.whole_model();
        let output_layer = working_len(config.vocab_size, config.hidden_size, whole);
        let Parameters { trainable, weights, .. } = self.parameters();
        let state = Stepper::numbers(&self.recipe.train.optimizer, self.tuned.as_ref());
        // Weights of a model that is trained itself are not held twice.
        let taken_over = if whole { weights * element } else { 0 };
        let frozen = self.base.decoder.weight_bytes().saturating_sub(taken_over);
        MemoryPlan {
            weights: frozen,
            trainable: (2 * trainable + state) * element,
            activations: tokens * (kept + 4 * config.intermediate_size) * element,
            output_layer: output_layer * element,
            largest_batch_tokens: tokens,
        }
    }
}

/// Bytes by purpose.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MemoryPlan {
    pub(crate) weights: usize,
    /// Values, gradients and the optimizer's state.
    pub(crate) trainable: usize,
    pub(crate) activations: usize,
    pub(crate) output_layer: usize,
    pub(crate) largest_batch_tokens: usize,
}

impl MemoryPlan {
    pub(crate) fn total(&self) -> usize {
        self.weights + self.trainable + self.activations + self.output_layer
    }
}

/// Trainable parameters by role, apart as the paper does not count the router.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Parameters {
    pub(crate) base: usize,
    pub(crate) a: usize,
    pub(crate) b: usize,
    pub(crate) router: usize,
    pub(crate) scale: usize,
    pub(crate) prompt: usize,
    /// Weights of the base model itself, norms and biases among them.
    pub(crate) weights: usize,
    pub(crate) trainable: usize,
    pub(crate) percent: f64,
}

impl Parameters {
    pub(crate) fn of(base: usize, tuned: &dyn Tuned) -> Self {
        let counts = count(tuned);
        let of = |role| counts.get(&role).copied().unwrap_or(0);
        let trainable: usize = counts.values().sum();
        let weights = of(Role::Weight) + of(Role::Norm);
        Self {
            base,
            weights,
            a: of(Role::A),
            b: of(Role::B),
            router: of(Role::Router),
            scale: of(Role::Scale),
            prompt: of(Role::Prompt),
            trainable,
            percent: 100.0 * trainable as f64 / (base + trainable - weights).max(1) as f64,
        }
    }
}

impl std::fmt::Display for Parameters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let roles = [
            ("A", self.a),
            ("B", self.b),
            ("router", self.router),
            ("factors", self.scale),
            ("prompt", self.prompt),
            ("weights", self.weights),
        ];
        let parts: Vec<String> = roles
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {}", thousands(*count)))
            .collect();
        write!(
            f,
            "{} trainable ({:.3} % of all): {}; base {} frozen",
            thousands(self.trainable),
            self.percent,
            parts.join(", "),
            thousands(self.base.saturating_sub(self.weights))
        )
    }
}

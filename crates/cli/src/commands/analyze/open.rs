//! An adapter with what its run's folder says of it.

use crate::failure::bad_input;
use crate::grown::add_of_adapter;
use crate::plan::{load_on, open_source};
use crate::recipe::read_method;
use hydralora_kernels::{DType, Tensor};
use hydralora_model::adapter::{Site, SiteShape};
use hydralora_peft::analysis::{Weights, initial_a, weights, without_factors};
use hydralora_peft::exchange::shapes_in;
use hydralora_peft::{INIT_FROM, MethodOptions, io};
use hydralora_train::Routing;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// An adapter's factors, and what is known of how it came about.
pub(super) struct Opened {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) method: &'static str,
    pub(super) base_model: String,
    pub(super) fingerprint: String,
    pub(super) seed: Option<u64>,
    /// In a study, its label on the compared axis.
    pub(super) label: Option<String>,
    pub(super) weights: Weights,
    /// Every `A` before training, or why it is not known.
    pub(super) initial: Result<BTreeMap<Site, Vec<Tensor>>, String>,
    pub(super) routing: Option<Routing>,
    /// Whether a domain was chosen for it.
    pub(super) of_domain: bool,
}

/// Opens an adapter's folder; `model` is needed where it trains something beside its layers.
pub(super) fn open(
    folder: &Path,
    model: Option<&str>,
    domain: Option<&str>,
) -> anyhow::Result<Opened> {
    let method = io::method_of(folder)?;
    let options = io::read_options(folder)?;
    if options.whole_model() || options.replaces_weights() {
        return Err(without_factors(folder)?.into());
    }
    let shapes = shapes_in(&io::decode(&io::stored_tensors(folder), DType::F32)?);
    let mut loaded = match model {
        Some(model) => {
            let mut source = open_source(model)?;
            add_of_adapter(&mut source, Some(folder))?;
            load_on(&source, folder, DType::F32)?
        }
        None => io::load_unbound(folder, &shapes, DType::F32)?,
    };
    let mut of_domain = false;
    if let (Some(name), Some(domains)) = (domain, loaded.tuned.as_domain_aware_mut()) {
        domains.choose_domain(name).map_err(|error| bad_input(format!("--domain: {error}")))?;
        of_domain = true;
    }
    let weights = weights(folder, loaded.tuned.as_ref())?;
    let recipe = recipe_beside(folder);
    let seed = recipe.as_ref().and_then(|recipe| recipe["train"]["seed"].as_u64());
    let initial = match (&recipe, seed) {
        (Some(recipe), Some(seed)) => initial(recipe, options.as_ref(), &shapes, seed, &weights),
        _ => Err("there is no recipe with a train.seed beside the adapter".to_owned()),
    };
    let config = io::read_config(folder)?;
    let named = config.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default();
    let metadata = loaded.metadata.unwrap_or_default();
    let base = if metadata.base_model.is_empty() { named } else { &metadata.base_model };
    Ok(Opened {
        name: name_of(folder),
        path: folder.to_path_buf(),
        method,
        base_model: base.to_owned(),
        fingerprint: metadata.base_fingerprint.clone(),
        seed,
        label: None,
        weights,
        initial,
        routing: routing_beside(folder)?,
        of_domain,
    })
}

/// The last part of the path that tells runs apart.
fn name_of(folder: &Path) -> String {
    let real = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    let mut parts = real.iter().rev().map(|part| part.to_string_lossy().into_owned());
    let own = parts.next().unwrap_or_default();
    match parts.next() {
        Some(run) if own == "adapter" => run,
        Some(run) if own == "best" => format!("{run} (best)"),
        _ => own,
    }
}

/// Numbers adapters that would have the same name.
pub(super) fn name_apart(opened: &mut [Opened]) {
    let mut taken: BTreeSet<String> = BTreeSet::new();
    for adapter in opened {
        let plain = adapter.name.clone();
        let mut number = 1;
        while !taken.insert(adapter.name.clone()) {
            number += 1;
            adapter.name = format!("{plain} {number}");
        }
    }
}

/// The recipe that a run keeps beside its adapter, if there is one that can be read.
fn recipe_beside(folder: &Path) -> Option<Value> {
    let text = hydralora_files::text_of(&folder.parent()?.join("recipe.yaml")).ok()?;
    serde_saphyr::from_str(&text).ok()
}

fn routing_beside(folder: &Path) -> anyhow::Result<Option<Routing>> {
    let Some(path) = folder.parent().map(|run| run.join("routing.json")) else { return Ok(None) };
    let Ok(bytes) = hydralora_files::bytes_of(&path) else { return Ok(None) };
    let routing = serde_json::from_slice(&bytes)
        .map_err(|error| bad_input(format!("{}: {error}", path.display())))?;
    Ok(Some(routing))
}

/// Every `A` as the recipe's method draws it from `seed`.
fn initial(
    recipe: &Value,
    options: &dyn MethodOptions,
    shapes: &[SiteShape],
    seed: u64,
    trained: &Weights,
) -> Result<BTreeMap<Site, Vec<Tensor>>, String> {
    let mut section = recipe["method"].clone();
    if let Some(section) = section.as_object_mut() {
        let from = section.remove(INIT_FROM);
        if from.is_some_and(|from| !from.is_null()) {
            return Err("A started from another adapter".to_owned());
        }
        if section.get("num_experts") == Some(&json!("auto")) {
            let found = options.to_recipe().get("num_experts").cloned().unwrap_or_default();
            section.insert("num_experts".to_owned(), found);
        }
    }
    let mut faults = Vec::new();
    let read = read_method(Some(&section), &mut faults);
    let Some((_, options)) = read.filter(|_| faults.is_empty()) else {
        return Err("the method of the recipe beside the adapter is not readable here".to_owned());
    };
    let drawn = initial_a(options.as_ref(), shapes, seed)?;
    let fits = trained.iter().all(|(site, weights)| {
        let shapes = |all: &[Tensor]| all.iter().map(|a| a.shape().to_vec()).collect::<Vec<_>>();
        drawn.get(site).is_some_and(|drawn| shapes(drawn) == shapes(&weights.a))
    });
    match fits {
        true => Ok(drawn),
        false => Err("the recipe beside the adapter gives other A".to_owned()),
    }
}

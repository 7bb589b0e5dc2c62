//! Recipes as a plan needs them: read, checked, counted and hashed without loading weights.

use crate::plan::open_source;
use crate::recipe::{Recipe, newer, read_method, set};
use crate::sources;
use hydralora_kernels::DType;
use hydralora_model::{ModelConfig, ModelIdentity, ModelSource};
use hydralora_peft::{Fault, INIT_FROM, MethodOptions, count, io};
use hydralora_run::eval::tasks;
use hydralora_study::host::{Recipes, Resolved};
use hydralora_study::{Error, Result, sha256_of};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Keys of a recipe that change nothing in its results.
const WITHOUT_EFFECT: [(&str, &str); 4] = [
    ("model", "path"),
    ("train", "save_every"),
    ("train", "keep_checkpoints"),
    ("data", "streaming"),
];

/// An opened base model: its dimensions and which one it is.
pub(super) struct Opened {
    config: ModelConfig,
    pub(super) identity: ModelIdentity,
}

/// What has been opened and hashed in this process.
#[derive(Default)]
pub(super) struct Known {
    bases: RefCell<HashMap<String, Rc<Opened>>>,
    hashes: RefCell<HashMap<PathBuf, String>>,
    /// Methods that fit their model.
    fitting: RefCell<HashSet<String>>,
}

impl Known {
    /// The base model that a recipe names; fetched if it is not here.
    pub(super) fn base(&self, spec: &str) -> Result<Rc<Opened>> {
        if let Some(opened) = self.bases.borrow().get(spec) {
            return Ok(opened.clone());
        }
        let opened = open_source(spec);
        let ModelSource { config, identity, .. } =
            opened.map_err(|error| Error::bad(format!("model.path: {spec}: {error:#}")))?;
        let opened = Rc::new(Opened { config, identity });
        self.bases.borrow_mut().insert(spec.to_owned(), opened.clone());
        Ok(opened)
    }

    /// SHA-256 of a file's content, read once.
    pub(super) fn sha256(&self, path: &Path) -> Result<String> {
        if let Some(hash) = self.hashes.borrow().get(path) {
            return Ok(hash.clone());
        }
        let hash = sha256_of(path)?;
        self.hashes.borrow_mut().insert(path.to_path_buf(), hash.clone());
        Ok(hash)
    }

    /// The data files of a recipe in their order, with the hashes of their content.
    pub(super) fn data_files(&self, recipe: &Recipe) -> Result<Vec<(PathBuf, String)>> {
        let mut files = Vec::new();
        for source in recipe.data.train.iter().chain(&recipe.data.valid) {
            let found =
                source.files(&recipe.base).map_err(|error| Error::bad(error.to_string()))?;
            for path in found {
                let path = absolute(&path)?;
                let hash = self.sha256(&path)?;
                files.push((path, hash));
            }
        }
        Ok(files)
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|source| Error::io(path, source))
}

/// Faults in a line each.
fn told(faults: &[Fault]) -> Error {
    match faults {
        [one] => Error::bad(one.to_string()),
        several => {
            let lines: Vec<String> = several.iter().map(|fault| format!("\n  {fault}")).collect();
            Error::bad(format!("the recipe has {} faults:{}", several.len(), lines.concat()))
        }
    }
}

/// The method of a resolved recipe; none where its number of experts is found in the data.
fn method(recipe: &Value) -> Result<Option<Box<dyn MethodOptions>>> {
    if recipe["method"]["num_experts"] == json!("auto") {
        return Ok(None);
    }
    let mut faults = Vec::new();
    let mut section = recipe.get("method").cloned();
    if let Some(Value::Object(options)) = &mut section {
        options.remove(INIT_FROM);
    }
    let found = read_method(section.as_ref(), &mut faults);
    if faults.is_empty() { Ok(found.map(|(_, options)| options)) } else { Err(told(&faults)) }
}

impl Known {
    /// Makes sure that a method changes layers that the model has, and does not see more than it can.
    fn check_fit(&self, recipe: &Recipe, opened: &Opened) -> Result<()> {
        let (asked, limit) = (recipe.data.max_seq_len, opened.config.max_position_embeddings);
        if asked > limit {
            return Err(Error::bad(format!(
                "data.max_seq_len: is {asked}; the model's context holds {limit}"
            )));
        }
        let key = format!(
            "{} {} {}",
            opened.identity.fingerprint,
            recipe.method_name,
            json!(recipe.method.to_recipe())
        );
        if self.fitting.borrow().contains(&key) {
            return Ok(());
        }
        let fault = |error: hydralora_peft::Error| Error::bad(error.to_string());
        let all = opened.config.sites();
        let sites = match recipe.method.whole_model() {
            true => all,
            false => recipe.method.select(&all).map_err(fault)?,
        };
        recipe.method.check_layers(&sites).map_err(fault)?;
        self.fitting.borrow_mut().insert(key);
        Ok(())
    }
}

impl Recipes for Known {
    fn set(&self, recipe: &mut Value, key: &str, value: &Value) -> Result<()> {
        match set(recipe, key, value.clone()) {
            Ok(_) => Ok(()),
            Err(message) => Err(Error::bad(format!("{key}: {message}"))),
        }
    }

    fn resolve(&self, recipe: &Value, folder: &Path) -> Result<Resolved> {
        let mut recipe = Recipe::from_value(recipe, folder).map_err(|faults| told(&faults))?;
        // Cells lie elsewhere.
        if let Ok(path) = Path::new(&recipe.model.path).canonicalize() {
            recipe.model.path = path.display().to_string();
        }
        sources::locate(&mut recipe.data, folder)
            .map_err(|error| Error::bad(format!("{error:#}")))?;
        let files = self.data_files(&recipe)?;
        let opened = self.base(&recipe.model.path)?;
        self.check_fit(&recipe, &opened)?;

        let base = recipe.base.clone();
        let mut identity = with_auto(recipe.resolved(), recipe.auto_experts);
        newer::leave_out(&mut identity);
        for (section, key) in WITHOUT_EFFECT {
            identity[section].as_object_mut().map(|section| section.remove(key));
        }
        identity.as_object_mut().map(|identity| identity.remove("output"));
        let data = &mut recipe.data;
        for (section, sources) in [("train", &mut data.train), ("valid", &mut data.valid)] {
            for (index, source) in sources.iter_mut().enumerate() {
                let noted = &mut identity["data"][section][index];
                // The name of the file gives the domain where nothing else does.
                noted["domain"] = json!(source.domain_name());
                noted.as_object_mut().map(|noted| noted.remove("path"));
                // A data set of the hub is no path.
                let path = base.join(&source.path);
                if !source.path.as_os_str().is_empty() && path.exists() {
                    source.path = absolute(&path)?;
                }
            }
        }
        if let Some(template) = &mut data.template {
            let path = base.join(template.as_str());
            if path.is_file() {
                identity["data"]["template"] = json!(self.sha256(&path)?);
                *template = absolute(&path)?.display().to_string();
            }
        }
        let mut compared = Vec::new();
        for path in &mut data.overlap_check {
            *path = absolute(&base.join(&path))?;
            compared.push(self.sha256(path)?);
        }
        identity["data"]["overlap_check"] = json!(compared);
        if let Some(adapter) = &mut recipe.init_from {
            *adapter = absolute(adapter)?;
            identity["method"][INIT_FROM] = json!(self.sha256(&io::stored_tensors(adapter))?);
        }
        let resolved = with_auto(recipe.resolved(), recipe.auto_experts);
        let base = [opened.identity.name.clone(), opened.identity.fingerprint.clone()];
        Ok(Resolved { recipe: resolved, identity, base, files })
    }

    fn parameters(&self, recipe: &Value) -> Result<Option<u64>> {
        let Some(options) = method(recipe)? else { return Ok(None) };
        let opened = self.base(recipe["model"]["path"].as_str().unwrap_or_default())?;
        let all = opened.config.sites();
        if options.replaces_weights() {
            // The weights are taken over when it runs; without any left out these are all.
            let defaults = hydralora_peft::methods::find(
                recipe["method"]["name"].as_str().unwrap_or_default(),
            )
            .is_ok_and(|method| method.defaults() == options.to_recipe());
            return Ok(defaults.then(|| opened.config.num_parameters() as u64));
        }
        let sites = match options.whole_model() {
            true => all,
            false => options.select(&all).map_err(|error| Error::bad(error.to_string()))?,
        };
        let tuned = options.build(&sites, DType::F32, 0);
        Ok(Some(count(tuned.as_ref()).values().sum::<usize>() as u64))
    }

    fn scale(&self, recipe: &Value) -> Option<f64> {
        let method = recipe.get("method")?;
        let (alpha, rank) = (method.get("alpha")?.as_f64()?, method.get("rank")?.as_f64()?);
        let root = method.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
        Some(if root { alpha / rank.sqrt() } else { alpha / rank })
    }

    fn check_task(&self, task: &str) -> Result<()> {
        tasks::known(task).map(|_| ()).map_err(|error| Error::bad(format!("tasks: {error}")))
    }
}

/// A number of experts that is found in the data is not one yet.
fn with_auto(mut recipe: Value, auto: bool) -> Value {
    if auto {
        recipe["method"]["num_experts"] = json!("auto");
    }
    recipe
}

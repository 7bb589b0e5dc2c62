//! All a run needs to go on bit for bit: adapter, the optimizer's state, and where it stood.
//!
//! Order and dropout follow from the seed and the step alone, so there is no random state to save.

use crate::error::{Error, Result};
use crate::fit::Run;
use crate::optimizer::{OPTIMIZERS, Stepper};
use hydralora_files::{Kind, Proof, remove_folder, replace_folder};
use hydralora_kernels::DType;
use hydralora_model::adapter::SiteShape;
use hydralora_peft::io;
use hydralora_peft::{TensorMap, Tuned};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const STATE_FILE: &str = "state.json";
/// What the run was given, for whoever goes on from it.
const SETTINGS_FILE: &str = "settings.json";
/// The trained tensors, where the adapter's own file holds others.
const TRAINABLES_FILE: &str = "trainables.safetensors";
/// What the method keeps beside its tensors.
const METHOD_FILE: &str = "method.safetensors";
/// The optimizer's state, `PARAMETER/STATE` for every parameter and each of its tensors of state.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// AdamW's moments as earlier builds kept them, each an adapter's tensors in its place.
const MOMENT_FILES: [&str; 2] = ["first_moments.safetensors", "second_moments.safetensors"];

/// What such a folder is.
const FOLDER: Kind = Kind {
    name: "checkpoint",
    earlier: Some(Proof {
        file: STATE_FILE,
        fields: &["step", "optimizer_steps", "run_fingerprint"],
        files: &[
            STATE_FILE,
            TRAINABLES_FILE,
            METHOD_FILE,
            MOMENT_FILES[0],
            MOMENT_FILES[1],
            io::CONFIG_FILE,
            io::TENSOR_FILE,
            io::METADATA_FILE,
            io::TEMPLATE_FILE,
            io::MODEL_FILE,
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ],
    }),
};

/// Where a run stood.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps taken.
    pub step: usize,
    /// The optimizer; builds that had AdamW alone did not say so.
    #[serde(default = "first_optimizer")]
    pub optimizer: String,
    /// Steps the optimizer counted.
    pub optimizer_steps: u64,
    /// Best held-out loss so far.
    pub best_loss: Option<f64>,
    /// Evaluations since the best one.
    pub evaluations_since_best: usize,
    /// Whether the held-out records are still to be evaluated after `step`: the run was interrupted
    /// while they were.
    #[serde(default)]
    pub evaluation_due: bool,
    /// Seconds of training so far.
    pub elapsed_s: f64,
    /// Joules used so far; none where they are not known.
    #[serde(default)]
    pub energy_j: Option<f64>,
    /// What they come from.
    #[serde(default)]
    pub energy_source: Option<String>,
    /// Hash of everything that decides how the run goes on.
    pub run_fingerprint: String,
}

fn first_optimizer() -> String {
    OPTIMIZERS[0].name().to_owned()
}

impl Progress {
    /// That of a run of this fingerprint before its first step.
    pub fn start(run_fingerprint: &str) -> Self {
        Self {
            step: 0,
            optimizer: first_optimizer(),
            optimizer_steps: 0,
            best_loss: None,
            evaluations_since_best: 0,
            evaluation_due: false,
            elapsed_s: 0.0,
            energy_j: None,
            energy_source: None,
            run_fingerprint: run_fingerprint.to_owned(),
        }
    }
}

/// Writes a checkpoint folder, whole or not at all. Where somebody put files into one of the same
/// name, that one is kept under the name that is returned.
///
/// # Errors
/// If the file system refuses.
pub fn save(
    folder: &Path,
    tuned: &dyn Tuned,
    optimizer: &Stepper,
    progress: &Progress,
    run: &Run<'_>,
    all: &[SiteShape],
) -> Result<Option<PathBuf>> {
    let kept = hydralora_files::set_aside(folder, &FOLDER)?;
    replace_folder::<Error>(folder, &FOLDER, |folder| {
        io::write_into(folder, tuned, run.metadata, all)?;
        if !run.settings.is_null() {
            let settings =
                serde_json::to_vec_pretty(run.settings).map_err(std::io::Error::other)?;
            fs::write(folder.join(SETTINGS_FILE), settings)?;
        }
        io::write_tensors(&folder.join(OPTIMIZER_FILE), &optimizer.state(tuned))?;
        let tensors = tuned.tensors();
        let in_file = tuned.file_tensors();
        let shapes = |map: &TensorMap| -> Vec<(String, Vec<usize>)> {
            map.iter().map(|(name, tensor)| (name.clone(), tensor.shape().to_vec())).collect()
        };
        if shapes(&tensors) != shapes(&in_file) {
            io::write_tensors(&folder.join(TRAINABLES_FILE), &tensors)?;
        }
        let kept = tuned.state();
        if !kept.is_empty() {
            io::write_tensors(&folder.join(METHOD_FILE), &kept)?;
        }
        let state = serde_json::to_vec_pretty(progress).map_err(std::io::Error::other)?;
        fs::write(folder.join(STATE_FILE), state)?;
        Ok(())
    })?;
    Ok(kept)
}

/// Where a run stood at a checkpoint.
///
/// # Errors
/// If the file is missing or malformed, or belongs to a run with other settings or data.
pub fn read_state(folder: &Path, run_fingerprint: &str) -> Result<Progress> {
    let path = folder.join(STATE_FILE);
    let fault = |message: String| Error::Checkpoint { path: path.clone(), message };
    let text = hydralora_files::bytes_of(&path).map_err(|error| fault(error.to_string()))?;
    let progress: Progress =
        serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))?;
    if progress.run_fingerprint != run_fingerprint {
        let message = "the recipe, the data or the base model changed since this checkpoint was \
                       written; resume with the same ones or start a new run";
        return Err(fault(message.to_owned()));
    }
    Ok(progress)
}

/// Loads a checkpoint into a run of the same shape.
///
/// # Errors
/// If it is not whole, or belongs to a run with other settings or data, or another optimizer.
pub fn load(
    folder: &Path,
    tuned: &mut dyn Tuned,
    optimizer: &mut Stepper,
    run_fingerprint: &str,
    all: &[SiteShape],
    dtype: DType,
) -> Result<Progress> {
    let progress = read_state(folder, run_fingerprint)?;
    if progress.optimizer != optimizer.name() {
        let (then, now) = (&progress.optimizer, optimizer.name());
        let message = format!(
            "the state is that of the optimizer `{then}`, and the run has `{now}`; resume with `{then}`, or \
             start a new run"
        );
        return Err(Error::Checkpoint { path: folder.join(STATE_FILE), message });
    }
    let source = Source { folder, dtype };
    let apart = folder.join(TRAINABLES_FILE).exists();
    let name = if apart { TRAINABLES_FILE } else { io::tensor_file(tuned) };
    source.take(name, |tensors| tuned.load(tensors))?;
    match folder.join(METHOD_FILE).exists() {
        true => source.take(METHOD_FILE, |tensors| tuned.load_state(tensors))?,
        false => whole(folder, METHOD_FILE, tuned.load_state(&mut TensorMap::new()))?,
    }
    let steps = progress.optimizer_steps;
    if folder.join(OPTIMIZER_FILE).exists() || !folder.join(MOMENT_FILES[0]).exists() {
        source.take(OPTIMIZER_FILE, |tensors| optimizer.restore(steps, tuned, tensors))?;
    } else {
        let moments = source.moments(tuned, all)?;
        optimizer.restore_moments(steps, [moments[0].as_ref(), moments[1].as_ref()]);
    }
    Ok(progress)
}

/// Where a checkpoint's tensors are read from.
struct Source<'a> {
    folder: &'a Path,
    dtype: DType,
}

impl Source<'_> {
    /// Reads the file `name` and has `into` take all that it holds.
    fn take(
        &self,
        name: &str,
        into: impl FnOnce(&mut TensorMap) -> std::result::Result<(), Vec<String>>,
    ) -> Result<()> {
        let mut tensors: TensorMap = io::decode(&self.folder.join(name), self.dtype)?;
        let mut mismatches = into(&mut tensors).err().unwrap_or_default();
        mismatches.extend(tensors.keys().map(|name| format!("`{name}` is left over")));
        let taken = if mismatches.is_empty() { Ok(()) } else { Err(mismatches) };
        whole(self.folder, name, taken)
    }

    /// The moments of earlier builds: adapters like `tuned` whose values they are, since they were kept
    /// under the names and in the shapes of an adapter's file.
    fn moments(&self, tuned: &dyn Tuned, all: &[SiteShape]) -> Result<[Box<dyn Tuned>; 2]> {
        let (sites, every) = (tuned.sites(), tuned.options().whole_model());
        let shapes: Vec<SiteShape> =
            all.iter().copied().filter(|shape| every || sites.contains(&shape.site)).collect();
        let read = |name: &str| -> Result<Box<dyn Tuned>> {
            let mut moment = tuned.options().build(&shapes, self.dtype, 0);
            self.take(name, |tensors| moment.load(tensors))?;
            Ok(moment)
        };
        Ok([read(MOMENT_FILES[0])?, read(MOMENT_FILES[1])?])
    }
}

/// What is wrong with the tensors of a checkpoint's file, if something is.
fn whole(folder: &Path, name: &str, taken: std::result::Result<(), Vec<String>>) -> Result<()> {
    taken.map_err(|mismatches| Error::Checkpoint {
        path: folder.join(name),
        message: mismatches.join("; "),
    })
}

/// What a checkpoint says of its run: the settings it was given, if it was written with any, and the
/// fingerprint.
///
/// # Errors
/// If a file of it is missing or malformed.
pub fn describe(folder: &Path) -> Result<(Option<Value>, String)> {
    let read = |name: &str| -> Result<Value> {
        let fault = |message: String| Error::Checkpoint { path: folder.join(name), message };
        let text = hydralora_files::bytes_of(&folder.join(name))
            .map_err(|error| fault(error.to_string()))?;
        serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))
    };
    let settings = folder.join(SETTINGS_FILE).exists().then(|| read(SETTINGS_FILE)).transpose()?;
    let fingerprint = read(STATE_FILE)?["run_fingerprint"].as_str().unwrap_or_default().to_owned();
    Ok((settings, fingerprint))
}

/// The folder of a step's checkpoint.
pub fn folder_of(run: &Path, step: usize) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step:06}"))
}

/// Checkpoints of a run, oldest first.
///
/// # Errors
/// If the folder cannot be read.
pub fn list(run: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let folder = run.join("checkpoints");
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Deletes all but the newest `keep` checkpoints, and says which could not be: a run does not end
/// for that. One that somebody put files into is kept.
///
/// # Errors
/// If the folder cannot be read.
pub fn prune(run: &Path, keep: usize) -> Result<Vec<String>> {
    let all = list(run)?;
    let old = &all[..all.len().saturating_sub(keep)];
    let failed = old.iter().filter_map(|(_, path)| remove_folder(path, &FOLDER).err());
    Ok(failed.map(|error| format!("an old checkpoint is kept: {error}")).collect())
}

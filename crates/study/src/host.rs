//! What a study needs of the program around it. The crate itself knows no model, no method and no format.

use crate::claim::Claim;
use crate::error::Result;
use crate::result::{Measured, Validated};
use crate::spec::EvalOptions;
use crate::store::CellFile;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// A recipe that was read and checked.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// With every value spelt out and the paths of its data absolute.
    pub recipe: Value,
    /// The same without what changes nothing in a result: paths, where it goes, how often it is saved.
    pub identity: Value,
    /// The base model's name and fingerprint.
    pub base: [String; 2],
    /// The data files in the order of the recipe, with the SHA-256 of their content.
    pub files: Vec<(PathBuf, String)>,
}

/// Reads recipes for a plan.
pub trait Recipes {
    /// Puts `value` at the key `key` (`train.seed`, `data.train.0.weight`) of a recipe.
    ///
    /// # Errors
    /// If there is no such place.
    fn set(&self, recipe: &mut Value, key: &str, value: &Value) -> Result<()>;
    /// Reads and checks a recipe whose data paths start from `folder`.
    ///
    /// # Errors
    /// With every fault.
    fn resolve(&self, recipe: &Value, folder: &Path) -> Result<Resolved>;
    /// Counts the trainable parameters of a resolved recipe, without loading weights; none if that is
    /// known only when it runs.
    ///
    /// # Errors
    /// If its method does not fit its model.
    fn parameters(&self, recipe: &Value) -> Result<Option<u64>>;
    /// The factor before the low-rank update of a resolved recipe; none for methods that have none.
    fn scale(&self, recipe: &Value) -> Option<f64>;
    /// Makes sure that there is such a task.
    ///
    /// # Errors
    /// If not, with the nearest known one.
    fn check_task(&self, task: &str) -> Result<()>;
}

/// A cell to be worked on.
pub struct Job<'a> {
    /// The cell's folder, in which commands are run.
    pub folder: &'a Path,
    /// What the cell is.
    pub cell: &'a CellFile,
    /// The name, inside the cell's folder, of the folder of the run.
    pub run: &'a str,
    /// The hold on the cell. Work has to end as soon as it is lost.
    pub claim: &'a Claim,
    /// Set when the program has been asked to stop.
    pub stop: &'a AtomicBool,
}

/// How work on a cell ended.
#[derive(Clone, Debug)]
pub enum Ended<T> {
    /// It is done.
    Done(T),
    /// It was stopped and can go on.
    Stopped,
    /// It failed, for the reason given.
    Failed(String),
}

/// Adapters to score.
pub struct Scored<'a> {
    /// Task names.
    pub tasks: &'a [String],
    /// How they are scored.
    pub eval: &'a EvalOptions,
    /// Folders of adapters of other cells that are put together first.
    pub sources: &'a [PathBuf],
}

/// Does a cell's work.
pub trait Runner: Sync {
    /// Trains a cell, going on from the newest checkpoint in the run's folder if there is one.
    ///
    /// # Errors
    /// If no cell can be trained here, so that it makes no sense to go on with the next one.
    fn train(&self, job: &Job<'_>) -> Result<Ended<Validated>>;
    /// Scores what a cell trained, or what it is made of, on its tasks.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    fn score(&self, job: &Job<'_>, scored: &Scored<'_>) -> Result<Ended<Measured>>;
    /// Looks at the weights of the adapter in the run's folder, for the field `analysis` of the result: what
    /// was found, or a null with the reason.
    ///
    /// # Errors
    /// If the disk refuses.
    fn analyze(&self, job: &Job<'_>) -> Result<Value>;
    /// Makes sure that the data and the base model of a cell are what they were when it was planned.
    ///
    /// # Errors
    /// With what has changed.
    fn check(&self, folder: &Path, cell: &CellFile) -> Result<()>;
    /// Waits for a command of an earlier attempt that may still work in the folder `run`: its worker has
    /// died, and it is about to save and to end.
    fn wait_for(&self, run: &Path);
    /// Says something to people.
    fn say(&self, line: &str);
}

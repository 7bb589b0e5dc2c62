//! A study on disk: `study.json`, `study.yaml`, `plan.json` and a folder a cell.

use crate::claim::Claim;
use crate::disk::{
    make_folder, names_in, read_json, read_text, sha256, to_json, write_file, write_json, write_new,
};
use crate::error::{Error, Result};
use crate::plan::{Plan, cell_folder, recipe_path};
use crate::result::CellResult;
use crate::spec::EvalOptions;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Version of the files of a study. Older ones are read as long as nothing in them means something else;
/// newer ones are refused by name.
pub const FORMAT: u32 = 1;
/// The folder of the cells.
pub const CELLS: &str = "cells";
/// The folder of parted data.
pub const DATA: &str = "data";
/// A cell's recipe.
pub const RECIPE: &str = "recipe.yaml";
/// What a cell is.
pub const CELL: &str = "cell.json";
/// What a cell gave.
pub const RESULT: &str = "result.json";
/// Why a cell failed.
pub const FAILED: &str = "failed.json";
/// What a cell's commands wrote to stderr.
pub const LOG: &str = "log.txt";
const STUDY: &str = "study.json";
const STUDY_FILE: &str = "study.yaml";
const PLAN: &str = "plan.json";
/// What belongs under version control is left over by this: recipes, cells, results, plan.
const IGNORED: &str = "# Weights, logs and parted data; the rest may be committed.
/data/
/cells/*/run*/
/cells/*/score*/
/cells/*/claims/
/cells/*/log.txt
/cells/*/failed.json
.study-*
";

/// What is done in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A recipe is trained, then scored.
    Trained,
    /// The base model is scored as it is.
    Untrained,
    /// Other cells' adapters are put together, then scored.
    Combined,
}

/// What a cell is, as `cell.json` holds it. It never changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellFile {
    /// Version of the format.
    pub format: u32,
    /// The cell's name, the beginning of the SHA-256 of `identity`.
    pub id: String,
    /// What is done in it.
    pub kind: Kind,
    /// All that decides its results: recipe, data, base model, tasks.
    pub identity: Value,
    /// SHA-256 of `recipe.yaml`.
    pub recipe_sha256: String,
    /// Name of the base model.
    pub base: String,
    /// Data files as seen from the cell's folder, with the SHA-256 of their content.
    pub files: Vec<(PathBuf, String)>,
    /// Tasks to score on the test split.
    pub tasks: Vec<String>,
    /// How they are scored.
    pub eval: EvalOptions,
    /// The command that puts adapters together, for a cell made of others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub combine: Vec<String>,
}

/// Why a cell failed, as `failed.json` holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// Version of the format.
    pub format: u32,
    /// What was being done: `train` or `score`.
    pub stage: String,
    /// What the command said.
    pub message: String,
}

/// Which study a folder holds.
#[derive(Debug, Serialize, Deserialize)]
struct StudyFile {
    format: u32,
    name: String,
}

/// A study's folder.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// A folder for a study, made if it is not there.
    ///
    /// # Errors
    /// If it cannot be made, or holds other files.
    pub fn create(root: &Path) -> Result<Self> {
        if !root.join(STUDY).is_file() && !names_in(root)?.is_empty() {
            return Err(Error::bad(format!(
                "--out: {} is a folder of other files (no {STUDY}); expected another place",
                root.display()
            )));
        }
        make_folder(root)?;
        Self::at(root)
    }

    /// A planned study.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(root: &Path) -> Result<Self> {
        if !root.join(PLAN).is_file() {
            return Err(Error::bad(format!(
                "{}: holds no planned study (no {PLAN}); `hydralora study plan FILE.yaml --out {0}` makes one",
                root.display()
            )));
        }
        Self::at(root)
    }

    fn at(root: &Path) -> Result<Self> {
        let root = root.canonicalize().map_err(|source| Error::io(root, source))?;
        Ok(Self { root })
    }

    /// The study's folder, absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Notes that the folder belongs to the study `name`.
    ///
    /// # Errors
    /// If it belongs to another one.
    pub(crate) fn claim_for(&self, name: &str) -> Result<()> {
        let path = self.root.join(STUDY);
        if !path.is_file() {
            let study = StudyFile { format: FORMAT, name: name.to_owned() };
            write_new(&path, &to_json(&study)?)?;
        }
        let found: StudyFile = read_json(&path)?;
        known_format(found.format, &path)?;
        if found.name != name {
            return Err(Error::bad(format!(
                "--out: {} holds the study `{}`; `{name}` needs a folder of its own",
                self.root.display(),
                found.name
            )));
        }
        Ok(())
    }

    /// Writes a cell that is not there yet and says whether it was so.
    ///
    /// # Errors
    /// If it cannot be written, or is there and was changed.
    pub(crate) fn add_cell(&self, cell: &CellFile, recipe: &str) -> Result<bool> {
        let folder = cell_folder(&self.root, &cell.id);
        if folder.is_dir() {
            self.check_cell(&cell.id)?;
            return Ok(false);
        }
        let cells = self.root.join(CELLS);
        let failed = |source| Error::io(&folder, source);
        make_folder(&cells)?;
        // Filled elsewhere and renamed. That all of it has reached the disk is not waited for, ten
        // thousand times: a file that did not is found by its hash.
        let temporary = cells.join(format!(".{}.{}.tmp", cell.id, std::process::id()));
        make_folder(&temporary)?;
        let put = |name: &str, bytes: &[u8]| -> Result<()> {
            let mut file = fs::File::create(temporary.join(name)).map_err(failed)?;
            file.write_all(bytes).map_err(failed)
        };
        let placed = put(RECIPE, recipe.as_bytes())
            .and_then(|()| put(CELL, &to_json(cell)?))
            .and_then(|()| fs::rename(&temporary, &folder).map_err(failed));
        if placed.is_err() {
            let _ = fs::remove_dir_all(&temporary);
            // Another process planned the same.
            if !folder.join(CELL).is_file() {
                placed?;
            }
        }
        Ok(true)
    }

    /// Writes the plan, and the study file beside it.
    pub(crate) fn save_plan(&self, plan: &Plan, text: &str) -> Result<()> {
        write_file(&self.root.join(".gitignore"), IGNORED.as_bytes())?;
        write_file(&self.root.join(STUDY_FILE), text.as_bytes())?;
        write_json(&self.root.join(PLAN), plan)
    }

    /// The plan.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn plan(&self) -> Result<Plan> {
        let path = self.root.join(PLAN);
        let value: Value = read_json(&path)?;
        known_format(format_of(&value, &path)?, &path)?;
        serde_json::from_value(value).map_err(|error| Error::file(&path, error.to_string()))
    }

    /// A cell's folder.
    pub fn folder(&self, id: &str) -> PathBuf {
        cell_folder(&self.root, id)
    }

    /// A file of a cell.
    pub fn file(&self, id: &str, name: &str) -> PathBuf {
        self.folder(id).join(name)
    }

    /// Reads what a cell is and makes sure that nobody has changed it.
    ///
    /// # Errors
    /// With the cell's name if it is not what was planned.
    pub fn check_cell(&self, id: &str) -> Result<CellFile> {
        let path = self.file(id, CELL);
        let edited = |what: &str, path: &Path| {
            Error::file(
                path,
                format!(
                    "the cell {id} was changed by hand ({what}); a cell never changes: put the file back, or \
                     change the study file and plan again, which makes a new cell"
                ),
            )
        };
        let value: Value = read_json(&path)?;
        known_format(format_of(&value, &path)?, &path)?;
        let cell: CellFile =
            serde_json::from_value(value).map_err(|error| edited(&error.to_string(), &path))?;
        let name = &sha256(cell.identity.to_string().as_bytes())[..id.len().min(64)];
        if cell.id != id || name != id {
            return Err(edited("its identity gives another name", &path));
        }
        let recipe = recipe_path(&self.root, id);
        if sha256(read_text(&recipe)?.as_bytes()) != cell.recipe_sha256 {
            return Err(edited("the recipe's hash is another one", &recipe));
        }
        Ok(cell)
    }

    /// What a cell gave; none if it is not done.
    ///
    /// # Errors
    /// If the file is damaged, of a version that is not known, or of another cell.
    pub fn result(&self, id: &str) -> Result<Option<CellResult>> {
        let path = self.file(id, RESULT);
        let text = match hydralora_files::bytes_of(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path, error)),
        };
        let fault = |error: serde_json::Error| Error::file(&path, error.to_string());
        let value: Value = serde_json::from_slice(&text).map_err(fault)?;
        known_format(format_of(&value, &path)?, &path)?;
        let result: CellResult = serde_json::from_value(value).map_err(fault)?;
        if result.cell != id {
            let message = format!("is the result of the cell {}; expected {id}", result.cell);
            return Err(Error::file(&path, message));
        }
        Ok(Some(result))
    }

    /// Writes what a cell gave. The first one counts: a result that is there is never written over
    /// by training again.
    pub(crate) fn publish(&self, result: &CellResult) -> Result<bool> {
        write_new(&self.file(&result.cell, RESULT), &to_json(result)?)
    }

    /// Puts a result with its scores in place of the one without.
    pub(crate) fn complete(&self, result: &CellResult) -> Result<()> {
        write_json(&self.file(&result.cell, RESULT), result)
    }

    /// Puts what was found in a cell's adapter into its result, and says whether there is a result. The
    /// cell has to be [claimed](crate::claim::Observer::claim), so that nobody else writes it meanwhile.
    ///
    /// # Errors
    /// If the result is damaged or cannot be written.
    pub fn set_analysis(&self, id: &str, claim: Claim, analysis: Value) -> Result<bool> {
        let found = self.result(id)?;
        let there = found.is_some();
        if let Some(result) = found.filter(|result| result.analysis != analysis) {
            self.complete(&CellResult { analysis, ..result })?;
        }
        claim.finish()?;
        Ok(there)
    }

    /// Why a cell failed; none if it did not.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn failure(&self, id: &str) -> Result<Option<Failure>> {
        let path = self.file(id, FAILED);
        if path.is_file() { read_json(&path).map(Some) } else { Ok(None) }
    }

    pub(crate) fn fail(&self, id: &str, stage: &str, message: &str) -> Result<()> {
        let failure =
            Failure { format: FORMAT, stage: stage.to_owned(), message: message.to_owned() };
        write_json(&self.file(id, FAILED), &failure)
    }

    pub(crate) fn forgive(&self, id: &str) -> Result<()> {
        let path = self.file(id, FAILED);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(&path, error))
            }
            _ => Ok(()),
        }
    }

    /// Cells that lie in the folder and not in the plan: of earlier versions of the study.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn unplanned(&self, plan: &Plan) -> Result<usize> {
        let planned: HashSet<&str> = plan.cells.iter().map(|cell| cell.id.as_str()).collect();
        let names = names_in(&self.root.join(CELLS))?;
        let other = |name: &&String| !name.starts_with('.') && !planned.contains(name.as_str());
        Ok(names.iter().filter(other).count())
    }
}

fn format_of(value: &Value, path: &Path) -> Result<u32> {
    let found = value.get("format").and_then(Value::as_u64);
    let missing = || {
        Error::file(
            path,
            format!("has no `format`; expected a file that hydralora wrote, of format {FORMAT}"),
        )
    };
    Ok(found.ok_or_else(missing)? as u32)
}

fn known_format(found: u32, path: &Path) -> Result<()> {
    match found {
        FORMAT => Ok(()),
        newer if newer > FORMAT => Err(Error::file(
            path,
            format!("is of format {newer}, of a newer hydralora; this one reads up to {FORMAT}"),
        )),
        older => Err(Error::file(
            path,
            format!("is of format {older}, which is not read any more; expected {FORMAT}"),
        )),
    }
}

/// A value that another part of the program will fill in, with the reason why it is not there.
pub fn not_measured(reason: &str) -> Value {
    json!({"value": null, "reason": reason})
}

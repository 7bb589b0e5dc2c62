//! What a benchmark task is: records turned into prompts, and answers turned into scores.

use super::engine::Scored;
use super::error::{Error, Result};
use super::prompt::{Prompt, Reader};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What the user asked for, as far as tasks have a say in it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder (or, for tasks over any file, file) with the data.
    pub data: PathBuf,
    /// Examples before each question; the task's own number if none.
    pub shots: Option<usize>,
    /// Only the first so many records of each task.
    pub limit: Option<usize>,
    /// Seed of drawn examples and sampled texts.
    pub seed: u64,
    /// Programs drawn for each problem; the task's own number if none.
    pub repeats: Option<usize>,
    /// Divides the logits of sampled texts; the task's own if none.
    pub temperature: Option<f64>,
    /// Most tokens to write; the task's own number if none.
    pub max_new_tokens: Option<usize>,
    /// Whether model-written programs may run.
    pub allow_code_execution: bool,
    /// Tokens of context the model has.
    pub context: usize,
}

impl Settings {
    /// The number of tokens to write, by default `own`.
    ///
    /// # Errors
    /// If the context leaves no room for a prompt.
    pub(crate) fn new_tokens(&self, own: usize) -> Result<usize> {
        let most = self.max_new_tokens.unwrap_or(own);
        if most >= self.context {
            return Err(Error::Option {
                option: "max-new-tokens",
                message: format!(
                    "is {most}; the model's context holds {} tokens, prompt included",
                    self.context
                ),
            });
        }
        Ok(most)
    }

    /// The number of examples, by default `own` and at most `most`.
    ///
    /// # Errors
    /// If there are not so many.
    pub(crate) fn examples(&self, task: &str, own: usize, most: usize) -> Result<usize> {
        let shots = self.shots.unwrap_or(own);
        if shots > most {
            return Err(Error::Option {
                option: "shots",
                message: format!("is {shots}; `{task}` has {most} examples"),
            });
        }
        Ok(shots)
    }
}

/// A family of tasks: one file under `tasks/`.
pub trait Family: Sync {
    /// Every name it answers to.
    fn names(&self) -> Vec<String>;
    /// Whether `name` may be followed by `:` and a file.
    fn takes_file(&self) -> bool {
        false
    }
    /// Where the hub has the data of one of its names; none for a user's own files.
    fn remote(&self, _name: &str, _settings: &Settings) -> Option<Remote> {
        None
    }
    /// One line for people.
    fn summary(&self) -> &'static str;
    /// The tasks and groups behind one of its names, data read.
    ///
    /// # Errors
    /// If the data are missing or malformed, or an option makes no sense here.
    fn open(&self, name: &str, settings: &Settings, reader: &Reader<'_>) -> Result<Opened>;
}

/// Data as the hub keeps them: a folder a configuration, in it Parquet files a split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The repository of the data set.
    pub repository: &'static str,
    /// Its revision.
    pub revision: &'static str,
    /// Folder and split of everything needed.
    pub splits: Vec<(String, &'static str)>,
}

/// Tasks that were asked for under one name.
#[derive(Default)]
pub struct Opened {
    /// The tasks.
    pub tasks: Vec<Box<dyn Task>>,
    /// Their means.
    pub groups: Vec<Group>,
}

/// Several tasks whose mean is reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its name in results.
    pub name: String,
    /// Its members' names.
    pub members: Vec<String>,
    /// Names of those that belong to it and have no files where the data are.
    pub absent: Vec<String>,
}

/// Records with a way to ask and a way to score.
pub trait Task: Sync {
    /// What it is.
    fn info(&self) -> &Info;
    /// The records.
    fn items(&self) -> &[Item];
    /// One score per metric of [`Info::metrics`].
    ///
    /// # Errors
    /// If the answer cannot be scored.
    fn score(&self, item: &Item, answer: &Answer) -> Result<Vec<Score>>;
}

/// What a task is and how it scores, for the results file.
#[derive(Clone, Debug)]
pub struct Info {
    /// Name in results.
    pub name: String,
    /// Version of the definition it follows.
    pub version: f64,
    /// Examples before each question.
    pub shots: usize,
    /// `multiple_choice`, `generate_until` or `loglikelihood`.
    pub output_type: &'static str,
    /// What is measured.
    pub metrics: Vec<Metric>,
    /// All else that decides the score: stop texts, filters, sampling.
    pub config: Map<String, Value>,
    /// SHA-256 of each file read.
    pub data: BTreeMap<String, String>,
    /// Records in the file, before any limit.
    pub original: usize,
}

/// One number of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metric {
    /// `acc`, `exact_match`, `pass@1`, `loss`.
    pub name: String,
    /// Which reading of the answer it is about.
    pub filter: String,
    /// Whether more is better.
    pub higher_is_better: bool,
}

impl Metric {
    /// A metric of which more is better.
    pub(crate) fn new(name: impl Into<String>, filter: impl Into<String>) -> Self {
        Self { name: name.into(), filter: filter.into(), higher_is_better: true }
    }

    /// `name,filter`, as results name it.
    pub fn key(&self) -> String {
        format!("{},{}", self.name, self.filter)
    }

    /// `name_stderr,filter`.
    pub fn stderr_key(&self) -> String {
        format!("{}_stderr,{}", self.name, self.filter)
    }
}

/// One record, ready to be asked.
#[derive(Clone, Debug)]
pub struct Item {
    /// Its number in the file, from 0.
    pub id: usize,
    /// As the file has it.
    pub record: Value,
    /// What is asked.
    pub prompt: Prompt,
    /// How.
    pub work: Work,
    /// The right answer.
    pub target: String,
}

/// How a record is asked.
#[derive(Clone, Debug)]
pub enum Work {
    /// The likelihood of each of these after the prompt, behind a delimiter.
    Choices {
        /// Before each choice.
        delimiter: Cow<'static, str>,
        /// The choices.
        choices: Vec<String>,
    },
    /// The mean loss of each of these whole texts; the prompt is not used.
    Whole(Vec<String>),
    /// Texts the model writes after the prompt.
    Write {
        /// Texts at which they end.
        stops: Vec<String>,
        /// Most tokens.
        max_new_tokens: usize,
        /// How many.
        repeats: usize,
        /// Divides the logits; 0 takes the likeliest token.
        temperature: f64,
        /// Only the likeliest tokens that together reach this probability.
        top_p: f64,
    },
    /// The loss of labelled tokens.
    Loss {
        /// Token ids.
        tokens: Vec<u32>,
        /// Each token that counts, or the label to ignore.
        labels: Vec<u32>,
    },
}

/// What the model answered.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// To [`Work::Choices`].
    Choices(Vec<Scored>),
    /// To [`Work::Whole`]: what decides between the texts, less being likelier.
    Whole(Vec<f64>),
    /// To [`Work::Write`].
    Texts(Vec<String>),
    /// To [`Work::Loss`]: sum in nats and number of tokens.
    Loss(f64, usize),
}

impl Answer {
    /// For the per-sample log.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Choices(scored) => {
                scored.iter().map(|s| json!([s.log_likelihood, s.greedy])).collect()
            }
            Self::Whole(losses) => json!(losses),
            Self::Texts(texts) => json!(texts),
            Self::Loss(sum, tokens) => json!([[sum, tokens]]),
        }
    }

    /// The texts, none for other answers.
    pub fn texts(&self) -> &[String] {
        match self {
            Self::Texts(texts) => texts,
            _ => &[],
        }
    }

    /// Every number in it.
    pub(crate) fn numbers(&self) -> Vec<f64> {
        match self {
            Self::Choices(scored) => scored.iter().map(|s| s.log_likelihood).collect(),
            Self::Whole(losses) => losses.clone(),
            Self::Texts(_) => Vec::new(),
            Self::Loss(sum, _) => vec![*sum],
        }
    }
}

/// A record's score under one metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The score.
    pub value: f64,
    /// How much it counts.
    pub weight: f64,
    /// The answer as the metric's filter read it.
    pub filtered: String,
}

impl Score {
    /// Right or wrong.
    pub(crate) fn of(right: bool, filtered: impl Into<String>) -> Self {
        Self { value: f64::from(u8::from(right)), weight: 1.0, filtered: filtered.into() }
    }
}

/// The index of the largest number; the first of equal ones.
pub(crate) fn largest(values: impl IntoIterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.into_iter().enumerate() {
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}

/// Data files of one task, each hashed as it is read.
#[derive(Default)]
pub(crate) struct Files {
    pub(crate) hashes: BTreeMap<String, String>,
}

impl Files {
    /// The text of `path`.
    pub(crate) fn read(&mut self, path: &Path) -> Result<String> {
        let bytes = hydralora_files::read(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.hashes.insert(name, hex(&bytes));
        String::from_utf8(bytes).map_err(|error| {
            let good = error.utf8_error().valid_up_to();
            let line = error.as_bytes()[..good].iter().filter(|byte| **byte == b'\n').count() + 1;
            Error::malformed(path, Some(line), "is not UTF-8; save the file as UTF-8")
        })
    }

    /// The objects of files of any layout that training reads, at most `limit`, with how many
    /// there are.
    pub(crate) fn objects<T: serde::de::DeserializeOwned>(
        &mut self,
        paths: &[PathBuf],
        expected: &str,
        limit: Option<usize>,
    ) -> Result<(Vec<(Value, T)>, usize)> {
        if let [path] = paths
            && path.extension().is_some_and(|ending| ending == "jsonl")
        {
            return self.json_lines(path, expected, limit);
        }
        let mut found: Vec<(Value, T)> = Vec::new();
        let mut count = 0;
        for path in paths {
            let bytes = hydralora_files::read(path)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            self.hashes.insert(name, hex(&bytes));
            let mut fault = None;
            hydralora_data::read_rows(path, &mut |place, object| {
                count += 1;
                if limit.is_some_and(|limit| found.len() >= limit) {
                    return Ok(true);
                }
                let value = Value::Object(object);
                match T::deserialize(&value) {
                    Ok(typed) => found.push((value, typed)),
                    Err(error) => {
                        let row = place.record.map_or(String::new(), |row| format!("row {row}: "));
                        let line = (place.line > 0).then_some(place.line);
                        let message = format!("{row}{error}; expected {expected}");
                        fault = Some(Error::malformed(path, line, message));
                    }
                }
                Ok(fault.is_none())
            })?;
            if let Some(fault) = fault {
                return Err(fault);
            }
        }
        match paths.first().filter(|_| found.is_empty()) {
            Some(path) => {
                Err(Error::malformed(path, None, format!("is empty; expected {expected}")))
            }
            None => Ok((found, count)),
        }
    }

    /// Hands the objects of a file of any layout that training reads to `take`, with the line each
    /// begins on where there are lines. What `take` finds wrong becomes an error that names the place.
    pub(crate) fn rows(
        &mut self,
        path: &Path,
        take: &mut dyn FnMut(Map<String, Value>) -> Result<(), String>,
    ) -> Result<()> {
        self.hashes.insert(path.display().to_string(), hex(&hydralora_files::read(path)?));
        let mut fault = None;
        hydralora_data::read_rows(path, &mut |place, object| {
            fault = take(object).err().map(|message| {
                let row = place.record.map_or(String::new(), |row| format!("record {row}: "));
                let line = (place.line > 0).then_some(place.line);
                Error::malformed(path, line, format!("{row}{message}"))
            });
            Ok(fault.is_none())
        })?;
        fault.map_or(Ok(()), Err)
    }

    /// The objects of a file of JSON lines, at most `limit`, with how many there are.
    pub(crate) fn json_lines<T: serde::de::DeserializeOwned>(
        &mut self,
        path: &Path,
        expected: &str,
        limit: Option<usize>,
    ) -> Result<(Vec<(Value, T)>, usize)> {
        let text = self.read(path)?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let mut found = Vec::new();
        let mut count = 0;
        for (index, line) in lines {
            count += 1;
            if limit.is_some_and(|limit| found.len() >= limit) {
                continue;
            }
            let fault = |error: serde_json::Error| {
                Error::malformed(path, Some(index + 1), format!("{error}; expected {expected}"))
            };
            let value: Value = serde_json::from_str(line).map_err(fault)?;
            let typed = serde_json::from_str(line).map_err(fault)?;
            found.push((value, typed));
        }
        if found.is_empty() {
            return Err(Error::malformed(path, None, format!("is empty; expected {expected}")));
        }
        Ok((found, count))
    }
}

/// Whether a file name is that of a part of `split`, as in `test-00000-of-00001.parquet`.
pub(crate) fn is_shard(name: &str, split: &str) -> bool {
    let rest = name.strip_prefix(split).and_then(|rest| rest.strip_prefix('-'));
    rest.is_some_and(|rest| rest.ends_with(".parquet") && !rest.contains('/'))
}

/// The files of a split that lie in `folder` as the hub keeps them, in their order.
pub(crate) fn shards(folder: &Path, split: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| is_shard(&path.file_name().unwrap_or_default().to_string_lossy(), split))
        .collect();
    found.sort();
    found
}

/// The first of `candidates` that exists, or the files of the first of `hub`'s folders that has the
/// split.
pub(crate) fn locate_split(
    task: &str,
    what: &str,
    candidates: Vec<PathBuf>,
    hub: &[PathBuf],
    split: &str,
) -> Result<Vec<PathBuf>> {
    let single = candidates.iter().find(|path| path.exists()).map(|path| vec![path.clone()]);
    let mut sharded = hub.iter().map(|folder| shards(folder, split));
    match single.or_else(|| sharded.find(|shards| !shards.is_empty())) {
        Some(files) => Ok(files),
        None => {
            let pattern = |folder: &PathBuf| folder.join(format!("{split}-*.parquet"));
            let looked = candidates.into_iter().chain(hub.iter().map(pattern)).collect();
            Err(Error::MissingData { task: task.to_owned(), what: what.to_owned(), looked })
        }
    }
}

/// SHA-256 in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Members of a JSON object.
pub(crate) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

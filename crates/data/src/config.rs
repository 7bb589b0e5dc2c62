//! The `data:` section of a recipe.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::format;
use crate::suggest;
use crate::template::ChatTemplate;

/// What to train and validate on, and how records become tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The files to train on.
    pub train: Vec<SourceConfig>,
    /// The files to validate on; none means a fraction of every training file.
    #[serde(default)]
    pub valid: Vec<SourceConfig>,
    /// The fraction of every training file kept for validation, in [0, 1); ignored where `valid`
    /// names files.
    #[serde(default = "default_valid_fraction")]
    pub valid_fraction: f64,
    /// The most tokens of one sequence, special tokens included.
    #[serde(default = "default_max_seq_len")]
    pub max_seq_len: usize,
    /// A built-in chat template's name or a jinja file; none means the model's own.
    #[serde(default)]
    pub template: Option<String>,
    /// Whether prompts are trained too; otherwise only answers are.
    #[serde(default)]
    pub train_on_prompt: bool,
    /// What happens to records longer than `max_seq_len`.
    #[serde(default)]
    pub overlong: Overlong,
    /// Whether records are drawn in random order; otherwise in file order.
    #[serde(default = "default_true")]
    pub shuffle: bool,
}

/// One data file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// The file, relative to the recipe's folder.
    pub path: PathBuf,
    /// `auto` or a format's name, see [`format_names`](crate::format_names).
    #[serde(default = "default_format")]
    pub format: String,
    /// The name under which losses and routing are reported; none means the file's name without
    /// its ending.
    #[serde(default)]
    pub domain: Option<String>,
    /// How often each record is expected to appear in an epoch.
    #[serde(default = "default_weight")]
    pub weight: f64,
    /// Read only the first so many records.
    #[serde(default)]
    pub limit: Option<usize>,
    /// From the format's field names to those of the file.
    #[serde(default)]
    pub fields: BTreeMap<String, String>,
    /// The system prompt of conversations that bring none.
    #[serde(default)]
    pub system: Option<String>,
}

/// What happens to records longer than `max_seq_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Their end is cut off.
    #[default]
    Truncate,
    /// They are left out.
    Drop,
}

/// One thing wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The key, such as `data.train[0].weight`.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Fault {
    /// A fault at a key.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

fn default_valid_fraction() -> f64 {
    0.05
}

fn default_max_seq_len() -> usize {
    1024
}

fn default_true() -> bool {
    true
}

fn default_format() -> String {
    format::AUTO.to_owned()
}

fn default_weight() -> f64 {
    1.0
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Vec::new(),
            valid: Vec::new(),
            valid_fraction: default_valid_fraction(),
            max_seq_len: default_max_seq_len(),
            template: None,
            train_on_prompt: false,
            overlong: Overlong::default(),
            shuffle: default_true(),
        }
    }
}

impl SourceConfig {
    /// A file with every option at its default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: default_format(),
            domain: None,
            weight: default_weight(),
            limit: None,
            fields: BTreeMap::new(),
            system: None,
        }
    }

    /// The domain of the file's records: `domain`, or the file's name without its ending.
    pub fn domain_name(&self) -> String {
        self.domain.clone().unwrap_or_else(|| {
            self.path
                .file_stem()
                .map_or_else(|| "data".to_owned(), |stem| stem.to_string_lossy().into_owned())
        })
    }
}

impl DataConfig {
    /// The weight of every training file, in order: what [`Sampler::new`](crate::Sampler::new)
    /// takes.
    pub fn weights(&self) -> Vec<f64> {
        self.train.iter().map(|source| source.weight).collect()
    }

    /// The template that `template` names: a built-in one, or a jinja file relative to `base_dir`.
    /// `None` where the model's own counts.
    ///
    /// # Errors
    /// When the name is neither, or the file is not a valid template.
    pub fn resolve_template(&self, base_dir: &Path) -> Result<Option<ChatTemplate>> {
        self.template.as_deref().map(|name| ChatTemplate::resolve(name, base_dir)).transpose()
    }

    /// Everything wrong with the section, all at once; empty when nothing is. Relative paths are
    /// those of `base_dir`. File contents are not read, the template's excepted.
    pub fn validate(&self, base_dir: &Path) -> Vec<Fault> {
        let mut faults = Vec::new();
        if self.train.is_empty() {
            faults.push(Fault::new("data.train", "names no file; at least one is needed"));
        }
        let sections = [("train", &self.train), ("valid", &self.valid)];
        for (section, sources) in sections {
            for (index, source) in sources.iter().enumerate() {
                source.check(&format!("data.{section}[{index}]"), base_dir, &mut faults);
                if section == "valid" && source.weight != default_weight() {
                    faults.push(Fault::new(
                        format!("data.valid[{index}].weight"),
                        "weights count for training only; every validation record is scored once",
                    ));
                }
            }
        }
        if !(0.0..1.0).contains(&self.valid_fraction) {
            faults.push(Fault::new(
                "data.valid_fraction",
                format!("must be at least 0 and below 1, is {}", self.valid_fraction),
            ));
        }
        if self.max_seq_len < 2 {
            faults.push(Fault::new(
                "data.max_seq_len",
                format!(
                    "must be at least 2 (a token and the one it predicts), is {}",
                    self.max_seq_len
                ),
            ));
        }
        if let Err(error) = self.resolve_template(base_dir) {
            faults.push(Fault::new("data.template", error.to_string()));
        }
        faults
    }
}

impl SourceConfig {
    fn check(&self, at: &str, base_dir: &Path, faults: &mut Vec<Fault>) {
        let mut fault = |key: &str, message: String| {
            faults.push(Fault::new(format!("{at}.{key}"), message));
        };
        let path = base_dir.join(&self.path);
        if self.path.as_os_str().is_empty() {
            fault("path", "is empty; expected a file".to_owned());
        } else if path.is_dir() {
            fault("path", format!("{} is a folder; expected a file", path.display()));
        } else if !path.exists() {
            fault("path", format!("there is no file {}", path.display()));
        }
        if !(self.weight.is_finite() && self.weight > 0.0) {
            fault("weight", format!("must be a finite number above 0, is {}", self.weight));
        }
        if self.limit == Some(0) {
            fault("limit", "must be at least 1, is 0".to_owned());
        }
        if self.domain.as_deref().is_some_and(|domain| domain.trim().is_empty()) {
            fault("domain", "is empty; leave it out for the file's name".to_owned());
        }
        match format::field_names(&self.format) {
            None => {
                let mut known = vec![format::AUTO];
                known.extend(format::format_names());
                fault("format", suggest::unknown("format", &self.format, &known));
            }
            Some(known) => {
                for (field, name) in &self.fields {
                    if !known.contains(&field.as_str()) {
                        let kind = format!("field of format {}", self.format);
                        fault(&format!("fields.{field}"), suggest::unknown(&kind, field, &known));
                    } else if name.is_empty() {
                        fault(&format!("fields.{field}"), "names no field of the file".to_owned());
                    }
                }
            }
        }
        if self.system.is_some() && format::is_chat(&self.format) == Some(false) {
            fault(
                "system",
                format!("format {} has no conversations to give a system prompt", self.format),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let parsed: DataConfig =
            serde_json::from_str(r#"{"train": [{"path": "x.jsonl"}]}"#).unwrap();
        let expected =
            DataConfig { train: vec![SourceConfig::new("x.jsonl")], ..DataConfig::default() };
        assert_eq!(parsed, expected);
        assert_eq!(parsed.weights(), [1.0]);
        assert_eq!(parsed.train[0].domain_name(), "x");
    }

    #[test]
    fn the_resolved_section_reads_back_as_itself() {
        let mut config =
            DataConfig { train: vec![SourceConfig::new("x.jsonl")], ..DataConfig::default() };
        config.train[0].fields.insert("output".into(), "answer".into());
        config.overlong = Overlong::Drop;
        let written = serde_json::to_string(&config).unwrap();
        assert!(written.contains(r#""overlong":"drop""#));
        assert_eq!(serde_json::from_str::<DataConfig>(&written).unwrap(), config);
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = serde_json::from_str::<DataConfig>(r#"{"train": [], "max_len": 3}"#);
        let message = error.unwrap_err().to_string();
        assert!(message.contains("unknown field `max_len`"), "{message}");
        let error = serde_json::from_str::<SourceConfig>(r#"{"path": "x", "wieght": 3}"#);
        assert!(error.unwrap_err().to_string().contains("unknown field `wieght`"));
    }
}

//! The `data:` section of a recipe.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::catalogue::{self, NamedSource};
use crate::error::Result;
use crate::format;
use crate::input;
use crate::overlap::SHORTEST_OVERLAP;
use crate::suggest;
use crate::template::ChatTemplate;

/// What to train and validate on, and how records become tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The sources to train on.
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
    /// Arguments of the chat template beside those of the conversation, as the keywords of
    /// `apply_chat_template` in `transformers`.
    #[serde(default)]
    pub template_arguments: Map<String, Value>,
    /// Short for the template argument that switches reasoning, see [`THINKING`]; none leaves it to
    /// the template.
    #[serde(default)]
    pub thinking: Option<bool>,
    /// Tokens that are added to the model's vocabulary.
    #[serde(default)]
    pub add_tokens: Vec<AddToken>,
    /// Which answers of a conversation are trained.
    #[serde(default, skip_serializing_if = "Turns::is_each")]
    pub turns: Turns,
    /// What special tokens are that a record's own texts write out.
    #[serde(default, skip_serializing_if = "SpecialTokens::are_read")]
    pub special_tokens: SpecialTokens,
    /// Whether prompts are trained too; otherwise only answers are.
    #[serde(default)]
    pub train_on_prompt: bool,
    /// What happens to records longer than `max_seq_len`.
    #[serde(default)]
    pub overlong: Overlong,
    /// Whether records are drawn in random order; otherwise in file order.
    #[serde(default = "default_true")]
    pub shuffle: bool,
    /// How often each source is drawn; none means as often as its weights say.
    #[serde(default)]
    pub mixing: Option<Mixing>,
    /// Which repeated records are left out.
    #[serde(default)]
    pub dedup: Dedup,
    /// The estimated Jaccard similarity from which records count as near duplicates, in (0, 1].
    #[serde(default = "default_dedup_threshold")]
    pub dedup_threshold: f64,
    /// Files of benchmark questions that training records are compared with.
    #[serde(default)]
    pub overlap_check: Vec<PathBuf>,
    /// Words of a run that a training record may not share with a question.
    #[serde(default = "default_overlap_words")]
    pub overlap_words: usize,
    /// Whether token ids are kept on disk rather than in memory; none means if the files are large.
    #[serde(default)]
    pub streaming: Option<bool>,
}

/// A token that is added to the model's vocabulary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct AddToken {
    /// Its text.
    pub text: String,
    /// Whether it is a mark, which decoded texts leave out, and no text.
    pub special: bool,
}

impl JsonSchema for AddToken {
    fn schema_name() -> Cow<'static, str> {
        "AddToken".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [
            {"type": "string"},
            {
                "type": "object",
                "properties": {"text": {"type": "string"}, "special": {"type": "boolean"}},
                "required": ["text"],
                "additionalProperties": false,
            },
        ]})
    }
}

impl TryFrom<Value> for AddToken {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        let fault = || format!("`{value}`: expected a text, or {{text: ..., special: true}}");
        if let Value::String(text) = &value {
            return Ok(Self { text: text.clone(), special: false });
        }
        let fields = value.as_object().ok_or_else(fault)?;
        let known = |key: &String| key == "text" || key == "special";
        let special = fields.get("special").unwrap_or(&Value::Bool(false)).as_bool();
        match (fields.get("text"), special) {
            (Some(Value::String(text)), Some(special)) if fields.keys().all(known) => {
                Ok(Self { text: text.clone(), special })
            }
            _ => Err(fault()),
        }
    }
}

impl From<AddToken> for Value {
    fn from(token: AddToken) -> Self {
        match token.special {
            true => serde_json::json!({"text": token.text, "special": true}),
            false => Value::String(token.text),
        }
    }
}

/// How often each source is drawn. `n_i` is its number of examples, `w_i` its weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mixing {
    /// Source `i` gets the share `p_i ∝ (w_i n_i)^(1/T)` of the draws: 1 changes nothing, larger
    /// values bring the shares closer together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// The share of each source in the order of `train`, up to a common factor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<Vec<f64>>,
}

/// Which repeated records are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dedup {
    /// None.
    #[default]
    None,
    /// Those with the text of an earlier one, but for case and white space.
    Exact,
    /// Those too that share most runs of five words with an earlier one.
    Near,
}

/// One source of data: a file, a folder of files, or a named source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// The file or folder, relative to the recipe's folder, or the id of a data set of the hub; may be
    /// left out for a named source.
    #[serde(default)]
    pub path: PathBuf,
    /// A named source of the catalogue.
    #[serde(default)]
    pub source: Option<String>,
    /// The split of a data set of the hub; none means `train`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// The configuration of a data set of the hub, where it has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `auto` or a format's name, see [`format_names`](crate::format_names).
    #[serde(default = "default_format")]
    pub format: String,
    /// The name under which losses and routing are reported; none means the file's name without
    /// its ending.
    #[serde(default)]
    pub domain: Option<String>,
    /// The evaluation set that its records are of, where it stands under `data.valid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// How often each record is expected to appear in an epoch.
    #[serde(default = "default_weight")]
    pub weight: f64,
    /// Read only the first so many records.
    #[serde(default)]
    pub limit: Option<usize>,
    /// From the format's field names to those of the file.
    #[serde(default, alias = "columns")]
    pub fields: BTreeMap<String, String>,
    /// The system prompt of conversations that bring none.
    #[serde(default)]
    pub system: Option<String>,
    /// The files of a named source, once they are found; no key of a recipe.
    #[serde(skip)]
    pub located: Vec<PathBuf>,
    /// Whether of a folder with splits those kept for validation are meant; no key of a recipe.
    #[serde(skip)]
    pub held_out: bool,
}

/// Which answers of a conversation are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Turns {
    /// Each of them, behind the prompt it is asked with; in one sequence where the template writes
    /// earlier turns the same once others follow, in a sequence of its own where not.
    #[default]
    Each,
    /// The last alone.
    Last,
}

impl Turns {
    fn is_each(&self) -> bool {
        *self == Self::Each
    }
}

/// What special tokens are that a record's own texts write out, as an end of text in an answer about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SpecialTokens {
    /// Those tokens.
    #[default]
    Read,
    /// Text like any other.
    Text,
}

impl SpecialTokens {
    fn are_read(&self) -> bool {
        *self == Self::Read
    }
}

/// What happens to records longer than `max_seq_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
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

/// The template arguments that switch reasoning on and off, in models that can do both: the first in
/// most of them, the second in Granite's and a few others.
pub const THINKING: [&str; 2] = ["enable_thinking", "thinking"];

/// What is wrong with the name of a template argument, if anything is: names that are no jinja
/// names, and what every conversation brings itself.
pub fn template_argument_fault(name: &str) -> Option<String> {
    let of_conversation = [
        "messages",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "tools",
        "documents",
        "continue_final_message",
    ];
    let letters = name.chars().all(|c| c.is_alphanumeric() || c == '_');
    if name.is_empty() || !letters || name.starts_with(|c: char| c.is_numeric()) {
        Some("is no name; expected letters, digits and `_`, such as `enable_thinking`".to_owned())
    } else if of_conversation.contains(&name) {
        Some("comes from the conversation and cannot be set".to_owned())
    } else {
        None
    }
}

fn default_valid_fraction() -> f64 {
    0.05
}

fn default_max_seq_len() -> usize {
    1024
}

fn default_dedup_threshold() -> f64 {
    0.8
}

fn default_overlap_words() -> usize {
    13
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
            template_arguments: Map::new(),
            thinking: None,
            add_tokens: Vec::new(),
            turns: Turns::default(),
            special_tokens: SpecialTokens::default(),
            train_on_prompt: false,
            overlong: Overlong::default(),
            shuffle: default_true(),
            mixing: None,
            dedup: Dedup::default(),
            dedup_threshold: default_dedup_threshold(),
            overlap_check: Vec::new(),
            overlap_words: default_overlap_words(),
            streaming: None,
        }
    }
}

impl SourceConfig {
    /// A file with every option at its default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            source: None,
            split: None,
            name: None,
            format: default_format(),
            domain: None,
            set: None,
            weight: default_weight(),
            limit: None,
            fields: BTreeMap::new(),
            system: None,
            located: Vec::new(),
            held_out: false,
        }
    }

    /// A named source with every option at its default.
    pub fn of(name: impl Into<String>) -> Self {
        Self { source: Some(name.into()), ..Self::new("") }
    }

    /// The named source, where it is a known one.
    pub fn named(&self) -> Option<&'static NamedSource> {
        self.source.as_deref().and_then(catalogue::find)
    }

    /// What the source is called in reports: its path, or its name.
    pub fn label(&self) -> PathBuf {
        match &self.source {
            Some(name) if self.path.as_os_str().is_empty() => PathBuf::from(name),
            _ => self.path.clone(),
        }
    }

    /// The domain of the records: `domain`, or the named source's, or the file's name without its
    /// ending.
    pub fn domain_name(&self) -> String {
        if let Some(domain) = &self.domain {
            return domain.clone();
        }
        if let Some(named) = self.named() {
            return named.domain.to_owned();
        }
        match input::stem(&self.path) {
            stem if stem.is_empty() => "data".to_owned(),
            stem => stem,
        }
    }
}

impl DataConfig {
    /// The weight of every training source, in order. What [`Sampler::new`](crate::Sampler::new)
    /// takes are [`DataReport::weights`](crate::DataReport::weights), in which `mixing` is counted.
    pub fn weights(&self) -> Vec<f64> {
        self.train.iter().map(|source| source.weight).collect()
    }

    /// The weights with `mixing` counted, for training sources of so many examples. An epoch keeps
    /// the number of draws that the weights alone give it.
    pub fn mixed_weights(&self, examples: &[usize]) -> Vec<f64> {
        let weights = self.weights();
        let Some(mixing) = &self.mixing else { return weights };
        let mass: Vec<f64> = weights.iter().zip(examples).map(|(w, &n)| w * n as f64).collect();
        let total: f64 = mass.iter().sum();
        let wanted: Vec<f64> = match (mixing.temperature, &mixing.shares) {
            (Some(temperature), _) => mass.iter().map(|m| m.powf(1.0 / temperature)).collect(),
            (None, Some(shares)) => {
                // A source of which nothing is left cannot have a share.
                shares.iter().zip(&mass).map(|(s, &m)| if m > 0.0 { *s } else { 0.0 }).collect()
            }
            (None, None) => return weights,
        };
        let sum: f64 = wanted.iter().sum();
        let weight = |((wanted, &n), &weight): ((&f64, &usize), &f64)| {
            if n == 0 { weight } else { wanted / sum * total / n as f64 }
        };
        wanted.iter().zip(examples).zip(&weights).map(weight).collect()
    }

    /// The template that `template` names: a built-in one, or a jinja file relative to `base_dir`.
    /// `None` where the model's own counts.
    ///
    /// # Errors
    /// When the name is neither, or the file is not a valid template.
    pub fn resolve_template(&self, base_dir: &Path) -> Result<Option<ChatTemplate>> {
        self.template.as_deref().map(|name| ChatTemplate::resolve(name, base_dir)).transpose()
    }

    /// `template_arguments` with `thinking` among them, under the name that `template` has for it.
    pub fn all_template_arguments(&self, template: &ChatTemplate) -> Map<String, Value> {
        let mut arguments = self.template_arguments.clone();
        if let Some(thinking) = self.thinking {
            arguments.insert(template.thinking().to_owned(), Value::from(thinking));
        }
        arguments
    }

    fn check_template(&self, base_dir: &Path, faults: &mut Vec<Fault>) {
        if let Err(error) = self.resolve_template(base_dir) {
            faults.push(Fault::new("data.template", error.to_string()));
        }
        let given = THINKING.into_iter().find(|name| self.template_arguments.contains_key(*name));
        if let Some(name) = given.filter(|_| self.thinking.is_some()) {
            let message = format!("is given in `template_arguments` too, as `{name}`");
            faults.push(Fault::new("data.thinking", message));
        }
        for name in self.template_arguments.keys() {
            if let Some(message) = template_argument_fault(name) {
                faults.push(Fault::new(format!("data.template_arguments.{name}"), message));
            }
        }
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
                let set = source.set.as_deref();
                if let Some(set) = set.filter(|set| section == "train" || set.trim().is_empty()) {
                    let message = match section {
                        "train" => "sets are for what is evaluated; expected under `valid` alone",
                        _ => "is blank; expected the name of an evaluation set",
                    };
                    let field = format!("data.{section}[{index}].set");
                    faults.push(Fault::new(field, format!("{set:?}: {message}")));
                }
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
        self.check_mixing(&mut faults);
        for (index, token) in self.add_tokens.iter().enumerate() {
            let at = format!("data.add_tokens[{index}]");
            if token.text.trim().is_empty() {
                let message = format!("{:?} is blank; expected a text", token.text);
                faults.push(Fault::new(at, message));
            } else if self.add_tokens[..index].iter().any(|other| other.text == token.text) {
                faults.push(Fault::new(at, format!("{:?} is listed twice", token.text)));
            }
        }
        if !(self.dedup_threshold > 0.0 && self.dedup_threshold <= 1.0) {
            faults.push(Fault::new(
                "data.dedup_threshold",
                format!("must be above 0 and at most 1, is {}", self.dedup_threshold),
            ));
        }
        if self.overlap_words < SHORTEST_OVERLAP {
            faults.push(Fault::new(
                "data.overlap_words",
                format!("must be at least {SHORTEST_OVERLAP}, is {}", self.overlap_words),
            ));
        }
        for (index, file) in self.overlap_check.iter().enumerate() {
            let path = base_dir.join(file);
            if !path.is_file() {
                let message = format!("there is no file {}", path.display());
                faults.push(Fault::new(format!("data.overlap_check[{index}]"), message));
            }
        }
        self.check_template(base_dir, &mut faults);
        faults
    }

    fn check_mixing(&self, faults: &mut Vec<Fault>) {
        let mut fault = |key: &str, message: String| {
            faults.push(Fault::new(format!("data.mixing{key}"), message));
        };
        let Some(mixing) = &self.mixing else { return };
        match (mixing.temperature, &mixing.shares) {
            (Some(_), Some(_)) => {
                fault("", "has both `temperature` and `shares`; choose one".to_owned());
            }
            (None, None) => fault("", "needs `temperature` or `shares`".to_owned()),
            (Some(temperature), None) if !(temperature.is_finite() && temperature > 0.0) => {
                fault(".temperature", format!("must be a finite number above 0, is {temperature}"));
            }
            (None, Some(shares)) => {
                if shares.len() != self.train.len() {
                    let (given, sources) = (shares.len(), self.train.len());
                    let message = format!(
                        "expected one share for each of the {sources} source(s), found {given}"
                    );
                    fault(".shares", message);
                }
                if let Some(share) = shares.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
                    fault(".shares", format!("must be finite numbers above 0, one is {share}"));
                }
            }
            _ => {}
        }
    }
}

impl SourceConfig {
    fn check(&self, at: &str, base_dir: &Path, faults: &mut Vec<Fault>) {
        let mut fault = |key: &str, message: String| {
            faults.push(Fault::new(format!("{at}.{key}"), message));
        };
        let path = base_dir.join(&self.path);
        let of_hub = self.of_hub(base_dir).is_some();
        for (key, value) in [("split", &self.split), ("name", &self.name)] {
            if value.is_some() && !of_hub {
                let message = "is for data sets of the hub, whose `path` is as owner/name";
                fault(key, message.to_owned());
            }
        }
        if of_hub {
            if self.source.is_some() {
                let message = "is given beside a data set of the hub; leave one of them out";
                fault("source", message.to_owned());
            }
        } else if self.path.as_os_str().is_empty() {
            if self.source.is_none() {
                fault("path", "is missing; expected a file, a folder or a `source`".to_owned());
            }
        } else if path.is_dir() {
            if let Err(error) = self.files(base_dir) {
                fault("path", error.to_string());
            }
        } else if !path.exists() {
            fault("path", format!("there is no file {}", path.display()));
        } else if !path.is_file() {
            let what = "is a pipe, a socket or a device; expected a file or a folder";
            fault("path", format!("{} {what}", path.display()));
        }
        if let Some(name) = self.source.as_deref().filter(|_| self.named().is_none()) {
            fault("source", suggest::unknown("data source", name, &catalogue::names()));
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
    fn template_arguments_are_checked() {
        let json = r#"{"train": [], "thinking": false, "template_arguments": {"date": "x", "a b": 1,
            "tools": [], "enable_thinking": true}}"#;
        let config: DataConfig = serde_json::from_str(json).unwrap();
        let of = |source: &str| {
            let template = ChatTemplate::from_source("t", source).unwrap();
            let arguments = config.all_template_arguments(&template);
            [
                arguments["enable_thinking"] == false,
                arguments.get("thinking") == Some(&false.into()),
            ]
        };
        assert_eq!(of("{% if enable_thinking %}{% endif %}"), [true, false]);
        assert_eq!(of("{% if thinking %}{% endif %}"), [false, true]);
        assert_eq!(of("{{ messages }}"), [true, false]);
        let faults = config.validate(Path::new(""));
        let paths: Vec<&str> = faults.iter().map(|fault| fault.path.as_str()).collect();
        let at = "data.template_arguments.";
        assert_eq!(
            paths,
            ["data.train", "data.thinking", &format!("{at}a b"), &format!("{at}tools")]
        );
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
    fn mixing_changes_shares_and_keeps_the_epoch() {
        let mut config = DataConfig {
            train: vec![SourceConfig::new("a"), SourceConfig::new("b"), SourceConfig::new("c")],
            ..DataConfig::default()
        };
        let counts = [900, 90, 10];
        let shares = |config: &DataConfig| -> Vec<f64> {
            let weights = config.mixed_weights(&counts);
            let draws: Vec<f64> = weights.iter().zip(counts).map(|(w, n)| w * n as f64).collect();
            let total: f64 = draws.iter().sum();
            assert!((total - 1000.0).abs() < 1e-9, "{total}");
            draws.iter().map(|draw| draw / total).collect()
        };
        let mix = |temperature, shares| Some(Mixing { temperature, shares });
        let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
        assert!(near(&shares(&config), &[0.9, 0.09, 0.01]));
        config.mixing = mix(Some(1.0), None);
        assert!(near(&shares(&config), &[0.9, 0.09, 0.01]));
        config.mixing = mix(Some(2.0), None);
        let roots = [30.0, 90.0_f64.sqrt(), 10.0_f64.sqrt()];
        let sum: f64 = roots.iter().sum();
        assert!(near(&shares(&config), &roots.map(|root| root / sum)));
        config.mixing = mix(Some(1e9), None);
        assert!(shares(&config).iter().all(|share| (share - 1.0 / 3.0).abs() < 1e-6));
        config.mixing = mix(None, Some(vec![2.0, 1.0, 1.0]));
        assert!(near(&shares(&config), &[0.5, 0.25, 0.25]));
        assert_eq!(config.mixed_weights(&[10, 0, 10])[1], 1.0, "nothing to draw from");
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

//! The study file.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// What a study file says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The study's name; the file's without its ending if it is left out.
    #[serde(default)]
    pub name: String,
    /// Heading of the report.
    #[serde(default)]
    pub title: Option<String>,
    /// What the study asks, in a paragraph for the report.
    #[serde(default)]
    pub question: Option<String>,
    /// A whole recipe, which the grid changes.
    pub base: Value,
    /// Axes by name, each a list of values or of named variants.
    pub grid: Map<String, Value>,
    /// Values of `train.seed`: a list, or how many from 1.
    pub seeds: Seeds,
    /// The axis of values among which every variant's best is chosen by the validation split.
    #[serde(default)]
    pub tune: Option<String>,
    /// The axis whose labels are compared; `method` if there is such an axis, or else the first.
    #[serde(default)]
    pub compare: Option<String>,
    /// The label that the others are tested against.
    #[serde(default)]
    pub reference: Option<String>,
    /// By what the best is chosen; `valid_loss` if it is left out.
    #[serde(default = "valid_loss")]
    pub select: String,
    /// What must hold between cells.
    #[serde(default)]
    pub constraints: Vec<Constraint>,
    /// How data files are parted into train, valid and test.
    #[serde(default)]
    pub split: Option<Split>,
    /// Tasks scored on the test split, as `hydralora eval --tasks` takes them.
    #[serde(default)]
    pub tasks: Vec<String>,
    /// How tasks are scored.
    #[serde(default)]
    pub eval: EvalOptions,
    /// What the report shows: keys of a cell's results, the first before all.
    #[serde(default)]
    pub metrics: Vec<String>,
    /// Numbers of a paper, printed beside ours.
    #[serde(default)]
    pub paper: Option<Paper>,
    /// Anything; another value makes cells of their own out of the same recipes.
    #[serde(default)]
    pub revision: Option<Value>,
    /// Whose weights are kept.
    #[serde(default)]
    pub keep: Keep,
    /// Blocks that `--setting NAME` puts over the rest of the file.
    #[serde(default)]
    pub settings: Map<String, Value>,
}

fn valid_loss() -> String {
    "valid_loss".to_owned()
}

/// The seeds of a study.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Seeds {
    /// 1, 2, …, this many.
    Count(u64),
    /// These.
    List(Vec<u64>),
}

impl Seeds {
    /// The seeds one by one.
    pub fn list(&self) -> Vec<u64> {
        match self {
            Seeds::Count(count) => (1..=*count).collect(),
            Seeds::List(seeds) => seeds.clone(),
        }
    }
}

/// What must hold between the variants of the compared axis.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// As many trainable parameters as the reference, by solving for a whole number.
    EqualParameters(EqualParameters),
    /// The scale of the update, alpha over rank, as the reference's.
    EqualScale(EqualScale),
}

/// Options of `equal_parameters`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EqualParameters {
    /// The label whose count is wanted.
    pub reference: String,
    /// The recipe key to solve for.
    pub solve: String,
    /// Largest relative difference.
    #[serde(default = "two_percent")]
    pub tolerance: f64,
    /// The labels to solve for; all others if it is left out.
    #[serde(default, rename = "for")]
    pub labels: Option<Vec<String>>,
}

fn two_percent() -> f64 {
    0.02
}

/// Options of `equal_scale`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EqualScale {
    /// The label whose scale is wanted.
    pub reference: String,
    /// The recipe key to set so that the scale is met; without it, it is checked.
    #[serde(default)]
    pub solve: Option<String>,
    /// The labels that are meant; all that have a scale if it is left out.
    #[serde(default, rename = "for")]
    pub labels: Option<Vec<String>>,
}

/// How each training file is parted. A line's part follows from its content and the seed, so equal
/// lines stay together and new lines move no others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// Share of the lines on which the best values are chosen.
    pub valid: f64,
    /// Share of the lines on which the choice is scored.
    pub test: f64,
    /// Decides which lines.
    #[serde(default)]
    pub seed: u64,
    /// Whose files the cells are scored on.
    #[serde(default)]
    pub test_on: TestOn,
}

/// On whose test parts a cell is scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TestOn {
    /// Of the files it was trained on.
    #[default]
    Trained,
    /// Of all files of the study's base recipe.
    Base,
}

/// Options of `hydralora eval` in a study.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalOptions {
    /// Folder of the benchmarks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Only the first records of each task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// Examples before each question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shots: Option<u64>,
    /// Seed of drawn examples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Most tokens to write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<u64>,
    /// Programs to draw per problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeats: Option<u64>,
    /// Prompts through the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply_chat_template: Option<bool>,
    /// Let HumanEval run programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_code_execution: Option<bool>,
    /// The domain that all records count as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
}

impl EvalOptions {
    /// These options with those that `over` gives in their place.
    pub fn with(&self, over: &EvalOptions) -> EvalOptions {
        EvalOptions {
            data: over.data.clone().or_else(|| self.data.clone()),
            limit: over.limit.or(self.limit),
            shots: over.shots.or(self.shots),
            seed: over.seed.or(self.seed),
            max_new_tokens: over.max_new_tokens.or(self.max_new_tokens),
            repeats: over.repeats.or(self.repeats),
            apply_chat_template: over.apply_chat_template.or(self.apply_chat_template),
            allow_code_execution: over.allow_code_execution.or(self.allow_code_execution),
            domain: over.domain.clone().or_else(|| self.domain.clone()),
        }
    }
}

/// A paper's numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paper {
    /// Which table of which paper, on which model.
    pub source: String,
    /// Label of the compared axis → column → number.
    pub rows: BTreeMap<String, Map<String, Value>>,
    /// What to know about them.
    #[serde(default)]
    pub note: Option<String>,
}

/// Whose weights a study keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Every cell's adapter.
    #[default]
    All,
    /// Those of the cells that were chosen and scored.
    Chosen,
    /// None, once all is scored.
    None,
}

/// One value of an axis.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Its name in tables and pictures.
    pub label: String,
    /// Recipe keys and their values.
    #[serde(default)]
    pub set: Map<String, Value>,
    /// Axes that have other values for this variant.
    #[serde(default)]
    pub grid: Map<String, Value>,
    /// Further test tasks.
    #[serde(default)]
    pub tasks: Vec<String>,
    /// Other options of the scoring.
    #[serde(default)]
    pub eval: EvalOptions,
    /// The base model as it is: scored and not trained.
    #[serde(default)]
    pub untrained: bool,
    /// An adapter made of other cells' adapters: scored and not trained.
    #[serde(default)]
    pub combine: Option<Combine>,
}

/// An adapter made of those of other cells.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Combine {
    /// Axis → labels: the cells whose adapters are put together, each at its best value and with this
    /// cell's seed.
    pub of: BTreeMap<String, Vec<String>>,
    /// The command that does it and its options: `[compose, --how, average]` or
    /// `[import, --from, lora]`.
    pub with: Vec<String>,
}

impl Spec {
    /// Reads a study file and lays the block `setting` of its `settings` over the rest.
    ///
    /// # Errors
    /// If the file cannot be read or does not say what a study file must.
    pub fn read(path: &Path, setting: Option<&str>) -> Result<(Self, String)> {
        let text = crate::disk::read_text(path)?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let spec = Self::parse(&text, &path.display().to_string(), &stem, setting)?;
        Ok((spec, text))
    }

    /// Takes the text of a study file; `shown` is what errors call it, `stem` the name of a study that
    /// gives itself none.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(text: &str, shown: &str, stem: &str, setting: Option<&str>) -> Result<Self> {
        let fault = |message: String| Error::bad(format!("{shown}: {message}"));
        let mut value: Value = serde_saphyr::from_str(text)
            .map_err(|error| fault(format!("not valid YAML: {error}")))?;
        if let Some(name) = setting {
            let settings = value["settings"].clone();
            let block = settings.get(name).ok_or_else(|| {
                let known: Vec<&str> = settings
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(key, _)| key.as_str())
                    .collect();
                let known =
                    if known.is_empty() { "there are none".to_owned() } else { known.join(", ") };
                fault(format!("settings: there is no `{name}`; expected one of: {known}"))
            })?;
            overlay(&mut value, block);
        }
        let mut spec: Spec = serde_path_to_error::deserialize(&value).map_err(|error| {
            let field = error.path().to_string();
            let at = line_of(text, &field).map_or(String::new(), |line| format!(":{line}"));
            let message = with_hint(&error.inner().to_string());
            match field.as_str() {
                "." => Error::bad(format!("{shown}: {message}")),
                _ => Error::bad(format!("{shown}{at}: {field}: {message}")),
            }
        })?;
        if spec.name.is_empty() {
            spec.name = stem.to_owned();
        }
        if let Some(setting) = setting {
            spec.name = format!("{}-{setting}", spec.name);
        }
        spec.check().map_err(fault)?;
        Ok(spec)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
        if !self.name.chars().all(plain) {
            return Err(format!("name: is `{}`; expected letters, digits, - and _", self.name));
        }
        if self.grid.is_empty() {
            return Err("grid: is empty; expected at least one axis, as `method: [...]`".to_owned());
        }
        let seeds = self.seeds.list();
        if seeds.is_empty() {
            return Err("seeds: is empty; expected at least one".to_owned());
        }
        if let Some(twice) = seeds.iter().enumerate().find(|(at, s)| seeds[..*at].contains(s)) {
            return Err(format!("seeds: {} stands there twice", twice.1));
        }
        if let Some(split) = &self.split {
            let part = |name: &str, share: f64| {
                let right = share > 0.0 && share < 1.0;
                if right {
                    Ok(())
                } else {
                    Err(format!("split.{name}: is {share}; expected a share between 0 and 1"))
                }
            };
            part("valid", split.valid)?;
            part("test", split.test)?;
            if split.valid + split.test >= 1.0 {
                return Err("split: valid and test leave nothing to train on".to_owned());
            }
        }
        if self.select.split('/').next() != Some("valid_loss") {
            let found = &self.select;
            return Err(format!(
                "select: is `{found}`; expected valid_loss or valid_loss/DOMAIN, which the test split has no part in"
            ));
        }
        for constraint in &self.constraints {
            if let Constraint::EqualParameters(equal) = constraint
                && !(equal.tolerance >= 0.0 && equal.tolerance < 1.0)
            {
                let found = equal.tolerance;
                return Err(format!("constraints: tolerance is {found}; expected 0 to 1"));
            }
        }
        Ok(())
    }
}

/// Lays `over` over `under`: mappings key by key, everything else whole.
fn overlay(under: &mut Value, over: &Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                overlay(under.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (under, over) => *under = over.clone(),
    }
}

/// Adds the nearest known name to serde's `unknown field `x`, expected one of ...`.
fn with_hint(message: &str) -> String {
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let Some((unknown, known)) = names.split_first() else { return message.to_owned() };
    if !message.starts_with("unknown field") {
        return message.to_owned();
    }
    let distance = |name: &str| strsim::damerau_levenshtein(unknown, name);
    match known.iter().min_by_key(|name| distance(name)) {
        Some(name) if distance(name) <= 2 => {
            format!("unknown key `{unknown}`; did you mean `{name}`?")
        }
        _ => message.replacen("field", "key", 1),
    }
}

/// The line of `text` on which the last named key of `field` stands, found by following its keys.
fn line_of(text: &str, field: &str) -> Option<usize> {
    let mut found = None;
    let mut from = 0;
    for part in field.split(['.', '[']).filter(|part| !part.ends_with(']')) {
        let line = text.lines().enumerate().skip(from).find(|(_, line)| {
            let line = line.trim_start_matches([' ', '-', '{']);
            line.strip_prefix(part).is_some_and(|rest| rest.trim_start().starts_with(':'))
        });
        let Some((at, _)) = line else { break };
        found = Some(at + 1);
        from = at;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
base: {model: {path: m}, method: {name: lora, rank: 4}}
grid:
  train.learning_rate: [1.0e-4, 1.0e-3]
seeds: 2
settings:
  paper:
    base: {model: {path: llama2}}
    seeds: [41]
";

    fn parse(text: &str, setting: Option<&str>) -> Result<Spec> {
        Spec::parse(text, "s.yaml", "s", setting)
    }

    #[test]
    fn a_setting_lies_over_the_rest() {
        let plain = parse(TEXT, None).unwrap();
        assert_eq!((plain.name.as_str(), plain.seeds.list()), ("s", vec![1, 2]));
        let paper = parse(TEXT, Some("paper")).unwrap();
        assert_eq!((paper.name.as_str(), paper.seeds.list()), ("s-paper", vec![41]));
        assert_eq!(paper.base["model"]["path"], "llama2");
        assert_eq!(paper.base["method"]["rank"], 4);
        let error = parse(TEXT, Some("papper")).unwrap_err().to_string();
        assert!(error.contains("there is no `papper`; expected one of: paper"), "{error}");
    }

    #[test]
    fn faults_name_file_line_and_key() {
        let fails = |from: &str, to: &str, expected: &str| {
            let error = parse(&TEXT.replacen(from, to, 1), None).unwrap_err();
            assert!(error.is_bad_input());
            assert!(error.to_string().contains(expected), "{error}");
        };
        fails("seeds: 2", "seds: 2", "unknown key `seds`; did you mean `seeds`?");
        fails("seeds: 2", "seeds: 0", "seeds: is empty");
        fails("seeds: 2", "seeds: [1, 1]", "seeds: 1 stands there twice");
        fails("seeds: 2", "seeds: 2\nsplit: {valid: 0.5, test: 0.5}", "nothing to train on");
        fails("  train.learning_rate: [1.0e-4, 1.0e-3]\n", "  {}\n", "grid: is empty");
        fails("seeds: 2", "seeds: 2\nselect: loss", "select: is `loss`; expected valid_loss");
        fails("seeds: 2", "seeds: 2\nkeep: everything", "s.yaml:5: keep: ");
        fails("grid:", "grid: [", "not valid YAML");
    }
}

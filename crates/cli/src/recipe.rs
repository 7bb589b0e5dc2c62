//! A recipe: what to train, on what, how, and where the result goes.
//!
//! Reading finds every fault there is before anything is opened: unknown keys with the nearest
//! known one, wrong types, values that make no sense; each with the line it stands on.

use crate::failure::bad_input;
use crate::keys;
use anyhow::Context;
use hydralora_data::DataConfig;
use hydralora_kernels::DType;
use hydralora_kernels::block::BlockFormat;
use hydralora_model::Held;
use hydralora_peft::new_tokens::with_trained_rows;
use hydralora_peft::{Fault, Method, MethodOptions, methods, nearest, read_section};
use hydralora_train::TrainConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// The `model:` section.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ModelSection {
    /// A folder, a .gguf file, a known name or a hub id.
    pub(crate) path: String,
    /// Type the weights are held in.
    pub(crate) dtype: ModelDtype,
}

/// Types the weights can be held in. Computation is in `f32` (`f64` for `f64`) in any case.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum ModelDtype {
    #[default]
    F32,
    /// For checks of numbers, not for speed.
    F64,
    Bf16,
    F16,
    /// 8-bit blocks of 32 with a scale.
    #[serde(rename = "q8_0")]
    #[value(name = "q8_0")]
    Q80,
    /// 4-bit blocks of 32 with a scale.
    #[serde(rename = "q4_0")]
    #[value(name = "q4_0")]
    Q40,
    /// 4-bit blocks of 32 with a scale and an offset.
    #[serde(rename = "q4_1")]
    #[value(name = "q4_1")]
    Q41,
    /// As the file has them.
    Stored,
}

impl ModelDtype {
    /// The type to compute in, and how to hold the weights.
    pub(crate) fn plan(self) -> (DType, Held) {
        match self {
            ModelDtype::F32 => (DType::F32, Held::Wide),
            ModelDtype::F64 => (DType::F64, Held::Wide),
            ModelDtype::Bf16 => (DType::F32, Held::Packed(BlockFormat::BF16)),
            ModelDtype::F16 => (DType::F32, Held::Packed(BlockFormat::F16)),
            ModelDtype::Q80 => (DType::F32, Held::Packed(BlockFormat::Q8_0)),
            ModelDtype::Q40 => (DType::F32, Held::Packed(BlockFormat::Q4_0)),
            ModelDtype::Q41 => (DType::F32, Held::Packed(BlockFormat::Q4_1)),
            ModelDtype::Stored => (DType::F32, Held::Stored),
        }
    }
}

/// A recipe, checked.
pub(crate) struct Recipe {
    pub(crate) model: ModelSection,
    pub(crate) data: DataConfig,
    pub(crate) method_name: &'static str,
    pub(crate) method: Box<dyn MethodOptions>,
    /// Whether the number of experts is to be found from the data.
    pub(crate) auto_experts: bool,
    pub(crate) train: TrainConfig,
    pub(crate) output: PathBuf,
    /// The folder that relative data paths start from.
    pub(crate) base: PathBuf,
}

pub(crate) const NUM_EXPERTS: &str = "num_experts";
const SECTIONS: &[&str] = &["model", "data", "method", "train", "output"];

impl Recipe {
    /// Reads a recipe file and applies `--set` changes.
    ///
    /// # Errors
    /// With every fault of the file.
    pub(crate) fn read(path: &Path, changes: &[String]) -> anyhow::Result<Self> {
        let shown = path.display();
        let text = fs::read_to_string(path)
            .map_err(|error| bad_input(format!("{shown}: cannot read the recipe: {error}")))?;
        let mut value: Value = serde_saphyr::from_str(&text)
            .map_err(|error| bad_input(format!("{shown}: not valid YAML: {error}")))?;
        for change in changes {
            apply(&mut value, change)?;
        }
        let base = path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        Self::from_value(&value, &base).map_err(|faults| {
            let lines: Vec<String> = faults
                .iter()
                .map(|fault| match line_of(&text, &fault.field) {
                    Some(line) => format!("  {shown}:{line}: {fault}"),
                    None => format!("  {shown}: {fault}"),
                })
                .collect();
            let count = match faults.len() {
                1 => "1 fault".to_owned(),
                n => format!("{n} faults"),
            };
            bad_input(format!("the recipe has {count}:\n{}", lines.join("\n")))
        })
    }

    /// Checks a recipe given as a value; data paths are relative to `base`.
    pub(crate) fn from_value(value: &Value, base: &Path) -> Result<Self, Vec<Fault>> {
        let Value::Object(sections) = value else {
            return Err(vec![Fault::new("recipe", "expected a mapping of sections")]);
        };
        let mut faults = Vec::new();
        for key in sections.keys().filter(|key| !SECTIONS.contains(&key.as_str())) {
            let hint = match nearest(key, SECTIONS.iter().copied()) {
                Some(nearest) => format!("did you mean `{nearest}`?"),
                None => format!("expected one of {}", SECTIONS.join(", ")),
            };
            faults.push(Fault::new(key.clone(), format!("unknown section; {hint}")));
        }
        let model: ModelSection = section(sections, "model", true, &mut faults).unwrap_or_default();
        if model.path.is_empty() && sections.contains_key("model") {
            faults.push(Fault::new(
                "model.path",
                "missing; expected a folder, a .gguf file or a name",
            ));
        }
        let data: Option<DataConfig> = section(sections, "data", true, &mut faults);
        if let Some(data) = &data {
            faults.extend(data.validate(base).into_iter().map(|f| Fault::new(f.path, f.message)));
        }
        let train: Option<TrainConfig> = section(sections, "train", false, &mut faults);
        if let Some(train) = &train {
            faults.extend(train.faults().into_iter().map(|(field, m)| Fault::new(field, m)));
        }
        let (method_section, auto_experts) = without_auto(sections.get("method"));
        let method = read_method(method_section.as_ref(), &mut faults);
        let output = match sections.get("output") {
            Some(Value::String(output)) if !output.is_empty() => PathBuf::from(output),
            None => PathBuf::from("runs/default"),
            Some(other) => {
                faults.push(Fault::new("output", format!("`{other}`; expected a folder")));
                PathBuf::new()
            }
        };
        match (data, method, train) {
            (Some(data), Some((method_name, method)), Some(train)) if faults.is_empty() => {
                let base = base.to_path_buf();
                Ok(Self { model, data, method_name, method, auto_experts, train, output, base })
            }
            _ => Err(faults),
        }
    }

    /// The recipe with every value spelt out.
    pub(crate) fn resolved(&self) -> Value {
        let mut method = Map::new();
        method.insert("name".to_owned(), json!(self.method_name));
        method.extend(self.method.to_recipe());
        json!({
            "model": self.model, "data": self.data, "method": method, "train": self.train,
            "output": self.output,
        })
    }

    /// Puts the number of experts that was found in place of `auto`.
    pub(crate) fn set_num_experts(&mut self, num_experts: usize) -> anyhow::Result<()> {
        let mut options = self.method.to_recipe();
        options.insert(NUM_EXPERTS.to_owned(), json!(num_experts));
        self.method = methods::find(self.method_name)?
            .read_recipe(&options)
            .map_err(|faults| hydralora_peft::Error::Options { faults })?;
        self.auto_experts = false;
        Ok(())
    }

    /// Has the method train the rows of the tokens `ids`, of an output layer that `tied` says is the
    /// embedding.
    pub(crate) fn train_rows(&mut self, ids: &[u32], tied: bool) -> anyhow::Result<()> {
        let options = self.method.to_recipe();
        let Some(options) = with_trained_rows(&options, ids, tied) else {
            let able =
                |method: &&&dyn Method| with_trained_rows(&method.defaults(), ids, tied).is_some();
            let able: Vec<&str> =
                methods::METHODS.iter().filter(able).map(|method| method.name()).collect();
            return Err(bad_input(format!(
                "data.add_tokens: `{}` trains no rows of the embedding, so new tokens would mean nothing;                  expected one of {}",
                self.method_name,
                able.join(", ")
            )));
        };
        self.method = methods::find(self.method_name)?
            .read_recipe(&options)
            .map_err(|faults| hydralora_peft::Error::Options { faults })
            .context("data.add_tokens")?;
        Ok(())
    }

    /// The same as YAML.
    pub(crate) fn to_yaml(&self) -> anyhow::Result<String> {
        Ok(serde_saphyr::to_string(&self.resolved())?)
    }
}

fn section<T: serde::de::DeserializeOwned + Default + Serialize>(
    sections: &Map<String, Value>,
    name: &str,
    required: bool,
    faults: &mut Vec<Fault>,
) -> Option<T> {
    let known: Map<String, Value> =
        keys::of::<T>().into_iter().map(|key| (key.to_owned(), Value::Null)).collect();
    let found = match sections.get(name) {
        Some(Value::Object(section)) => section.clone(),
        None | Some(Value::Null) if !required => Map::new(),
        None | Some(Value::Null) => {
            faults.push(Fault::new(name, "the section is missing"));
            return None;
        }
        Some(other) => {
            faults.push(Fault::new(name, format!("`{other}`; expected a mapping")));
            return None;
        }
    };
    match read_section(name, &found, &known) {
        Ok(value) => Some(value),
        Err(found) => {
            faults.extend(found);
            None
        }
    }
}

/// The method's section with `num_experts: auto` taken out, if the method has experts to count, and
/// whether it was there. Until the data have been looked at, the method's own default stands in.
fn without_auto(section: Option<&Value>) -> (Option<Value>, bool) {
    let mut section = section.cloned();
    let mut auto = false;
    if let Some(Value::Object(map)) = &mut section
        && map.get(NUM_EXPERTS) == Some(&json!("auto"))
        && let Some(Value::String(name)) = map.get("name")
        && methods::find(name).is_ok_and(|method| method.defaults().contains_key(NUM_EXPERTS))
    {
        map.remove(NUM_EXPERTS);
        auto = true;
    }
    (section, auto)
}

/// Reads a `method:` section, noting what is wrong with it.
pub(crate) fn read_method(
    value: Option<&Value>,
    faults: &mut Vec<Fault>,
) -> Option<(&'static str, Box<dyn MethodOptions>)> {
    let Some(Value::Object(section)) = value else {
        faults.push(Fault::new("method", "the section is missing"));
        return None;
    };
    let known: Vec<&str> = methods::METHODS.iter().map(|method| method.name()).collect();
    let name = match section.get("name") {
        Some(Value::String(name)) => name,
        _ => {
            let message = format!("missing; expected one of {}", known.join(", "));
            faults.push(Fault::new("method.name", message));
            return None;
        }
    };
    let Ok(method) = methods::find(name) else {
        let hint = match nearest(name, known.iter().copied()) {
            Some(nearest) => format!("did you mean `{nearest}`?"),
            None => format!("expected one of {}", known.join(", ")),
        };
        faults.push(Fault::new("method.name", format!("`{name}` is not known; {hint}")));
        return None;
    };
    let mut options = section.clone();
    options.remove("name");
    match method.read_recipe(&options) {
        Ok(options) => Some((method.name(), options)),
        Err(found) => {
            faults.extend(found);
            None
        }
    }
}

/// Applies `a.b=c`; the value is read as YAML.
fn apply(recipe: &mut Value, change: &str) -> anyhow::Result<()> {
    let fault = |message: &str| bad_input(format!("--set {change}: {message}"));
    let (path, value) = change_of(change).map_err(|message| fault(&message))?;
    set(recipe, path, value).map_err(|message| fault(&message))
}

/// The key and the value of `a.b=c`.
pub(crate) fn change_of(change: &str) -> Result<(&str, Value), String> {
    let (path, value) =
        change.split_once('=').ok_or_else(|| "expected KEY=VALUE, as train.seed=7".to_owned())?;
    let value = serde_saphyr::from_str(value).map_err(|error| error.to_string())?;
    Ok((path, value))
}

/// Puts `value` at the dotted key `path`, making the mappings on the way to it.
pub(crate) fn set(recipe: &mut Value, path: &str, value: Value) -> Result<(), String> {
    let mut place = recipe;
    for part in path.split('.') {
        place = match place {
            Value::Array(list) => {
                let len = list.len();
                part.parse::<usize>()
                    .ok()
                    .and_then(|index| list.get_mut(index))
                    .ok_or_else(|| format!("`{part}` is not an index below {len}"))?
            }
            other => {
                if !other.is_object() {
                    *other = json!({});
                }
                match other {
                    Value::Object(map) => map.entry(part).or_insert(Value::Null),
                    _ => unreachable!("made an object above"),
                }
            }
        };
    }
    *place = value;
    Ok(())
}

/// The line of a recipe on which `field` (as `data.train[1].weight`) stands, or the nearest key
/// above it that can be found. Follows keys by their indentation; a flow mapping counts as its line.
fn line_of(text: &str, field: &str) -> Option<usize> {
    let mut found = None;
    let (mut from, mut deeper_than) = (0, None);
    for part in field.split('.') {
        let (key, index) = match part.split_once('[') {
            Some((key, index)) => (key, index.trim_end_matches(']').parse::<usize>().ok()),
            None => (part, None),
        };
        let lines = || text.lines().enumerate().skip(from);
        let indent = |line: &str| line.len() - line.trim_start_matches([' ', '-']).len();
        let names_key = |line: &str| {
            let line = line.trim_start_matches([' ', '-', '{']);
            line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with(':'))
        };
        let Some((at, line)) = lines().find(|(_, line)| {
            names_key(line) && deeper_than.map_or(indent(line) == 0, |depth| indent(line) > depth)
        }) else {
            // The key may stand inside a flow mapping on the line found last.
            return found;
        };
        found = Some(at + 1);
        deeper_than = Some(indent(line));
        from = at;
        if let Some(index) = index {
            let item = text
                .lines()
                .enumerate()
                .skip(at + 1)
                .filter(|(_, line)| line.trim_start().starts_with("- "))
                .nth(index);
            if let Some((at, line)) = item {
                found = Some(at + 1);
                deeper_than = Some(line.len() - line.trim_start().len());
                from = at;
            }
        } else {
            from = at + usize::from(!line.contains('{'));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
model: {path: m}
data:
  train:
    - {path: a.jsonl}
    - path: b.jsonl
      weight: -1
  max_seq_len: 0
method: {name: lora, rnk: 3}
train:
  seed: x
";

    #[test]
    fn lines_are_found() {
        for (field, line) in [
            ("data.train[1].weight", 6),
            ("data.train[0].path", 4),
            ("data.max_seq_len", 7),
            ("method.rnk", 8),
            ("train.seed", 10),
            ("train.epochs", 9),
        ] {
            assert_eq!(line_of(TEXT, field), Some(line), "{field}");
        }
        assert_eq!(line_of(TEXT, "output"), None);
    }

    #[test]
    fn changes_reach_any_depth() {
        let mut value = json!({"train": {"seed": 1}, "data": {"train": [{"path": "a"}]}});
        apply(&mut value, "train.learning_rate=1e-4").unwrap();
        apply(&mut value, "data.train.0.weight=2").unwrap();
        apply(&mut value, "method.targets=[q_proj, v_proj]").unwrap();
        assert_eq!(value["train"]["learning_rate"], json!(1e-4));
        assert_eq!(value["data"]["train"][0]["weight"], json!(2));
        assert_eq!(value["method"]["targets"], json!(["q_proj", "v_proj"]));
        assert!(apply(&mut value, "train").is_err());
        assert!(apply(&mut value, "data.train.7.weight=2").is_err());
    }
}

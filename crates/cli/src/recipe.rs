//! A recipe: what to train, on what, how, and where the result goes.
//!
//! Reading finds every fault there is before anything is opened: unknown keys with the nearest
//! known one, wrong types, values that make no sense, layers that the model does not have; each with
//! the line it stands on. A fault of one option keeps no other from being checked.

mod keys;
pub(crate) mod names;
pub(crate) mod newer;
mod paths;
mod place;
mod sections;

use crate::failure::bad_input;
use anyhow::Context;
use hydralora_data::{ChatTemplate, DataConfig};
use hydralora_kernels::DType;
use hydralora_kernels::block::BlockFormat;
use hydralora_model::Held;
use hydralora_peft::new_tokens::with_trained_rows;
use hydralora_peft::{Fault, INIT_FROM, Method, MethodOptions, methods};
use hydralora_train::TrainConfig;
pub(crate) use paths::relative;
pub(crate) use place::{Origin, change_of, set};
use schemars::JsonSchema;
pub(crate) use sections::{faults_with, read_method};
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
    /// The adapter that training starts from.
    pub(crate) init_from: Option<PathBuf>,
    /// Where its values come from.
    pub(crate) origin: Origin,
    /// What is to be told about it.
    pub(crate) notes: Vec<String>,
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
        let mut origin = Origin::of_file(path.to_path_buf(), text);
        origin.apply(&mut value, changes)?;
        let base = path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        sections::read(&value, &base, origin.clone()).map_err(|faults| origin.error(&faults))
    }

    /// Checks a recipe given as a value; data paths are relative to `base`.
    pub(crate) fn from_value(value: &Value, base: &Path) -> Result<Self, Vec<Fault>> {
        sections::read(value, base, Origin::default())
    }

    /// The recipe with every value spelt out.
    pub(crate) fn resolved(&self) -> Value {
        let mut method = Map::new();
        method.insert("name".to_owned(), json!(self.method_name));
        method.extend(self.method.to_recipe());
        if let Some(folder) = &self.init_from {
            method.insert(INIT_FROM.to_owned(), json!(folder));
        }
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
                "data.add_tokens: `{}` trains no rows of the embedding, so new tokens would mean nothing; \
                 expected one of {}",
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

    /// The same with paths that are right in a file of the run's folder. That is there, as `folder`
    /// for now: whoever writes it may give it its name later.
    pub(crate) fn to_yaml_of_run(&self, folder: &Path) -> anyhow::Result<String> {
        let mut resolved = self.resolved();
        // A path of the recipe, as it is reached from the run's folder.
        let moved = |value: &mut Value, base: &Path| {
            let path = value.as_str().filter(|path| !path.is_empty()).map(Path::new);
            let Some(path) = path.filter(|path| path.is_relative()) else { return };
            let target = base.join(path);
            let absolute = || std::path::absolute(&target).ok().filter(|path| path.exists());
            if let Some(path) = paths::relative(&target, folder).or_else(absolute) {
                *value = json!(path);
            }
        };
        let data = &mut resolved["data"];
        for list in ["train", "valid"] {
            let sources = data[list].as_array_mut().into_iter().flatten();
            sources.for_each(|source| moved(&mut source["path"], &self.base));
        }
        let files = data["overlap_check"].as_array_mut().into_iter().flatten();
        files.for_each(|file| moved(file, &self.base));
        if data["template"].as_str().is_some_and(|name| ChatTemplate::builtin(name).is_err()) {
            moved(&mut data["template"], &self.base);
        }
        if let Some(folder) = resolved["method"].get_mut(INIT_FROM) {
            moved(folder, Path::new(""));
        }
        moved(&mut resolved["model"]["path"], Path::new(""));
        resolved["output"] = json!(std::path::absolute(&self.output)?);
        Ok(serde_saphyr::to_string(&resolved)?)
    }
}

//! (IA)³: learned factors on activations, `y = l ⊙ (W0 x)`, or `y = W0 (l ⊙ x)` in feed-forward
//! layers.
//!
//! Liu et al., arXiv 2205.05638. All factors start at one, so training starts from the base model.

use crate::described::Described;
use crate::error::{Fault, Result};
use crate::method::MethodOptions;
use crate::options::{refuse_unless, to_map};
use crate::targets::{Targets, module_names};
use crate::trainable::{Role, TensorMap, Trainable, export_by_name, load_by_name};
use crate::tuned::{Mergeable, Parameters, Persist, TrainHooks, Tuned};
use hydralora_kernels::{DType, Tensor};
use hydralora_model::adapter::{Adapter, Pass, Side, Site, SiteShape, Update};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Options of (IA)³ in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// The layers to change.
    targets: Targets,
    /// Which of them have their input scaled instead of their output.
    feedforward: Targets,
}

impl Default for Options {
    /// PEFT's for Llama.
    fn default() -> Self {
        let names = ["k_proj", "v_proj", "down_proj"].map(str::to_owned);
        Self {
            targets: Targets::Many(names.to_vec()),
            feedforward: Targets::Many(vec!["down_proj".to_owned()]),
        }
    }
}

impl Described for Options {
    const NAME: &'static str = "ia3";
    const SUMMARY: &'static str = "learned factors on keys, values and feed-forward activations";
    const PEFT_TYPE: &'static str = "IA3";

    fn faults(&self) -> Vec<Fault> {
        let empty = self.targets.entries().is_empty();
        let message = "is empty; expected at least one layer";
        empty.then(|| Fault::new("method.targets", message)).into_iter().collect()
    }

    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        let mut faults = refuse_unless(
            config,
            &[("fan_in_fan_out", &["false", "null"]), ("modules_to_save", &["null", "[]"])],
        );
        let mut names = |key: &str, missing: Option<Targets>| match config.get(key) {
            None | Some(Value::Null) if missing.is_some() => missing.unwrap_or_default(),
            found => {
                found.and_then(|v| serde_json::from_value(v.clone()).ok()).unwrap_or_else(|| {
                    faults.push(Fault::new(key, "expected a name or a list of names"));
                    Targets::default()
                })
            }
        };
        let targets = names("target_modules", None);
        let feedforward = names("feedforward_modules", Some(Targets::default()));
        if faults.is_empty() { Ok(Self { targets, feedforward }) } else { Err(faults) }
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let config = json!({
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "inference_mode": true,
            "target_modules": self.targets.entries(),
            "feedforward_modules": self.feedforward.entries(),
            "fan_in_fan_out": false,
            "init_ia3_weights": true,
            "modules_to_save": null,
        });
        to_map(&config)
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, _seed: u64) -> Box<dyn Tuned> {
        let factors = |shape: &SiteShape| {
            // PEFT's shapes: a column of outputs, a row of inputs.
            let feedforward = self.feedforward.contain(shape);
            let extent = if feedforward { [1, shape.in_features] } else { [shape.out_features, 1] };
            let ones = Tensor::from_f64(dtype, &vec![1.0; extent[0] * extent[1]], extent);
            let name = format!("{}.ia3_l", shape.site);
            (shape.site, Factors { feedforward, l: Trainable::new(name, Role::Scale, ones) })
        };
        Box::new(Ia3Adapter { options: self.clone(), sites: sites.iter().map(factors).collect() })
    }
}

struct Factors {
    feedforward: bool,
    l: Trainable,
}

/// A live (IA)³ adapter.
struct Ia3Adapter {
    options: Options,
    sites: BTreeMap<Site, Factors>,
}

impl Adapter for Ia3Adapter {
    fn rows_stand_alone(&self) -> bool {
        true
    }

    fn update(&self, site: Site, _rows: usize, _pass: &Pass<'_>) -> Update<'_> {
        let Some(factors) = self.sites.get(&site) else { return Update::None };
        let side = if factors.feedforward { Side::Input } else { Side::Output };
        Update::Scale(side, factors.l.var())
    }
}

impl Parameters for Ia3Adapter {
    fn options(&self) -> &dyn MethodOptions {
        &self.options
    }

    fn sites(&self) -> Vec<Site> {
        self.sites.keys().copied().collect()
    }

    fn trainables(&self) -> Vec<&Trainable> {
        self.sites.values().map(|factors| &factors.l).collect()
    }

    fn trainables_mut(&mut self) -> Vec<&mut Trainable> {
        self.sites.values_mut().map(|factors| &mut factors.l).collect()
    }

    fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor) -> TensorMap {
        export_by_name(self.trainables(), pick)
    }
}

impl Persist for Ia3Adapter {
    fn load(&mut self, tensors: &mut TensorMap) -> Result<(), Vec<String>> {
        load_by_name(self.trainables_mut(), tensors)
    }

    fn peft_config(&self, all: &[SiteShape]) -> Map<String, Value> {
        // PEFT wants the feed-forward names to be some of the target names.
        let mut names = module_names(&self.sites(), all);
        let scaled_inputs = |name: &str| {
            let meant = Targets::One(name.to_owned());
            let kinds = all
                .iter()
                .filter(|shape| meant.contain(shape))
                .filter_map(|shape| self.sites.get(&shape.site).map(|f| f.feedforward));
            kinds.fold((false, false), |(yes, no), f| (yes || f, no || !f))
        };
        if names.iter().any(|name| scaled_inputs(name) == (true, true)) {
            names = self.sites.keys().map(Site::to_string).collect();
        }
        let feedforward: Vec<&String> = names.iter().filter(|name| scaled_inputs(name).0).collect();
        let mut config = self.options.to_peft();
        config.insert("feedforward_modules".to_owned(), json!(feedforward));
        config.insert("target_modules".to_owned(), json!(names));
        config
    }
}

impl TrainHooks for Ia3Adapter {}

impl Mergeable for Ia3Adapter {}

impl Tuned for Ia3Adapter {}

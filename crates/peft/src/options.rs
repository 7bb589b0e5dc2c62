//! Options that LoRA-like methods share, and their names in PEFT's `adapter_config.json`.

use crate::error::{Error, Fault};
use crate::low_rank::{TokenIndices, is_saved};
use crate::patterns::Patterns;
use crate::targets::{Targets, modules};
use hydralora_model::adapter::SiteShape;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// A struct of options as a JSON object.
pub(crate) fn to_map<T: Serialize>(options: &T) -> Map<String, Value> {
    match serde_json::to_value(options) {
        Ok(Value::Object(map)) => map,
        other => unreachable!("options serialise to an object, got {other:?}"),
    }
}

/// `alpha / r`, or `alpha / √r` when rank-stabilised.
pub(crate) fn scale(alpha: f64, rank: usize, rank_stabilised: bool) -> f64 {
    let rank = rank as f64;
    alpha / if rank_stabilised { rank.sqrt() } else { rank }
}

/// PEFT writes whole numbers without a fraction.
pub(crate) fn whole_if_possible(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

/// Faults of the options every LoRA-like method has.
pub(crate) fn check_common(rank: usize, alpha: f64, dropout: f64, targets: &Targets) -> Vec<Fault> {
    let mut faults = Vec::new();
    if rank == 0 {
        faults.push(Fault::new("method.rank", "is 0; expected at least 1"));
    }
    if !(alpha.is_finite() && alpha > 0.0) {
        faults.push(Fault::new("method.alpha", format!("is {alpha}; expected a positive number")));
    }
    if !(0.0..1.0).contains(&dropout) {
        faults
            .push(Fault::new("method.dropout", format!("is {dropout}; expected 0 ≤ dropout < 1")));
    }
    if targets.entries().is_empty() {
        faults.push(Fault::new("method.targets", "is empty; expected at least one layer"));
    }
    faults
}

/// A fault if there is no expert.
pub(crate) fn check_experts(num_experts: usize) -> Option<Fault> {
    (num_experts == 0).then(|| Fault::new("method.num_experts", "is 0; expected at least 1"))
}

/// A fault for every key that asks for something not supported: present and unlike the values
/// listed with it, written as JSON.
pub(crate) fn refuse_unless(config: &Map<String, Value>, keys: &[(&str, &[&str])]) -> Vec<Fault> {
    keys.iter()
        .filter_map(|(key, accepted)| {
            let value = config.get(*key)?;
            let refused = !accepted.contains(&value.to_string().as_str());
            refused.then(|| Fault::new(*key, format!("`{value}` is not supported here")))
        })
        .collect()
}

/// The keys of PEFT's `LoraConfig` that mean something here.
#[derive(Default)]
pub(crate) struct LoraConfigKeys {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) use_rslora: bool,
    pub(crate) dropout: f64,
    pub(crate) targets: Targets,
    pub(crate) rank_pattern: Patterns<usize>,
    pub(crate) alpha_pattern: Patterns<f64>,
    pub(crate) modules_to_save: Vec<String>,
    pub(crate) trainable_token_indices: Option<TokenIndices>,
    pub(crate) ensure_weight_tying: bool,
    /// The start that a file named, which says nothing of its tensors.
    pub(crate) start: Option<Value>,
}

/// Those of them that only the family of LoRA understands.
const OF_FAMILY: [&str; 5] = [
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
];

/// Options of PEFT's LoRA that change the computation and are not supported: present and unlike
/// these values, they are refused.
const REFUSED_UNLESS: &[(&str, &[&str])] = &[
    ("use_dora", &["false", "null"]),
    ("fan_in_fan_out", &["false", "null"]),
    ("bias", &["\"none\"", "null"]),
    ("lora_bias", &["false", "null"]),
    ("rank_pattern", &["{}", "null"]),
    ("alpha_pattern", &["{}", "null"]),
    ("modules_to_save", &["null", "[]"]),
    ("layer_replication", &["null"]),
    ("trainable_token_indices", &["null"]),
    ("target_parameters", &["null", "[]"]),
    ("use_qalora", &["false", "null"]),
    ("use_bdlora", &["false", "null"]),
    ("alora_invocation_tokens", &["null"]),
    ("arrow_config", &["null"]),
    ("kasa_config", &["null"]),
    ("monteclora_config", &["null"]),
    ("velora_config", &["null"]),
    ("megatron_config", &["null"]),
    ("ensure_weight_tying", &["false", "null"]),
];

/// Starts that leave the base model alone, so that a file's tensors say all; by their names in PEFT.
const PLAIN_STARTS: [&str; 5] = ["kaiming", "gaussian", "orthogonal", "eva", "mica"];

/// Starts that take what they start from out of the base model.
const STARTS_OUT_OF_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "lora_ga", "loftq"];

/// What is wrong with the start that a file names.
fn start_fault(start: &Value) -> Option<Fault> {
    let message = match start.as_str() {
        None if start.is_boolean() || start.is_null() => return None,
        Some(name) if PLAIN_STARTS.contains(&name) => return None,
        Some(name) if STARTS_OUT_OF_THE_BASE.iter().any(|known| name.starts_with(known)) => {
            format!(
                "`{name}` takes its start out of the base model's weights, which this folder does not hold; \
             have PEFT convert the adapter to one for the unchanged base (save_pretrained with \
             path_initial_model_for_weight_conversion) and give the result"
            )
        }
        _ => format!(
            "`{start}` is a start that is not known here; expected true, false or one of {}",
            PLAIN_STARTS.join(", ")
        ),
    };
    Some(Fault::new("init_lora_weights", message))
}

/// Keys of PEFT's and the published code's files that say nothing about what is computed from the
/// tensors, or that every method that has them checks.
const OF_NO_CONSEQUENCE: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "blc_alpha",
    "blc_weight",
    "corda_config",
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_version",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "qalora_group_size",
    "r",
    "revision",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
];

/// A fault for every key of an `adapter_config.json` that asks for something nobody here has heard
/// of; `written` are the keys the method itself writes.
pub(crate) fn refuse_unknown(
    config: &Map<String, Value>,
    written: &Map<String, Value>,
) -> Vec<Fault> {
    let asks = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        _ => true,
    };
    config
        .iter()
        .filter(|(key, value)| {
            let known = written.contains_key(*key)
                || OF_NO_CONSEQUENCE.contains(&key.as_str())
                || *key == "init_lora_weights"
                || REFUSED_UNLESS.iter().any(|(checked, _)| checked == key);
            !known && asks(value)
        })
        .map(|(key, value)| {
            Fault::new(key, format!("`{value}`: an option that is not known here; expected none"))
        })
        .collect()
}

/// What `config` has under `key`, if anything.
fn of_key<T: DeserializeOwned + Default>(
    config: &Map<String, Value>,
    key: &str,
    faults: &mut Vec<Fault>,
) -> T {
    let Some(value) = config.get(key).filter(|value| !value.is_null()) else { return T::default() };
    serde_json::from_value(value.clone()).unwrap_or_else(|error| {
        faults.push(Fault::new(key, error.to_string()));
        T::default()
    })
}

/// Patterns as PEFT writes them.
fn whole_numbers(patterns: &Patterns<f64>) -> Map<String, Value> {
    patterns.iter().map(|(key, &value)| (key.to_owned(), whole_if_possible(value))).collect()
}

impl LoraConfigKeys {
    /// Reads them out of an `adapter_config.json`, of which the method understands `own` too; what only
    /// the family of LoRA understands is refused unless it is `of_family`.
    ///
    /// # Errors
    /// Every key that is missing, malformed, or asks for something not supported.
    pub(crate) fn read(
        config: &Map<String, Value>,
        own: &[&str],
        of_family: bool,
    ) -> Result<Self, Vec<Fault>> {
        let mut faults = refuse_unless(config, REFUSED_UNLESS);
        faults.retain(|fault| {
            let field = fault.field.as_str();
            !(own.contains(&field) || of_family && OF_FAMILY.contains(&field))
        });
        let start = config.get("init_lora_weights").filter(|_| !own.contains(&"init_lora_weights"));
        faults.extend(start.and_then(start_fault));
        let known = if of_family { config } else { &Map::new() };
        let rank_pattern = of_key(known, "rank_pattern", &mut faults);
        let alpha_pattern = of_key(known, "alpha_pattern", &mut faults);
        let modules_to_save = of_key(known, "modules_to_save", &mut faults);
        let trainable_token_indices = of_key(known, "trainable_token_indices", &mut faults);
        let ensure_weight_tying = of_key(known, "ensure_weight_tying", &mut faults);
        let mut number = |key: &str, default: Option<f64>| match config.get(key) {
            Some(Value::Null) | None if default.is_some() => default.unwrap_or_default(),
            Some(value) if value.is_number() => value.as_f64().unwrap_or_default(),
            other => {
                let found = other.map_or_else(|| "missing".to_owned(), |v| format!("`{v}`"));
                faults.push(Fault::new(key, format!("{found}; expected a number")));
                1.0
            }
        };
        let rank = number("r", None);
        let alpha = number("lora_alpha", None);
        let dropout = number("lora_dropout", Some(0.0));
        let targets = match config.get("target_modules") {
            Some(value) => serde_json::from_value(value.clone()).ok(),
            None => None,
        };
        if targets.is_none() {
            faults.push(Fault::new("target_modules", "expected a name or a list of names"));
        }
        let (rank, use_rslora) =
            (rank.max(0.0) as usize, config.get("use_rslora") == Some(&json!(true)));
        let targets = targets.unwrap_or(Targets::Many(Vec::new()));
        if faults.is_empty() {
            // The layers are taken from the tensors, so what a file calls its targets is not checked.
            let any = Targets::One("all".to_owned());
            faults = check_common(rank, alpha, dropout, &any);
        }
        let keys = Self {
            rank,
            alpha,
            use_rslora,
            dropout,
            targets,
            rank_pattern,
            alpha_pattern,
            modules_to_save,
            trainable_token_indices,
            ensure_weight_tying,
            start: start.cloned(),
        };
        faults.extend(keys.pattern_faults(""));
        faults.extend(keys.end_faults(""));
        if faults.is_empty() { Ok(keys) } else { Err(faults) }
    }

    /// Faults of the patterns, their names behind `prefix`.
    pub(crate) fn pattern_faults(&self, prefix: &str) -> Vec<Fault> {
        let mut faults = Vec::new();
        for (key, &rank) in self.rank_pattern.iter() {
            if rank == 0 {
                let field = format!("{prefix}rank_pattern.{key}");
                faults.push(Fault::new(field, "is 0; expected at least 1"));
            }
        }
        for (key, &alpha) in self.alpha_pattern.iter() {
            if !(alpha.is_finite() && alpha > 0.0) {
                let message = format!("is {alpha}; expected a positive number");
                faults.push(Fault::new(format!("{prefix}alpha_pattern.{key}"), message));
            }
        }
        faults
    }

    /// Faults of what is trained beside the layers, their names behind `prefix`.
    pub(crate) fn end_faults(&self, prefix: &str) -> Vec<Fault> {
        let mut faults = Vec::new();
        let mut fault = |option: &str, message: String| {
            faults.push(Fault::new(format!("{prefix}{option}"), message));
        };
        if self.modules_to_save.iter().any(String::is_empty) {
            fault("modules_to_save", "has an empty name; expected names such as norm".to_owned());
        }
        let saved = |end: &str| self.modules_to_save.iter().any(|key| end.ends_with(key.as_str()));
        if let Some(tokens) = &self.trainable_token_indices {
            for message in tokens.faults() {
                fault("trainable_token_indices", message);
            }
            for end in tokens.ends() {
                if saved(end) {
                    let message = format!("is about {end}, which modules_to_save trains whole");
                    fault("trainable_token_indices", message);
                }
                if self.targets.name_end(end) {
                    let message = format!("is about {end}, which is a target too; use one of them");
                    fault("trainable_token_indices", message);
                }
            }
        }
        for end in self.targets.ends().into_iter().filter(|end| saved(end)) {
            let message = format!("`{end}` is in modules_to_save too; expected it in one of them");
            fault("targets", message);
        }
        if self.ensure_weight_tying && !self.targets.ends().is_empty() {
            let message = "is for modules_to_save and trainable_token_indices; a pair at the embedding \
                           or the output layer stays apart";
            fault("ensure_weight_tying", message.to_owned());
        }
        faults
    }

    /// Refuses patterns that match none of `sites`, as a slip of the pen does.
    pub(crate) fn check_layers(&self, sites: &[SiteShape]) -> Result<(), Error> {
        let names = sites.iter().map(|shape| shape.site.to_string());
        let names: Vec<String> =
            names.chain(self.targets.ends().into_iter().map(str::to_owned)).collect();
        let idle = [
            ("rank_pattern", self.rank_pattern.matching_nothing(&names)),
            ("alpha_pattern", self.alpha_pattern.matching_nothing(&names)),
        ];
        let mut faults: Vec<Fault> = idle
            .into_iter()
            .filter_map(|(option, key)| {
                let message = format!(
                    "matches none of the layers that `targets` chooses ({}); expected the end of a \
                     layer's name from a dot on, as a regular expression",
                    modules(sites).join(", ")
                );
                Some(Fault::new(format!("method.{option}.{}", key?), message))
            })
            .collect();
        let twice =
            |shape: &&SiteShape| is_saved(&self.modules_to_save, &format!("{}.weight", shape.site));
        if let Some(SiteShape { site, .. }) = sites.iter().find(twice) {
            let message =
                format!("means {site}, which is a target too; expected it in one of them");
            faults.push(Fault::new("method.modules_to_save", message));
        }
        if faults.is_empty() { Ok(()) } else { Err(Error::Options { faults }) }
    }

    /// The `adapter_config.json` PEFT would write for them.
    pub(crate) fn write(self, peft_type: &str) -> Map<String, Value> {
        let value = json!({
            "peft_type": peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": true,
            "r": self.rank,
            "lora_alpha": whole_if_possible(self.alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "target_modules": self.targets.entries(),
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": self.start.unwrap_or(json!(true)),
            "modules_to_save": (!self.modules_to_save.is_empty()).then_some(self.modules_to_save),
        });
        let mut map = match value {
            Value::Object(map) => map,
            _ => unreachable!("an object literal"),
        };
        // What is not used is not written: files stay those of earlier builds.
        let mut used = |key: &str, value: Value, is_used: bool| {
            if is_used {
                map.insert(key.to_owned(), value);
            }
        };
        let (ranks, alphas) = (&self.rank_pattern, whole_numbers(&self.alpha_pattern));
        used("rank_pattern", json!(ranks), ranks.iter().next().is_some());
        used("alpha_pattern", json!(alphas), self.alpha_pattern.iter().next().is_some());
        let tokens = self.trainable_token_indices;
        used("trainable_token_indices", json!(tokens), tokens.is_some());
        used("ensure_weight_tying", json!(true), self.ensure_weight_tying);
        map
    }
}

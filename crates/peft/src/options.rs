//! Options that LoRA-like methods share, and their names in PEFT's `adapter_config.json`.

use crate::error::Fault;
use crate::targets::Targets;
use serde::Serialize;
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
pub(crate) struct LoraConfigKeys {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) use_rslora: bool,
    pub(crate) dropout: f64,
    pub(crate) targets: Targets,
}

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
    // The others start from a changed base model, which a file does not hold.
    (
        "init_lora_weights",
        &["true", "false", "null", "\"kaiming\"", "\"gaussian\"", "\"orthogonal\"", "\"eva\""],
    ),
];

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
                || REFUSED_UNLESS.iter().any(|(checked, _)| checked == key);
            !known && asks(value)
        })
        .map(|(key, value)| {
            Fault::new(key, format!("`{value}`: an option that is not known here; expected none"))
        })
        .collect()
}

impl LoraConfigKeys {
    /// Reads them out of an `adapter_config.json`, of which the method understands `own` too.
    ///
    /// # Errors
    /// Every key that is missing, malformed, or asks for something not supported.
    pub(crate) fn read(config: &Map<String, Value>, own: &[&str]) -> Result<Self, Vec<Fault>> {
        let mut faults = refuse_unless(config, REFUSED_UNLESS);
        faults.retain(|fault| !own.contains(&fault.field.as_str()));
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
        if !faults.is_empty() {
            return Err(faults);
        }
        Ok(Self { rank, alpha, use_rslora, dropout, targets })
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
            "init_lora_weights": true,
            "modules_to_save": null,
        });
        match value {
            Value::Object(map) => map,
            _ => unreachable!("an object literal"),
        }
    }
}

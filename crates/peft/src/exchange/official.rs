//! HydraLoRA's published code: `adapter_config.json` with `peft_type: LORA` and `lora_nums`, and
//! `adapter_model.bin`, a pickled dictionary of tensors.

use super::pickle;
use crate::error::{Error, Fault, Result};
use crate::io::{CONFIG_FILE, PEFT_PREFIX, PICKLED_FILE};
use crate::tuned::Tuned;
use hydralora_model::adapter::SiteShape;
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

/// Options that the published code has one fixed value for.
fn fixed() -> [(&'static str, Value); 10] {
    [
        ("gate", json!("softmax")),
        ("route_on", json!("x")),
        ("router_bias", json!(false)),
        ("router_scope", json!("linear")),
        ("router_top_k", Value::Null),
        ("router_temperature", json!(1.0)),
        ("use_rslora", json!(false)),
        // The published code has no place for what another start takes out of the weight.
        ("init_lora_weights", json!("kaiming")),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
    ]
}

/// Writes `tuned`, a HydraLoRA, as the published code saves its own.
///
/// # Errors
/// If it is no HydraLoRA, has options that code lacks, or the file system refuses.
pub fn write_official(
    folder: &Path,
    tuned: &dyn Tuned,
    base_model: &str,
    all: &[SiteShape],
) -> Result<()> {
    let own = tuned.peft_config(all);
    let kind = own.get("peft_type").and_then(Value::as_str).unwrap_or_default();
    let mut faults = Vec::new();
    if kind != "HYDRALORA" {
        faults.push(Fault::new("peft_type", format!("is {kind}; expected HYDRALORA")));
    }
    for (option, only) in fixed() {
        if let Some(value) = own.get(option).filter(|value| **value != only) {
            let message = format!("is {value}; the published code knows only {only}");
            faults.push(Fault::new(option, message));
        }
    }
    if !faults.is_empty() {
        return Err(Error::Options { faults });
    }
    if let Some(more) = tuned.beside_layers() {
        let message = format!("it trains {more}, for which the published code has no place");
        let faults = vec![Fault::new("modules_to_save", message)];
        return Err(Error::Options { faults });
    }
    let mut config = Map::new();
    for (key, value) in [
        ("base_model_name_or_path", json!(base_model)),
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("inference_mode", json!(true)),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("merge_weights", json!(false)),
        ("enable_lora", Value::Null),
        ("modules_to_save", Value::Null),
    ] {
        config.insert(key.to_owned(), value);
    }
    for key in ["r", "lora_alpha", "lora_dropout", "lora_nums", "target_modules"] {
        config.insert(key.to_owned(), own.get(key).cloned().unwrap_or(Value::Null));
    }
    let tensors: Vec<_> = tuned
        .tensors()
        .into_iter()
        .map(|(name, tensor)| (format!("{PEFT_PREFIX}{name}"), tensor))
        .collect();
    let pickled = pickle::write(&tensors, &folder.join(PICKLED_FILE))?;
    hydralora_files::replace_folder(folder, &crate::io::MADE, |folder| {
        fs::write(folder.join(CONFIG_FILE), format!("{:#}\n", Value::Object(config)))?;
        fs::write(folder.join(PICKLED_FILE), pickled)?;
        Ok(())
    })
}

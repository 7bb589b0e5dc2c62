//! The registry's side of a method: everything but its options' fields follows from a few words.

use crate::error::{Fault, Result};
use crate::method::{Method, MethodOptions};
use crate::options::{LoraConfigKeys, refuse_unless};
use crate::section::{read_rest, read_section};
use schemars::{JsonSchema, Schema, schema_for};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::marker::PhantomData;

/// Options that describe their method.
pub(crate) trait Described:
    MethodOptions + Default + DeserializeOwned + JsonSchema + 'static
{
    /// The name in a recipe, `method.name`.
    const NAME: &'static str;
    /// One line for `--help` and the docs.
    const SUMMARY: &'static str;
    /// `peft_type` in an `adapter_config.json`.
    const PEFT_TYPE: &'static str;

    /// Whether an `adapter_config.json` describes this method.
    fn claims(config: &Map<String, Value>) -> bool {
        config.get("peft_type") == Some(&json!(Self::PEFT_TYPE))
    }

    /// Every option whose value makes no sense.
    fn faults(&self) -> Vec<Fault>;

    /// Reads the options, and checks them, out of an `adapter_config.json`.
    ///
    /// # Errors
    /// Every option that is wrong or not supported here.
    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>>;
}

/// The registry's entry of the method whose options are `O`.
pub(crate) struct Registered<O>(PhantomData<fn() -> O>);

impl<O> Registered<O> {
    /// The entry.
    pub(crate) const ENTRY: Self = Self(PhantomData);
}

impl<O: Described> Method for Registered<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn summary(&self) -> &'static str {
        O::SUMMARY
    }

    fn claims(&self, config: &Map<String, Value>) -> bool {
        O::claims(config)
    }

    fn defaults(&self) -> Map<String, Value> {
        O::default().to_recipe()
    }

    fn schema(&self) -> Schema {
        schema_for!(O)
    }

    fn read_recipe(
        &self,
        section: &Map<String, Value>,
    ) -> Result<Box<dyn MethodOptions>, Vec<Fault>> {
        let (options, mut faults) = read_rest::<O>("method", section, &self.defaults());
        let Some(options) = options else { return Err(faults) };
        // An option that could not be read stands at its default, of which nothing is to be said.
        let of_rest = options.faults().into_iter();
        let of_rest: Vec<Fault> = of_rest
            .filter(|found| !faults.iter().any(|fault| fault.field == found.field))
            .collect();
        faults.extend(of_rest);
        if faults.is_empty() { Ok(Box::new(options)) } else { Err(faults) }
    }

    fn read_peft(&self, config: &Map<String, Value>) -> Result<Box<dyn MethodOptions>, Vec<Fault>> {
        Ok(Box::new(O::from_peft(config)?))
    }
}

/// Reads options that a file names as a recipe does, from `own`, and refuses what the rest of
/// `config` asks for and `accepted` does not list; finds every fault at once.
///
/// # Errors
/// Every option that is wrong or not supported here.
pub(crate) fn from_own<O: Described>(
    config: &Map<String, Value>,
    accepted: &[(&str, &[&str])],
    own: &Map<String, Value>,
) -> Result<O, Vec<Fault>> {
    let mut faults = refuse_unless(config, accepted);
    let read: Result<O, _> = read_section("adapter_config", own, &O::default().to_recipe());
    let options = read.unwrap_or_else(|found| {
        faults.extend(found);
        O::default()
    });
    faults.extend(options.faults());
    if faults.is_empty() { Ok(options) } else { Err(faults) }
}

/// Reads the `adapter_config.json` of a method that has LoRA's options under PEFT's names, its number of
/// heads as `lora_nums` if it has one, and the options `own` under theirs.
///
/// # Errors
/// Every entry that is wrong, missing or not supported; the layers are taken from the tensors.
pub(crate) fn read_lora_like<O: Described>(
    config: &Map<String, Value>,
    own: &[&str],
) -> Result<O, Vec<Fault>> {
    let LoraConfigKeys { rank, alpha, use_rslora, dropout, targets, .. } =
        LoraConfigKeys::read(config, &[], false)?;
    let defaults = O::default().to_recipe();
    let mut section = Map::new();
    for &key in own {
        section.extend(config.get(key).map(|value| (key.to_owned(), value.clone())));
    }
    if defaults.contains_key("num_experts") {
        let count = config.get("lora_nums");
        section.extend(count.map(|count| ("num_experts".to_owned(), count.clone())));
    }
    for (key, value) in [
        ("rank", json!(rank)),
        ("alpha", json!(alpha)),
        ("use_rslora", json!(use_rslora)),
        ("dropout", json!(dropout)),
        ("targets", json!(targets)),
    ] {
        section.insert(key.to_owned(), value);
    }
    let options: O = read_section("adapter_config", &section, &defaults)?;
    let mut faults = options.faults();
    faults.retain(|fault| fault.field != "method.targets");
    if faults.is_empty() { Ok(options) } else { Err(faults) }
}

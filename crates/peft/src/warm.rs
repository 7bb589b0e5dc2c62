//! Starting from an adapter that was trained before.

use crate::error::{Error, Fault, Result};
use crate::io::{decode, method_of, read_options, stored_tensors};
use crate::method::MethodOptions;
use crate::tuned::Tuned;
use hydralora_kernels::DType;
use serde_json::{Map, Value};
use std::path::Path;

/// The option that names the adapter.
pub const INIT_FROM: &str = "init_from";

/// Options that decide how an adapter is trained and not what its tensors mean. Which layers it
/// changes is seen from the tensors.
const OF_TRAINING: &[&str] = &[
    "targets",
    "feedforward",
    "dropout",
    "dropout_mask",
    "init_lora_weights",
    "router_init",
    "router_gain",
    "router_temperature_start",
    "router_guide",
    "router_guide_weight",
    "router_guide_decay",
    "router_top_k_gradient",
    "router_z_weight",
    "balance",
    "balance_weight",
    "balance_delta",
    "knowledge_domains",
    "align_weight",
    "alignment",
    "spectral_weight",
    "bias_rate",
    "orth_reg_weight",
    "init_r",
    "target_r",
    "tinit",
    "tfinal",
    "delta_t",
    "beta1",
    "beta2",
    "total_step",
    "init",
    "init_text",
];

/// Most mismatched tensors that a message lists.
const LISTED: usize = 3;

/// Puts the tensors of the adapter in `folder` in place of the fresh ones of `tuned`, which is of the
/// method `name`.
///
/// # Errors
/// If the folder holds an adapter of another method, with options that give its tensors another meaning,
/// or with other tensors; as faults of `method.init_from`.
pub fn start_from_adapter(
    folder: &Path,
    name: &str,
    tuned: &mut dyn Tuned,
    dtype: DType,
) -> Result<()> {
    let fault = |message: String| {
        let message = format!("{}: {message}", folder.display());
        Error::Options { faults: vec![Fault::new(format!("method.{INIT_FROM}"), message)] }
    };
    if tuned.as_whole_model().is_some() {
        let message = "holds an adapter, and method.name is `full`, which goes on from a model; give a \
                       model that was trained whole as model.path, or fold the adapter into its base \
                       with `hydralora merge` first";
        return Err(fault(message.to_owned()));
    }
    let found = method_of(folder)?;
    if found != name {
        let way = match (found, name) {
            ("lora", "hydralora") => {
                "; `hydralora import --from lora` makes a hydralora of one or several, from which it can \
                 start"
            }
            _ => "; expected an adapter of the same method",
        };
        return Err(fault(format!("holds a `{found}`, and method.name is `{name}`{way}")));
    }
    let options = read_options(folder)?;
    let differing = differences(&options.to_recipe(), tuned.options());
    if !differing.is_empty() {
        return Err(fault(format!("{}; expected the same", differing.join(", "))));
    }
    let mut tensors = decode(&stored_tensors(folder), dtype)?;
    let mut mismatches = tuned.load_file(&mut tensors).err().unwrap_or_default();
    let left =
        tensors.keys().map(|name| format!("`{name}` is not used by the layers of `targets`"));
    mismatches.extend(left);
    let more = mismatches.len().saturating_sub(LISTED);
    mismatches.truncate(LISTED);
    if more > 0 {
        mismatches.push(format!("and {more} more"));
    }
    if mismatches.is_empty() { Ok(()) } else { Err(fault(mismatches.join("; "))) }
}

/// What the two say differently of what tensors mean, in words.
fn differences(there: &Map<String, Value>, here: &dyn MethodOptions) -> Vec<String> {
    let here = here.to_recipe();
    let differs = |key: &&String| !OF_TRAINING.contains(&key.as_str()) && here[*key] != there[*key];
    let keys = here.keys().filter(|key| there.contains_key(*key)).filter(differs);
    keys.map(|key| format!("method.{key} is {} there and {} here", there[key], here[key])).collect()
}

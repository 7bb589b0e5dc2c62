//! A HydraLoRA that starts from separately trained LoRAs: `A = mean A_i`, `B_i` as they are, a fresh
//! router. With near-even gates at the start this is about their average.

use super::{Lora, weighted_sum};
use crate::error::{Error, Result};
use crate::methods;
use crate::tuned::Tuned;
use hydralora_kernels::{DType, Tensor};
use serde_json::{Value, json};

/// Makes the HydraLoRA of `loras`, its router drawn from `seed`.
///
/// # Errors
/// If there are fewer than two, or they differ in layers, rank or scale.
pub fn hydralora_from(loras: &[Lora], seed: u64) -> Result<Box<dyn Tuned>> {
    let [first, rest @ ..] = loras else { return Err(too_few(0)) };
    if rest.is_empty() {
        return Err(too_few(1));
    }
    if let Some(lora) = loras.iter().find(|lora| !lora.beside.is_empty()) {
        let name = lora.beside.tensors.keys().next().cloned().unwrap_or_default();
        let message = format!("trains `{name}` beside its layers, of which there are no heads");
        return Err(Error::Malformed { path: lora.path.clone(), message });
    }
    for other in rest {
        let differ = |message: String| Error::Incompatible {
            first: first.path.clone(),
            second: other.path.clone(),
            message,
        };
        if first.rank != other.rank {
            let message = format!("ranks {} and {}; expected the same", first.rank, other.rank);
            return Err(differ(message));
        }
        if (first.scale() - other.scale()).abs() > 1e-9 * first.scale().abs() {
            let message = format!(
                "scales {} and {} (lora_alpha {} and {}); expected the same",
                first.scale(),
                other.scale(),
                first.alpha,
                other.alpha
            );
            return Err(differ(message));
        }
        let lacking =
            |a: &Lora, b: &Lora| a.sites.keys().find(|s| !b.sites.contains_key(s)).copied();
        if let Some(site) = lacking(first, other).or(lacking(other, first)) {
            return Err(differ(format!(
                "only one of them changes {site}; expected the same layers"
            )));
        }
    }
    let section = json!({
        "rank": first.rank,
        "alpha": first.alpha,
        "use_rslora": first.use_rslora,
        "num_experts": loras.len(),
        "targets": first.target_modules,
    });
    let section = section.as_object().cloned().unwrap_or_default();
    let options = methods::find("hydralora")?
        .read_recipe(&section)
        .map_err(|faults| Error::Options { faults })?;
    let mut tuned = options.build(&first.shapes(), DType::F32, seed);
    let mut tensors = tuned.tensors();
    let share = vec![1.0 / loras.len() as f64; loras.len()];
    for site in first.sites.keys() {
        let pairs: Vec<_> = loras.iter().filter_map(|lora| lora.sites.get(site)).collect();
        let a: Vec<&Tensor> = pairs.iter().map(|pair| &pair.a).collect();
        tensors.insert(format!("{site}.lora_A.weight"), weighted_sum(&a, &share));
        for (head, pair) in pairs.iter().enumerate() {
            tensors.insert(format!("{site}.lora_B{head}.weight"), pair.b.clone());
        }
    }
    tuned
        .load(&mut tensors)
        .map_err(|mismatches| Error::Tensors { path: first.path.clone(), mismatches })?;
    Ok(tuned)
}

fn too_few(count: usize) -> Error {
    let value: Value = json!(count);
    Error::Options {
        faults: vec![crate::error::Fault::new(
            "adapters",
            format!("{value} given; expected at least 2 LoRAs to make heads of"),
        )],
    }
}

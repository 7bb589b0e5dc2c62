//! What a GGUF file holds, if it is no dense text model.
//!
//! Many files lie beside a model that are no model: the format is also that of adapters, vision
//! encoders, heads that draft tokens for another model, and statistics for quantising one. Each is
//! refused as what it is, rather than for the first thing that a text model has and it lacks.

use super::GgufFile;
use crate::error::{Error, Result};

/// Architectures of heads that draft tokens for another model, and have no text model in them.
const DRAFTS: &[&str] = &["eagle", "eagle2", "eagle3", "medusa", "dflash"];
/// Ends of such architectures' names.
const DRAFT_ENDINGS: &[&str] = &["assistant", "mtp"];
/// How names of a layer that drafts the token after the next one start, after the layer's number.
const NEXT_TOKENS: &str = "nextn.";

/// Checks that nothing in the metadata of `file` says that it is no dense text model.
///
/// # Errors
/// Saying what it is.
pub(crate) fn check_metadata(file: &GgufFile) -> Result<()> {
    let text = |key: &str| file.get(key).and_then(|value| value.as_str());
    let refuse = |what: String| Err(Error::NotTextModel { path: file.path().to_path_buf(), what });
    let architecture = text("general.architecture").unwrap_or_default();
    match text("general.type") {
        Some("adapter") => return refuse(adapter(text("adapter.type"))),
        Some("imatrix") => return refuse(IMATRIX.to_owned()),
        Some("vocab") => return refuse(VOCABULARY.to_owned()),
        Some("mmproj" | "clip-vision") => return refuse(PROJECTOR.to_owned()),
        _ => {}
    }
    // Not all writers give a type.
    match architecture {
        "clip" | "mmproj" => return refuse(PROJECTOR.to_owned()),
        "imatrix" => return refuse(IMATRIX.to_owned()),
        "controlvector" => {
            return refuse("a control vector, to be added to a model's hidden states".to_owned());
        }
        _ => {}
    }
    let drafts = DRAFTS.contains(&architecture)
        || DRAFT_ENDINGS
            .iter()
            .filter_map(|ending| architecture.strip_suffix(ending))
            .any(|start| start.ends_with(['-', '_']));
    if drafts {
        return refuse(draft(architecture));
    }
    let experts = file.get(&format!("{architecture}.expert_count"));
    match experts.and_then(|value| value.as_u64()) {
        Some(experts) if experts > 0 => {
            refuse(mixture(&format!("`{architecture}`, {experts} experts a layer")))
        }
        _ => Ok(()),
    }
}

/// Checks the same of the names of its tensors, which have to be those of all its parts.
///
/// # Errors
/// Saying what it is.
pub(crate) fn check_tensors(file: &GgufFile) -> Result<()> {
    let refuse = |what: String| Err(Error::NotTextModel { path: file.path().to_path_buf(), what });
    let names = || file.tensors().iter().map(|tensor| tensor.name.as_str());
    if file.tensors().is_empty() {
        let vocabulary = file.get("tokenizer.ggml.tokens").is_some();
        return refuse(if vocabulary { VOCABULARY } else { "a file without a tensor" }.to_owned());
    }
    // `blk.0.ffn_gate_exps.weight`
    let of_experts = |name: &&str| name.split('.').any(|part| part.ends_with("_exps"));
    if let Some(name) = names().find(of_experts) {
        return refuse(mixture(&format!("it has a tensor `{name}`")));
    }
    if names().any(|name| name.ends_with(".in_sum2")) {
        return refuse(IMATRIX.to_owned());
    }
    if names().all(|name| name.ends_with(".lora_a") || name.ends_with(".lora_b")) {
        return refuse(adapter(Some("lora")));
    }
    // A model may carry such a layer after its own; a file of that layer alone has no first one.
    let in_layer = |name: &str| Some(name.strip_prefix("blk.")?.split_once('.')?.1.to_owned());
    let next = |name: &str| in_layer(name).is_some_and(|rest| rest.starts_with(NEXT_TOKENS));
    if names().any(next) && !names().any(|name| name.starts_with("blk.0.")) {
        let architecture = file.get("general.architecture").and_then(|value| value.as_str());
        return refuse(draft(architecture.unwrap_or_default()));
    }
    Ok(())
}

const PROJECTOR: &str = "a vision or audio projector (mmproj), which turns pictures or sound into a \
                         model's input and has no text model in it; name the file of the model it belongs to";

const IMATRIX: &str =
    "an importance matrix, statistics for quantising a model; name the file of that model";

const VOCABULARY: &str = "a vocabulary alone: it has no tensors";

fn mixture(why: &str) -> String {
    format!("a mixture of experts ({why}), which is not supported; only dense models are")
}

fn draft(architecture: &str) -> String {
    format!(
        "a draft head (`{architecture}`), which proposes tokens to another model and is none by \
         itself; name the file of the model it belongs to"
    )
}

fn adapter(kind: Option<&str>) -> String {
    match kind {
        Some("lora") | None => "a LoRA adapter, not a model; name the file of the model it was \
                                trained for, and the adapter as an adapter"
            .to_owned(),
        Some(kind) => format!("an adapter of type `{kind}`, not a model"),
    }
}

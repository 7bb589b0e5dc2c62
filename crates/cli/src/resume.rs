//! Why a run does not go on: which value is another one than when it began.

use crate::plan::Plan;
use hydralora_train::Error;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Sections and keys that do not decide how a run goes.
const IDLE: [&str; 5] =
    ["output", "model.path", "train.save_every", "train.keep_checkpoints", "data.streaming"];
/// The most values that are named.
const MOST: usize = 12;

/// What a run's folder says of the run.
#[derive(Default)]
pub(crate) struct Before {
    recipe: Value,
    data: Option<String>,
}

impl Before {
    /// As it was written when the run began; nothing where it cannot be read.
    pub(crate) fn read(folder: &Path) -> Self {
        let recipe = fs::read_to_string(folder.join("recipe.yaml")).unwrap_or_default();
        let data = fs::read(folder.join("data.json")).unwrap_or_default();
        let data: Value = serde_json::from_slice(&data).unwrap_or_default();
        Self {
            recipe: serde_saphyr::from_str(&recipe).unwrap_or_default(),
            data: data["fingerprint"].as_str().map(str::to_owned),
        }
    }

    /// As it would be written now.
    pub(crate) fn of(plan: &Plan) -> Self {
        let data = Some(plan.dataset.fingerprint().to_owned());
        Self { recipe: plan.recipe.resolved(), data }
    }

    /// Every value that differs, as `train.epochs: was 2, is 4`.
    fn differences(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if self.recipe.is_object() {
            compare("", &self.recipe, &now.recipe, &mut found);
        }
        if self.data.is_some() && self.data != now.data && found.is_empty() {
            found.push(
                "the records, the tokenizer or the chat template: they give other tokens"
                    .to_owned(),
            );
        }
        let more = found.len().saturating_sub(MOST);
        found.truncate(MOST);
        if more > 0 {
            found.push(format!("and {more} more"));
        }
        found
    }
}

/// Adds the values below `path` that differ. What one of the two leaves out is the same as nothing.
fn compare(path: &str, was: &Value, is: &Value, found: &mut Vec<String>) {
    let nothing = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        _ => false,
    };
    let numbers = was.as_f64().zip(is.as_f64()).is_some_and(|(was, is)| was == is);
    if was == is || numbers || (nothing(was) && nothing(is)) || IDLE.contains(&path) {
        return;
    }
    let below =
        |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match (was, is) {
        (Value::Object(a), Value::Object(b)) => {
            let new = b.keys().filter(|name| !a.contains_key(*name));
            for name in a.keys().chain(new) {
                compare(&below(name), &was[name], &is[name], found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (was, is)) in a.iter().zip(b).enumerate() {
                compare(&format!("{path}[{index}]"), was, is, found);
            }
        }
        _ => {
            let told = |value: &Value| match value {
                Value::Null => "nothing".to_owned(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            found.push(format!("{path}: was {}, is {}", told(was), told(is)));
        }
    }
}

/// Adds to the refusal of a checkpoint which values are others than when the run began.
pub(crate) fn explain(
    error: anyhow::Error,
    before: Option<&Before>,
    now: &Before,
) -> anyhow::Error {
    // Other refusals of a checkpoint have other reasons.
    let changed = |message: &str| message.contains("changed since this checkpoint");
    let of_checkpoint = error.chain().any(|cause| {
        let found = cause.downcast_ref::<Error>();
        matches!(found, Some(Error::Checkpoint { message, .. }) if changed(message))
    });
    let Some(before) = before.filter(|_| of_checkpoint) else { return error };
    let differences = before.differences(now);
    if differences.is_empty() {
        return error;
    }
    let listed = differences.join("; ");
    crate::failure::bad_input(format!(
        "--resume: other values than when the run began: {listed}; go on with the same ones, or start a \
         new run ({error:#})"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_that_changed_are_named() {
        let was = json!({
            "train": {"epochs": 2.0, "seed": 1, "save_every": 3}, "output": "a",
            "data": {"train": [{"path": "a", "weight": 1}], "mixing": null, "overlap_check": []},
        });
        let is = json!({
            "train": {"epochs": 4, "seed": 1, "save_every": 5}, "output": "b",
            "data": {"train": [{"path": "b", "weight": 1.0}], "turns": "last"},
        });
        let of = |recipe: Value| Before { recipe, data: None };
        assert_eq!(
            of(was.clone()).differences(&of(is)),
            [
                "train.epochs: was 2.0, is 4",
                "data.train[0].path: was a, is b",
                "data.turns: was nothing, is last"
            ]
        );
        assert!(of(was.clone()).differences(&of(was)).is_empty());
    }
}

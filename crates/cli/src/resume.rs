//! What may be another when a run goes on, and saying what is.
//!
//! A checkpoint holds the settings of its run. Where the result goes, how often it is saved and where
//! files lie may change; so may the length of the run, over which the learning rate's schedule is
//! stretched then. Anything else would make it another run.

use crate::failure::bad_input;
use crate::plan::Plan;
use crate::recipe::{Recipe, newer};
use hydralora_train::{OPTIMIZER, OPTIMIZERS, checkpoint};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Settings that change nothing in what is trained.
const FREE: &[&str] = &[
    "output",
    "model.path",
    "train.save_every",
    "train.keep_checkpoints",
    "data.streaming",
    "data.overlap_check",
    "data.overlap_words",
    "method.init_from",
];
/// How long a run is.
const LENGTH: &[&str] = &["train.epochs", "train.max_steps"];

/// What a checkpoint keeps of a run.
pub(crate) fn settings(plan: &Plan) -> Value {
    json!({
        "recipe": plan.recipe.resolved(),
        "base_model": plan.metadata.base_model,
        "base_fingerprint": plan.metadata.base_fingerprint,
        "data_fingerprint": plan.dataset.fingerprint(),
    })
}

/// A checkpoint that a run may go on from.
pub(crate) struct Continued {
    /// The fingerprint it was written with, where it is known to be of this run.
    pub(crate) fingerprint: Option<String>,
    /// What is to be told.
    pub(crate) notes: Vec<String>,
}

/// Refuses a recipe that says something else than the newest checkpoint's, as far as the recipe alone
/// tells.
pub(crate) fn check_recipe(recipe: &Recipe) -> anyhow::Result<()> {
    if !recipe.data.add_tokens.is_empty() {
        // Which rows the method trains for them the model says.
        return Ok(());
    }
    compare(&recipe.output, &recipe.resolved(), None).map(|_| ())
}

/// The newest checkpoint of a run, if the run that is to go on, of so many steps, is the one it belongs to.
pub(crate) fn check_plan(plan: &Plan, folder: &Path, steps: usize) -> anyhow::Result<Continued> {
    if let Some((step, _)) = checkpoint::list(folder)?.pop().filter(|(step, _)| *step > steps) {
        return Err(bad_input(format!(
            "--resume: {} has taken {step} steps, and the run is to have {steps}; expected at least as many",
            folder.display()
        )));
    }
    compare(folder, &plan.recipe.resolved(), Some(&settings(plan)))
}

fn compare(folder: &Path, recipe: &Value, now: Option<&Value>) -> anyhow::Result<Continued> {
    let none = Continued { fingerprint: None, notes: Vec::new() };
    // One that is damaged says nothing here; whoever reads it whole says what is wrong with it.
    let all = checkpoint::list(folder)?.into_iter().rev();
    let mut described =
        all.filter_map(|(step, path)| Some((step, checkpoint::describe(&path).ok()?)));
    // Builds before this one kept the fingerprint alone.
    let Some((step, (Some(then), fingerprint))) = described.next() else { return Ok(none) };
    let other = |key: &str| now.is_some_and(|now| now[key] != then[key]);
    let (base, data) = (other("base_fingerprint"), other("data_fingerprint"));
    let mut faults = Vec::new();
    let mut notes = Vec::new();
    let [mut before, mut after] = [then["recipe"].clone(), recipe.clone()];
    newer::leave_out(&mut before);
    newer::leave_out(&mut after);
    faults.extend(other_optimizer(&mut before, &mut after));
    for (field, was, is) in differences(&before, &after) {
        let line = format!("{field} was {was} and is {is} now");
        let of_data = field.ends_with(".path") || field == "data.template";
        if LENGTH.contains(&field.as_str()) {
            notes.push(line);
        } else if !(FREE.contains(&field.as_str()) || of_data && !data) {
            faults.push(line);
        }
    }
    if base {
        let name = |settings: &Value| settings["base_model"].as_str().unwrap_or("?").to_owned();
        let now = now.map(name).unwrap_or_default();
        faults.push(format!(
            "the base model was `{}` and is `{now}` now, which is another",
            name(&then)
        ));
    }
    if data && faults.is_empty() {
        faults.push(
            "the training data are others: a file, the chat template or the tokenizer changed"
                .to_owned(),
        );
    }
    // AdaLoRA and whatever else plans by it.
    let by_length = recipe["method"].get("total_step").is_some_and(Value::is_null);
    if !notes.is_empty() && by_length {
        faults.append(&mut notes);
        faults.push(format!(
            "the ranks of {} follow the length of the run, which cannot change",
            recipe["method"]["name"]
        ));
    }
    if faults.is_empty() {
        if !notes.is_empty() {
            notes.push("the learning rate follows its schedule over the new length".to_owned());
        }
        return Ok(Continued { fingerprint: Some(fingerprint), notes });
    }
    Err(bad_input(format!(
        "--resume: step {step} of {} belongs to a run with other settings:\n  {}\nresume with the same ones, \
         or start a new run",
        folder.display(),
        faults.join("\n  ")
    )))
}

/// What is to be said where two recipes have another optimizer. That is taken out of both then, with what
/// are options of the one or the other.
fn other_optimizer(before: &mut Value, after: &mut Value) -> Option<String> {
    let name = |recipe: &Value| {
        recipe["train"][OPTIMIZER].as_str().unwrap_or(OPTIMIZERS[0].name()).to_owned()
    };
    let (then, now) = (name(before), name(after));
    if then == now {
        return None;
    }
    for recipe in [before, after] {
        if let Some(train) = recipe["train"].as_object_mut() {
            let options = OPTIMIZERS.iter().flat_map(|kind| kind.defaults());
            let options: Vec<String> = options.map(|(option, _)| option).collect();
            train.retain(|key, _| key != OPTIMIZER && !options.contains(key));
        }
    }
    Some(format!("train.{OPTIMIZER} was \"{then}\" and is \"{now}\" now, which has another state"))
}

/// The values in which two recipes differ: field, before, now. What is left out counts like what says
/// nothing, so that options that came later are no difference.
fn differences(then: &Value, now: &Value) -> Vec<(String, Value, Value)> {
    let (mut before, mut after) = (Map::new(), Map::new());
    flatten("", then, &mut before);
    flatten("", now, &mut after);
    let mut fields: Vec<&String> = before.keys().chain(after.keys()).collect();
    fields.sort();
    fields.dedup();
    let of = |map: &Map<String, Value>, field: &str| map.get(field).cloned().unwrap_or(Value::Null);
    fields
        .into_iter()
        .map(|field| (field.clone(), of(&before, field), of(&after, field)))
        .filter(|(_, was, is)| says(was) != says(is) || says(was) && was != is)
        .collect()
}

fn says(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        _ => true,
    }
}

/// Every value of a recipe by its field.
fn flatten(field: &str, value: &Value, into: &mut Map<String, Value>) {
    match value {
        Value::Object(entries) if !entries.is_empty() => {
            for (key, value) in entries {
                let dot = if field.is_empty() { "" } else { "." };
                flatten(&format!("{field}{dot}{key}"), value, into);
            }
        }
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (index, value) in items.iter().enumerate() {
                flatten(&format!("{field}[{index}]"), value, into);
            }
        }
        other => {
            into.insert(field.to_owned(), other.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_optimizer_is_said_once() {
        // As builds with AdamW alone wrote it.
        let then = json!({"train": {"learning_rate": 0.01, "beta2": 0.999, "epsilon": 1e-8}});
        let now = json!({"train": {"optimizer": "lion", "learning_rate": 0.01, "beta2": 0.99}});
        let [mut before, mut after] = [then.clone(), now];
        let said = other_optimizer(&mut before, &mut after).unwrap();
        assert!(said.starts_with("train.optimizer was \"adamw\" and is \"lion\" now"), "{said}");
        assert_eq!((&before, &after), (&json!({"train": {"learning_rate": 0.01}}), &before));
        let [mut before, mut after] = [then.clone(), then.clone()];
        assert_eq!(other_optimizer(&mut before, &mut after), None);
        assert_eq!(before, then);
    }

    #[test]
    fn differences_name_the_field_and_both_values() {
        let then = json!({
            "train": {"learning_rate": 0.01, "max_steps": null, "seed": 1},
            "data": {"train": [{"path": "a", "weight": 1.0}], "shuffle": true},
            "method": {"name": "lora", "targets": ["q_proj"]},
        });
        let mut now = then.clone();
        now["method"]["rank_pattern"] = json!({});
        now["method"]["use_dora"] = json!(false);
        assert_eq!(differences(&then, &now), []);
        now["train"]["learning_rate"] = json!(0.5);
        now["train"]["max_steps"] = json!(3);
        now["data"]["shuffle"] = json!(false);
        now["data"]["train"][0]["weight"] = json!(2.0);
        now["method"]["targets"] = json!(["q_proj", "v_proj"]);
        let found: Vec<String> =
            differences(&then, &now).iter().map(|(f, a, b)| format!("{f} {a} {b}")).collect();
        let expected = [
            "data.shuffle true false",
            "data.train[0].weight 1.0 2.0",
            "method.targets [\"q_proj\"] [\"q_proj\",\"v_proj\"]",
            "train.learning_rate 0.01 0.5",
            "train.max_steps null 3",
        ];
        assert_eq!(found, expected);
    }
}

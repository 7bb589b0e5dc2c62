//! Recipes as people write them: with other programs' names, from other folders.

use crate::support::{Place, model};
use std::fs;

#[test]
fn names_of_other_programs_are_answered_in_one_round() {
    let place = Place::new();
    place.write(
        "field.yaml",
        &format!(
            "\
model: {{path: {}, torch_dtype: bf16}}
data:
  train:
    - {{path: animals.jsonl, type: alpaca}}
    - {{path: nowhere.jsonl}}
  max_seq_len: 9999
  val_set_size: 0.1
method: {{type: hydralora, r: 8, lora_alpha: 16, targets: w1, num_heads: 3}}
train:
  lr: 1.0e-4
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  lr_scheduler_type: cosine
  optim: adamw_torch
  report_to: wandb
  epochs: \"3\"
",
            model().display()
        ),
    );
    let ran = place.run(&["check", "field.yaml"]);
    assert_eq!(ran.code, Some(2));
    for line in [
        "field.yaml:1: model.torch_dtype: unknown option; here it is `dtype`",
        "field.yaml:4: data.train[0].type: unknown option; here it is `format`",
        "field.yaml:5: data.train[1].path: there is no file nowhere.jsonl",
        "field.yaml:6: data.max_seq_len: is 9999; the model's context holds 512",
        "field.yaml:7: data.val_set_size: unknown option; here it is `valid_fraction`",
        "field.yaml:8: method.type: unknown option; here it is `name`",
        "field.yaml:8: method.r: unknown option; here it is `rank`",
        "field.yaml:8: method.lora_alpha: unknown option; here it is `alpha`",
        "field.yaml:8: method.num_heads: unknown option; here it is `num_experts`",
        "field.yaml:8: method.targets: `w1` matches no linear layer",
        "field.yaml:10: train.lr: unknown option; here it is `learning_rate`",
        "field.yaml:11: train.per_device_train_batch_size: unknown option; here it is `batch_size`",
        "field.yaml:12: train.gradient_accumulation_steps: unknown option; here it is `grad_acc",
        "field.yaml:13: train.lr_scheduler_type: unknown option; here it is `schedule`",
        "field.yaml:14: train.optim: unknown option; here it is `optimizer`",
        "field.yaml:15: train.report_to: unknown option; metrics.jsonl",
        "field.yaml:16: train.epochs: is the text `3`; expected a number: write it without quotes",
    ] {
        assert!(ran.stderr.contains(line), "{line:?} is missing in\n{}", ran.stderr);
    }
    assert!(ran.stderr.contains("the recipe has 17 faults"), "{}", ran.stderr);
    assert!(ran.stderr.lines().all(|line| line.len() < 260), "{}", ran.stderr);
}

#[test]
fn a_change_is_blamed_on_the_argument() {
    let place = Place::new();
    let ran = place.run(&["check", "recipe.yaml", "--set", "train.lr=1", "--set", "method.rank=x"]);
    assert_eq!(ran.code, Some(2));
    for line in
        ["  --set train.lr=1: train.lr: unknown", "  --set method.rank=x: method.rank: is the"]
    {
        assert!(ran.stderr.contains(line), "{line:?} is missing in\n{}", ran.stderr);
    }
    assert!(!ran.stderr.contains("recipe.yaml:"), "{}", ran.stderr);
    let ran = place.run(&["train", "recipe.yaml", "--lr", "1e-4"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("`--set train.learning_rate=1e-4`"), "{}", ran.stderr);
}

#[test]
fn files_of_other_programs_are_called_by_their_name() {
    let place = Place::new();
    let axolotl = "base_model: x/y\ndatasets: [{path: tatsu-lab/alpaca, type: alpaca}]\n\
        sequence_len: 512\nmicro_batch_size: 2\noutput_dir: out\n";
    let factory = "model_name_or_path: x/y\nstage: sft\nfinetuning_type: lora\ncutoff_len: 512\n";
    for (text, name) in [(axolotl, "an Axolotl configuration"), (factory, "a LLaMA-Factory config")]
    {
        place.write("other.yaml", text);
        let ran = place.run(&["train", "other.yaml"]);
        assert_eq!(ran.code, Some(2));
        for part in [name, "docs/recipes.md", "here it is `data.max_seq_len`", "`model.path`"] {
            assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
        }
        assert!(!ran.stderr.contains("section is missing"), "{}", ran.stderr);
    }
}

#[test]
fn paths_count_from_the_recipe_and_elsewhere_with_a_note() {
    let place = Place::new();
    fs::create_dir_all(place.path("models")).unwrap();
    place.widened_model("models/own");
    let recipe = place.read("recipe.yaml");
    let start = recipe.find("path: ").unwrap() + 6;
    let end = start + recipe[start..].find('}').unwrap();
    let with_model = |path: &str| format!("{}{path}{}", &recipe[..start], &recipe[end..]);
    // Beside the recipe, and not where the command runs.
    let data = with_model("own").replace("animals.jsonl", "../animals.jsonl");
    place.write("models/near.yaml", &data.replace("colours.jsonl", "../colours.jsonl"));
    let ran = place.succeed(&["check", "models/near.yaml"]);
    assert!(!ran.stderr.contains("note:"), "{}", ran.stderr);
    // Where the command runs, and not beside the recipe.
    place.write("far/far.yaml", &with_model("models/own"));
    let ran = place.succeed(&["check", "far/far.yaml"]);
    for part in [
        "note: model.path: there is no models/own in the recipe's folder",
        "note: data.train[0].path: there is no animals.jsonl in the recipe's folder",
        "(../animals.jsonl would name it)",
    ] {
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
    // An argument counts from where the command runs, and needs no note.
    let set = ["--set", "model.path=models/own", "--set", "data.train.0.path=animals.jsonl"];
    let ran = place.succeed(&[&["check", "models/near.yaml"], &set[..]].concat());
    assert!(!ran.stderr.contains("note:"), "{}", ran.stderr);
    // What a run leaves says the same wherever it is read from.
    place.succeed(&["train", "models/near.yaml", "--quiet", "--set", "train.max_steps=2"]);
    let written = place.read("run/recipe.yaml");
    for part in ["path: ../models/own", "path: ../animals.jsonl"] {
        assert!(written.contains(part), "{part:?} is missing in\n{written}");
    }
    let again = ["train", "run/recipe.yaml", "--quiet", "--set", "output=again"];
    place.succeed(&again);
    let tensors =
        |run: &str| fs::read(place.path(run).join("adapter/adapter_model.safetensors")).unwrap();
    assert!(tensors("run") == tensors("again"));
    let ran = place.run(&["train", "run/recipe.yaml"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("holds a run already"), "{}", ran.stderr);
    place.succeed(&["train", "run/recipe.yaml", "--resume", "--quiet"]);
}

#[test]
fn check_and_train_say_steps_and_time() {
    let place = Place::new();
    let ran = place.succeed(&["check", "recipe.yaml"]);
    let line = ran.stdout.lines().find(|line| line.starts_with("steps ")).unwrap();
    assert!(line.contains("20 steps, about ") && line.contains(" tokens/s"), "{line}");
    let ran = place.succeed(&["check", "recipe.yaml", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json["estimate"]["steps"], 20);
    assert!(json["estimate"]["seconds"].as_f64().unwrap() > 0.0);
    let ran = place.succeed(&["train", "recipe.yaml"]);
    let base = ran.stderr.lines().find(|line| line.starts_with("base ")).unwrap();
    assert!(base.contains("held-out loss ") && base.contains("animals "), "{base}");
    let steps = ran.stderr.find("20 steps, about ").unwrap();
    assert!(steps < ran.stderr.find("base     held-out").unwrap(), "{}", ran.stderr);
    // The base's loss is TensorBoard's at step 0: a record without the field of a step above 0.
    let folder = fs::read_dir(place.path("run/tensorboard")).unwrap().next().unwrap().unwrap();
    let bytes = fs::read(folder.path()).unwrap();
    let (mut at, mut steps) = (0, Vec::new());
    while at < bytes.len() {
        let length = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let event = &bytes[at + 12..at + 12 + length];
        // Wall time is field 1; the step is field 2, a varint.
        if event.get(9) == Some(&0x10) {
            let held_out = event.windows(10).any(|part| part == b"valid/loss");
            steps.push((event[10], held_out));
        }
        at += length + 16;
    }
    assert_eq!(steps[0], (0, true), "{steps:?}");
    assert!(steps.iter().skip(1).all(|(step, _)| *step > 0), "{steps:?}");
}

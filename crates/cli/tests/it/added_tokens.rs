//! Tokens that a recipe adds to the vocabulary.

use crate::support::{Place, model};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::{Value, json as value};
use std::fs;
use std::path::PathBuf;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Data whose answers use two new tokens, of which the recipe says which they are.
pub(crate) fn place() -> Place {
    let place = Place::new();
    let lines = (0..24)
        .map(|i| format!("{{\"instruction\": \"Sky {i}?\", \"output\": \"<act>blue<end>\"}}\n"));
    place.write("act.jsonl", &lines.collect::<String>());
    let data = "data:\n  train: [{path: act.jsonl}]\n  template: plain\n  max_seq_len: 64\n  \
                valid_fraction: 0.2\n  add_tokens:\n    - <act>\n    - {text: <end>, special: true}\n";
    let recipe = place.read("recipe.yaml");
    let (start, rest) = recipe.split_once("data:").unwrap();
    let (_, rest) = rest.split_once("method:").unwrap();
    place.write("recipe.yaml", &format!("{start}{data}method:{rest}"));
    place
}

/// The tensors of a file, as names, shapes and numbers.
fn tensors(place: &Place, file: &str) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(place.path(file)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let read = |(name, view): (String, TensorView<'_>)| {
        let numbers = view.data().chunks_exact(4);
        let numbers = numbers.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        (name, view.shape().to_vec(), numbers)
    };
    tensors.tensors().into_iter().map(read).collect()
}

/// The trained model with its files changed, and `head` as its output layer if that is not tied.
fn variant(place: &Place, name: &str, untied: bool) -> PathBuf {
    let folder = place.path(name);
    fs::create_dir(&folder).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"] {
        fs::copy(model().join(file), folder.join(file)).unwrap();
    }
    if untied {
        let bytes = fs::read(model().join("model.safetensors")).unwrap();
        let stored = SafeTensors::deserialize(&bytes).unwrap();
        let embedding = stored.tensor("model.embed_tokens.weight").unwrap();
        let head =
            TensorView::new(Dtype::F32, embedding.shape().to_vec(), embedding.data()).unwrap();
        let mut all = stored.tensors();
        all.push(("lm_head.weight".to_owned(), head));
        fs::write(folder.join("model.safetensors"), serialize(all, None).unwrap()).unwrap();
        let config = fs::read_to_string(folder.join("config.json")).unwrap();
        let config =
            config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
        fs::write(folder.join("config.json"), config).unwrap();
    }
    folder
}

fn logits(place: &Place, model: &str, adapter: &[&str]) -> (Value, Vec<f64>) {
    let start = ["inspect", "--model", model, "--logits", "Sky<act>", "--json"];
    let found = json(&place.succeed(&[&start[..], adapter].concat()).stdout)["logits"].take();
    let last = found["last"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    (found["tokens"].clone(), last)
}

fn assert_close(found: &[f64], wanted: &[f64], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (found, wanted) in found.iter().zip(wanted) {
        assert!((found - wanted).abs() < 1e-3, "{what}: {found} {wanted}");
    }
}

#[test]
fn new_tokens_are_learnt_and_saved_with_the_adapter() {
    let place = place();
    let more = ["--set", "train.max_steps=60", "--set", "train.eval_every=60", "--quiet"];
    place.succeed(&[&["train", "recipe.yaml"][..], &more].concat());
    let saved = json(&place.read("run/adapter/hydralora.json"));
    let [act, end] = [("<act>", 512, false), ("<end>", 513, true)]
        .map(|(content, id, special)| value!({"id": id, "content": content, "special": special}));
    assert_eq!(saved["added_tokens"], value!([act, end]));
    let config = json(&place.read("run/adapter/adapter_config.json"));
    assert_eq!(config["trainable_token_indices"], value!([512, 513]));
    let rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
    let held = tensors(&place, "run/adapter/adapter_model.safetensors");
    let (_, shape, numbers) = held.iter().find(|(name, ..)| name == rows).unwrap();
    assert_eq!(*shape, [2, 64]);
    // They start at the mean of the others and move away from it.
    let base = fs::read(model().join("model.safetensors")).unwrap();
    let base = SafeTensors::deserialize(&base).unwrap();
    let table = base.tensor("model.embed_tokens.weight").unwrap();
    let mut mean = [0.0_f64; 64];
    for (at, b) in table.data().chunks_exact(4).enumerate() {
        mean[at % 64] += f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])) / 512.0;
    }
    let gap = |row: &[f32]| -> f64 {
        row.iter().zip(mean).map(|(value, mean)| (f64::from(*value) - mean).abs()).sum::<f64>()
    };
    for row in numbers.chunks_exact(64) {
        assert!((1e-2..64.0 * 1.0).contains(&gap(row)), "{}", gap(row));
    }
    let tokenizer = json(&place.read("run/adapter/tokenizer.json"));
    let listed = tokenizer["added_tokens"].as_array().unwrap();
    assert!(listed.iter().any(|token| token["content"] == "<end>" && token["id"] == 513));

    let model = model().display().to_string();
    let generate = ["generate", "--model", &model, "--adapter", "run/adapter", "--json"];
    let more = ["--prompt", "Sky 3?", "--max-new-tokens", "4"];
    let text = json(&place.succeed(&[&generate[..], &more].concat()).stdout)["text"].to_string();
    assert!(
        text.contains("<act>") && !text.contains("<end>"),
        "a special token is no text: {text}"
    );
    let (tokens, last) = logits(&place, &model, &["--adapter", "run/adapter"]);
    assert_eq!((tokens.as_array().unwrap().last(), last.len()), (Some(&value!(512)), 514));

    // The resolved recipe is a recipe, and goes on where this one ended.
    let resolved = ["--set", "data.train.0.path=../act.jsonl"];
    place.succeed(&[&["check", "run/recipe.yaml"][..], &resolved].concat());
    let resumed = ["train", "recipe.yaml", "--resume", "--quiet", "--set", "train.eval_every=60"];
    place.succeed(&[&resumed[..], &["--set", "train.max_steps=60"]].concat());
}

#[test]
fn a_run_of_no_steps_leaves_new_rows_at_the_mean_of_the_others() {
    let place = place();
    let set = ["train.max_steps=1", "train.learning_rate=1e-12", "method.name=lora"];
    let mut arguments = vec!["train", "recipe.yaml", "--quiet"];
    arguments.extend(set.iter().flat_map(|change| ["--set", change]));
    arguments.extend(["--set", "method={name: lora, rank: 2, targets: qv}"]);
    place.succeed(&arguments);
    let base = tensors(&place, &model().join("model.safetensors").display().to_string());
    let (.., table) = base.iter().find(|(name, ..)| name == "model.embed_tokens.weight").unwrap();
    let held = tensors(&place, "run/adapter/adapter_model.safetensors");
    let (.., rows) = held.iter().find(|(name, ..)| name.contains("trainable_tokens")).unwrap();
    for (at, value) in rows.iter().enumerate() {
        let column = table.iter().skip(at % 64).step_by(64);
        let mean = column.map(|&value| f64::from(value)).sum::<f64>() / 512.0;
        assert!((f64::from(*value) - mean).abs() < 1e-6, "{at}: {value} {mean}");
    }
}

#[test]
fn merged_models_have_grown() {
    for untied in [false, true] {
        let place = place();
        let model = variant(&place, "base", untied).display().to_string();
        let path = format!("model.path={model}");
        let set = [path.as_str(), "method={name: lora, rank: 2, targets: qv}"];
        let mut arguments = vec!["train", "recipe.yaml", "--quiet"];
        arguments.extend(set.iter().flat_map(|change| ["--set", change]));
        place.succeed(&arguments);
        let config = json(&place.read("run/adapter/adapter_config.json"));
        let ids = value!([512, 513]);
        let wanted = if untied { value!({"embed_tokens": ids, "lm_head": ids}) } else { ids };
        assert_eq!(config["trainable_token_indices"], wanted);
        let (tokens, wanted) = logits(&place, &model, &["--adapter", "run/adapter"]);
        for out in ["merged", "merged.gguf"] {
            let merge = ["merge", "--model", &model, "--adapter", "run/adapter", "--out", out];
            place.succeed(&[&merge[..], &["--dtype", "f32"]].concat());
            let (found_tokens, found) = logits(&place, out, &[]);
            assert_eq!(found_tokens, tokens, "{out}");
            assert_close(&found, &wanted, out);
        }
        let merged = json(&place.read("merged/config.json"));
        assert_eq!(merged["vocab_size"], 514);
        assert_eq!(merged["tie_word_embeddings"], !untied);
        // From the GGUF file, whose metadata are carried over, the same again.
        let plain = ["train", "recipe.yaml", "--quiet", "--set", "output=again", "--set"];
        let gguf = format!("model.path={}", place.path("merged.gguf").display());
        let tokens = "data.add_tokens=[<more>]";
        let method = "method={name: lora, rank: 2, targets: qv}";
        place.succeed(&[&plain[..], &[&gguf, "--set", tokens, "--set", method]].concat());
        let (_, wanted) = logits(&place, "merged.gguf", &["--adapter", "again/adapter"]);
        let merge = ["merge", "--model", "merged.gguf", "--adapter", "again/adapter"];
        place.succeed(&[&merge[..], &["--dtype", "f32", "--out", "more.gguf"]].concat());
        let (_, found) = logits(&place, "more.gguf", &[]);
        assert_eq!(found.len(), 515);
        assert_close(&found, &wanted, "more.gguf");
    }
}

#[test]
fn packed_models_grow_too() {
    let place = place();
    let wide = place.widened_model("wide").display().to_string();
    let merge = ["merge", "--model", &wide, "--adapter", "run/adapter", "--dtype", "q8_0"];
    let path = format!("model.path={wide}");
    let method = "method={name: hydralora, rank: 2, num_experts: 2, gate: uniform, targets: ffn}";
    let train = ["train", "recipe.yaml", "--quiet", "--set", method, "--set", "train.max_steps=3"];
    place.succeed(&[&train[..], &["--set", &path]].concat());
    place.succeed(&[&merge[..], &["--out", "packed.gguf"]].concat());
    // As a GGUF file has them, in blocks of Q8_0.
    let set = ["model.path=packed.gguf", "model.dtype=stored", "data.add_tokens=[<more>]"];
    let mut arguments = train.to_vec();
    arguments.extend(set.iter().flat_map(|change| ["--set", change]));
    place.succeed(&[&arguments[..], &["--set", "output=again"]].concat());
    let config = json(&place.read("again/adapter/adapter_config.json"));
    assert_eq!(config["trainable_token_indices"], value!([514]));
    let generate = ["generate", "--model", "packed.gguf", "--adapter", "again/adapter", "--json"];
    let tokens = |prompt: &str| {
        let more = ["--dtype", "stored", "--raw", "--max-new-tokens", "2", "--prompt", prompt];
        let ran = place.succeed(&[&generate[..], &more].concat());
        json(&ran.stdout)["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(tokens("Sky<act><more>"), tokens("Sky") + 2);
}

#[test]
fn tokens_that_make_no_sense_are_refused() {
    let place = place();
    let refused = |set: &[&str], says: &str| {
        let mut arguments = vec!["check", "recipe.yaml"];
        arguments.extend(set.iter().flat_map(|change| ["--set", change]));
        let ran = place.run(&arguments);
        assert_eq!(ran.code, Some(2), "{set:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains(says), "{set:?}\n{}", ran.stderr);
    };
    refused(
        &["data.add_tokens=[<act>, </s>]"],
        "data.add_tokens[1]: \"</s>\" is a token of the model already, 2",
    );
    refused(&["data.add_tokens=[<act>, '  ']"], "data.add_tokens[1]: \"  \" is blank");
    refused(&["data.add_tokens=['']"], "data.add_tokens[0]: \"\" is blank");
    refused(&["data.add_tokens=[<act>, <act>]"], "data.add_tokens[1]: \"<act>\" is listed twice");
    refused(&["data.add_tokens=[5]"], "expected a text, or {text: ..., special: true}");
    refused(&["data.add_tokens=[{text: a, spacial: true}]"], "expected a text");
    refused(&["method={name: ia3}"], "`ia3` trains no rows of the embedding");
    refused(&["method={name: full}"], "`full` trains no rows of the embedding");
    refused(&["method={name: ia3}"], "expected one of");
    let pair = "method={name: lora, targets: [q_proj, embed_tokens]}";
    refused(&[pair], "data.add_tokens");
    let recipe = place.read("recipe.yaml").replace("- <act>", "- \" \"");
    place.write("blank.yaml", &recipe);
    let ran = place.run(&["check", "blank.yaml"]);
    assert!(ran.stderr.contains("blank.yaml:8: data.add_tokens[0]"), "{}", ran.stderr);
}

#[test]
fn an_adapter_with_tokens_is_scored_alone_and_on_its_own_model() {
    let place = place();
    let method = "method={name: lora, rank: 2, targets: qv}";
    let train = ["train", "recipe.yaml", "--quiet", "--set", method, "--set", "train.max_steps=2"];
    place.succeed(&train);
    let none = ["--set", "data.add_tokens=[]", "--set", "output=none"];
    place.succeed(&[&train[..], &none].concat());
    let model = model().display().to_string();
    let eval = ["eval", "--model", &model, "--tasks", "loss:act.jsonl", "--json"];
    let with = |more: &[&str]| place.run(&[&eval[..], more].concat());
    let ran = with(&["--adapter", "run/adapter"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("with --skip-base"), "{}", ran.stderr);
    let ran = with(&["--adapter", "run/adapter", "--adapter", "none/adapter", "--skip-base"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("different added tokens"), "{}", ran.stderr);
    let ran = with(&["--adapter", "run/adapter", "--skip-base"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}

#[test]
fn tokens_of_a_folder_without_rows_get_them_when_others_are_added() {
    let place = place();
    let folder = variant(&place, "base", false);
    let path = folder.join("tokenizer.json");
    let mut tokenizer = json(&fs::read_to_string(&path).unwrap());
    let listed = tokenizer["added_tokens"].as_array_mut().unwrap();
    let mut extra = listed[0].clone();
    (extra["id"], extra["content"]) = (512.into(), "<extra>".into());
    listed.push(extra);
    fs::write(&path, tokenizer.to_string()).unwrap();
    let model = folder.display().to_string();
    let generate = ["generate", "--model", &model, "--raw", "--max-new-tokens", "1", "--prompt"];
    assert_eq!(place.run(&[&generate[..], &["Sky"]].concat()).code, Some(0));
    let ran = place.run(&[&generate[..], &["Sky <extra>"]].concat());
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("the token 512 (\"<extra>\"), which has no row"), "{}", ran.stderr);
    place.write("extra.jsonl", "{\"instruction\": \"a\", \"output\": \"<extra>\"}\n");
    let path = format!("model.path={model}");
    let method = "method={name: lora, rank: 2, targets: qv}";
    let train = ["train", "recipe.yaml", "--quiet", "--set", &path, "--set", method];
    let ran = place.run(
        &[&train[..], &["--set", "data.add_tokens=[]", "--set", "data.train.0.path=extra.jsonl"]]
            .concat(),
    );
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("which has no row"), "{}", ran.stderr);
    place.succeed(&train);
    let config = json(&place.read("run/adapter/adapter_config.json"));
    assert_eq!(config["trainable_token_indices"], value!([512, 513, 514]));
    let with = [&generate[..], &["Sky <extra><act>", "--adapter", "run/adapter"]].concat();
    assert_eq!(place.run(&with).code, Some(0));
}

/// A LoRA with rows of new tokens is exported, averaged and opened again; what cannot carry them says so.
#[test]
fn rows_of_new_tokens_go_along_with_a_lora() {
    let place = place();
    let train = |method: &str, seed: &str, out: &str| {
        let method = format!("method={{name: {method}, targets: ffn}}");
        let (seed, output) = (format!("train.seed={seed}"), format!("output={out}"));
        let sets = ["--set", &method, "--set", &seed, "--set", &output, "--quiet"];
        place.succeed(&[&["train", "recipe.yaml"][..], &sets].concat());
    };
    train("lora, rank: 2", "1", "one");
    train("lora, rank: 2", "2", "two");
    train("hydralora, rank: 2, num_experts: 2", "3", "routed");
    let base = model().display().to_string();
    let of = |adapter: &str| logits(&place, &base, &["--adapter", adapter]).1;
    place.succeed(&["export", "--adapter", "one", "--as", "lora", "--out", "plain"]);
    assert_close(&of("plain"), &of("one"), "exported");

    // With its gates held, a routed adapter is what merging with the same gates gives.
    let held = ["--adapter", "routed", "--gate", "uniform", "--out"];
    place.succeed(&[&["export", "--as", "lora"][..], &held, &["held"]].concat());
    place
        .succeed(&[&["merge", "--model", &base, "--dtype", "f32"][..], &held, &["whole"]].concat());
    let (_, merged) = logits(&place, &place.path("whole").display().to_string(), &[]);
    assert_close(&of("held"), &merged, "held");

    // The mean of the pairs and of the rows.
    place.succeed(&["compose", "--how", "average", "one", "one", "--out", "same"]);
    assert_close(&of("same"), &of("one"), "the mean of equal ones");
    place.succeed(&["compose", "--how", "average", "one", "two", "--out", "mean"]);
    let rows = |folder: &str| {
        let all = tensors(&place, &format!("{folder}/adapter_model.safetensors"));
        let found = all.into_iter().find(|(name, _, _)| name.contains("token_adapter"));
        found.unwrap_or_else(|| panic!("{folder} has no rows")).2
    };
    let [one, two] = ["one/adapter", "two/adapter"].map(rows);
    for (at, mean) in rows("mean").into_iter().enumerate() {
        assert!((mean - (one[at] + two[at]) / 2.0).abs() < 1e-6);
    }

    for (arguments, says) in [
        (&["compose", "--how", "ties", "one", "two", "--out", "x"][..], "expected `average`"),
        (&["import", "--from", "lora", "one", "two", "--out", "x"][..], "no heads"),
        (&["export", "--adapter", "one", "--as", "lora-gguf", "--out", "x"][..], "no place"),
    ] {
        let ran = place.run(arguments);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(says) && !place.path("x").exists(), "{}", ran.stderr);
    }
}

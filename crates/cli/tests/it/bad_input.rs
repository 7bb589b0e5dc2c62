//! What a user sees when something is wrong: the place, the cause, exit status 2.

use crate::support::{Place, model, ran};
use hydralora_model::gguf::{GgufWriter, Value};
use std::fs;
use std::process::Command;

fn refused(place: &Place, arguments: &[&str], parts: &[&str]) {
    let ran = place.run(arguments);
    assert_eq!(ran.code, Some(2), "{arguments:?}: {}", ran.stderr);
    assert!(ran.stderr.contains("error: "), "{}", ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    for part in parts {
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
    assert!(!place.path("run/adapter").exists());
}

#[test]
fn all_faults_of_a_recipe_come_at_once_with_their_lines() {
    let place = Place::new();
    place.write(
        "wrong.yaml",
        "\
model: {path: somewhere}
data:
  train:
    - {path: animals.jsonl, weight: 0}
    - {path: nowhere.jsonl}
  max_seq_len: 0
method: {name: hydralora, rank: 0, num_experts: none, drop: 0.1, alpha: -1}
trian: {}
train: {learning_rat: 1, batch_size: 0, schedule: cosin}
",
    );
    refused(
        &place,
        &["check", "wrong.yaml"],
        &[
            "wrong.yaml:4: data.train[0].weight",
            "wrong.yaml:5: data.train[1].path",
            "wrong.yaml:6: data.max_seq_len",
            "wrong.yaml:7: method.num_experts",
            "wrong.yaml:7: method.drop: unknown option; did you mean `dropout`?",
            "trian: unknown section; did you mean `train`?",
            "train.learning_rat: unknown option; did you mean `learning_rate`?",
            "train.schedule",
        ],
    );
    for (change, parts) in [
        ("method.rank=0", &["method.rank: is 0; expected at least 1"][..]),
        ("method.name=hydralor", &["did you mean `hydralora`?"]),
        ("method.rank=1000000000000", &["method: training it takes", "GB for the adapter alone"]),
        ("method.targets=w1", &["`w1` matches no linear layer", "q_proj"]),
        ("train.batch_size=0", &["train.batch_size: is 0"]),
        ("data.max_seq_len=600", &["data.max_seq_len: is 600", "512"]),
        ("model.path=nowhere", &["model.path", "no folder or file here"]),
    ] {
        refused(&place, &["train", "recipe.yaml", "--set", change], parts);
    }
    refused(&place, &["check", "absent.yaml"], &["absent.yaml", "cannot read the recipe"]);
    place.write("broken.yaml", "model: {path: [\n");
    refused(&place, &["check", "broken.yaml"], &["broken.yaml", "not valid YAML"]);
}

#[test]
fn data_that_cannot_be_read_names_file_line_and_field() {
    let place = Place::new();
    let check = ["check", "recipe.yaml"];
    place.write(
        "animals.jsonl",
        "{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"a\"\n",
    );
    refused(&place, &check, &["animals.jsonl", "line 2", "not valid JSON"]);
    place.write("animals.jsonl", "{\"instruction\": \"a\", \"output\": 3}\n");
    refused(&place, &check, &["animals.jsonl", "line 1", "`output`"]);
    place.write("animals.jsonl", "");
    refused(&place, &check, &["animals.jsonl", "no record"]);
}

/// A copy of the model to spoil.
fn copy_model(place: &Place) -> String {
    let folder = place.path("model");
    fs::create_dir_all(&folder).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(model().join(name), folder.join(name)).unwrap();
    }
    format!("model.path={}", folder.display())
}

fn change_config(place: &Place, from: &str, to: &str) {
    let text = place.read("model/config.json");
    assert!(text.contains(from), "{text}");
    place.write("model/config.json", &text.replace(from, to));
}

#[test]
fn a_model_that_is_not_whole_is_refused() {
    let place = Place::new();
    let set = copy_model(&place);
    let check = ["check", "recipe.yaml", "--set", &set];
    let weights = fs::read(place.path("model/model.safetensors")).unwrap();

    fs::write(place.path("model/model.safetensors"), &weights[..weights.len() - 100]).unwrap();
    refused(&place, &check, &["model.safetensors", "not a whole safetensors file"]);
    fs::remove_file(place.path("model/model.safetensors")).unwrap();
    refused(&place, &check, &["no model here"]);
    place.write(
        "model/model.safetensors.index.json",
        r#"{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}"#,
    );
    refused(&place, &check, &["lists the shard", "model-00001.safetensors"]);
    fs::remove_file(place.path("model/model.safetensors.index.json")).unwrap();
    fs::write(place.path("model/model.safetensors"), &weights).unwrap();

    let config = place.read("model/config.json");
    for (from, to, parts) in [
        ("\"llama\"", "\"mamba\"", &["model_type `mamba` is not supported", "llama"][..]),
        ("\"hidden_size\": 64", "\"hidden_size\": 32", &["has shape", "expected"]),
        ("\"num_hidden_layers\": 5", "\"num_hidden_layers\": 4", &["does not use the tensors"]),
        (
            "\"num_hidden_layers\": 5",
            "\"num_hidden_layers\": 6",
            &["`model.layers.5", "is missing"],
        ),
        ("\"num_key_value_heads\": 4", "\"num_key_value_heads\": 3", &["num_key_value_heads"]),
        ("\"hidden_size\": 64,", "", &["hidden_size: missing"]),
    ] {
        change_config(&place, from, to);
        refused(&place, &check, parts);
        place.write("model/config.json", &config);
    }

    let tokenizer = place.read("model/tokenizer_config.json");
    place.write("model/tokenizer_config.json", &tokenizer.replace("</s>", "<|end|>"));
    refused(&place, &check, &["eos_token is `<|end|>`, which is not in the vocabulary"]);
    place.write("model/tokenizer_config.json", &tokenizer);
    fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    refused(&place, &check, &["tokenizer.json"]);

    place.write("half.gguf", "GGUF\u{3}\0\0\0");
    refused(
        &place,
        &["check", "recipe.yaml", "--set", "model.path=half.gguf"],
        &["half.gguf", "cut off"],
    );
    place.write("text.gguf", "not a model");
    refused(
        &place,
        &["check", "recipe.yaml", "--set", "model.path=text.gguf"],
        &["not a GGUF file"],
    );
    GgufWriter::new()
        .metadata("general.architecture", Value::String("qwen3moe".to_owned()))
        .metadata("qwen3moe.expert_count", Value::U32(128))
        .write(&place.path("experts.gguf"))
        .unwrap();
    refused(
        &place,
        &["check", "recipe.yaml", "--set", "model.path=experts.gguf"],
        &["experts.gguf: this is a mixture of experts (`qwen3moe`, 128 experts a layer)"],
    );
}

#[test]
fn an_adapter_that_does_not_fit_is_refused() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", "output=good"]);
    let base = model().display().to_string();
    let generate = |adapter: &'static str| {
        ["generate", "--model", &base, "--raw", "--prompt", "a", "--adapter", adapter]
            .map(str::to_owned)
            .to_vec()
    };
    let refused_with = |adapter: &'static str, parts: &[&str]| {
        let arguments = generate(adapter);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        refused(&place, &arguments, parts);
    };
    refused_with("absent", &["--adapter", "no such folder", "adapter_config.json"]);
    refused_with("good/metrics.jsonl", &["this is a file"]);
    refused_with("good/tensorboard", &["holds no adapter", "adapter_config.json"]);

    // Another base: same shapes, other weights.
    copy_model(&place);
    let mut weights = fs::read(place.path("model/model.safetensors")).unwrap();
    let last = weights.len() - 2;
    weights[last] ^= 1;
    fs::write(place.path("model/model.safetensors"), weights).unwrap();
    refused(
        &place,
        &["generate", "--model", "model", "--raw", "--prompt", "a", "--adapter", "good/adapter"],
        &["was trained on `", "stories260K` (fingerprint", "the model given is `", "/model` (fing"],
    );

    let config = place.read("good/adapter/adapter_config.json");
    for (from, to, parts) in [
        ("\"HYDRALORA\"", "\"VERA\"", &["peft_type is \"VERA\"", "hydralora"][..]),
        ("\"r\": 2", "\"r\": 4", &["has shape", "lora_A"]),
        (
            "\"lora_nums\": 3",
            "\"lora_nums\": 4",
            &["lora_route.weight` has shape [3, 64], expected [4, 64]"],
        ),
        ("\"lora_nums\": 3", "\"lora_nums\": 2", &["has shape [3, 64], expected [2, 64]"]),
    ] {
        assert!(config.contains(from), "{config}");
        place.write("good/adapter/adapter_config.json", &config.replace(from, to));
        refused_with("good/adapter", parts);
    }
    // An option of tomorrow's PEFT is named, not ignored.
    let unknown = config.replacen('{', "{\"use_tomorrow\": {\"much\": 1},", 1);
    place.write("good/adapter/adapter_config.json", &unknown);
    refused_with("good/adapter", &["use_tomorrow", "not known here"]);
    place.write("good/adapter/adapter_config.json", &config);

    let tensors = fs::read(place.path("good/adapter/adapter_model.safetensors")).unwrap();
    let mut spoiled = tensors.clone();
    let at = spoiled.len() - 4;
    spoiled[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(place.path("good/adapter/adapter_model.safetensors"), &spoiled).unwrap();
    refused_with("good/adapter", &["holds NaN", "expected finite numbers"]);
    fs::write(place.path("good/adapter/adapter_model.safetensors"), &tensors[..400]).unwrap();
    refused_with("good/adapter", &["adapter_model.safetensors"]);
}

/// The same widths, but fewer layers: every tensor would find a place.
#[test]
fn an_adapter_of_a_smaller_model_is_refused() {
    let place = Place::new();
    let method =
        "method={name: lora, rank: 2, targets: [\"model.layers.0.*\", \"model.layers.1.*\"]}";
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", "output=few", "--set", method]);
    let folder = model().display().to_string();
    let generate =
        ["generate", "--model", &folder, "--raw", "--prompt", "a", "--adapter", "few/adapter"];
    let ran = place.run(&[&generate[..], &["--max-new-tokens", "1"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let text = place.read("few/adapter/adapter_config.json");
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["target_modules"] = serde_json::json!(["q_proj", "down_proj"]);
    place.write("few/adapter/adapter_config.json", &config.to_string());
    refused(&place, &generate, &["layers.2.self_attn.q_proj", "nor for 5 more", "another model"]);
}

#[test]
fn methods_that_do_not_go_together_are_refused() {
    let place = Place::new();
    for (method, parts) in [
        ("{name: lora, use_dora: true, init_lora_weights: pissa}", &["use one of them"][..]),
        ("{name: lora, init_lora_weights: rlora}", &["several heads"]),
        ("{name: hydralora, init_lora_weights: pissa}", &["single pair"]),
        ("{name: hydralora, gate: none, router_top_k: 2}", &["router_top_k", "gate: softmax"]),
        ("{name: hydralora, route_on: a, router_scope: block}", &["router_scope", "route_on: a"]),
        ("{name: hydralora, use_dora: true}", &["method.use_dora: unknown option"]),
        ("{name: mtl-lora}", &["method.domains: is empty"]),
        ("{name: mtl-lora, domains: [a, a]}", &["names a domain twice"]),
        ("[lora, ia3]", &["method"]),
    ] {
        let method = format!("method={method}");
        refused(&place, &["check", "recipe.yaml", "--set", &method], parts);
    }
    for name in ["full", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning"] {
        let method = format!("method={{name: {name}}}");
        let ratio = "train.b_learning_rate_ratio=4";
        let arguments = ["check", "recipe.yaml", "--set", &method, "--set", ratio];
        refused(&place, &arguments, &["b_learning_rate_ratio: is 4", name]);
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint() {
    let place = Place::new();
    let train = |warmup: &str| {
        place.run(&[
            "train",
            "recipe.yaml",
            "--quiet",
            "--set",
            "train.learning_rate=1e38",
            "--set",
            "train.save_every=1",
            "--set",
            warmup,
            "--set",
            "train.eval_every=0",
        ])
    };
    // At once so far off that the weights cannot be saved.
    let ran = train("train.warmup_steps=2");
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    for part in ["step 1: `", "is not finite any more; training stopped"] {
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
    let ran = train("train.warmup_steps=7");
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    for part in ["step ", "not finite", "training stopped"] {
        let inf = part == "not finite" && ran.stderr.contains("the loss is");
        assert!(inf || ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
    assert!(ran.stderr.contains("the last checkpoint is run/checkpoints/step-"), "{}", ran.stderr);
    assert!(!place.path("run/adapter").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said_and_leaves_no_half_written_file() {
    const MOUNT: [&str; 3] = ["unshare", "--map-root-user", "--mount"];
    let place = Place::new();
    let may = Command::new(MOUNT[0]).args(&MOUNT[1..]).arg("true").output();
    if !may.is_ok_and(|output| output.status.success()) {
        hydralora_testing::skip("mounts", "a small file system cannot be mounted here");
        return;
    }
    fs::create_dir_all(place.path("run")).unwrap();
    // Room for the records, but not for a checkpoint.
    let script = "mount -t tmpfs -o size=64k tmpfs run && \"$@\"; code=$?; find run; exit $code";
    let mut command = Command::new(MOUNT[0]);
    command.args(&MOUNT[1..]).args(["sh", "-c", script, "sh", env!("CARGO_BIN_EXE_hydralora")]);
    command.args(["train", "recipe.yaml", "--quiet"]).current_dir(place.path(""));
    let ran = ran(command.output().unwrap());
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("No space left on device"), "{}", ran.stderr);
    assert!(ran.stderr.contains("step-000005"), "{}", ran.stderr);
    assert!(ran.stdout.contains("run/recipe.yaml"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("run/adapter") && !ran.stdout.contains(".tmp"), "{}", ran.stdout);
}

#[test]
fn sampling_options_are_checked() {
    let place = Place::new();
    let base = model().display().to_string();
    let arguments =
        ["generate", "--model", &base, "--prompt", "a", "--temperature=-1", "--top-p", "2"];
    refused(&place, &arguments, &["--temperature: is -1", "--top-p: is 2"]);
    refused(&place, &["generate", "--model", &base, "--prompt", "a"], &["has no chat template"]);
    refused(&place, &["inspect"], &["nothing to inspect"]);
}

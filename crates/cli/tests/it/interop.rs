//! Exchange with other programs, on adapters and logits that PEFT and PyTorch made
//! (`tests/interop/make_fixtures.py`), and merging, exporting, importing and composing by command.

use crate::support::{Place, Ran, model};
use hydralora_model::gguf::Value as GgufValue;
use hydralora_model::{GgufFile, interleaved_row};
use serde_json::Value;
use std::path::{Path, PathBuf};

const PROMPT: &str = "Once upon a time";

fn fixture(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/interop");
    folder.join(name).display().to_string()
}

fn json(ran: &Ran) -> Value {
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {}", ran.stdout))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// What the other side computed.
fn wanted(name: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(fixture("logits.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    numbers(&all["logits"][name])
}

fn logits(place: &Place, model: &str, adapter: Option<&str>) -> Vec<f64> {
    let mut arguments = vec!["inspect", "--model", model, "--logits", PROMPT, "--json"];
    if let Some(adapter) = adapter {
        arguments.extend(["--adapter", adapter]);
    }
    let found = json(&place.succeed(&arguments));
    assert_eq!(numbers(&found["logits"]["tokens"]), [1.0, 403.0, 407.0, 261.0, 378.0]);
    numbers(&found["logits"]["last"])
}

/// The largest difference relative to the largest logit.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

fn folder() -> String {
    model().display().to_string()
}

fn gguf() -> String {
    model().join("stories260K.gguf").display().to_string()
}

fn refused(place: &Place, arguments: &[&str], words: &[&str]) {
    let ran = place.run(arguments);
    assert_eq!(ran.code, Some(2), "{arguments:?}\n{}\n{}", ran.stdout, ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{word} is missing in\n{}", ran.stderr);
    }
}

#[test]
fn adapters_of_peft_give_pefts_logits() {
    let place = Place::new();
    let base = logits(&place, &folder(), None);
    for name in [
        "lora",
        "lora_rslora",
        "adalora",
        "ia3",
        "prompt_tuning",
        "p_tuning",
        "prefix_tuning",
        "official_hydralora",
        "official_hydralora_bf16",
        "official_loramoe",
    ] {
        let found = logits(&place, &folder(), Some(&fixture(name)));
        let off = distance(&wanted(name), &found);
        assert!(off < 2e-5, "{name}: {off}");
        assert!(distance(&base, &found) > 1e-2, "{name} does nothing");
    }
}

#[test]
fn a_merged_model_has_the_adapters_logits_from_either_base_in_either_form() {
    let place = Place::new();
    for base in [folder(), gguf()] {
        for name in ["lora", "lora_rslora", "adalora", "ia3"] {
            let adapter = fixture(name);
            let adapted = logits(&place, &base, Some(&adapter));
            for (out, dtype, limit) in [
                ("merged", "f16", 3e-3),
                ("merged.gguf", "f16", 3e-3),
                ("exact", "f32", 2e-6),
                ("exact.gguf", "f32", 2e-6),
                ("brief", "bf16", 3e-2),
                ("small.gguf", "q8_0", 5e-2),
            ] {
                let arguments = [
                    "merge",
                    "--model",
                    &base,
                    "--adapter",
                    &adapter,
                    "--out",
                    out,
                    "--dtype",
                    dtype,
                ];
                place.succeed(&arguments);
                let merged = logits(&place, &place.path(out).display().to_string(), None);
                let off = distance(&adapted, &merged);
                assert!(off < limit, "{name} into {base} as {out}: {off}");
            }
        }
    }
}

fn trained(place: &Place, run: &str, method: &str) -> String {
    let output = format!("output={run}");
    let method = format!("method={method}");
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", &output, "--set", &method]);
    format!("{run}/adapter")
}

#[test]
fn a_router_is_held_still_and_what_that_costs_is_said() {
    let place = Place::new();
    for scope in ["linear", "block"] {
        let run = format!("run-{scope}");
        let method = format!(
            "{{name: hydralora, rank: 2, alpha: 16, num_experts: 3, targets: ffn, router_scope: {scope}}}"
        );
        let adapter = trained(&place, &run, &method);
        let base = ["merge", "--model", &folder(), "--adapter", &adapter].map(str::to_owned);
        let with = |more: &[&str]| {
            base.iter().map(String::as_str).chain(more.iter().copied()).map(str::to_owned).collect()
        };
        let plain: Vec<String> = with(&["--out", "never"]);
        let plain: Vec<&str> = plain.iter().map(String::as_str).collect();
        refused(&place, &plain, &["for every token", "--calibration", "--gate uniform"]);
        assert!(!place.path("never").exists());

        let measured: Vec<String> =
            with(&["--out", "mean", "--dtype", "f32", "--calibration", "animals.jsonl", "--json"]);
        let measured: Vec<&str> = measured.iter().map(String::as_str).collect();
        let found = json(&place.succeed(&measured));
        let loss = |key: &str| found["held_out_loss"][key].as_f64().unwrap();
        assert!((loss("fixed") - loss("adapted") - loss("difference")).abs() < 1e-9);
        assert!(loss("difference").abs() < 0.2 && loss("adapted") > 0.0, "{found}");
        let gates = found["gates"].as_object().unwrap();
        assert_eq!(gates.len(), 15);
        for gates in gates.values() {
            let gates = numbers(gates);
            assert_eq!(gates.len(), 3);
            assert!((gates.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{gates:?}");
        }
        // The export with the same gates is the same model as the merged one.
        let arguments = [
            "export",
            "--adapter",
            &adapter,
            "--as",
            "lora",
            "--model",
            &folder(),
            "--calibration",
            "animals.jsonl",
            "--out",
            "exported",
            "--json",
        ];
        let exported = json(&place.succeed(&arguments));
        assert_eq!(exported["rank"], 6);
        let cost = exported["held_out_loss"]["fixed"].as_f64().unwrap();
        assert!((cost - loss("fixed")).abs() < 1e-4, "{cost} {found}");
        let merged = logits(&place, &place.path("mean").display().to_string(), None);
        let exported = logits(&place, &folder(), Some("exported"));
        assert!(distance(&merged, &exported) < 1e-5);
        // So is the one with its heads added up.
        let mut compact = arguments.to_vec();
        compact[10] = "compact";
        compact.push("--compact");
        assert_eq!(json(&place.succeed(&compact))["rank"], 2);
        assert!(distance(&merged, &logits(&place, &folder(), Some("compact"))) < 1e-5);
    }
}

#[test]
fn an_even_gate_needs_no_model_and_the_published_form_comes_back() {
    let place = Place::new();
    let adapter =
        trained(&place, "run", "{name: hydralora, rank: 2, num_experts: 3, targets: ffn}");
    let export = |form: &str, out: &str, more: &[&str]| {
        let mut arguments = vec!["export", "--adapter", &adapter, "--as", form, "--out", out];
        arguments.extend(more);
        place.succeed(&arguments);
    };
    export("lora", "even", &["--gate", "uniform"]);
    let config: Value = serde_json::from_str(&place.read("even/adapter_config.json")).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["r"], 6);
    assert_eq!(config["lora_alpha"], 96);
    assert_eq!(config["target_modules"], serde_json::json!(["gate_proj", "up_proj", "down_proj"]));
    assert_ne!(logits(&place, &folder(), Some("even")), logits(&place, &folder(), None));

    export("hydralora-official", "official", &[]);
    let config: Value = serde_json::from_str(&place.read("official/adapter_config.json")).unwrap();
    assert_eq!((&config["peft_type"], &config["lora_nums"]), (&"LORA".into(), &3.into()));
    place.succeed(&["import", "--from", "hydralora-official", "official", "--out", "back"]);
    let own = logits(&place, &folder(), Some(&adapter));
    for again in ["official", "back"] {
        assert_eq!(own, logits(&place, &folder(), Some(again)), "{again}");
    }
    // Options that the published code lacks are named.
    let uniform =
        trained(&place, "uniform", "{name: hydralora, rank: 2, gate: uniform, targets: ffn}");
    let arguments =
        ["export", "--adapter", &uniform, "--as", "hydralora-official", "--out", "never"];
    refused(&place, &arguments, &["gate", "uniform", "published code"]);
}

#[test]
fn published_checkpoints_become_ours() {
    let place = Place::new();
    for (name, kind) in [("official_hydralora", "HYDRALORA"), ("official_loramoe", "LORAMOE")] {
        for more in [&[][..], &["--model", &folder()]] {
            let fixture = fixture(name);
            let mut arguments =
                vec!["import", "--from", "hydralora-official", &fixture, "--out", name, "--json"];
            arguments.extend(more);
            assert_eq!(json(&place.succeed(&arguments))["peft_type"], kind);
            let off = distance(&wanted(name), &logits(&place, &folder(), Some(name)));
            assert!(off < 2e-5, "{name}: {off}");
        }
        assert!(place.path(name).join("hydralora.json").exists(), "the base is recorded");
    }
    let config: Value =
        serde_json::from_str(&place.read("official_loramoe/adapter_config.json")).unwrap();
    assert_eq!(config["balance_delta"], 0.1);
    assert_eq!(config["balance_weight"], 0.01);
}

#[test]
fn pickles_that_are_not_tensors_are_refused() {
    let place = Place::new();
    let import = |name: &str, words: &[&str]| {
        let fixture = fixture(name);
        refused(
            &place,
            &["import", "--from", "hydralora-official", &fixture, "--out", "never"],
            words,
        );
    };
    import("official_hydralora_legacy", &["adapter_model.bin", "before 1.6"]);
    import("official_evil", &["adapter_model.bin", "print", "refused"]);
    import("lora", &["lora_nums", "adapter_config.json"]);
    // A number that is not finite, and a file that was cut off.
    let spoil = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        std::fs::create_dir_all(place.path(name)).unwrap();
        let from = PathBuf::from(fixture("official_hydralora"));
        std::fs::copy(
            from.join("adapter_config.json"),
            place.path(name).join("adapter_config.json"),
        )
        .unwrap();
        let mut bytes = std::fs::read(from.join("adapter_model.bin")).unwrap();
        change(&mut bytes);
        std::fs::write(place.path(name).join("adapter_model.bin"), bytes).unwrap();
        let arguments = ["import", "--from", "hydralora-official", name, "--out", "never"];
        refused(&place, &arguments, &["adapter_model.bin"]);
    };
    spoil("short", &|bytes| bytes.truncate(bytes.len() / 2));
    spoil("empty", &|bytes| bytes.clear());
    assert!(!place.path("never").exists());
}

#[test]
fn separately_trained_loras_become_heads() {
    let place = Place::new();
    let (a, b) = (fixture("compose_a"), fixture("compose_b"));
    // Two equal heads weigh the same under any gate.
    let arguments = ["import", "--from", "lora", &a, &a, "--out", "heads", "--json"];
    let made = json(&place.succeed(&arguments));
    assert_eq!(made["peft_type"], "HYDRALORA");
    assert_eq!(made["parameters"]["router"], 5 * 2 * 64);
    let own = logits(&place, &folder(), Some(&a));
    assert!(distance(&own, &logits(&place, &folder(), Some("heads"))) < 1e-5);
    // It can be trained on.
    let tensors =
        |out: &str| std::fs::read(place.path(out).join("adapter_model.safetensors")).unwrap();
    for (seed, out) in [("1", "one"), ("1", "again"), ("2", "two")] {
        place.succeed(&["import", "--from", "lora", &a, &a, "--out", out, "--seed", seed]);
    }
    assert!(tensors("one") == tensors("again") && tensors("one") != tensors("two"));

    let lora = |from: &[&str], words: &[&str]| {
        let mut arguments = vec!["import", "--from", "lora", "--out", "never"];
        arguments.extend(from);
        refused(&place, &arguments, words);
    };
    lora(&[&a, &b], &["scales 2 and 3", "lora_alpha 4 and 6", "compose_a", "compose_b"]);
    lora(&[&a], &["at least 2"]);
    lora(&[&a, &fixture("lora")], &["only one of them changes"]);
    lora(&[&a, &fixture("lora_rslora")], &["ranks 2 and 3"]);
    lora(&[&a, &fixture("ia3")], &["no plain LoRA", "IA3"]);
    lora(&[&a, "nowhere"], &["nowhere"]);
}

#[test]
fn compositions_are_pefts() {
    let place = Place::new();
    let (a, b) = (fixture("compose_a"), fixture("compose_b"));
    let composed = |how: &str, out: &str, more: &[&str]| {
        let mut arguments = vec!["compose", &a, &b, "--how", how, "--out", out];
        arguments.extend(more);
        place.succeed(&arguments);
        logits(&place, &folder(), Some(out))
    };
    let weights = ["--weights", "0.7,-0.4"];
    for (how, name, more) in [
        ("linear", "compose_linear", &[][..]),
        ("task-arithmetic", "compose_cat", &[]),
        ("task-arithmetic", "compose_svd", &["--rank", "3"]),
        ("ties", "compose_ties", &["--density", "0.5"]),
    ] {
        let found = composed(how, name, &[&weights, more].concat());
        let off = distance(&wanted(name), &found);
        assert!(off < 2e-5, "{name}: {off}");
    }
    let half = composed("task-arithmetic", "half", &["--weights", "0.5,0.5"]);
    assert_eq!(composed("average", "average", &[]), half);
    // Nothing dropped, DARE is what it builds on.
    let whole = ["--density", "1"];
    for (dare, plain) in [("dare-linear", "linear"), ("dare-ties", "ties")] {
        assert_eq!(
            composed(dare, "dare", &[&weights[..], &whole].concat()),
            composed(plain, "plain", &[&weights[..], &whole].concat())
        );
    }
    let thin = |seed: &str| composed("dare-linear", "thin", &["--density", "0.5", "--seed", seed]);
    assert_eq!(thin("1"), thin("1"));
    assert_ne!(thin("1"), thin("2"));

    let wrong = |how: &str, from: &[&str], more: &[&str], words: &[&str]| {
        let mut arguments = vec!["compose", "--how", how, "--out", "never"];
        arguments.extend(from);
        arguments.extend(more);
        refused(&place, &arguments, words);
    };
    let r3 = fixture("lora_rslora");
    wrong("ties", &[&a, &r3], &[], &["ranks 2 and 3", "average"]);
    wrong("linear", &[&a, &b], &["--weights", "1"], &["weights: 1 given for 2"]);
    wrong("ties", &[&a, &b], &["--density", "0"], &["density: is 0"]);
    wrong("linear", &[&a, &b], &["--rank", "2"], &["rank"]);
    wrong("average", &[&a, &b], &["--weights", "1,1"], &["task-arithmetic"]);
    wrong("average", &[&a], &[], &["at least 2"]);
    wrong("lorahub", &[&a, &b], &[], &["--model", "--data"]);
    wrong("average", &[&a, &fixture("adalora")], &[], &["no plain LoRA", "ADALORA"]);
}

#[test]
fn lorahub_finds_weights_that_lower_the_loss() {
    let place = Place::new();
    let lora = |run: &str| trained(&place, run, "{name: lora, rank: 2, alpha: 4, targets: qv}");
    let (good, other) = (lora("good"), fixture("compose_b"));
    // The other was made for another purpose and covers other layers.
    let arguments = ["compose", &good, &other, "--how", "lorahub", "--out", "never"];
    let more = ["--model", &folder(), "--data", "animals.jsonl", "--budget", "5"];
    refused(&place, &[&arguments[..], &more].concat(), &["their layers differ"]);
    place.succeed(&["compose", &good, &good, "--how", "dare-linear", "--out", "noisy"]);
    // Scales have to agree, so both go through the same way.
    place.succeed(&["compose", &good, &good, "--how", "linear", "--out", "same"]);
    let arguments = ["compose", "same", "noisy", "--how", "lorahub", "--out", "hub", "--json"];
    let more = ["--model", &folder(), "--data", "animals.jsonl", "--budget", "15"];
    let arguments = [&arguments[..], &more].concat();
    let found = json(&place.succeed(&arguments));
    let weights = numbers(&found["weights"]);
    assert!(weights.iter().all(|weight| weight.abs() <= 1.5), "{weights:?}");
    let (before, after) = (found["base_loss"].as_f64().unwrap(), found["loss"].as_f64().unwrap());
    assert!(after < before - 0.05, "{before} -> {after} with {weights:?}");
    assert_eq!(numbers(&json(&place.succeed(&arguments))["weights"]), weights, "nothing is drawn");
    assert!(place.path("hub/adapter_model.safetensors").exists());
}

#[test]
fn llama_cpp_gets_the_rows_in_its_order() {
    let place = Place::new();
    let adapter = fixture("lora");
    let arguments = [
        "export",
        "--adapter",
        &adapter,
        "--as",
        "lora-gguf",
        "--model",
        &folder(),
        "--out",
        "a.gguf",
    ];
    place.succeed(&arguments);
    let bytes = std::fs::read(place.path("a.gguf")).unwrap();
    let file = GgufFile::parse(&bytes, Path::new("a.gguf")).unwrap();
    let text = |key: &str| file.str(key).unwrap().unwrap().to_owned();
    assert_eq!(text("general.type"), "adapter");
    assert_eq!(text("adapter.type"), "lora");
    assert_eq!(text("general.architecture"), "llama");
    assert_eq!(file.get("adapter.lora.alpha"), Some(&GgufValue::F32(4.0)));
    assert_eq!(file.tensors().len(), 2 * 2 * 5);
    let stored = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        let floats = bytes[tensor.range.clone()].as_chunks::<4>().0.iter();
        (tensor.shape.clone(), floats.map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>())
    };
    let (shape, _) = stored("blk.3.ffn_down.weight.lora_a");
    assert_eq!(shape, [2, 172]);
    let (shape, b) = stored("blk.3.attn_q.weight.lora_b");
    assert_eq!(shape, [64, 2]);
    let tensors = hydralora_peft::io::decode(
        &Path::new(&adapter).join("adapter_model.safetensors"),
        hydralora_kernels::DType::F32,
    )
    .unwrap();
    let own = tensors["model.layers.3.self_attn.q_proj.lora_B.weight"].to_f32();
    for row in 0..64 {
        let at = interleaved_row(row, 64, 8);
        assert_eq!(own[row * 2..row * 2 + 2], b[at * 2..at * 2 + 2], "row {row}");
    }
    assert!((0..64).any(|row| interleaved_row(row, 64, 8) != row));
    refused(
        &place,
        &["export", "--adapter", &adapter, "--as", "lora-gguf", "--out", "b.gguf"],
        &["--as lora-gguf", "--model"],
    );
}

#[test]
fn what_cannot_be_merged_says_why() {
    let place = Place::new();
    for (name, words) in [
        ("prompt_tuning", "embeddings put before every text"),
        ("p_tuning", "embeddings put before every text"),
        ("prefix_tuning", "keys and values"),
    ] {
        let adapter = fixture(name);
        let merge = ["merge", "--model", &folder(), "--adapter", &adapter, "--out", "never"];
        refused(&place, &merge, &[words]);
        let mut calibrated = merge.to_vec();
        calibrated.extend(["--calibration", "animals.jsonl"]);
        refused(&place, &calibrated, &[words]);
        let export = ["export", "--adapter", &adapter, "--as", "lora", "--out", "never"];
        refused(&place, &export, &[words]);
    }
    let ia3 = fixture("ia3");
    let export = ["export", "--adapter", &ia3, "--as", "lora", "--out", "never"];
    refused(&place, &export, &["two thin matrices"]);
    let lora = fixture("lora");
    let merge = |more: &[&str], words: &[&str]| {
        let mut arguments = vec!["merge", "--model"];
        let folder = folder();
        arguments.extend([folder.as_str(), "--adapter", &lora]);
        arguments.extend(more);
        refused(&place, &arguments, words);
    };
    merge(&["--out", "never", "--dtype", "q8_0"], &["--dtype", "GGUF"]);
    merge(&["--out", &lora], &["--out", "another place"]);
    merge(&["--out", &folder()], &["--out", "another place"]);
    place.write("mine/notes.txt", "keep me");
    merge(&["--out", "mine"], &["--out", "notes.txt", "would be lost"]);
    for command in ["export", "compose", "import"] {
        let rest: &[&str] = match command {
            "export" => &["--adapter", &lora, "--as", "lora"],
            "compose" => &[&lora, &lora, "--how", "average"],
            _ => &["--from", "lora", &lora, &lora],
        };
        refused(&place, &[&[command, "--out", "mine"], rest].concat(), &["would be lost"]);
        refused(&place, &[&[command, "--out", &lora], rest].concat(), &["another place"]);
    }
    assert_eq!(place.read("mine/notes.txt"), "keep me");
    place.write("few.jsonl", "{\"instruction\": \"a\", \"output\": \"b\"}\n");
    merge(&["--out", "never", "--calibration", "few.jsonl"], &["few.jsonl", "at least 4"]);
    merge(&["--out", "never", "--calibration", "none.jsonl"], &["none.jsonl"]);
    // Trained on another base.
    let adapter = trained(&place, "run", "{name: lora, rank: 2, targets: qv}");
    let other = gguf();
    let arguments = ["merge", "--model", &other, "--adapter", &adapter, "--out", "never"];
    refused(&place, &arguments, &["was trained on", "fingerprint"]);
    assert!(!place.path("never").exists());
}

/// DoRA rescales rows, PiSSA and R-LoRA take their start out of the weight: each is a weight all the same.
#[test]
fn variants_fold_as_they_compute() {
    let place = Place::new();
    for (run, method, gate, rank) in [
        ("dora", "{name: lora, rank: 2, use_dora: true}", &[][..], None),
        ("pissa", "{name: lora, rank: 2, init_lora_weights: pissa}", &[], Some(4)),
        (
            "rlora",
            "{name: hydralora, rank: 2, num_experts: 3, init_lora_weights: rlora, gate: uniform}",
            &[],
            Some(8),
        ),
        (
            "routed",
            "{name: hydralora, rank: 2, num_experts: 3, init_lora_weights: rlora}",
            &["--calibration", "animals.jsonl"],
            Some(8),
        ),
    ] {
        let adapter = trained(&place, run, method);
        let own = logits(&place, &folder(), Some(&adapter));
        let [merged, exported] = ["merged", "exported"].map(|what| format!("{run}-{what}"));
        let fold = ["--model", &folder(), "--adapter", &adapter].map(str::to_owned);
        let fold: Vec<&str> = fold.iter().map(String::as_str).chain(gate.iter().copied()).collect();
        place.succeed(&[&["merge", "--dtype", "f32", "--out", &merged], &fold[..]].concat());
        let merged = logits(&place, &place.path(&merged).display().to_string(), None);
        if gate.is_empty() {
            let off = distance(&own, &merged);
            assert!(off < 1e-5, "{run}: {off}");
        }
        let export = [&["export", "--as", "lora", "--out", &exported], &fold[..]].concat();
        let Some(rank) = rank else {
            refused(&place, &export, &["two thin matrices", "merge"]);
            let compose = ["compose", &adapter, &adapter, "--how", "average", "--out", "never"];
            refused(&place, &compose, &["use_dora", "no plain LoRA"]);
            continue;
        };
        place.succeed(&export);
        let config = place.read(&format!("{exported}/adapter_config.json"));
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["r"], rank, "{run}");
        let off = distance(&merged, &logits(&place, &folder(), Some(&exported)));
        assert!(off < 1e-5, "{run} exported: {off}");
        if run == "routed" {
            let official =
                ["export", "--adapter", &adapter, "--as", "hydralora-official", "--out", "never"];
            refused(&place, &official, &["init_lora_weights", "rlora", "published code"]);
        }
    }
    let sparse = trained(&place, "sparse", "{name: hydralora, rank: 2, router_top_k: 2}");
    let official = ["export", "--adapter", &sparse, "--as", "hydralora-official", "--out", "never"];
    refused(&place, &official, &["router_top_k", "is 2"]);
}

/// What vLLM's documentation and its reader of PEFT folders ask of a LoRA.
#[test]
fn an_exported_lora_keeps_to_what_vllm_reads() {
    let place = Place::new();
    let adapter =
        trained(&place, "run", "{name: hydralora, rank: 2, num_experts: 4, targets: all}");
    let export =
        ["export", "--adapter", &adapter, "--as", "lora", "--gate", "uniform", "--out", "v"];
    place.succeed(&export);
    let config: Value = serde_json::from_str(&place.read("v/adapter_config.json")).unwrap();
    assert_eq!((&config["peft_type"], &config["bias"]), (&"LORA".into(), &"none".into()));
    assert_eq!(config["r"], 8);
    assert!(config["lora_alpha"].is_number() && config["target_modules"].is_array(), "{config}");
    assert!(config["modules_to_save"].is_null() && config["use_rslora"] == false);
    assert!(config.get("use_dora").is_none_or(|value| value == false), "{config}");
    let bytes = std::fs::read(place.path("v/adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 5 * 7 * 2);
    for (name, view) in file.iter() {
        let parts: Vec<&str> = name.split('.').collect();
        let [.., module, ab, "weight"] = parts[..] else { panic!("{name}") };
        assert!(name.starts_with("base_model.model.model.layers."), "{name}");
        assert!(["lora_A", "lora_B"].contains(&ab), "{name}");
        assert!(hydralora_model::family::linears().any(|linear| linear.module() == module));
        assert_eq!(view.shape()[usize::from(ab == "lora_B")], 8, "{name}");
    }
}

#[test]
fn a_start_that_changes_the_base_is_refused_by_name() {
    let place = Place::new();
    std::fs::create_dir(place.path("pissa")).unwrap();
    let from = PathBuf::from(fixture("lora"));
    let config = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let config = config.replace("\"init_lora_weights\": true", "\"init_lora_weights\": \"olora\"");
    place.write("pissa/adapter_config.json", &config);
    std::fs::copy(
        from.join("adapter_model.safetensors"),
        place.path("pissa/adapter_model.safetensors"),
    )
    .unwrap();
    let arguments = ["merge", "--model", &folder(), "--adapter", "pissa", "--out", "never"];
    refused(&place, &arguments, &["init_lora_weights", "olora"]);
}

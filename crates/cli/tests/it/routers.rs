//! Routers that start from clusters and are guided by them, and what a run says of routers and heads.

use crate::support::Place;
use serde_json::Value;
use std::fs;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn rows(place: &Place, run: &str) -> Vec<Value> {
    place.read(&format!("{run}/metrics.jsonl")).lines().map(json).collect()
}

fn tensors(place: &Place, run: &str) -> Vec<u8> {
    fs::read(place.path(run).join("adapter/adapter_model.safetensors")).unwrap()
}

/// Trains the recipe with these changes.
fn train<'a>(place: &Place, output: &'a str, changes: &[&'a str]) -> crate::support::Ran {
    let output = format!("output={output}");
    let mut arguments = vec!["train", "recipe.yaml", "--set", &output];
    for change in changes {
        arguments.extend(["--set", change]);
    }
    place.succeed(&arguments)
}

/// The last evaluation's spread of the gates over the domains.
fn spread(place: &Place, run: &str) -> f64 {
    let rows = rows(place, run);
    let last = rows.iter().rev().find(|row| row["gate_spread"].is_number()).unwrap();
    last["gate_spread"].as_f64().unwrap()
}

const STILL: &str = "train.learning_rate=1e-12";

#[test]
fn routers_start_from_clusters_of_their_layers_inputs() {
    let place = Place::new();
    train(&place, "random", &[STILL]);
    for init in ["layer_centroids", "token_centroids", "centroids"] {
        let init_of = format!("method.router_init={init}");
        train(&place, init, &[STILL, &init_of, "method.router_gain=10"]);
        let [sharp, random] = [spread(&place, init), spread(&place, "random")];
        assert!(sharp > 2.0 * random, "{init}: {sharp} {random}");
        // The same again, bit for bit.
        let again = format!("{init}-again");
        train(&place, &again, &[STILL, &init_of, "method.router_gain=10"]);
        assert!(tensors(&place, init) == tensors(&place, &again), "{init}");
    }
    train(&place, "soft", &[STILL, "method.router_init=layer_centroids"]);
    assert!(spread(&place, "soft") < spread(&place, "layer_centroids"));
}

#[test]
fn a_guide_tells_clusters_apart_and_a_resumed_run_follows_it() {
    let place = Place::new();
    let guided = [
        "method.router_guide=clusters",
        "train.router_learning_rate_ratio=10",
        "train.schedule=constant",
        "train.warmup_steps=1",
        "method.num_experts=2",
        "train.learning_rate=1e-3",
    ];
    train(&place, "long", &guided);
    let added: Vec<f64> =
        rows(&place, "long").iter().filter_map(|row| row["aux_loss"].as_f64()).collect();
    // The cross-entropy of nearly even gates is ln 2, and it falls.
    assert!((added[0] - 0.3 * 2.0_f64.ln()).abs() < 0.05, "{added:?}");
    assert!(added[10..].iter().sum::<f64>() / 10.0 < 0.85 * added[0], "{added:?}");
    train(&place, "short", &[&guided[..], &["train.max_steps=12"]].concat());
    let output = "output=short";
    let mut resume = vec!["train", "recipe.yaml", "--resume", "--set", output];
    for change in &guided {
        resume.extend(["--set", change]);
    }
    place.succeed(&resume);
    assert!(tensors(&place, "short") == tensors(&place, "long"));
    train(&place, "unguided", &guided[1..]);
    assert!(spread(&place, "long") > 2.0 * spread(&place, "unguided"));
    // A guide that fades is gone at the end.
    train(&place, "fading", &[&guided[..], &["method.router_guide_decay=0.5"]].concat());
    let steps = rows(&place, "fading");
    let added: Vec<f64> = steps.iter().filter_map(|row| row["aux_loss"].as_f64()).collect();
    assert!(added[0] > 0.1 && added[added.len() - 1] == 0.0, "{added:?}");
}

#[test]
fn a_run_and_inspect_say_what_heads_and_routers_do() {
    let place = Place::new();
    train(&place, "run", &[]);
    let rows = rows(&place, "run");
    let steps: Vec<u64> = rows
        .iter()
        .filter(|row| row["routers"].is_object())
        .map(|row| row["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 10, 20]);
    let last = rows.iter().rev().find(|row| row["routers"].is_object()).unwrap();
    let routers = &last["routers"];
    let share = |value: &Value| {
        let value = value.as_f64().unwrap();
        assert!((0.0..=1.0 + 1e-9).contains(&value), "{routers}");
        value
    };
    share(&routers["gate_entropy"]);
    share(&routers["gate_spread"]);
    assert!(routers["router_movement"].as_f64().unwrap() > 0.0);
    let heads = &routers["heads"];
    share(&heads["cosine"]);
    assert!(heads["rank"].as_f64().unwrap() <= heads["full_rank"].as_f64().unwrap() + 1e-6);
    assert!(heads["difference_share"].as_f64().unwrap() >= 0.0);
    assert_eq!(heads["dead_heads"], 0);
    let evaluated = rows.iter().rev().find(|row| row["valid_loss"].is_number()).unwrap();
    for domain in ["animals", "colours"] {
        share(&evaluated["gate_entropy_by_domain"][domain]);
    }
    assert_eq!(evaluated["gate_entropy_by_layer"].as_object().unwrap().len(), 5);
    let of_valid = &evaluated["heads"];
    assert_eq!(of_valid["cosine"], heads["cosine"], "of the same weights");
    // The page and the finished adapter say the same.
    let page = place.read("run/report.html");
    for part in ["heads: cosine", "Entropy of a token's gates", "entropy of gates: animals"] {
        assert!(page.contains(&part.replace('\'', "&#39;")) || page.contains(part), "{part}");
    }
    let ran = place.succeed(&["inspect", "--adapter", "run/adapter"]);
    for part in
        ["heads              cosine", "entropy of gates", "animals", "routers moved", "dead"]
    {
        assert!(ran.stdout.contains(part), "{part:?} is missing in\n{}", ran.stdout);
    }
    let ran = place.succeed(&["inspect", "--adapter", "run/adapter", "--json"]);
    let shown = json(&ran.stdout);
    let found = &shown["adapter"];
    for (key, of_run) in [("cosine", &of_valid["cosine"]), ("rank", &of_valid["rank"])] {
        let [a, b] = [&found["heads"][key], of_run].map(|value| value.as_f64().unwrap());
        assert!((a - b).abs() < 1e-6, "{key}: {a} {b}");
    }
    let moved = found["routing"]["router_movement"].as_f64().unwrap();
    assert!((moved - evaluated["router_movement"].as_f64().unwrap()).abs() < 1e-6);
    // TensorBoard has them by name.
    let folder = fs::read_dir(place.path("run/tensorboard")).unwrap().next().unwrap().unwrap();
    let bytes = fs::read(folder.path()).unwrap();
    for name in ["train/head_cosine", "valid/difference_share", "valid/gate_entropy_animals"] {
        assert!(bytes.windows(name.len()).any(|part| part == name.as_bytes()), "{name}");
    }
}

#[test]
fn heads_that_are_copies_are_told_with_what_helps() {
    let place = Place::new();
    // Gates that are even but for rounding.
    let steps = [
        "train.epochs=50",
        "train.max_steps=30",
        "train.learning_rate=1e-5",
        "method.router_gain=0.01",
    ];
    let told = "are copies of each other";
    let ran = train(&place, "copies", &steps);
    for part in [told, "after 30 steps", "router_gain: 10", "router_guide: clusters"] {
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
    let apart = [&steps[..], &["method.init_lora_weights=orthogonal"]].concat();
    let ran = train(&place, "apart", &apart);
    assert!(!ran.stderr.contains(told), "{}", ran.stderr);
    // Not of a few steps, which say nothing.
    let ran = train(&place, "few", &["train.learning_rate=1e-5", "method.router_gain=0.01"]);
    assert!(!ran.stderr.contains(told), "{}", ran.stderr);
}

#[test]
fn a_rate_of_routers_needs_routers() {
    let place = Place::new();
    for method in ["{name: lora}", "{name: hydralora, gate: uniform}", "{name: flylora}"] {
        let method = format!("method={method}");
        let arguments = [
            "check",
            "recipe.yaml",
            "--set",
            &method,
            "--set",
            "train.router_learning_rate_ratio=10",
        ];
        let ran = place.run(&arguments);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        for part in ["train.router_learning_rate_ratio", "is 10", "router"] {
            assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
        }
    }
    let ran = place.run(&["check", "recipe.yaml", "--set", "train.router_learning_rate_ratio=0"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("router_learning_rate_ratio: is 0"), "{}", ran.stderr);
}

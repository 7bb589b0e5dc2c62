//! `hydralora bench`, on the 260K-parameter model: that it measures, not how fast it is.

use crate::support::{Place, model};
use serde_json::Value;

#[test]
fn training_steps_of_several_methods_are_compared() {
    let place = Place::new();
    let folder = model().display().to_string();
    let size = ["--batches", "2", "--batch-size", "2", "--seq-len", "16", "--model", &folder];
    let bench = |method: &str, more: &[&str]| -> Value {
        let arguments =
            [&["bench", "train", "--json", "--method", method], &size[..], more].concat();
        serde_json::from_str(&place.succeed(&arguments).stdout).unwrap()
    };
    let found = bench("base, {name: lora, rank: 2, targets: [q_proj, v_proj]},full", &[]);
    let methods = found["methods"].as_array().unwrap();
    let number = |method: &Value, key: &str| method[key].as_f64().unwrap();
    let counts: Vec<f64> = methods.iter().map(|m| number(m, "trainable_parameters")).collect();
    assert_eq!(counts, [0.0, 2.0 * 5.0 * (64.0 + 64.0 + 64.0 + 32.0), 260_032.0]);
    for method in methods {
        assert!(number(method, "relative_time") > 0.0 && number(method, "peak_rss_mb") > 1.0);
        assert_eq!(method["step_seconds"].as_array().unwrap().len(), 2);
    }
    // The base has no tensor to change, so it stands still.
    assert_eq!(methods[0]["method"], "base");
    assert!(number(&methods[2], "last_loss").is_finite());
    // Alone, and with less kept for the way back.
    let alone = bench("full", &["--gradient-checkpointing"]);
    assert_eq!(alone["gradient_checkpointing"], true);
    assert_eq!(alone["methods"][0]["trainable_parameters"], 260_032);
    let first = |method: &Value| number(method, "first_loss");
    assert!((first(&alone["methods"][0]) - first(&methods[2])).abs() < 1e-4);
}

#[test]
fn methods_that_are_not_known_are_refused() {
    let place = Place::new();
    let folder = model().display().to_string();
    for (method, parts) in [
        ("lorra", &["--method lorra", "did you mean `lora`?"][..]),
        ("base,{name: lora, rnk: 2}", &["{name: lora, rnk: 2}", "did you mean `rank`?"]),
        ("{name: lora", &["--method {name: lora"]),
        (",", &["--method", "at least one"]),
    ] {
        let ran = place.run(&["bench", "train", "--model", &folder, "--method", method]);
        assert_eq!(ran.code, Some(2), "{method}: {}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "{part} is missing in {}", ran.stderr);
        }
    }
}

#[test]
fn many_requests_are_compared_with_one() {
    let place = Place::new();
    let folder = model().display().to_string();
    let size = ["--dtype", "f32,bf16", "--requests", "1,3", "--adapters", "0,2"];
    let arguments = [
        &["bench", "engine", "--json", "--model", &folder, "--prompt", "5", "--new-tokens", "6"],
        &size[..],
    ];
    let found: Value = serde_json::from_str(&place.succeed(&arguments.concat()).stdout).unwrap();
    let runs = found["runs"].as_array().unwrap();
    let of =
        |key: &str| -> Vec<u64> { runs.iter().map(|run| run[key].as_u64().unwrap()).collect() };
    assert_eq!(of("requests"), [1, 3, 1, 3, 1, 3, 1, 3]);
    assert_eq!(of("adapters"), [0, 0, 2, 2, 0, 0, 2, 2]);
    for run in runs {
        assert!(run["tokens_per_s"].as_f64().unwrap() > 0.0);
        assert!(run["of_bare_loop"].as_f64().unwrap() > 0.0);
    }
    let none = ["bench", "engine", "--model", &folder, "--new-tokens", "1"];
    let ran = place.run(&none);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
}

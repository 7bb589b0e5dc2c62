//! Heads from files, by the command and by a recipe's `auto`.

use crate::support::{Place, model};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Two domains that share no word.
fn write_domains(place: &Place) {
    let lines = |words: [&str; 6]| -> String {
        (0..40)
            .map(|row| {
                let text: Vec<&str> =
                    (0..5).map(|at| words[(row * 7 + at * (row % 3 + 1)) % 6]).collect();
                format!("{{\"text\": \"{}\"}}\n", text.join(" "))
            })
            .collect()
    };
    place.write("bakery.jsonl", &lines(["flour", "butter", "oven", "dough", "sugar", "yeast"]));
    place.write("court.jsonl", &lines(["judge", "clause", "verdict", "appeal", "lawyer", "jury"]));
}

#[test]
fn the_command_suggests_explains_and_draws() {
    let place = Place::new();
    write_domains(&place);
    let arguments = ["heads", "bakery.jsonl", "court.jsonl", "--k-max", "5", "--out", "found"];
    let ran = place.succeed(&arguments);
    for part in ["suggested number of heads: 2", "stability", "from bakery 40", "index 1.000"] {
        assert!(ran.stdout.contains(part), "{part} is missing in\n{}", ran.stdout);
    }
    let kept = json(&place.read("found/heads.json"));
    let printed = json(&place.succeed(&[&arguments[..], &["--json"]].concat()).stdout);
    assert_eq!(kept, printed);
    assert_eq!(kept["agreement"]["adjusted_rand"], 1.0);
    assert_eq!(kept["seeds"], 15);
    for file in ["heads.html", "elbow.svg", "map.svg"] {
        assert!(place.read(&format!("found/{file}")).contains("<svg"), "{file}");
    }
}

#[test]
fn fields_and_domains_of_other_names_are_mapped() {
    let place = Place::new();
    let rows: String = ["flour butter oven", "judge clause verdict"]
        .map(|words| {
            format!(
                "{{\"question\": \"{words}\", \"answer\": \"yes\", \"kind\": \"{}\"}}\n",
                &words[..5]
            )
        })
        .concat()
        .repeat(20);
    place.write("copies/gsm8k/train.jsonl", &rows);
    let mapped = ["--field", "instruction=question", "--field", "output=answer"];
    let file = "copies/gsm8k/train.jsonl";
    let ran = place.succeed(&[&["heads", file, "--json"][..], &mapped].concat());
    assert_eq!(json(&ran.stdout)["num_experts"], 2);
    // A domain of one's own leaves a named source's other names as they are.
    let copies = place.path("copies").display().to_string();
    let environment = [("HYDRALORA_DATA_DIR", copies.as_str())];
    let ran = place.run_in(&environment, &["heads", "gsm8k", "--domain-field", "kind", "--json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(json(&ran.stdout)["domains"], serde_json::json!(["flour", "judge"]));
}

#[test]
fn named_sources_are_looked_up_where_there_is_no_such_file() {
    let place = Place::new();
    let line = "{\"question\": \"how many apples\", \"answer\": \"seven pears\"}\n";
    place.write("copies/gsm8k/train.jsonl", &line.repeat(9));
    let copies = place.path("copies").display().to_string();
    let environment = [("HYDRALORA_DATA_DIR", copies.as_str())];
    let ran = place.run_in(&environment, &["heads", "gsm8k", "--json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("gsm8k: licence: MIT"), "{}", ran.stderr);
    assert_eq!(json(&ran.stdout)["domains"][0], "math");
    // A file of that name comes first.
    place.write("gsm8k", "{\"text\": \"bread\"}\n{\"text\": \"butter\"}\n");
    let ran = place.run_in(&environment, &["heads", "gsm8k", "--json"]);
    assert_eq!(json(&ran.stdout)["domains"][0], "gsm8k");
    let ran = place.run(&["heads", "t0"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("data source `t0` cannot be had"), "{}", ran.stderr);
}

#[test]
fn a_models_hidden_states_are_features_and_kept() {
    let place = Place::new();
    write_domains(&place);
    let model = model().display().to_string();
    let arguments = [
        "heads",
        "bakery.jsonl",
        "court.jsonl",
        "--k-max",
        "4",
        "--seeds",
        "3",
        "--features",
        "model",
        "--model",
        &model,
        "--json",
    ];
    let first = place.succeed(&arguments);
    assert_eq!(json(&first.stdout)["features"]["kind"], "model");
    assert!(!first.stderr.contains("features from"), "{}", first.stderr);
    let second = place.succeed(&arguments);
    assert!(second.stderr.contains("features from"), "{}", second.stderr);
    assert_eq!(first.stdout, second.stdout);
    let other = place.succeed(&[&arguments[..], &["--layer", "5"]].concat());
    assert!(!other.stderr.contains("features from"), "another layer, other features");
}

#[test]
fn bad_input_is_named() {
    let place = Place::new();
    write_domains(&place);
    place.write("empty.jsonl", "{\"text\": \"\"}\n{\"text\": \"the\"}\n");
    place.write("two.jsonl", "{\"text\": \"one cat\"}\n{\"text\": \"two dogs\"}\n");
    place.write("named.jsonl", "{\"question\": \"one cat\", \"answer\": \"two\"}\n");
    std::fs::write(place.path("latin.jsonl"), b"{\"text\": \"caf\xe9\"}\n").unwrap();
    let model = model().display().to_string();
    for (arguments, message) in [
        (vec!["missing.jsonl"], "missing.jsonl"),
        (vec!["gsm9k", "court.jsonl"], "no such file and no data source; did you mean `gsm8k`?"),
        (vec!["named.jsonl"], "or with `--field instruction=question"),
        (vec!["empty.jsonl"], "empty.jsonl: there is nothing to cluster"),
        (
            vec!["two.jsonl", "--k-min", "3"],
            "two.jsonl: too few rows to cluster: 2 with a word that counts, 3",
        ),
        (vec!["latin.jsonl"], "latin.jsonl: line 1, byte 14 of the line: not valid UTF-8"),
        (
            vec!["court.jsonl", "--k-min", "4", "--k-max", "2"],
            "--k-max is 2, below --k-min, which is 4",
        ),
        (vec!["court.jsonl", "--k-max", "100000"], "expected 1 to 256"),
        (vec!["court.jsonl", "--limit", "0"], "at least 1"),
        (vec!["court.jsonl", "--field", "output"], "expected a field of the format"),
        (vec!["court.jsonl", "--field", "outptu=x"], "--field: unknown field of format"),
        (vec!["court.jsonl", "--format", "alpacca"], "did you mean `alpaca`?"),
        (vec!["court.jsonl", "--features", "model"], "needs --model"),
        (vec!["court.jsonl", "--model", "x"], "--features model"),
        (
            vec!["court.jsonl", "--features", "model", "--model", &model, "--layer", "6"],
            "has the layers 0 to 4, and 5 for the final state",
        ),
        (vec!["court.jsonl", "--rule", "oracle"], "oracle"),
    ] {
        let ran = place.run(&[&["heads"], &arguments[..]].concat());
        assert_eq!(ran.code, Some(2), "{arguments:?} {}", ran.stderr);
        assert!(ran.stderr.contains(message), "{arguments:?}: {}", ran.stderr);
    }
}

#[test]
fn a_recipe_counts_its_experts_once_and_resumes_with_them() {
    let place = Place::new();
    write_domains(&place);
    let auto = [
        "--quiet",
        "--set",
        "method.num_experts=auto",
        "--set",
        "data.train=[{path: bakery.jsonl}, {path: court.jsonl}]",
        "--set",
        "train.max_steps=10",
    ];
    let train = |more: &[&str]| place.run(&[&["train", "recipe.yaml"], &auto[..], more].concat());
    let ran = train(&[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(json(&place.read("run/heads.json"))["num_experts"], 2);
    assert!(place.read("run/recipe.yaml").contains("num_experts: 2"));
    let config = json(&place.read("run/adapter/adapter_config.json"));
    assert_eq!(config["lora_nums"], 2);

    // What the run recorded counts, not what another search would give.
    let resumed = train(&["--resume"]);
    assert_eq!(resumed.code, Some(0), "{}", resumed.stderr);
    place.write("run/heads.json", "{\"num_experts\": 3}");
    let other = train(&["--resume"]);
    assert_eq!(other.code, Some(2), "{}", other.stderr);
    place.write("run/heads.json", "{}");
    let broken = train(&["--resume"]);
    assert_eq!(broken.code, Some(2));
    assert!(broken.stderr.contains("it holds no num_experts"), "{}", broken.stderr);

    let ran = place.succeed(&["check", "recipe.yaml", "--set", "method.num_experts=auto"]);
    assert!(ran.stdout.contains("experts  "), "{}", ran.stdout);
}

#[test]
fn routers_start_from_the_clusters_when_asked() {
    let place = Place::new();
    write_domains(&place);
    let route = |output: &str, more: &[&str]| {
        let output_option = format!("output={output}");
        let mut arguments = vec!["train", "recipe.yaml", "--quiet", "--set", &output_option];
        arguments.extend(["--set", "data.train=[{path: bakery.jsonl}, {path: court.jsonl}]"]);
        arguments.extend(["--set", "train.max_steps=1", "--set", "method.num_experts=2"]);
        arguments.extend(more);
        place.succeed(&arguments);
        json(&place.read(&format!("{output}/routing.json")))
    };
    // After one step of next to no learning rate the routers are as they started.
    let still = ["--set", "train.learning_rate=1e-12"];
    let random = route("random", &still);
    let centroids = [&still[..], &["--set", "method.router_init=centroids"]].concat();
    let started = route("centroids", &centroids);
    let spread = |routing: &Value| -> f64 {
        let sites = routing["sites"].as_array().unwrap();
        let apart = |site: &Value| {
            let gate = |domain: usize| site["mean_gate"][domain][0].as_f64().unwrap();
            (gate(0) - gate(1)).abs()
        };
        sites.iter().map(apart).sum::<f64>() / sites.len() as f64
    };
    assert!(spread(&started) > 2.0 * spread(&random), "{} {}", spread(&started), spread(&random));

    let ran = place.run(&[
        "train",
        "recipe.yaml",
        "--set",
        "method.router_init=centroids",
        "--set",
        "method.route_on=a",
    ]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("method.router_init"), "{}", ran.stderr);
}

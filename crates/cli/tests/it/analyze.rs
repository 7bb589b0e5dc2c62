//! Trained adapters looked at and compared: by the command, by a study, and with what cannot be compared.

use crate::support::{Place, model};
use serde_json::Value;
use std::fs;
use std::path::Path;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

const LORA: &str = "{name: lora, rank: 2, alpha: 8, targets: ffn}";

/// Trains a few steps into the folder `run`.
fn train_on(place: &Place, model: &Path, run: &str, domain: &str, method: &str, seed: u64) {
    let recipe = format!(
        "model: {{path: {}}}\n\
         data: {{train: [{{path: {domain}.jsonl, domain: {domain}}}], template: plain, \
         valid_fraction: 0.2, max_seq_len: 128}}\n\
         method: {method}\n\
         train: {{batch_size: 4, epochs: 20, max_steps: 5, learning_rate: 1.0e-2, eval_every: 0, \
         seed: {seed}}}\noutput: {run}\n",
        model.display()
    );
    place.write(&format!("{run}.yaml"), &recipe);
    place.succeed(&["train", &format!("{run}.yaml")]);
}

fn train(place: &Place, run: &str, domain: &str, method: &str, seed: u64) {
    train_on(place, &model(), run, domain, method, seed);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn likeness_of_a_follows_from_the_seed_and_the_page_says_so() {
    let place = Place::new();
    train(&place, "animals", "animals", LORA, 1);
    train(&place, "colours", "colours", LORA, 1);
    train(&place, "other", "colours", LORA, 2);
    let adapters = ["animals", "colours", "other/adapter"];
    let ran = place.succeed(&[&["analyze"][..], &adapters, &["--out", "found"]].concat());
    let found = json(&place.read("found/analysis.json"));
    let printed = place.succeed(&[&["analyze", "--json"][..], &adapters].concat());
    assert_eq!(json(&printed.stdout), found);
    let pair = |first: &str, second: &str| {
        let pairs = found["pairs"].as_array().unwrap().iter();
        let mut here = pairs.filter(|pair| pair["first"] == first && pair["second"] == second);
        here.next().unwrap_or_else(|| panic!("no pair {first} {second}")).clone()
    };
    let (equal, apart) = (pair("animals", "colours"), pair("colours", "other"));
    assert_eq!((&equal["began_equal"], &apart["began_equal"]), (&true.into(), &false.into()));
    assert!(number(&equal["a"]["cosine"]) > 0.8, "{equal}");
    assert!(number(&apart["a"]["cosine"]).abs() < 0.4, "{apart}");
    // What training changed of A is less alike than A.
    let change = number(&equal["a_change"]["cosine"]);
    assert!(change < number(&equal["a"]["cosine"]) - 0.1, "{equal}");
    assert_eq!(found["groups"].as_array().unwrap().len(), 2);
    for adapter in found["adapters"].as_array().unwrap() {
        let own = &adapter["overall"];
        assert!((1.0..=2.0).contains(&number(&own["effective_rank"])), "{own}");
        assert!(number(&own["a_change"]) > 0.0 && number(&own["a_change"]) < 2.0, "{own}");
        assert!(own["difference_share"].is_null(), "one head alone: {own}");
        assert!(adapter["missing"]["gates"].is_string() && adapter["seed"].is_u64());
    }
    let layers = found["pairs"][0]["layers"].as_u64().unwrap() as usize;
    // A, B and the change of A in every layer of three pairs, below a heading.
    assert_eq!(place.read("found/pairs.csv").lines().count(), 1 + 3 * 3 * layers);
    assert_eq!(place.read("found/layers.csv").lines().count(), 1 + 3 * layers);
    assert_eq!(place.read("found/map.csv").lines().count(), 1 + 3 * 2 * layers);
    let page = place.read("found/analysis.html");
    assert!(
        page.contains("A began equal in animals – colours: there similarity of A is expected.")
    );
    for file in ["similarity.svg", "map.svg", "rank.svg"] {
        let svg = place.read(&format!("found/{file}"));
        assert!(page.contains(&svg) && !svg.contains("NaN") && !svg.contains("inf"), "{file}");
    }
    assert!(!page.contains("src=") && !page.contains("href="), "the page needs another file");
    assert!(ran.stdout.contains("animals – colours") && ran.stdout.contains("analysis.html"));
    assert!(ran.stderr.contains("A of 1 of 3 pairs began equal"), "{}", ran.stderr);
    // It may be made again, and never in place of something else.
    place.succeed(&["analyze", "animals", "--out", "found"]);
    place.write("mine/notes.txt", "mine");
    let ran = place.run(&["analyze", "animals", "--out", "mine"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert_eq!(place.read("mine/notes.txt"), "mine");
}

#[test]
fn the_same_adapter_is_wholly_alike_and_names_are_escaped() {
    let place = Place::new();
    train(&place, "one", "animals", LORA, 1);
    copy(&place.path("one/adapter"), &place.path("<i>&two"));
    place.succeed(&["analyze", "one", "<i>&two", "--out", "found"]);
    let found = json(&place.read("found/analysis.json"));
    let pair = &found["pairs"][0];
    for part in ["a", "b"] {
        for measure in ["cosine", "cka", "angle_cosine"] {
            assert!((number(&pair[part][measure]) - 1.0).abs() < 1e-9, "{part} {measure}: {pair}");
        }
        assert!(number(&pair[part]["largest_angle"]) < 1e-6, "{pair}");
    }
    // A copy without its run says nothing of how it began.
    assert!(pair["began_equal"].is_null() && pair["a_change"].is_null(), "{pair}");
    let missing = found["adapters"][1]["missing"]["a_change"].as_str().unwrap();
    assert!(missing.contains("no recipe"), "{missing}");
    let page = place.read("found/analysis.html");
    assert!(page.contains("&lt;i&gt;&amp;two") && !page.contains("<i>"), "{page}");
}

#[test]
fn heads_and_gates_of_one_adapter() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml"]);
    place.succeed(&["analyze", "run", "--out", "found"]);
    let found = json(&place.read("found/analysis.json"));
    let adapter = &found["adapters"][0];
    assert_eq!((&adapter["num_a"], &adapter["num_b"]), (&1.into(), &3.into()));
    let own = &adapter["overall"];
    assert!((0.0..=1.0).contains(&number(&own["difference_share"])), "{own}");
    let entropy = number(&own["gate_entropy"]);
    assert!(entropy > 0.0 && entropy <= 1.0 + 1e-9, "{own}");
    let routing = json(&place.read("run/routing.json"));
    let gates = &routing["sites"][0]["mean_gate"];
    let expected: f64 = (0..3).map(|i| (number(&gates[0][i]) - number(&gates[1][i])).abs()).sum();
    let site = adapter["sites"].as_array().unwrap().iter();
    let mut site = site.filter(|site| site["site"] == routing["sites"][0]["site"]);
    let distance = &site.next().unwrap()["gates"]["distances"][0];
    assert!((number(&distance["distance"]) - expected / 2.0).abs() < 1e-12, "{distance}");
    assert_eq!((&distance["first"], &distance["second"]), (&"animals".into(), &"colours".into()));
    for file in ["heads.svg", "gates.svg", "map.svg"] {
        assert!(place.read(&format!("found/{file}")).ends_with("</svg>"), "{file}");
    }
    assert!(place.read("found/analysis.html").contains("mean gates over layers would come out"));
}

#[test]
fn what_cannot_be_compared_is_named() {
    let place = Place::new();
    train(&place, "ffn", "animals", LORA, 1);
    train(&place, "gate", "animals", "{name: lora, rank: 3, alpha: 8, targets: [gate_proj]}", 1);
    train(&place, "attention", "animals", "{name: lora, rank: 2, alpha: 8, targets: [q_proj]}", 1);
    train(&place, "ia3", "animals", "{name: ia3, targets: ffn}", 1);
    train(&place, "prompt", "animals", "{name: prompt-tuning, num_virtual_tokens: 2}", 1);
    let wide = place.widened_model("wide");
    train_on(&place, &wide, "wide-run", "animals", LORA, 1);
    place.write("empty/notes.txt", "nothing");
    for (adapters, message) in [
        (vec!["empty"], "this folder holds no adapter"),
        (vec!["missing"], "there is no such folder"),
        (vec!["ffn", "ia3"], "ia3 has no A and B to look at; expected a low-rank adapter (lora,"),
        (vec!["prompt"], "prompt-tuning has no A and B"),
        (vec!["ffn", "wide-run"], "expected adapters of models of the same dimensions"),
        (vec!["ffn", "attention"], "no layer is in two of them"),
        (vec!["ffn", "--domain", "law"], "the adapters treat all domains alike"),
        (vec![], "required"),
        (vec!["ffn", "--study", "x"], "cannot be used with"),
    ] {
        let ran = place.run(&[&["analyze"], &adapters[..]].concat());
        assert_eq!(ran.code, Some(2), "{adapters:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(message), "{adapters:?}: {}", ran.stderr);
    }
    // Of adapters on different layers those that both have are compared, and the others named.
    let ran = place.succeed(&["analyze", "ffn", "gate", "attention", "--json"]);
    let found = json(&ran.stdout);
    let pair = &found["pairs"][0];
    assert_eq!(pair["layers"].as_u64(), Some(5), "{pair}");
    assert_eq!(pair["left_out"].as_array().map(Vec::len), Some(10), "{pair}");
    assert!(pair["sites"].as_array().unwrap().iter().all(|site| site["projection"] == "gate_proj"));
    // Ranks differ: no cosine, all the rest.
    assert!(pair["a"]["cosine"].is_null() && pair["a"]["cka"].is_f64(), "{pair}");
    assert!(ran.stderr.contains("are compared in the 5 layers that both change; left out: "));
}

const STUDY: &str = "\
name: alike
base:
  model: {path: MODEL}
  data: {train: [{path: animals.jsonl, domain: animals}], template: plain, max_seq_len: 128}
  method: {name: lora, rank: 2, alpha: 8, targets: ffn}
  train: {batch_size: 4, epochs: 20, max_steps: 4, learning_rate: 1.0e-2, eval_every: 0}
split: {valid: 0.2, test: 0.2}
grid:
  task:
    - {label: animals, set: {data.train: [{path: animals.jsonl, domain: animals}]}}
    - {label: colours, set: {data.train: [{path: colours.jsonl, domain: colours}]}}
compare: task
seeds: 2
";

#[test]
fn a_study_keeps_what_its_adapters_consist_of_and_compares_them() {
    let place = Place::new();
    place.write("alike.yaml", &STUDY.replace("MODEL", &model().display().to_string()));
    place.succeed(&["study", "plan", "alike.yaml", "--out", "s"]);
    place.succeed(&["study", "run", "s"]);
    let cells: Vec<String> = fs::read_dir(place.path("s/cells"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    assert_eq!(cells.len(), 4);
    let result = |cell: &str| json(&place.read(&format!("s/cells/{cell}/result.json")));
    for cell in &cells {
        let analysis = &result(cell)["analysis"];
        assert!(number(&analysis["overall"]["effective_rank"]) >= 1.0, "{analysis}");
        assert!(analysis["by_projection"]["gate_proj"]["a_change"].is_f64(), "{analysis}");
        assert!(analysis.get("sites").is_none());
        assert!(!place.path(&format!("s/cells/{cell}/run/analysis.json")).exists());
    }
    // What an earlier build left open is filled in, and nothing else is touched.
    let path = place.path(&format!("s/cells/{}/result.json", cells[0]));
    let whole = result(&cells[0]);
    let mut open = whole.clone();
    open["analysis"] = serde_json::json!({"value": null, "reason": "not looked at"});
    fs::write(&path, open.to_string()).unwrap();
    let before = place.succeed(&["study", "report", "s"]).stdout;
    assert!(!place.read("s/report/report.html").contains("Likeness of A"), "{before}");
    let ran = place.succeed(&["analyze", "--study", "s"]);
    assert!(ran.stdout.contains("4 cells looked at"), "{}", ran.stdout);
    assert_eq!(result(&cells[0]), whole);

    let found = json(&place.read("s/report/analysis.json"));
    assert_eq!(found["axis"], "task");
    let groups = found["groups"].as_array().unwrap();
    let group = |began: bool, same: bool| {
        let mut here = groups
            .iter()
            .filter(|group| group["began_equal"] == began && group["same_label"] == same);
        here.next().cloned()
    };
    // Two tasks from the same seed; of other seeds the same task and others.
    let (equal, apart) = (group(true, false).unwrap(), group(false, true).unwrap());
    assert!(group(true, true).is_none() && group(false, false).is_some(), "{groups:?}");
    assert!(number(&equal["a"]["cosine"]) > number(&apart["a"]["cosine"]) + 0.3, "{groups:?}");
    place.succeed(&["study", "report", "s"]);
    let page = place.read("s/report/report.html");
    for part in ["The weights", "Likeness of A", "Likeness of the change of A", "Map of B"] {
        assert!(page.contains(part), "{part} is missing");
    }
    assert!(place.read("s/report/report.md").contains("figures/weights-map-a"));
    assert!(place.read("s/report/results.csv").starts_with("study,"));
    assert!(
        place.read("s/report/results.csv").lines().next().unwrap().contains("analysis/a_change")
    );
    assert!(place.path("s/report/figures/weights-a.svg").exists());
    // A damaged comparison is named.
    place.write("s/report/analysis.json", "{\"format\": 1}");
    let ran = place.run(&["study", "report", "s"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("analysis.json"), "{}", ran.stderr);
}

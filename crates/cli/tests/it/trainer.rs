//! What a recipe says of the trainer: the optimizer, evaluation sets, and the table of metrics.

use crate::support::{Place, Ran};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}:\n{text}"))
}

/// The rows of a run's `metrics.csv` by column.
fn table(place: &Place, run: &str) -> Vec<BTreeMap<String, String>> {
    let text = place.read(&format!("{run}/metrics.csv"));
    let mut lines = text.lines();
    let head: Vec<&str> = lines.next().unwrap().split(',').collect();
    let row = |line: &str| -> BTreeMap<String, String> {
        let cells: Vec<&str> = line.split(',').collect();
        assert_eq!(cells.len(), head.len(), "{line}");
        let pairs = head.iter().zip(cells);
        pairs.map(|(name, cell)| ((*name).to_owned(), cell.to_owned())).collect()
    };
    lines.map(row).collect()
}

/// The rows of `metrics.jsonl`.
fn rows(place: &Place, run: &str) -> Vec<Value> {
    place.read(&format!("{run}/metrics.jsonl")).lines().map(json).collect()
}

fn refused(ran: &Ran, parts: &[&str]) {
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    for part in parts {
        assert!(ran.stderr.contains(part), "{part:?} is missing in\n{}", ran.stderr);
    }
}

#[test]
fn an_optimizer_is_a_word_with_its_options_beside_it() {
    let place = Place::new();
    for (set, parts) in [
        (
            "train.optimizer=lyon",
            &["train.optimizer: `lyon` is not known; did you mean `lion`?"][..],
        ),
        ("train.optimizer=adamw_8bit", &["did you mean `adamw`?"]),
        ("train.momentum=0.9", &["train.momentum: `adamw` has no such option; it is one of muon"]),
        ("train.optim=lion", &["train.optim: unknown option; here it is `optimizer`"]),
        ("train.beta2=1", &["--set train.beta2=1: train.beta2: is 1; expected 0 ≤ beta2 < 1"]),
    ] {
        refused(&place.run(&["check", "recipe.yaml", "--set", set]), parts);
    }
    let lion = ["--set", "train.optimizer=lion"];
    let momentum = ["--set", "train.momentum=0.9", "--set", "train.ns_steps=3"];
    let ran = place.run(&[&["check", "recipe.yaml"][..], &lion, &momentum].concat());
    refused(&ran, &["has 2 faults", "`lion` has no such option; it is one of muon"]);

    // What the state takes follows from the optimizer: 2, 1, 1 and next to no number for each.
    let bytes = |optimizer: &str| {
        let set = format!("train.optimizer={optimizer}");
        let ran = place.succeed(&["check", "recipe.yaml", "--json", "--set", &set]);
        let found = json(&ran.stdout);
        let trainable = found["parameters"]["trainable"].as_u64().unwrap() as f64 * 4.0;
        found["memory_bytes"]["trainable"].as_u64().unwrap() as f64 / trainable
    };
    assert_eq!(bytes("adamw"), 4.0);
    assert_eq!(bytes("lion"), 3.0);
    assert_eq!(bytes("muon"), 3.0);
    assert!((2.0..3.0).contains(&bytes("adafactor")));
}

#[test]
fn every_optimizer_trains_and_goes_on_from_its_own_state_alone() {
    let place = Place::new();
    let short = ["--quiet", "--set", "train.max_steps=6", "--set", "train.save_every=3"];
    for optimizer in ["lion", "adafactor", "muon"] {
        let (set, output) = (format!("train.optimizer={optimizer}"), format!("output={optimizer}"));
        let train = ["train", "recipe.yaml", "--set", &set, "--set", &output];
        place.succeed(&[&train[..], &short].concat());
        let adapter = format!("{optimizer}/adapter/adapter_model.safetensors");
        let whole = fs::read(place.path(&adapter)).unwrap();
        let spelt = place.read(&format!("{optimizer}/recipe.yaml"));
        assert!(spelt.contains(&format!("optimizer: {optimizer}")), "{spelt}");
        assert!(!spelt.contains("epsilon: 1e-08") || optimizer == "muon", "{spelt}");
        fs::remove_dir_all(place.path(&format!("{optimizer}/adapter"))).unwrap();
        fs::remove_dir_all(place.path(&format!("{optimizer}/checkpoints/step-000006"))).unwrap();
        let resume = [&train[..], &short, &["--resume"]].concat();
        place.succeed(&resume);
        assert!(fs::read(place.path(&adapter)).unwrap() == whole, "{optimizer}");
        let other = ["train", "recipe.yaml", "--resume", "--set", &output];
        let ran = place.run(&[&other[..], &short].concat());
        let said = format!("train.optimizer was \"{optimizer}\" and is \"adamw\" now");
        refused(&ran, &[&said]);
        assert!(!ran.stderr.contains("beta"), "{}", ran.stderr);
    }
    // The resolved recipe is a recipe.
    place.succeed(&["check", "muon/recipe.yaml"]);
}

#[test]
fn the_table_says_what_the_lines_say_and_survives_what_they_survive() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let compare = || {
        let (lines, table) = (rows(&place, "run"), table(&place, "run"));
        assert_eq!(lines.len(), table.len());
        for (line, row) in lines.iter().zip(&table) {
            assert_eq!(row["event"] == "evaluation", line.get("valid_loss").is_some());
            for key in ["step", "loss", "valid_loss", "tokens_per_s", "gate_spread"] {
                let value = line.get(key).or_else(|| line["routers"].get(key));
                let said = value.filter(|v| !v.is_null()).map_or(String::new(), Value::to_string);
                assert_eq!(row[key], said, "{key} of {line}");
            }
        }
        let last = table.last().unwrap();
        let domain = |name: &str| last[&format!("domain_loss:{name}")].parse::<f64>().unwrap();
        assert!(domain("animals") > 0.0 && domain("colours") > 0.0);
    };
    compare();
    let whole = place.read("run/metrics.csv");
    fs::remove_dir_all(place.path("run/adapter")).unwrap();
    fs::remove_dir_all(place.path("run/checkpoints/step-000020")).unwrap();
    fs::write(place.path("run/metrics.csv"), &whole[..whole.len() / 2]).unwrap();
    place.succeed(&["train", "recipe.yaml", "--quiet", "--resume"]);
    compare();
    assert_eq!(table(&place, "run").len(), whole.lines().count() - 1);
}

#[test]
fn evaluation_sets_have_losses_of_their_own_and_one_may_decide() {
    let place = Place::new();
    // What is learnt is not what the second set asks for.
    let record =
        |at: usize| format!("{{\"instruction\": \"Odd {at}?\", \"output\": \"zq{at}xv.\"}}\n");
    place.write("odd.jsonl", &(0..6).map(record).collect::<String>());
    let head = |name: &str| place.read(name).lines().take(4).collect::<Vec<_>>().join("\n") + "\n";
    place.write("seen.jsonl", &head("animals.jsonl"));
    let sets =
        "  valid:\n    seen: [{path: seen.jsonl, domain: animals}]\n    odd: {path: odd.jsonl}\n";
    let recipe = place.read("recipe.yaml").replace("  valid_fraction: 0.2\n", sets);
    place.write("sets.yaml", &recipe);
    let train = |output: &str, more: &[&str]| {
        let output = format!("output={output}");
        let arguments = ["train", "sets.yaml", "--json", "--set", &output];
        place.succeed(&[&arguments[..], more].concat())
    };
    let eval = ["--set", "train.eval_every=2"];
    let found = json(&train("together", &eval).stdout);
    let of = |evaluation: &Value, set: &str| -> (f64, f64) {
        let all = evaluation["sets"].as_array().unwrap();
        let found = all.iter().find(|of| of["set"] == set).unwrap();
        (found["loss"].as_f64().unwrap(), found["label_tokens"].as_f64().unwrap())
    };
    // The sets together are all that is held out.
    let evaluation = &found["evaluation"];
    let [(seen, seen_tokens), (odd, odd_tokens)] = ["seen", "odd"].map(|set| of(evaluation, set));
    let mean = (seen * seen_tokens + odd * odd_tokens) / (seen_tokens + odd_tokens);
    assert!((evaluation["loss"].as_f64().unwrap() - mean).abs() < 1e-9);
    assert!(seen < of(&found["baseline"], "seen").0);
    let last = table(&place, "together").pop().unwrap();
    assert_eq!(last["set_loss:odd"].parse::<f64>().unwrap(), odd);
    let report = place.read("together/report.html");
    assert!(report.contains("set seen") && report.contains("held-out, odd"));
    let best = |run: &str, loss: &dyn Fn(&Value) -> f64| -> (Vec<u64>, f64) {
        let rows = rows(&place, run).into_iter().filter(|row| row.get("valid_loss").is_some());
        let (mut least, mut steps) = (f64::INFINITY, Vec::new());
        for row in rows {
            if loss(&row) < least {
                least = loss(&row);
                steps.push(row["step"].as_u64().unwrap());
                assert_eq!(row["best"], true, "{row}");
            } else {
                assert_eq!(row["best"], false, "{row}");
            }
        }
        (steps, least)
    };
    best("together", &|row| row["valid_loss"].as_f64().unwrap());
    for set in ["odd", "seen"] {
        let chosen = format!("train.best_set={set}");
        let ran = train(set, &[&eval[..], &["--set", &chosen]].concat());
        let (steps, least) = best(set, &|row| of(row, set).0);
        assert_eq!(json(&ran.stdout)["best_loss"].as_f64().unwrap(), least, "{steps:?}");
    }
    // The resolved recipe says the same with the sets beside the files.
    let again = json(&place.succeed(&["check", "odd/recipe.yaml", "--json"]).stdout);
    assert_eq!(again["recipe"]["data"]["valid"][1]["set"], "odd");
    assert_eq!(again["recipe"]["train"]["best_set"], "odd");

    for (set, parts) in [
        (
            "train.best_set=od",
            &["train.best_set: `od` is no set of `data.valid`; did you mean `odd`?"][..],
        ),
        (
            "data.valid={odd: [{path: none.jsonl}]}",
            &["data.valid.odd[0].path: there is no file none"],
        ),
        ("data.valid={odd: {paht: odd.jsonl}}", &["data.valid.odd.paht: unknown option"]),
        (
            "data.valid={odd: odd.jsonl}",
            &["data.valid.odd: is the text `odd.jsonl`; expected a mapping"],
        ),
        ("data.train.0.set=x", &["data.train[0].set: \"x\": sets are for what is evaluated"]),
    ] {
        refused(&place.run(&["check", "sets.yaml", "--set", set]), parts);
    }
    let ran = place.run(&["check", "recipe.yaml", "--set", "train.best_set=odd"]);
    refused(&ran, &["`data.valid` names no sets"]);
}

//! Energy in what commands write, from a tree of counters that the test moves, from a power that was
//! given, and from nothing.

use crate::support::{Place, Ran, model, ran};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const GUESS: &str = "estimate: 65 W x wall time";
const MEASURED: &str = "rapl:package-0+dram";
/// Names the folder of counters.
const POWERCAP: &str = "HYDRALORA_POWERCAP";

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A package and its memory, whose counters go up as long as this lives, the package's over its range.
struct Counters {
    root: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Counters {
    fn new(place: &Place) -> Self {
        const RANGE: u64 = 3_000_000;
        let domains = [("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram")];
        for (folder, name) in domains {
            place.write(&format!("powercap/{folder}/name"), &format!("{name}\n"));
            place.write(&format!("powercap/{folder}/max_energy_range_uj"), &format!("{RANGE}\n"));
            place.write(&format!("powercap/{folder}/energy_uj"), "0\n");
        }
        let (root, stop) = (place.path("powercap"), Arc::new(AtomicBool::new(false)));
        let (files, stopped) = (root.clone(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut energy = 0_u64;
            while !stopped.load(Ordering::Relaxed) {
                energy += 20_000;
                for (folder, _) in domains {
                    let file = files.join(folder).join("energy_uj");
                    let new = files.join("new");
                    fs::write(&new, format!("{}\n", energy % RANGE)).unwrap();
                    fs::rename(&new, &file).unwrap();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self { root, stop, thread: Some(thread) }
    }

    fn run(&self, place: &Place, arguments: &[&str]) -> Value {
        json(&in_tree(place, &self.root.display().to_string(), arguments).stdout)
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Runs with a folder of counters, and insists on success.
fn in_tree(place: &Place, root: &str, arguments: &[&str]) -> Ran {
    let mut command = place.command(arguments);
    let found = ran(command.env(POWERCAP, root).output().unwrap());
    assert_eq!(found.code, Some(0), "{arguments:?}\n{}\n{}", found.stdout, found.stderr);
    found
}

/// The rows of a run's steps.
fn steps(place: &Place, run: &str) -> Vec<Value> {
    let rows = place.read(&format!("{run}/metrics.jsonl"));
    rows.lines().map(json).filter(|row| row.get("tokens").is_some()).collect()
}

fn joules(energy: &Value) -> f64 {
    energy["energy_j"].as_f64().unwrap_or_else(|| panic!("{energy}"))
}

#[test]
fn training_says_what_the_counters_say() {
    let place = Place::new();
    let counters = Counters::new(&place);
    let train = ["--json", "train", "recipe.yaml", "--idle-seconds", "0.3"];
    let trained = counters.run(&place, &train);
    let energy = &trained["energy"];
    let rows = steps(&place, "run");
    assert_eq!(rows.len(), 20);
    let mut before = 0.0;
    for row in &rows {
        assert!(joules(row) >= before, "{row}");
        assert_eq!(row["energy_source"], MEASURED);
        before = joules(row);
    }
    assert!(before > 0.0 && joules(energy) >= before, "{energy}");
    assert_eq!((&energy["source"], &energy["reason"]), (&MEASURED.into(), &Value::Null));
    assert_eq!(energy["estimated"], false);
    let tokens: u64 = rows.iter().filter_map(|row| row["tokens"].as_u64()).sum();
    assert_eq!(energy["tokens"], tokens);
    let near = |found: &Value, wanted: f64| {
        let found = found.as_f64().unwrap();
        assert!((found / wanted - 1.0).abs() < 1e-9, "{found} {wanted}");
    };
    near(&energy["j_per_1000_tokens"], joules(energy) * 1000.0 / tokens as f64);
    near(&energy["kwh"], joules(energy) / 3.6e6);
    assert!(energy["idle_watts"].as_f64() > Some(0.0), "{energy}");
    assert_eq!(energy["idle_seconds"], 0.3);
    assert!(energy.get("g_co2eq").is_none(), "nobody said what a kilowatt-hour emits: {energy}");
    let report = place.read("run/report.html");
    assert!(report.contains("energy") && report.contains(MEASURED));
}

#[test]
fn a_run_that_goes_on_adds_to_what_it_used() {
    let place = Place::new();
    let counters = Counters::new(&place);
    let train = ["--json", "--quiet", "train", "recipe.yaml"];
    let part = counters.run(&place, &[&train[..], &["--set", "train.max_steps=10"]].concat());
    let first = joules(steps(&place, "run").last().unwrap());
    let resume = [&train[..], &["--resume", "--power-watts", "65"]].concat();
    let whole = counters.run(&place, &resume);
    let both = format!("{MEASURED}, then {GUESS}");
    let energy = &whole["energy"];
    assert!(joules(energy) > first && joules(&part["energy"]) >= first, "{energy}");
    assert_eq!((&energy["source"], &energy["estimated"]), (&both.as_str().into(), &true.into()));
    let rows = steps(&place, "run");
    assert_eq!(rows[9]["energy_source"], MEASURED);
    assert!(rows[10]["energy_source"] == both.as_str() && joules(&rows[10]) >= first);
    // Nothing is left to do, and what was used is still known.
    let again = counters.run(&place, &[&train[..], &["--resume"]].concat());
    assert_eq!(again["already_finished"], true);
    assert_eq!(again["energy"]["source"], both);
    assert!(joules(&again["energy"]) >= joules(rows.last().unwrap()));

    // A part that nobody measured leaves the whole unknown.
    let unknown = ["--set", "output=dark"];
    let part = [&train[..], &unknown, &["--set", "train.max_steps=10"]].concat();
    in_tree(&place, "nowhere", &part);
    let whole = counters.run(&place, &[&train[..], &unknown, &["--resume"]].concat());
    assert_eq!(whole["energy"]["energy_j"], Value::Null);
    assert_eq!(whole["energy"]["reason"], "the first 10 steps were not measured");
}

#[test]
fn a_power_that_is_given_is_marked_as_a_guess_everywhere() {
    let place = Place::new();
    let counters = Counters::new(&place);
    let guess = ["--power-watts", "65", "--grid-intensity", "400"];
    let all = |arguments: &[&str]| counters.run(&place, &[arguments, &guess].concat());
    let check = |energy: &Value| {
        assert_eq!((&energy["source"], &energy["estimated"]), (&GUESS.into(), &true.into()));
        assert!((joules(energy) / (65.0 * energy["seconds"].as_f64().unwrap()) - 1.0).abs() < 1e-6);
        let grams = energy["g_co2eq"].as_f64().unwrap();
        assert!((grams / (400.0 * energy["kwh"].as_f64().unwrap()) - 1.0).abs() < 1e-9);
        assert_eq!(energy["grid_g_per_kwh"], 400.0);
        assert_eq!(energy["idle_watts"], Value::Null);
    };
    check(&all(&["--json", "train", "recipe.yaml"])["energy"]);
    assert!(steps(&place, "run").iter().all(|row| row["energy_source"] == GUESS));
    assert!(place.read("run/report.html").contains(GUESS));

    let folder = model().display().to_string();
    let both = ["--model", &folder, "--adapter", "run/adapter"];
    let tasks = ["--tasks", "loss:animals.jsonl", "--out", "results.json"];
    let scored = all(&[&["--json", "eval"], &both[..], &tasks].concat());
    let written = json(&place.read("results.run.json"));
    for energy in [&scored["models"]["base"]["energy"], &written["energy"]] {
        check(energy);
        // 24 records, by two models in one pass.
        assert_eq!(energy["answers"], 48);
        let each = energy["j_per_answer"].as_f64().unwrap();
        assert!((each * 48.0 / joules(energy) - 1.0).abs() < 1e-9);
    }
    let prompt = ["--prompt", "Once", "--raw", "--max-new-tokens", "4"];
    let answer = all(&[&["--json", "generate"], &both[..], &prompt].concat());
    check(&answer["energy"]);
    assert_eq!(answer["energy"]["answers"], 1);
    assert_eq!(answer["energy"]["j_per_answer"], answer["energy"]["energy_j"]);
    let told = ["--quiet", "generate", "--model", &folder, "--prompt", "Once", "--raw"];
    let told = in_tree(&place, "nowhere", &[&told[1..], &guess].concat());
    assert!(told.stderr.contains(GUESS), "{}", told.stderr);

    let bench = ["--json", "bench", "train", "--model", &folder, "--method", "base,lora"];
    let size = ["--batches", "1", "--batch-size", "2", "--seq-len", "16", "--no-memory"];
    let compared = all(&[&bench[..], &size].concat());
    for method in compared["methods"].as_array().unwrap() {
        check(&method["energy"]);
        assert_eq!(method["energy"]["tokens"], 32);
    }
}

#[test]
fn where_nothing_can_be_read_the_reason_is_said() {
    let place = Place::new();
    let trained = json(&in_tree(&place, "nowhere", &["--json", "train", "recipe.yaml"]).stdout);
    let energy = &trained["energy"];
    assert_eq!((&energy["energy_j"], &energy["source"]), (&Value::Null, &Value::Null));
    assert_eq!((&energy["kwh"], &energy["estimated"]), (&Value::Null, &false.into()));
    assert!(energy.get("j_per_1000_tokens").is_none(), "{energy}");
    let reason = energy["reason"].as_str().unwrap();
    assert!(reason.starts_with("processor: nowhere: no such folder; "), "{reason}");
    for row in steps(&place, "run") {
        assert_eq!((&row["energy_j"], &row["energy_source"]), (&Value::Null, &Value::Null));
    }
    assert!(place.read("run/report.html").contains("not measured: processor: nowhere"));
    // A guess about what emits how much is none without joules.
    let folder = model().display().to_string();
    let prompt = ["--json", "generate", "--model", &folder, "--prompt", "Once", "--raw"];
    let said = in_tree(&place, "nowhere", &[&prompt[..], &["--grid-intensity", "400"]].concat());
    let energy = &json(&said.stdout)["energy"];
    assert!(energy["reason"].is_string() && energy.get("g_co2eq").is_none(), "{energy}");
}

#[test]
fn a_study_keeps_the_energy_of_its_cells() {
    let place = Place::new();
    let counters = Counters::new(&place);
    let study = "\
name: small
base:
  model: {path: MODEL}
  data: {train: [{path: animals.jsonl, domain: animals}], template: plain, max_seq_len: 128}
  method: {name: lora, rank: 2, alpha: 16, targets: ffn}
  train: {batch_size: 4, epochs: 40, max_steps: 4, learning_rate: 1.0e-2, eval_every: 0, save_every: 2}
split: {valid: 0.2, test: 0.2}
grid: {method.rank: [2, 4]}
seeds: 1
metrics: [energy_j, test_energy_j, loss]
";
    place.write("small.yaml", &study.replace("MODEL", &model().display().to_string()));
    for (folder, options, source) in [
        ("measured", &[][..], MEASURED),
        ("guessed", &["--power-watts", "65", "--grid-intensity", "400"], GUESS),
    ] {
        place.succeed(&["study", "plan", "small.yaml", "--out", folder]);
        let jobs = if folder == "guessed" { "2" } else { "1" };
        let run = ["--json", "study", "run", folder, "--jobs", jobs];
        counters.run(&place, &[&run[..], options].concat());
        let mut cells = 0;
        for cell in fs::read_dir(place.path(folder).join("cells")).unwrap() {
            let text = fs::read_to_string(cell.unwrap().path().join("result.json")).unwrap();
            let result = json(&text);
            for energy in [&result["trained"]["energy"], &result["test"]["energy"]] {
                assert!(joules(energy) > 0.0, "{energy}");
                assert_eq!(energy["source"], source);
                let grams = energy["g_co2eq"].as_f64();
                let wanted = (jobs == "2").then(|| 400.0 * joules(energy) / 3.6e6);
                assert_eq!(grams.is_some(), wanted.is_some(), "{energy}");
                assert!((grams.unwrap_or(1.0) / wanted.unwrap_or(1.0) - 1.0).abs() < 1e-9);
                let others = energy["reason"] == "counts all of the 2 cells at work at once";
                assert_eq!(others, jobs == "2", "{energy}");
            }
            cells += 1;
        }
        assert_eq!(cells, 2);
        place.succeed(&["study", "report", folder]);
        let report = place.read(&format!("{folder}/report/report.md"));
        let name = if folder == "guessed" { "energy (J, estimated)" } else { "energy (J)" };
        assert!(report.contains(name) && report.contains(source), "{report}");
        let table = place.read(&format!("{folder}/report/results.csv"));
        assert!(table.lines().next().unwrap().ends_with(",energy_source"), "{table}");
        assert!(table.lines().skip(1).all(|line| line.ends_with(source)), "{table}");
    }
}

#[test]
fn powers_and_intensities_that_are_none_are_refused() {
    let place = Place::new();
    let folder = model().display().to_string();
    let generate = ["generate", "--model", &folder, "--prompt", "Once", "--raw"];
    let eval = ["eval", "--model", &folder, "--tasks", "loss:animals.jsonl"];
    let commands: [&[&str]; 6] = [
        &["train", "recipe.yaml"],
        &generate,
        &eval,
        &["bench", "kernels"],
        &["study", "run", "nowhere"],
        &["study", "quick"],
    ];
    for command in commands {
        for (option, values, expected) in [
            (
                "--power-watts",
                &["-3", "NaN", "0", "inf", "much"][..],
                "expected a power in watts above 0",
            ),
            (
                "--grid-intensity",
                &["-1", "nan", "green"],
                "expected grams for a kilowatt-hour, 0 or more",
            ),
            ("--idle-seconds", &["-1", "NaN", "1e9"], "expected seconds, 0 to 3600"),
        ] {
            for value in values {
                let ran = place.run(&[command, &[option, value]].concat());
                assert_eq!(ran.code, Some(2), "{command:?} {option} {value}: {}", ran.stderr);
                assert!(
                    ran.stderr.contains(expected) && ran.stderr.contains(option),
                    "{}",
                    ran.stderr
                );
            }
        }
    }
    let both = ["train", "recipe.yaml", "--power-watts", "65", "--idle-seconds", "1"];
    let ran = place.run(&both);
    assert_eq!(ran.code, Some(2), "a guess has no idle power: {}", ran.stderr);
    assert!(!place.path("run").exists());
}

//! What an earlier build trained and saved is read, computes the same, and is gone on from: recipes,
//! adapters and checkpoints in `fixtures/golden`, with the script that wrote them.

use crate::support::{Place, model};
use safetensors::tensor::SafeTensors;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden")
}

/// One method's recipe and what came of it.
struct Case {
    name: String,
    folder: PathBuf,
    golden: Value,
}

/// Every case.
fn cases() -> Vec<Case> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder()).unwrap() {
        let folder = entry.unwrap().path();
        if folder.join("recipe.yaml").exists() {
            let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
            let golden =
                serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
            found.push(Case { name, folder, golden });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(found.len() > 20, "{} cases", found.len());
    found
}

/// The vector instructions that results may depend on in their last bits.
fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            "x86_64 avx512"
        } else if std::arch::is_x86_feature_detected!("avx2") {
            "x86_64 avx2"
        } else {
            "x86_64"
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        std::env::consts::ARCH
    }
}

/// Every tensor of a file as `f32`.
fn tensors(path: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut all: Vec<_> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let (numbers, _) = view.data().as_chunks::<4>();
            let values = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            (name, view.shape().to_vec(), values)
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

impl Case {
    /// Trains with the case's recipe into `run`.
    fn train(&self, place: &Place, more: &[&str]) {
        let recipe = self.folder.join("recipe.yaml").display().to_string();
        let model = format!("model.path={}", model().display());
        let train = ["train", &recipe, "--quiet", "--set", &model, "--set", "output=run"];
        place.succeed(&[&train[..], more].concat());
    }

    /// Insists on the adapter that the earlier build ended with: within `bound` on a machine with the
    /// same vector instructions, where sums are formed in the same order.
    fn compare(&self, place: &Place, what: &str, bound: f64) {
        let own = place.path("run/adapter");
        for file in ["adapter_config.json", "hydralora.json"] {
            let read = |folder: &Path| -> Value {
                serde_json::from_slice(&fs::read(folder.join(file)).unwrap()).unwrap()
            };
            let (mut found, mut golden) = (read(&own), read(&self.folder.join("adapter")));
            // A later build says so.
            found["version"] = Value::Null;
            golden["version"] = Value::Null;
            // Earlier builds named a base model by its folder's name alone.
            for key in ["base_model", "base_model_name_or_path"] {
                if let Some(name) = found.get_mut(key) {
                    let path = Path::new(name.as_str().unwrap());
                    assert!(path.is_absolute(), "{}: {}", self.name, path.display());
                    *name = path.file_name().unwrap().to_str().unwrap().into();
                }
            }
            assert_eq!(found, golden, "{} {what}: {file}", self.name);
        }
        let file = "adapter_model.safetensors";
        let (found, golden) =
            (tensors(&own.join(file)), tensors(&self.folder.join("adapter").join(file)));
        let names = |all: &[(String, Vec<usize>, Vec<f32>)]| -> Vec<_> {
            all.iter().map(|(name, shape, _)| (name.clone(), shape.clone())).collect()
        };
        assert_eq!(names(&found), names(&golden), "{} {what}", self.name);
        let same_machine = self.golden["instructions"] == instructions();
        for ((name, _, found), (_, _, golden)) in found.iter().zip(&golden) {
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
            let apart =
                norm(&mut found.iter().zip(golden).map(|(a, b)| f64::from(*a) - f64::from(*b)));
            let off = (apart / norm(&mut golden.iter().map(|v| f64::from(*v))).max(1e-30)).sqrt();
            let bound = if same_machine { bound } else { 1e-3 };
            assert!(off <= bound, "{} {what}: {name} is off by {off:.1e}", self.name);
        }
    }

    /// A list of numbers by its path, as `anew/losses`.
    fn numbers(&self, path: &str) -> Vec<f64> {
        let list = self.golden.pointer(&format!("/{path}")).and_then(Value::as_array).unwrap();
        list.iter().map(|value| value.as_f64().unwrap()).collect()
    }
}

/// The numbers of one key in the metrics of a run.
fn metrics(place: &Place, key: &str) -> Vec<f64> {
    let rows = place.read("run/metrics.jsonl");
    let rows = rows.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter_map(|row| row[key].as_f64()).collect()
}

fn assert_near(found: &[f64], golden: &[f64], what: &str) {
    assert_eq!(found.len(), golden.len(), "{what}: {found:?}, not {golden:?}");
    for (found, golden) in found.iter().zip(golden) {
        assert!((found - golden).abs() <= 1e-5 * golden.abs(), "{what}: {found}, not {golden}");
    }
}

#[test]
fn adapters_of_earlier_builds_compute_the_same() {
    for case in cases() {
        let adapter = case.folder.join("adapter");
        if !adapter.exists() {
            continue;
        }
        let place = Place::new();
        let [model, adapter, task] = [
            model().display().to_string(),
            adapter.display().to_string(),
            format!("loss:{}", folder().join("animals.jsonl").display()),
        ];
        let mut arguments = vec!["eval", "--model", &model, "--adapter", &adapter, "--skip-base"];
        if ["mtl-lora", "domain-heads"].contains(&case.name.as_str()) {
            arguments.extend(["--domain", "animals"]);
        }
        arguments.extend(["--tasks", &task, "--json"]);
        let found: Value = serde_json::from_str(&place.succeed(&arguments).stdout).unwrap();
        let scores = &found["models"].as_object().unwrap().values().next().unwrap()["results"];
        let loss = scores["loss"]["loss,none"].as_f64().unwrap();
        assert_near(&[loss], &[case.golden["eval_loss"].as_f64().unwrap()], &case.name);
    }
}

#[test]
fn checkpoints_of_earlier_builds_are_gone_on_from() {
    let mut count = 0;
    for case in cases() {
        let checkpoint = case.folder.join("checkpoint");
        if !checkpoint.exists() {
            continue;
        }
        count += 1;
        let place = Place::new();
        let into = place.path("run/checkpoints/step-000004");
        fs::create_dir_all(&into).unwrap();
        for entry in fs::read_dir(&checkpoint).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), into.join(entry.file_name())).unwrap();
        }
        case.train(&place, &["--resume"]);
        case.compare(&place, "resumed", 0.0);
        assert_near(&metrics(&place, "loss"), &case.numbers("losses")[4..], &case.name);
    }
    assert!(count >= 6, "{count} checkpoints");
}

#[test]
fn recipes_of_earlier_builds_train_the_same() {
    for case in cases() {
        let place = Place::new();
        case.train(&place, &[]);
        assert_near(&metrics(&place, "loss"), &case.numbers("anew/losses"), &case.name);
        assert_near(&metrics(&place, "valid_loss"), &case.numbers("anew/valid_losses"), &case.name);
    }
}

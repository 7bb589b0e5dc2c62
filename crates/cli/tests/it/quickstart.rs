//! The README's first command, on the small model and with few steps.

use crate::files::all_below;
use crate::support::{Place, model, ran};
use serde_json::Value;

#[test]
fn quickstart_compares_two_methods_of_equal_size() {
    let place = Place::new();
    let base = model().display().to_string();
    let arguments =
        ["quickstart", "--model", &base, "--max-steps", "3", "--out", "qs", "--json", "--quiet"];
    let result: Value = serde_json::from_str(&place.succeed(&arguments).stdout).unwrap();
    let size = |name: &str| result[name]["trainable"].as_f64().unwrap();
    let ratio = size("hydralora") / size("lora");
    assert!((0.9..1.1).contains(&ratio), "{ratio}");
    assert_eq!(result["hydralora"]["losses"].as_array().unwrap().len(), 6, "five domains and all");
    let answers = result["answers"].as_array().unwrap();
    assert!(answers.iter().all(|asked| asked["answers"].as_array().unwrap().len() == 3));
    assert!(result["routing"]["specialisation"].is_number());
    let report = place.read("qs/report.html");
    for part in
        ["Routing", "HydraLoRA, held-out", "LoRA, held-out", "alpha 32", "learning rate", "seed 41"]
    {
        assert!(report.contains(part), "{part} is missing");
    }
    assert!(place.path("qs/hydralora/adapter/adapter_model.safetensors").exists());
    assert!(place.path("qs/lora/adapter/adapter_model.safetensors").exists());
    let records = place.read("qs/hydralora/data.json") + &place.read("qs/hydralora/recipe.yaml");
    assert!(
        records.contains("qs/data/law.jsonl") && !records.contains("hydralora.tmp"),
        "{records}"
    );
    // It stays until another one is whole.
    let before = all_below(&place.path("qs"));
    let ran = place.run(&arguments);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("--force"), "{}", ran.stderr);
    let again = [&arguments[..], &["--force"]].concat();
    let mut long = again.clone();
    long[4] = "100000";
    let mut child = place.start(&long);
    std::thread::sleep(std::time::Duration::from_secs(3));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(before == all_below(&place.path("qs")), "a repeat that was killed changed the first");
    place.succeed(&again);
    let left = std::fs::read_dir(place.path("")).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with(".qs")).collect();
    assert!(left.is_empty(), "{left:?}");
    place.write("qs/lora/notes.txt", "mine");
    let ran = place.run(&again);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("lora/notes.txt"), "{}", ran.stderr);
    assert_eq!(place.read("qs/lora/notes.txt"), "mine");
}

#[test]
fn quickstart_takes_no_folder_of_other_files() {
    let place = Place::new();
    place.write("work/hydralora/src/main.rs", "fn main() {}");
    place.write("work/lora/thesis.tex", "mine");
    let base = model().display().to_string();
    let before = all_below(&place.path("work"));
    for more in [&[][..], &["--force"]] {
        let arguments = ["quickstart", "--model", &base, "--max-steps", "2", "--out", "work"];
        let ran = place.run(&[&arguments[..], more].concat());
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains("would be lost"), "{}", ran.stderr);
    }
    assert!(before == all_below(&place.path("work")));
}

#[cfg(unix)]
#[test]
fn an_empty_folder_to_be_in_is_filled() {
    let place = Place::new();
    let base = model().display().to_string();
    std::fs::create_dir(place.path("here")).unwrap();
    let arguments = ["quickstart", "--model", &base, "--max-steps", "1", "--out", ".", "--quiet"];
    for more in [&[][..], &["--force"]] {
        let mut command = place.command(&[&arguments[..], more].concat());
        let ended = ran(command.current_dir(place.path("here")).output().unwrap());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(place.path("here/hydralora/adapter/adapter_config.json").exists());
    }
    let names = std::fs::read_dir(place.path("here")).unwrap().count();
    assert_eq!(names, 5, "data, two runs, the report and the list");
}

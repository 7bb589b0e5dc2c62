//! The README's first command, on the small model and with few steps.

use crate::support::{Place, model};
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
    assert_eq!(result["generations"].as_array().unwrap().len(), 2);
    assert!(place.read("qs/report.html").contains("Routing"));
    assert!(place.path("qs/hydralora/adapter/adapter_model.safetensors").exists());
    assert!(place.path("qs/lora/adapter/adapter_model.safetensors").exists());
    // Once more over the first one's results.
    place.succeed(&arguments);
}

//! Ten thousand cells. Measured without company, a plan takes under 10 s and a report under 30 s; the bounds
//! here leave room for a busy machine.

use crate::fake::{STUDY, loss, planned};
use hydralora_study::report::analysis::Analysis;
use hydralora_study::report::write;
use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, Instant};

#[test]
fn ten_thousand_cells_are_planned_and_reported() {
    let place = tempfile::tempdir().unwrap();
    let rates: Vec<String> = (1..=100).map(|n| format!("{n}.0e-4")).collect();
    let text = STUDY
        .replace("[1.0e-4, 1.0e-3, 1.0e-2]", &format!("[{}]", rates.join(", ")))
        .replace("tune:", "  train.dropout: [0, 0.1, 0.2, 0.3, 0.4]\ntune:")
        .replace("seeds: 3", "seeds: 10");
    let began = Instant::now();
    let (store, plan, new) = planned(&text, &place.path().join("s")).unwrap();
    let planning = began.elapsed();
    assert_eq!(new, 10_000);
    for cell in &plan.cells {
        let recipe = fs::read_to_string(store.file(&cell.id, "recipe.yaml")).unwrap();
        let recipe: Value = serde_saphyr::from_str(&recipe).unwrap();
        let loss = loss(&recipe);
        let losses = json!({"loss": loss, "label_tokens": 10, "domains": {"a": {"loss": loss, "label_tokens": 10}}});
        let energy = json!({"energy_j": null, "source": null, "reason": "simulated"});
        let parameters = json!({"trainable": 400});
        let curve: Vec<Value> = (0..50).map(|step| json!({"step": step, "loss": loss})).collect();
        let result = json!({
            "format": 1, "cell": cell.id, "program": "test", "identity": null,
            "trained": {
                "valid": losses, "base": null, "ending": "finished", "steps": 50, "tokens": 1000,
                "label_tokens": 500, "wall_s": 1.5, "cpu_s": 3.0, "peak_rss_mb": 100.0, "energy": energy,
                "parameters": parameters, "gates": null, "curve": curve, "evaluations": [],
            },
            "test": {
                "tasks": {"mmlu": {"acc,none": 1.0 / loss}}, "higher_is_better": {"mmlu": {"acc": true}},
                "data_sha256": {}, "wall_s": 1.0, "cpu_s": null, "energy": energy,
            },
            "machine": {"processor": null, "threads": 1, "system": "test"},
            "attempts": 1, "overhead_s": 0.0, "analysis": null,
        });
        fs::write(store.file(&cell.id, "result.json"), result.to_string()).unwrap();
    }
    let began = Instant::now();
    let written =
        write("Large", &[Analysis::read(&store).unwrap()], &place.path().join("report")).unwrap();
    let reporting = began.elapsed();
    println!("10,000 cells: planned in {planning:.1?}, reported in {reporting:.1?}");
    assert!(written.figures > 5);
    let rows = fs::read_to_string(place.path().join("report/results.csv")).unwrap().lines().count();
    assert_eq!(rows, 10_001);
    assert!(planning < Duration::from_secs(60), "{planning:?}");
    assert!(reporting < Duration::from_secs(120), "{reporting:?}");
}

//! The cells of a study: what each adapter consists of, into its result, and how alike they are, into the
//! study's report.

use super::measure::measure;
use super::open::{Opened, name_apart, open};
use super::report::Report;
use super::tables::{began, number};
use crate::args::Global;
use crate::ui::{result, say, table};
use hydralora_files::write_file;
use hydralora_study::claim::Observer;
use hydralora_study::plan::Planned;
use hydralora_study::report::analysis::Analysis;
use hydralora_study::report::weights::FILE;
use hydralora_study::store::{Store, not_measured};
use hydralora_study::work::{ADAPTER, RUN};
use serde_json::{Map, Value, json};
use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// Adapters that are compared with each other.
const MOST_ADAPTERS: usize = 24;
/// A claim without a heartbeat for so long is dead.
const STALE_AFTER: Duration = Duration::from_secs(60);

pub(super) fn run(global: &Global, folder: &Path) -> anyhow::Result<ExitCode> {
    let store = Store::open(folder)?;
    let analysis = Analysis::read(&store)?;
    let chosen: HashSet<usize> = analysis
        .choices
        .iter()
        .filter_map(|choice| choice.chosen())
        .flat_map(|tried| tried.cells.iter().copied())
        .collect();
    let mut observer = Observer::new(STALE_AFTER);
    let mut seen = BTreeSet::new();
    let mut compared: Vec<(Opened, &str)> = Vec::new();
    let (mut filled, mut without, mut left_out) = (0, 0, 0);
    for (index, cell) in analysis.plan.cells.iter().enumerate() {
        let adapter = store.folder(&cell.id).join(RUN).join(ADAPTER);
        if !seen.insert(&cell.id) || !analysis.results.contains_key(&cell.id) || !adapter.is_dir() {
            continue;
        }
        let opened = open(&adapter, None, None);
        let found = match &opened {
            Ok(opened) => json!(measure(std::slice::from_ref(opened))?),
            Err(_) => Value::Null,
        };
        let found = match &opened {
            Ok(_) => of_cell(&found),
            Err(error) => not_measured(&format!("{error:#}")),
        };
        match observer.claim(&store.folder(&cell.id))? {
            Some(claim) => {
                store.set_analysis(&cell.id, claim, found)?;
                filled += usize::from(opened.is_ok());
            }
            None => say(global, format!("{}: is being worked on, and is left as it is", cell.id)),
        }
        let Ok(mut opened) = opened else {
            without += 1;
            continue;
        };
        if !(chosen.is_empty() || chosen.contains(&index)) {
            continue;
        }
        if compared.len() == MOST_ADAPTERS {
            left_out += 1;
            continue;
        }
        opened.name = name(cell, analysis.plan.tune.as_deref());
        opened.label = cell.labels.get(&analysis.plan.compare).cloned();
        compared.push((opened, &cell.id));
    }
    let (mut adapters, cells): (Vec<Opened>, Vec<&str>) = compared.into_iter().unzip();
    name_apart(&mut adapters);
    let mut text = format!("{filled} cells looked at, {without} without A and B");
    let mut out = Value::Null;
    if adapters.len() > 1 {
        let mut report = measure(&adapters)?;
        if left_out > 0 {
            report.notes.push(format!(
                "{left_out} more adapters are left out of the comparison, which takes {MOST_ADAPTERS}"
            ));
        }
        let path = store.root().join(FILE);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let compared = of_study(&report, &analysis.plan.name, &analysis.plan.compare, &cells);
        write_file(&path, &serde_json::to_vec_pretty(&compared)?)?;
        text.push_str(&format!("\n\n{}", groups(&report, &analysis.plan.compare)));
        for note in &report.notes {
            text.push_str(&format!("note: {note}\n"));
        }
        text.push_str(&format!(
            "compared  {}\nshow it   hydralora study report {}",
            path.display(),
            folder.display()
        ));
        out = json!(path);
    } else {
        text.push_str("; a comparison needs two adapters");
    }
    let json = json!({
        "filled": filled, "without": without, "compared": adapters.len(), "left_out": left_out,
        "out": out,
    });
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The labels of a cell and its seed.
fn name(cell: &Planned, tune: Option<&str>) -> String {
    let mut parts: Vec<String> = cell.group(tune).into_values().collect();
    parts.extend(cell.seed.map(|seed| format!("seed {seed}")));
    parts.join(", ")
}

/// What a cell's result keeps of a report: the means of its one adapter.
pub(crate) fn of_cell(report: &Value) -> Value {
    let adapter = &report["adapters"][0];
    let mut kept = Map::new();
    kept.insert("format".to_owned(), report["format"].clone());
    for key in ["overall", "by_projection", "missing"] {
        kept.insert(key.to_owned(), adapter[key].clone());
    }
    Value::Object(kept)
}

/// What the study's report shows: no single layers.
fn of_study(report: &Report, study: &str, axis: &str, cells: &[&str]) -> Value {
    let mut value = json!(report);
    for key in ["adapters", "pairs"] {
        for entry in value[key].as_array_mut().into_iter().flatten() {
            entry.as_object_mut().map(|entry| entry.remove("sites"));
        }
    }
    for (adapter, cell) in value["adapters"].as_array_mut().into_iter().flatten().zip(cells) {
        adapter["cell"] = json!(cell);
        adapter.as_object_mut().map(|adapter| adapter.remove("path"));
    }
    value["study"] = json!(study);
    value["axis"] = json!(axis);
    value
}

fn groups(report: &Report, axis: &str) -> String {
    let header = ["A began", axis, "pairs", "", "cosine", "CKA", "cos of angles", "by chance"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for group in &report.groups {
        for (part, likeness) in group.mean.parts() {
            let label = match group.same_label {
                Some(true) => "the same",
                Some(false) => "another",
                None => "",
            };
            let mut row = [began(group.began_equal), label].map(str::to_owned).to_vec();
            row.extend([group.pairs.to_string(), part.to_owned()]);
            let numbers = [likeness.cosine, likeness.cka, likeness.angle_cosine, likeness.chance];
            row.extend(numbers.map(number));
            rows.push(row);
        }
    }
    table(&rows)
}

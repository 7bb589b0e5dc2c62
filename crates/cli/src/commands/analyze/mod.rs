//! `hydralora analyze`: what the weights of trained adapters have in common, and what each consists of.

mod gates;
mod measure;
mod open;
mod page;
mod pictures;
mod report;
mod study;
mod tables;

use crate::adapter;
use crate::args::Global;
use crate::failure::bad_input;
use crate::output::check_folder;
use crate::ui::{result, say};
use anyhow::Context;
use clap::Args;
use hydralora_files::{Kind, replace_folder, write_file};
use report::Report;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
pub(crate) use study::of_cell;

/// The folder that `--out` makes.
const MADE: Kind = Kind { name: "analysis of adapters", earlier: None };

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hydralora analyze runs/law runs/math --out runs/analysis
  hydralora analyze runs/hydralora --out runs/heads-apart
  hydralora analyze --study runs/observation-2")]
pub(crate) struct AnalyzeArguments {
    /// Adapter folders, or their runs'.
    #[arg(required_unless_present = "study", value_parser = adapter::folder)]
    adapters: Vec<PathBuf>,
    /// Folder for analysis.json, analysis.html, tables as CSV and pictures as SVG.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Look at the cells of this study instead: fill in their results, and compare their adapters in its
    /// report.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["adapters", "out", "domain", "model"])]
    study: Option<PathBuf>,
    /// Base model, for adapters that train something beside their layers.
    #[arg(long)]
    model: Option<String>,
    /// The domain whose update is taken, for adapters that have one for each.
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
}

pub(crate) fn run(global: &Global, arguments: &AnalyzeArguments) -> anyhow::Result<ExitCode> {
    if let Some(folder) = &arguments.study {
        return study::run(global, folder);
    }
    let inputs: Vec<&Path> = arguments.adapters.iter().map(PathBuf::as_path).collect();
    if let Some(out) = &arguments.out {
        check_folder(out, &MADE, &inputs)?;
    }
    let mut opened = Vec::new();
    for path in &arguments.adapters {
        let asked = (arguments.model.as_deref(), arguments.domain.as_deref());
        opened.push(open::open(path, asked.0, asked.1)?);
    }
    if let Some(name) = &arguments.domain
        && opened.iter().all(|adapter| !adapter.of_domain)
    {
        return Err(bad_input(format!(
            "--domain {name}: the adapters treat all domains alike; leave the option out"
        )));
    }
    open::name_apart(&mut opened);
    let report = measure::measure(&opened)?;
    if let Some(out) = &arguments.out {
        write(out, &report).context("--out")?;
    }
    report.notes.iter().for_each(|note| say(global, format!("note: {note}")));
    result(global, &report, &page::text(&report, arguments.out.as_deref()))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the folder, whole or not at all.
fn write(folder: &Path, report: &Report) -> anyhow::Result<()> {
    let mut files = vec![
        ("analysis.json".to_owned(), serde_json::to_vec_pretty(report)?),
        ("analysis.html".to_owned(), page::html(report).into_bytes()),
    ];
    for (name, table) in tables::files(report) {
        files.push((format!("{name}.csv"), table.csv()?));
    }
    for picture in pictures::pictures(report) {
        files.push((format!("{}.svg", picture.name), picture.svg.into_bytes()));
    }
    replace_folder(folder, &MADE, |folder| -> anyhow::Result<()> {
        for (name, bytes) in &files {
            write_file(&folder.join(name), bytes)?;
        }
        Ok(())
    })
}

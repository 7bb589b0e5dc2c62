//! `hydralora study quick`: shrunken versions of all studies, one after the other, in one report.

use super::{change, planned, work_on, work_options, write_report};
use crate::args::Global;
use crate::commands::quickstart::SAMPLE;
use crate::energy::EnergyArguments;
use crate::stop;
use crate::ui::say;
use clap::Args;
use clap::builder::PossibleValuesParser;
use hydralora_files::write_file;
use hydralora_study::report::analysis::Analysis;
use hydralora_study::spec::Spec;
use hydralora_study::store::Store;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// The block of a study file that is its shrunken version.
const SETTING: &str = "quick";

/// The studies of the paper, so that the binary needs no other file.
const STUDIES: &[(&str, &str)] = &[
    ("observation-1", include_str!("../../../../../recipes/studies/observation-1.yaml")),
    ("observation-2", include_str!("../../../../../recipes/studies/observation-2.yaml")),
    ("single-domain", include_str!("../../../../../recipes/studies/single-domain.yaml")),
    ("multi-domain", include_str!("../../../../../recipes/studies/multi-domain.yaml")),
    ("merging", include_str!("../../../../../recipes/studies/merging.yaml")),
    ("efficiency", include_str!("../../../../../recipes/studies/efficiency.yaml")),
    ("ablation", include_str!("../../../../../recipes/studies/ablation.yaml")),
    ("heads", include_str!("../../../../../recipes/studies/heads.yaml")),
];

/// Others, which are run when they are asked for.
const MORE: &[(&str, &str)] = &[
    ("router-search", include_str!("../../../../../recipes/studies/router-search.yaml")),
    ("router-final", include_str!("../../../../../recipes/studies/router-final.yaml")),
];

#[derive(Debug, Args)]
pub(super) struct QuickArguments {
    /// Folder for the studies and their report.
    #[arg(long, default_value = "runs/quick")]
    out: PathBuf,
    /// Base model: a folder, a .gguf file, or a known name.
    #[arg(long, default_value = "smollm2-135m")]
    model: String,
    /// These studies alone, and others than the paper's.
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(known()))]
    studies: Vec<String>,
    /// Change a value of every study's base recipe.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Cells at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    jobs: u16,
    #[command(flatten)]
    energy: EnergyArguments,
}

fn known() -> Vec<&'static str> {
    STUDIES.iter().chain(MORE).map(|(name, _)| *name).collect()
}

pub(super) fn run(global: &Global, arguments: &QuickArguments) -> anyhow::Result<ExitCode> {
    let began = Instant::now();
    // Laid out as in the repository, where the study files find their data.
    let source = arguments.out.join("source");
    let (files, data) = (source.join("recipes/studies"), source.join("data/sample"));
    fs::create_dir_all(&files)?;
    fs::create_dir_all(&data)?;
    for (domain, records) in SAMPLE {
        write_file(&data.join(format!("{domain}.jsonl")), records.as_bytes())?;
    }
    let asked = |name: &str| arguments.studies.iter().any(|study| study == name);
    let all = arguments.studies.is_empty();
    let wanted = STUDIES.iter().filter(|(name, _)| all || asked(name));
    let wanted = wanted.chain(MORE.iter().filter(|(name, _)| asked(name)));
    let mut changes = vec![format!("model.path={}", serde_json::to_string(&arguments.model)?)];
    changes.extend(arguments.set.iter().cloned());
    let stop = stop::flag("stopping after the steps under way; the same command goes on");
    let mut stores = Vec::new();
    // All are planned before any is run, so that faults show at once.
    for (name, text) in wanted {
        write_file(&files.join(format!("{name}.yaml")), text.as_bytes())?;
        let mut spec = Spec::parse(text, &format!("{name}.yaml"), name, Some(SETTING))?;
        change(&mut spec, &changes)?;
        let out = arguments.out.join(name);
        let (plan, _) = planned(&spec, text, &files, &out)?;
        stores.push((Store::open(&out)?, plan));
    }
    let options = work_options(global, usize::from(arguments.jobs));
    let mut failed = 0;
    for (number, (store, plan)) in stores.iter().enumerate() {
        say(
            global,
            format!("\n{}/{}  {}: {} cells", number + 1, stores.len(), plan.name, plan.cells.len()),
        );
        failed += work_on(global, store, plan, &options, &arguments.energy, stop)?.failed;
        if stop.load(Ordering::SeqCst) {
            say(global, "stopped; the same command goes on");
            return Ok(ExitCode::from(130));
        }
    }
    let studies: Vec<Analysis> = stores
        .iter()
        .map(|(store, _)| Analysis::read(store))
        .collect::<hydralora_study::Result<_>>()?;
    write_report(global, "All studies, shrunken", &studies, &arguments.out.join("report"))?;
    say(global, format!("{:.0} s in all", began.elapsed().as_secs_f64()));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

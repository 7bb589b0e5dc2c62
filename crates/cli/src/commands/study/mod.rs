//! `hydralora study`: grids of recipes as cells on disk.

mod quick;
mod recipes;
mod runner;

use crate::args::Global;
use crate::energy::EnergyArguments;
use crate::failure::bad_input;
use crate::recipe::{change_of, set};
use crate::stop;
use crate::ui::{result, say, table, thousands};
use clap::{Args, Subcommand, ValueEnum};
use hydralora_study::claim::{Held, Observer};
use hydralora_study::export::{Resources, Scheduler, export};
use hydralora_study::plan::{Plan, plan};
use hydralora_study::report::analysis::Analysis;
use hydralora_study::report::{self, Written};
use hydralora_study::result::Machine;
use hydralora_study::spec::Spec;
use hydralora_study::store::Store;
use hydralora_study::work::{WorkOptions, Worked, work};
use recipes::Known;
use runner::Children;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// The folder of a study's report.
const REPORT: &str = "report";

/// Options of `study`.
#[derive(Debug, Args)]
pub(crate) struct StudyArguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Expand a study file into cells
    Plan(PlanArguments),
    /// Work on cells, beside any number of other processes
    Run(RunArguments),
    /// Show how far a study is
    Status {
        /// The study's folder.
        folder: PathBuf,
    },
    /// Write page, pictures and tables of one study or of several, finished or not
    Report(ReportArguments),
    /// Print the few lines that run a study on a scheduler
    Export(ExportStudyArguments),
    /// Run shrunken versions of all studies, and report them together
    Quick(quick::QuickArguments),
}

#[derive(Debug, Args)]
struct PlanArguments {
    /// The study file.
    file: PathBuf,
    /// The study's folder.
    #[arg(long)]
    out: PathBuf,
    /// A block of the file's `settings` to lay over the rest.
    #[arg(long)]
    setting: Option<String>,
    /// Change a value of the base recipe, as in `--set model.path=models/x`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Args)]
struct RunArguments {
    /// The study's folder.
    folder: PathBuf,
    /// Cells at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    jobs: u16,
    /// This cell alone; the beginning of its name is enough.
    #[arg(long, value_name = "ID", conflicts_with = "shard")]
    cell: Option<String>,
    /// One of n parts of the cells, i from 0.
    #[arg(long, value_name = "i/n", value_parser = shard)]
    shard: Option<(usize, usize)>,
    /// End when nothing is free, rather than wait for what others work on.
    #[arg(long)]
    no_wait: bool,
    /// Try again what failed.
    #[arg(long)]
    retry: bool,
    /// Seconds without a heartbeat after which a worker on another machine counts as dead.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    stale_after: u64,
    #[command(flatten)]
    energy: EnergyArguments,
}

#[derive(Debug, Args)]
struct ReportArguments {
    /// Folders of studies.
    #[arg(required = true)]
    folders: Vec<PathBuf>,
    /// Folder of the report [default: `report` in the study's folder].
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Slurm,
    K8s,
    Snakemake,
    Sh,
}

#[derive(Debug, Args)]
struct ExportStudyArguments {
    /// The study's folder, as the workers see it.
    folder: PathBuf,
    /// For which scheduler.
    #[arg(long, value_enum)]
    format: Format,
    /// Workers at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    workers: u16,
    /// Cores of each.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    cores: u16,
    /// Gigabytes of memory of each.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    memory_gb: u16,
}

fn shard(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parts
        .filter(|(i, n): &(usize, usize)| i < n)
        .ok_or_else(|| "expected i/n with i from 0 to n - 1, as 0/4".to_owned())
}

pub(crate) fn run(global: &Global, arguments: &StudyArguments) -> anyhow::Result<ExitCode> {
    match &arguments.action {
        Action::Plan(arguments) => plan_study(global, arguments),
        Action::Run(arguments) => run_study(global, arguments),
        Action::Status { folder } => status(global, folder),
        Action::Report(arguments) => report_studies(global, arguments),
        Action::Export(arguments) => export_study(global, arguments),
        Action::Quick(arguments) => quick::run(global, arguments),
    }
}

fn plan_study(global: &Global, arguments: &PlanArguments) -> anyhow::Result<ExitCode> {
    let folder = arguments.file.parent().unwrap_or(Path::new("")).to_path_buf();
    let (mut spec, text) = Spec::read(&arguments.file, arguments.setting.as_deref())?;
    change(&mut spec, &arguments.set)?;
    let shown = arguments.file.display();
    let (planned, written) =
        planned(&spec, &text, &folder, &arguments.out).map_err(|error| match error {
            hydralora_study::Error::Bad(message) => bad_input(format!("{shown}: {message}")),
            other => other.into(),
        })?;
    let json = json!({
        "study": planned.name, "cells": distinct(&planned).len(), "new": written,
        "points": planned.cells.len(), "folder": arguments.out,
    });
    result(global, &json, &plan_text(&planned, written, &arguments.out))?;
    Ok(ExitCode::SUCCESS)
}

/// Changes the base recipe of a study as `--set` says.
fn change(spec: &mut Spec, changes: &[String]) -> anyhow::Result<()> {
    for change in changes {
        let fault = |message: String| bad_input(format!("--set {change}: {message}"));
        let (key, value) = change_of(change).map_err(fault)?;
        set(&mut spec.base, key, value).map_err(fault)?;
    }
    Ok(())
}

fn planned(
    spec: &Spec,
    text: &str,
    folder: &Path,
    out: &Path,
) -> hydralora_study::Result<(Plan, usize)> {
    let store = Store::create(out)?;
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let folder = folder
        .canonicalize()
        .map_err(|source| hydralora_study::Error::Io { path: folder.to_path_buf(), source })?;
    plan(spec, text, &folder, &store, &Known::default())
}

fn distinct(plan: &Plan) -> BTreeSet<&str> {
    plan.cells.iter().map(|cell| cell.id.as_str()).collect()
}

fn plan_text(plan: &Plan, written: usize, out: &Path) -> String {
    let mut rows = vec![vec![plan.compare.clone(), "cells".to_owned(), "parameters".to_owned()]];
    let labels = plan.axes.iter().find(|(axis, _)| *axis == plan.compare).map(|(_, labels)| labels);
    for label in labels.into_iter().flatten() {
        let of =
            |cell: &&hydralora_study::plan::Planned| cell.labels.get(&plan.compare) == Some(label);
        let cells: Vec<_> = plan.cells.iter().filter(of).collect();
        let counts: BTreeSet<u64> = cells.iter().filter_map(|cell| cell.parameters).collect();
        let counts: Vec<String> = counts.iter().map(|count| thousands(*count as usize)).collect();
        let counts = if counts.is_empty() { "–".to_owned() } else { counts.join(" / ") };
        rows.push(vec![label.clone(), cells.len().to_string(), counts]);
    }
    let cells = distinct(plan).len();
    let shared = match plan.cells.len() - cells {
        0 => String::new(),
        n => format!("; {n} points share another's cell"),
    };
    let mut text = format!("{}\n{cells} cells, {written} of them new{shared}", table(&rows));
    for note in &plan.notes {
        text.push_str(&format!("\nnote: {note}"));
    }
    format!("{text}\nrun it  hydralora study run {}", out.display())
}

fn run_study(global: &Global, arguments: &RunArguments) -> anyhow::Result<ExitCode> {
    let store = Store::open(&arguments.folder)?;
    let plan = store.plan()?;
    let stop = stop::flag("stopping after the steps under way; the study can go on later");
    let jobs = usize::from(arguments.jobs);
    let options = WorkOptions {
        cell: arguments.cell.clone(),
        shard: arguments.shard,
        wait: !arguments.no_wait,
        retry: arguments.retry,
        stale_after: Duration::from_secs(arguments.stale_after),
        ..work_options(global, jobs)
    };
    let worked = work_on(global, &store, &plan, &options, &arguments.energy, stop)?;
    let Worked { trained, scored, failed, stopped } = worked;
    let json = json!({"trained": trained, "scored": scored, "failed": failed, "stopped": stopped});
    let analysis = Analysis::read(&store)?;
    let text = format!(
        "{trained} trained, {scored} scored, {failed} failed here\n{}",
        report::progress(&analysis)
    );
    result(global, &json, &text)?;
    Ok(match (stopped, failed) {
        (true, _) => ExitCode::from(130),
        (false, 0) => ExitCode::SUCCESS,
        (false, _) => ExitCode::FAILURE,
    })
}

fn work_options(global: &Global, jobs: usize) -> WorkOptions {
    let threads = threads(global, jobs);
    WorkOptions {
        jobs,
        cell: None,
        shard: None,
        wait: true,
        retry: false,
        stale_after: Duration::from_secs(60),
        machine: machine(threads),
        program: concat!("hydralora ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

/// Threads of each of so many cells at once.
fn threads(global: &Global, jobs: usize) -> usize {
    match global.threads {
        Some(threads) => usize::from(threads),
        None => (rayon::current_num_threads() / jobs.max(1)).max(1),
    }
}

fn machine(threads: usize) -> Machine {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    Machine {
        processor: model.map(|line| line.trim_start_matches(['\t', ' ', ':']).to_owned()),
        threads: threads as u64,
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    }
}

fn work_on(
    global: &Global,
    store: &Store,
    plan: &Plan,
    options: &WorkOptions,
    energy: &EnergyArguments,
    stop: &AtomicBool,
) -> anyhow::Result<Worked> {
    let children = Children {
        global,
        threads: threads(global, options.jobs),
        jobs: options.jobs,
        energy: energy.spelt(),
        program: std::env::current_exe()?,
        checked: Mutex::default(),
    };
    Ok(work(store, plan, &children, options, stop)?)
}

fn status(global: &Global, folder: &Path) -> anyhow::Result<ExitCode> {
    let store = Store::open(folder)?;
    let analysis = Analysis::read(&store)?;
    let mut observer = Observer::new(Duration::from_secs(60));
    let plan = &analysis.plan;
    let mut counts: BTreeMap<&str, [usize; 5]> = BTreeMap::new();
    let mut held: Vec<Value> = Vec::new();
    let mut lines = Vec::new();
    let mut seen = BTreeSet::new();
    for cell in &plan.cells {
        let label = cell.labels.get(&plan.compare).map_or("", String::as_str);
        let row = counts.entry(label).or_default();
        row[0] += 1;
        let result = analysis.results.get(&cell.id);
        row[1] += usize::from(result.is_some_and(|result| result.trained.is_some()));
        row[2] += usize::from(result.is_some_and(|result| result.test.is_some()));
        if let Some(failure) = analysis.failures.get(&cell.id) {
            row[3] += 1;
            if seen.insert(&cell.id) {
                let first = failure.message.lines().next().unwrap_or_default();
                lines.push(format!("failed   {}: {first}", cell.id));
            }
        } else if result.is_none_or(|result| result.test.is_none())
            && let Held::By(who) = observer.look(&store.folder(&cell.id))?
        {
            row[4] += 1;
            if seen.insert(&cell.id) {
                lines.push(format!("working  {}: {who}", cell.id));
                held.push(json!({"cell": cell.id, "by": who}));
            }
        }
    }
    let header = [plan.compare.as_str(), "points", "trained", "scored", "failed", "working"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let labels = plan.axes.iter().find(|(axis, _)| *axis == plan.compare).map(|(_, labels)| labels);
    for label in labels.into_iter().flatten() {
        let row = counts.get(label.as_str()).copied().unwrap_or_default();
        let mut cells = vec![label.clone()];
        cells.extend(row.map(|count| count.to_string()));
        rows.push(cells);
    }
    let all = analysis.counts();
    let json = json!({
        "study": plan.name, "cells": all.cells, "trained": all.trained, "scored": all.scored,
        "failed": all.failed, "open": all.open + all.unscored, "working": held,
        "unplanned": analysis.unplanned,
    });
    lines.insert(0, report::progress(&analysis));
    result(global, &json, &format!("{}\n{}", table(&rows), lines.join("\n")))?;
    Ok(ExitCode::SUCCESS)
}

fn report_studies(global: &Global, arguments: &ReportArguments) -> anyhow::Result<ExitCode> {
    let mut studies = Vec::new();
    for folder in &arguments.folders {
        studies.push(Analysis::read(&Store::open(folder)?)?);
    }
    let out = match (&arguments.out, arguments.folders.as_slice()) {
        (Some(out), _) => out.clone(),
        (None, [one]) => one.join(REPORT),
        (None, _) => {
            return Err(bad_input("--out: several studies need a folder for their report"));
        }
    };
    let title = match studies.as_slice() {
        [one] => one.plan.title.clone(),
        _ => "Studies".to_owned(),
    };
    write_report(global, &title, &studies, &out)?;
    Ok(ExitCode::SUCCESS)
}

fn write_report(
    global: &Global,
    title: &str,
    studies: &[Analysis],
    out: &Path,
) -> anyhow::Result<()> {
    let Written { page, markdown, figures, without_png, findings } =
        report::write(title, studies, out)?;
    if let Some(reason) = &without_png {
        say(global, format!("note: {reason}"));
    }
    let json = json!({
        "page": page, "markdown": markdown, "figures": figures, "without_png": without_png,
        "findings": findings,
    });
    let text = format!("{}\n\n{figures} pictures\nreport  {}", findings.join("\n"), page.display());
    result(global, &json, &text)
}

fn export_study(global: &Global, arguments: &ExportStudyArguments) -> anyhow::Result<ExitCode> {
    let store = Store::open(&arguments.folder)?;
    let plan = store.plan()?;
    let scheduler = match arguments.format {
        Format::Slurm => Scheduler::Slurm,
        Format::K8s => Scheduler::Kubernetes,
        Format::Snakemake => Scheduler::Snakemake,
        Format::Sh => Scheduler::Shell,
    };
    let resources = Resources {
        workers: arguments.workers.into(),
        cores: arguments.cores.into(),
        memory_gb: arguments.memory_gb.into(),
    };
    let program = std::env::current_exe()?;
    let text = export(scheduler, &plan, &program, store.root(), &resources);
    result(global, &json!({"lines": text}), text.trim_end())?;
    Ok(ExitCode::SUCCESS)
}

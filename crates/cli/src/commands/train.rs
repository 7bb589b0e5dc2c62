//! `hydralora train`: a recipe to a run's folder.

use crate::args::{Global, TrainArguments};
use crate::energy::{Energy, EnergyArguments, Meter, Work};
use crate::estimate::Estimate;
use crate::failure::bad_input;
use crate::plan::Plan;
use crate::progress::Progress;
use crate::ranks::with_team;
use crate::recipe::Recipe;
use crate::resume;
use crate::stop;
use crate::ui::{result, say, table};
use anyhow::Context;
use hydralora_files::{Lock, check_replaceable, write_file};
use hydralora_model::adapter::NoAdapter;
use hydralora_peft::io::TRAINED;
use hydralora_train::ranks::Team;
use hydralora_train::report::{ReportInput, render};
use hydralora_train::{
    ClusterOf, Columns, Ending, Evaluation, Event, METRICS_FILE, METRICS_TABLE, MetricsFile,
    Outcome, Run, Sink, TensorBoard, check_ranks, checkpoint, evaluate_until, finished, fit,
    planned_steps, read_metrics,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

const RECIPE_FILE: &str = "recipe.yaml";
const DATA_FILE: &str = "data.json";
const BASELINE_FILE: &str = "baseline.json";
const ROUTING_FILE: &str = "routing.json";
const REPORT_FILE: &str = "report.html";
const HEADS_FILE: &str = "heads.json";

/// What a run writes into its folder beside adapters and checkpoints.
const FILES: [&str; 7] =
    [RECIPE_FILE, DATA_FILE, BASELINE_FILE, METRICS_FILE, METRICS_TABLE, ROUTING_FILE, REPORT_FILE];

pub(crate) fn run(global: &Global, arguments: &TrainArguments) -> anyhow::Result<ExitCode> {
    with_team(global, |global, team| run_as(global, arguments, team))
}

/// Trains as one of the ranks of `team`.
fn run_as(
    global: &Global,
    arguments: &TrainArguments,
    team: &Team<'_>,
) -> anyhow::Result<ExitCode> {
    let recipe = Recipe::read(&arguments.recipe.recipe, &arguments.recipe.set)?;
    if !arguments.resume {
        spare_the_recipe(&recipe, &arguments.recipe.recipe)?;
    }
    let plan = open_in_turn(recipe, arguments.resume, team)?;
    if let Some(fault) = &plan.refused {
        return Err(bad_input(fault));
    }
    compare(&plan, team)?;
    let folder = plan.recipe.output.clone();
    let stop = match team.writes() {
        true => stop::flag("stopping after this step; the run will be saved"),
        false => stop::quiet_flag(),
    };
    let start = Start {
        folder: &folder,
        resume: arguments.resume,
        baseline: None,
        stop,
        energy: &arguments.energy,
        team,
    };
    let trained = train(global, plan, start)?;
    let shown = match team.writes() {
        true => result(global, &trained.to_json(), &trained.summary()),
        false => Ok(()),
    };
    if trained.outcome.ending == Ending::Interrupted {
        // The terminal may be gone, and what counts is saved.
        return Ok(ExitCode::from(130));
    }
    shown?;
    Ok(ExitCode::SUCCESS)
}

/// Refuses a recipe in the place where the run would put its own, with every value spelt out.
fn spare_the_recipe(recipe: &Recipe, path: &Path) -> anyhow::Result<()> {
    let record = recipe.output.join(RECIPE_FILE);
    let same = matches!((record.canonicalize(), path.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same
        && hydralora_files::bytes_of(path).ok()
            != Some(recipe.to_yaml_of_run(&recipe.output)?.into_bytes())
    {
        return Err(bad_input(format!(
            "output: {} is the recipe itself, and the run would write over it; choose another folder",
            record.display()
        )));
    }
    Ok(())
}

/// Opens a run on every rank. What is fetched or encoded on the way the first does before the others, which
/// find it then.
fn open_in_turn(recipe: Recipe, resume: bool, team: &Team<'_>) -> anyhow::Result<Plan> {
    let fetched = !Path::new(&recipe.model.path).exists() || recipe.data.streaming == Some(true);
    if team.size() == 1 || !fetched {
        return open(recipe, resume);
    }
    if team.writes() {
        let plan = open(recipe, resume)?;
        team.agree("the first that opens the run", Ok(()))?;
        return Ok(plan);
    }
    team.agree("the first that opens the run", Ok(()))?;
    open(recipe, resume)
}

/// Refuses ranks that would train something else: with another program, model, data or recipe.
fn compare(plan: &Plan, team: &Team<'_>) -> anyhow::Result<()> {
    if team.size() == 1 {
        return Ok(());
    }
    let program = std::env::current_exe().and_then(|path| hydralora_files::bytes_of(&path));
    let program = program.context("the program cannot read its own file")?;
    let hash: String = Sha256::digest(program).iter().map(|byte| format!("{byte:02x}")).collect();
    team.same("the hash of the program", hash)?;
    team.same("the hash of the base model", plan.metadata.base_fingerprint.clone())?;
    team.same("the hash of the data", plan.dataset.fingerprint().to_owned())?;
    team.same("the hash of the recipe", plan.fingerprint())?;
    check_ranks(team, plan.tuned.as_ref(), &plan.recipe.train)?;
    Ok(())
}

/// Opens a run, refusing to write over another one or over files that no run wrote.
fn open(mut recipe: Recipe, resume: bool) -> anyhow::Result<Plan> {
    check_output(&recipe.output, resume)?;
    if !resume && !Lock::was_in(&recipe.output) {
        check_foreign(&recipe)?;
    }
    if resume && recipe.auto_experts {
        let found = recorded_experts(&recipe.output.join(HEADS_FILE))?;
        recipe.set_num_experts(found)?;
    }
    if resume {
        resume::check_recipe(&recipe)?;
    }
    Plan::open(recipe, None)
}

fn check_output(folder: &Path, resume: bool) -> anyhow::Result<()> {
    let checkpoints = !checkpoint::list(folder)?.is_empty();
    if !resume && (checkpoints || folder.join("adapter").exists()) {
        return Err(bad_input(format!(
            "output: {} holds a run already; go on with --resume, or choose another folder",
            folder.display()
        )));
    }
    if resume && !checkpoints {
        return Err(bad_input(format!(
            "--resume: {} holds no checkpoint to go on from",
            folder.display()
        )));
    }
    Ok(())
}

/// Refuses a folder in which no run was, and which holds what a run would write over.
fn check_foreign(recipe: &Recipe) -> anyhow::Result<()> {
    let folder = &recipe.output;
    if let Some(found) = FILES.iter().map(|name| folder.join(name)).find(|path| path.exists()) {
        return Err(bad_input(format!(
            "output: {} was written by no run, and would be lost; choose another folder",
            found.display()
        )));
    }
    check_replaceable(&folder.join("best"), &TRAINED)
        .map_err(|error| bad_input(format!("output: {error}; choose another folder")))?;
    if recipe.auto_experts {
        super::heads::check(folder).map_err(|error| error.context("output"))?;
    }
    Ok(())
}

/// The number of experts that a run found when it began.
fn recorded_experts(path: &Path) -> anyhow::Result<usize> {
    let missing = |message: String| {
        bad_input(format!(
            "--resume: method.num_experts is auto, and {}: {message}",
            path.display()
        ))
    };
    let text = hydralora_files::bytes_of(path).map_err(|error| missing(error.to_string()))?;
    let heads: Value = serde_json::from_slice(&text).map_err(|error| missing(error.to_string()))?;
    let found = heads["num_experts"].as_u64().filter(|found| *found > 0);
    Ok(found.ok_or_else(|| missing("it holds no num_experts".to_owned()))? as usize)
}

/// What a run gave.
pub(crate) struct Trained {
    pub(crate) outcome: Outcome,
    pub(crate) baseline: Option<Evaluation>,
    pub(crate) plan: Plan,
    /// That of training, with its evaluations and checkpoints.
    pub(crate) energy: Energy,
    /// Whether there was nothing left to do.
    already: bool,
}

impl Trained {
    /// Held-out loss per domain and evaluation set, before and after.
    pub(crate) fn losses(&self) -> Vec<(String, f64, f64)> {
        let (Some(before), Some(after)) = (&self.baseline, &self.outcome.evaluation) else {
            return Vec::new();
        };
        let rows = before.domains.iter().zip(&after.domains);
        let mut rows: Vec<_> = rows.map(|(b, a)| (b.domain.clone(), b.loss, a.loss)).collect();
        rows.extend(before.sets.iter().filter_map(|before| {
            let after = after.loss_of(Some(&before.set))?;
            Some((format!("set {}", before.set), before.loss, after))
        }));
        rows.push(("all".to_owned(), before.loss, after.loss));
        rows
    }

    /// The best held-out loss and the last, where an earlier adapter was better than the last.
    fn better_best(&self) -> Option<(f64, f64)> {
        let set = self.plan.recipe.train.best_set.as_deref();
        let last = self.outcome.evaluation.as_ref()?.loss_of(set)?;
        let best = self.outcome.best_loss.filter(|best| *best < last)?;
        self.plan.recipe.output.join("best").exists().then_some((best, last))
    }

    fn summary(&self) -> String {
        let mut rows = vec![["domain", "base", "trained", "change"].map(str::to_owned).to_vec()];
        for (domain, before, after) in self.losses() {
            let change = format!("{:+.1} %", 100.0 * (after / before - 1.0));
            rows.push(vec![domain, format!("{before:.4}"), format!("{after:.4}"), change]);
        }
        let folder = self.plan.recipe.output.display();
        let steps = self.outcome.steps;
        let how = match (&self.outcome.ending, self.already) {
            (Ending::Finished, false) => format!("trained {steps} steps"),
            (Ending::Finished, true) => {
                format!("already finished after {steps} steps; nothing was done")
            }
            (Ending::EarlyStopped, false) => format!("stopped early after {steps} steps"),
            (Ending::EarlyStopped, true) => {
                format!("already stopped early after {steps} steps; nothing was done")
            }
            (Ending::Interrupted, _) if steps == 0 => {
                return "interrupted before the first step; nothing to go on from".to_owned();
            }
            (Ending::Interrupted, _) => {
                return format!("interrupted after step {steps}; go on with --resume ({folder})");
            }
        };
        let losses = if rows.len() > 1 {
            format!("held-out loss\n{}\n", table(&rows))
        } else {
            String::new()
        };
        let what = if self.plan.tuned.as_whole_model().is_some() { "model  " } else { "adapter" };
        let set = self.plan.recipe.train.best_set.as_ref();
        let set = set.map_or_else(String::new, |set| format!(" of the set {set}"));
        let best = match self.better_best() {
            Some((best, last)) => format!(
                "best     {folder}/best: held-out loss{set} {best:.4}; that of {folder}/adapter, the last, \
                 is {last:.4}\n"
            ),
            None => String::new(),
        };
        let energy = self.energy.in_words();
        format!(
            "{how}\n{losses}{what}  {folder}/adapter\n{best}report   {folder}/report.html\nenergy   {energy}"
        )
    }

    fn to_json(&self) -> Value {
        let folder = &self.plan.recipe.output;
        json!({
            "ending": format!("{:?}", self.outcome.ending).to_lowercase(),
            "already_finished": self.already,
            "steps": self.outcome.steps,
            "baseline": self.baseline,
            "evaluation": self.outcome.evaluation,
            "best_loss": self.outcome.best_loss,
            "energy": self.energy,
            "parameters": self.plan.parameters(),
            "adapter": folder.join("adapter"),
            "best_adapter": self.better_best().map(|_| folder.join("best")),
            "report": folder.join(REPORT_FILE),
        })
    }
}

/// How a run is begun.
pub(crate) struct Start<'a> {
    /// Where it is written.
    pub(crate) folder: &'a Path,
    /// Whether it goes on from the newest checkpoint there.
    pub(crate) resume: bool,
    /// The base model's held-out loss where it is known already.
    pub(crate) baseline: Option<Evaluation>,
    /// Set to end it; it saves first.
    pub(crate) stop: &'a AtomicBool,
    /// How its energy is measured.
    pub(crate) energy: &'a EnergyArguments,
    /// The ranks that train it together.
    pub(crate) team: &'a Team<'a>,
}

/// What is written when a run starts or goes on, and not before: one that is refused leaves its
/// folder as it was.
struct Records {
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Sink for Records {
    fn record(&mut self, event: &Event) -> hydralora_train::Result<()> {
        if matches!(event, Event::Started { .. }) {
            for (path, bytes) in self.files.drain(..) {
                write_file(&path, &bytes)?;
            }
        }
        Ok(())
    }
}

/// TensorBoard with the base model's held-out loss before the first step.
struct Board {
    board: TensorBoard,
    base: Option<Evaluation>,
}

impl Sink for Board {
    fn record(&mut self, event: &Event) -> hydralora_train::Result<()> {
        self.board.record(event)?;
        if matches!(event, Event::Started { .. })
            && let Some(evaluation) = self.base.take()
        {
            self.board.record(&Event::Evaluated { step: 0, evaluation, best: false })?;
        }
        Ok(())
    }
}

/// Trains a plan and writes its folder.
pub(crate) fn train(global: &Global, mut plan: Plan, start: Start<'_>) -> anyhow::Result<Trained> {
    let Start { folder, resume, baseline, stop, energy, team } = start;
    let _lock = match team.writes() {
        true => Some(Lock::folder(folder).context("output")?),
        false => None,
    };
    // Somebody may have been here while the data were read.
    if team.writes() {
        check_output(folder, resume)?;
    }
    let (fingerprint, settings) = (plan.fingerprint(), resume::settings(&plan));
    let weights = plan.dataset.report.weights();
    let of_run = (fingerprint.as_str(), &settings);
    let run_with = |continues| {
        let (plan, weights) = (&plan, &weights);
        Run { continues, ..run_of(plan, of_run, weights, folder, stop, team) }
    };
    let steps = planned_steps(&run_with(None))?;
    let continued = resume.then(|| resume::check_plan(&plan, folder, steps)).transpose()?;
    let continues = continued.as_ref().and_then(|of| of.fingerprint.as_deref());
    if resume && let Some(outcome) = finished(&run_with(continues))? {
        let whole = [folder.join("adapter"), folder.join(REPORT_FILE)].iter().all(|p| p.exists());
        if whole {
            return already_finished(global, plan, folder, outcome, energy);
        }
    }
    // Nobody reads it of a quiet run, which is timed by whoever started it.
    let estimate = (!global.quiet).then(|| Estimate::of(&mut plan, team.size())).transpose()?;
    if let Some(heads) = &plan.heads {
        say(global, format!("experts  {}: {}", heads.num_experts, heads.reasons.join("; ")));
    }
    plan.recipe.notes.iter().for_each(|note| say(global, note));
    say(global, format!("model    {}", plan.metadata.base_model));
    say(global, format!("method   {}, {}", plan.recipe.method_name, plan.parameters()));
    if let Some(estimate) = &estimate {
        say(global, format!("steps    {estimate}"));
    }
    say(global, plan.dataset.report.to_string());

    let fresh = continued.is_none() && plan.recipe.init_from.is_none();
    plan.find_clusters(fresh)?;
    if let Some(continued) = &continued {
        continued.notes.iter().for_each(|note| say(global, note));
    } else if fresh {
        plan.start_routers()?;
    }
    let recipe = plan.recipe.to_yaml()?;
    let data = serde_json::to_vec_pretty(&plan.dataset.report)?;
    let of_run = plan.recipe.to_yaml_of_run(folder)?;
    let mut files = vec![(RECIPE_FILE, of_run.into_bytes()), (DATA_FILE, data)];
    if let Some(heads) = &plan.heads {
        files.extend(super::heads::files(heads)?);
    }
    let kept = kept_baseline(folder).filter(|_| resume);
    let baseline = match baseline.or(kept) {
        Some(known) => Some(known),
        None => measure_baseline(global, &plan, stop, team)?,
    };
    if let Some(found) = &baseline {
        files.push((BASELINE_FILE, serde_json::to_vec_pretty(found)?));
    }
    let Plan { base, tuned, .. } = &mut plan;
    if let Some(model) = tuned.as_whole_model() {
        base.decoder.release(|name| model.takes_over(name));
    }
    let meter = Meter::start(global, energy);
    // The meters of a machine say nothing of another.
    let one_machine = on_one_machine(team)?;
    let base_at_start = baseline.clone().filter(|_| !resume);
    let files = files.into_iter().map(|(name, bytes)| (folder.join(name), bytes)).collect();
    let (domains, sets) = (plan.dataset.domains.clone(), plan.dataset.report.sets().names);
    let columns = Columns { domains, sets };
    let mut sinks: Vec<Box<dyn Sink>> = vec![
        Box::new(Records { files }),
        Box::new(MetricsFile::new(folder, resume, columns)),
        Box::new(Board {
            board: TensorBoard::new(&folder.join("tensorboard")),
            base: base_at_start,
        }),
        Box::new(Progress::new(global.quiet)),
    ];
    if !team.writes() {
        sinks.clear();
    }
    let Plan { recipe: of_run, base, dataset, tuned, metadata, clusters, .. } = &mut plan;
    let cluster_of =
        clusters.as_ref().map(|clusters| |source: u32, row: u32| clusters.of(source, row));
    let run = Run {
        decoder: &base.decoder,
        dataset,
        weights: &weights,
        shuffle: of_run.data.shuffle,
        config: &of_run.train,
        metadata,
        fingerprint: &fingerprint,
        continues,
        settings: &settings,
        folder: Some(folder),
        meter: Some(meter.inner()).filter(|_| one_machine),
        clusters: cluster_of.as_ref().map(|of| of as &ClusterOf<'_>),
        stop,
        team,
    };
    let outcome = fit(&run, tuned.as_mut(), resume, &mut sinks)?;
    drop(sinks);
    let metrics = match outcome.steps {
        _ if !team.writes() => Vec::new(),
        0 => Vec::new(),
        _ => read_metrics(&folder.join(METRICS_FILE))?,
    };
    let energy = meter.energy(outcome.energy.clone(), Work::tokens(tokens(&metrics)));
    let trained = Trained { outcome, baseline, plan, energy, already: false };
    if trained.outcome.steps > 0 && team.writes() {
        write_report(&trained, metrics, &recipe, folder)?;
    }
    Ok(trained)
}

/// The tokens of all steps in a run's metrics.
fn tokens(metrics: &[Value]) -> usize {
    metrics.iter().filter_map(|row| row["tokens"].as_u64()).sum::<u64>() as usize
}

/// Whether all ranks are on one machine.
fn on_one_machine(team: &Team<'_>) -> anyhow::Result<bool> {
    let host = hydralora_files::bytes_of("/proc/sys/kernel/hostname".as_ref()).unwrap_or_default();
    let hosts = team.agree("the machines", Ok(host))?;
    Ok(hosts.iter().all(|host| *host == hosts[0]))
}

/// The run of a plan with this fingerprint and these settings.
fn run_of<'a>(
    plan: &'a Plan,
    (fingerprint, settings): (&'a str, &'a Value),
    weights: &'a [f64],
    folder: &'a Path,
    stop: &'a AtomicBool,
    team: &'a Team<'a>,
) -> Run<'a> {
    Run {
        decoder: &plan.base.decoder,
        dataset: &plan.dataset,
        weights,
        shuffle: plan.recipe.data.shuffle,
        config: &plan.recipe.train,
        metadata: &plan.metadata,
        fingerprint,
        continues: None,
        settings,
        folder: Some(folder),
        meter: None,
        clusters: None,
        stop,
        team,
    }
}

/// A run with nothing left to do: its losses are those it wrote.
fn already_finished(
    global: &Global,
    plan: Plan,
    folder: &Path,
    mut outcome: Outcome,
    energy: &EnergyArguments,
) -> anyhow::Result<Trained> {
    let metrics = read_metrics(&folder.join(METRICS_FILE)).unwrap_or_default();
    let last = metrics.iter().rev().find(|row| row.get("valid_loss").is_some());
    outcome.evaluation = last.and_then(|row| {
        let fields = json!({
            "loss": row["valid_loss"], "label_tokens": row["valid_label_tokens"],
            "domains": row["domains"], "sets": row.get("sets").unwrap_or(&json!([])),
        });
        serde_json::from_value(fields).ok()
    });
    // What it used is known, and nothing is left to measure.
    let meter = Meter::start(global, &EnergyArguments { idle_seconds: None, ..energy.clone() });
    let energy = meter.energy(outcome.energy.clone(), Work::tokens(tokens(&metrics)));
    Ok(Trained { outcome, baseline: kept_baseline(folder), plan, energy, already: true })
}

/// Held-out loss of the base model as the run began with it.
fn kept_baseline(folder: &Path) -> Option<Evaluation> {
    serde_json::from_slice(&hydralora_files::bytes_of(&folder.join(BASELINE_FILE)).ok()?).ok()
}

/// Held-out loss of the base model; none without held-out records, or when told to stop.
fn measure_baseline(
    global: &Global,
    plan: &Plan,
    stop: &AtomicBool,
    team: &Team<'_>,
) -> anyhow::Result<Option<Evaluation>> {
    if plan.dataset.valid.is_empty() || team.any("baseline", stop.load(Ordering::Relaxed))? {
        return Ok(None);
    }
    say(global, "measuring the base model's held-out loss");
    let (examples, domains) = (&plan.dataset.valid, &plan.dataset.domains);
    let sets = plan.dataset.report.sets();
    let decoder = &plan.base.decoder;
    let found = evaluate_until(team, stop, decoder, &NoAdapter, examples, domains, &sets)?;
    if let Some(found) = &found {
        let domains = found.domains.iter().map(|of| format!("{} {:.4}", of.domain, of.loss));
        let sets = found.sets.iter().map(|of| format!("[{}] {:.4}", of.set, of.loss));
        let domains: Vec<String> = domains.chain(sets).collect();
        say(global, format!("base     held-out loss {:.4}  {}", found.loss, domains.join("  ")));
    }
    Ok(found)
}

fn write_report(
    trained: &Trained,
    metrics: Vec<Value>,
    recipe: &str,
    folder: &Path,
) -> anyhow::Result<()> {
    let plan = &trained.plan;
    let per_domain = |pick: fn(&(String, f64, f64)) -> f64| {
        trained.losses().iter().map(|row| (row.0.clone(), pick(row))).collect::<Vec<_>>()
    };
    let comparison = if trained.losses().is_empty() {
        Vec::new()
    } else {
        vec![
            ("base".to_owned(), per_domain(|row| row.1)),
            (plan.recipe.method_name.to_owned(), per_domain(|row| row.2)),
        ]
    };
    let routing = trained.outcome.evaluation.as_ref().and_then(|e| e.routing.as_ref());
    if let Some(routing) = routing {
        write_file(&folder.join(ROUTING_FILE), &serde_json::to_vec_pretty(routing)?)?;
    }
    let report = &plan.dataset.report;
    let facts = [
        ("base model".to_owned(), plan.metadata.base_model.clone()),
        ("method".to_owned(), plan.recipe.method_name.to_owned()),
        ("parameters".to_owned(), plan.parameters().to_string()),
        (
            "data".to_owned(),
            format!(
                "{} training and {} held-out records in {} domains",
                report.train_examples,
                report.valid_examples,
                plan.dataset.domains.len()
            ),
        ),
        ("steps".to_owned(), trained.outcome.steps.to_string()),
        ("seed".to_owned(), plan.recipe.train.seed.to_string()),
        ("energy".to_owned(), trained.energy.in_words()),
        ("adapter".to_owned(), folder.join("adapter").display().to_string()),
        ("hydralora".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ];
    let title = format!("{} on {}", plan.recipe.method_name, plan.metadata.base_model);
    let page = render(&ReportInput {
        title: &title,
        facts: &facts,
        runs: &[(plan.recipe.method_name.to_owned(), metrics)],
        comparison: &comparison,
        answers: &[],
        routing,
        heads: trained.outcome.evaluation.as_ref().and_then(|e| e.heads.as_ref()),
        recipe,
    });
    Ok(write_file(&folder.join(REPORT_FILE), page.as_bytes())?)
}

//! `hydralora train`: a recipe to a run's folder.

use crate::args::{Global, TrainArguments};
use crate::failure::bad_input;
use crate::plan::{Base, Plan};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::resume::{Before, explain};
use crate::ui::{result, say, table};
use anyhow::Context;
use hydralora_model::adapter::NoAdapter;
use hydralora_model::durable::write_file;
use hydralora_train::report::{ReportInput, render};
use hydralora_train::{
    Ending, Evaluation, METRICS_FILE, MetricsFile, Outcome, Run, Sink, TensorBoard, checkpoint,
    evaluate, fit, read_metrics,
};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

const BASELINE_FILE: &str = "baseline.json";
const HEADS_FILE: &str = "heads.json";

pub(crate) fn run(global: &Global, arguments: &TrainArguments) -> anyhow::Result<ExitCode> {
    let recipe = Recipe::read(&arguments.recipe.recipe, &arguments.recipe.set)?;
    let before = arguments.resume.then(|| Before::read(&recipe.output));
    let plan = open(recipe, None, arguments.resume)?;
    if let Some(fault) = &plan.refused {
        return Err(bad_input(fault));
    }
    let now = Before::of(&plan);
    let trained = train(global, plan, arguments.resume, None)
        .map_err(|error| explain(error, before.as_ref(), &now))?;
    let text = trained.summary();
    result(global, &trained.to_json(), &text)?;
    Ok(match trained.outcome.ending {
        Ending::Interrupted => ExitCode::from(130),
        Ending::Finished | Ending::EarlyStopped => ExitCode::SUCCESS,
    })
}

/// Opens a run, refusing to write over another one.
pub(crate) fn open(mut recipe: Recipe, base: Option<Base>, resume: bool) -> anyhow::Result<Plan> {
    let folder = &recipe.output;
    let there = !checkpoint::list(folder)?.is_empty() || folder.join("adapter").exists();
    if there && !resume {
        return Err(bad_input(format!(
            "output: {} holds a run already; go on with --resume, or choose another folder",
            folder.display()
        )));
    }
    if resume && checkpoint::list(folder)?.is_empty() {
        return Err(bad_input(format!(
            "--resume: {} holds no checkpoint to go on from",
            folder.display()
        )));
    }
    if resume && recipe.auto_experts {
        let found = recorded_experts(&recipe.output.join(HEADS_FILE))?;
        recipe.set_num_experts(found)?;
    }
    Plan::open(recipe, base)
}

/// The number of experts that a run found when it began.
fn recorded_experts(path: &Path) -> anyhow::Result<usize> {
    let missing = |message: String| {
        bad_input(format!(
            "--resume: method.num_experts is auto, and {}: {message}",
            path.display()
        ))
    };
    let text = fs::read(path).map_err(|error| missing(error.to_string()))?;
    let heads: Value = serde_json::from_slice(&text).map_err(|error| missing(error.to_string()))?;
    let found = heads["num_experts"].as_u64().filter(|found| *found > 0);
    Ok(found.ok_or_else(|| missing("it holds no num_experts".to_owned()))? as usize)
}

/// What a run gave.
pub(crate) struct Trained {
    pub(crate) outcome: Outcome,
    pub(crate) baseline: Option<Evaluation>,
    pub(crate) plan: Plan,
}

impl Trained {
    /// Held-out loss per domain before and after.
    pub(crate) fn losses(&self) -> Vec<(String, f64, f64)> {
        let (Some(before), Some(after)) = (&self.baseline, &self.outcome.evaluation) else {
            return Vec::new();
        };
        let rows = before.domains.iter().zip(&after.domains);
        let mut rows: Vec<_> = rows.map(|(b, a)| (b.domain.clone(), b.loss, a.loss)).collect();
        rows.push(("all".to_owned(), before.loss, after.loss));
        rows
    }

    /// The best held-out loss and the last, where an earlier adapter was better than the last.
    fn better_best(&self) -> Option<(f64, f64)> {
        let last = self.outcome.evaluation.as_ref()?.loss;
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
        let how = match self.outcome.ending {
            Ending::Finished => format!("trained {} steps", self.outcome.steps),
            Ending::EarlyStopped => {
                format!("stopped early after {} steps", self.outcome.steps)
            }
            Ending::Interrupted => {
                return format!(
                    "interrupted after step {}; go on with --resume ({folder})",
                    self.outcome.steps
                );
            }
        };
        let losses = if rows.len() > 1 {
            format!("held-out loss\n{}\n", table(&rows))
        } else {
            String::new()
        };
        let what = if self.plan.tuned.as_whole_model().is_some() { "model  " } else { "adapter" };
        let best = match self.better_best() {
            Some((best, last)) => format!(
                "best     {folder}/best: held-out loss {best:.4}; that of {folder}/adapter, the last, is \
                 {last:.4}\n"
            ),
            None => String::new(),
        };
        format!("{how}\n{losses}{what}  {folder}/adapter\n{best}report   {folder}/report.html")
    }

    fn to_json(&self) -> Value {
        let folder = &self.plan.recipe.output;
        json!({
            "ending": format!("{:?}", self.outcome.ending).to_lowercase(),
            "steps": self.outcome.steps,
            "baseline": self.baseline,
            "evaluation": self.outcome.evaluation,
            "best_loss": self.outcome.best_loss,
            "parameters": self.plan.parameters(),
            "adapter": folder.join("adapter"),
            "best_adapter": self.better_best().map(|_| folder.join("best")),
            "report": folder.join("report.html"),
        })
    }
}

/// The flag that Ctrl-C and termination set. A second one ends the process at once.
fn stop_flag() -> Arc<AtomicBool> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    FLAG.get_or_init(|| {
        let flag = Arc::new(AtomicBool::new(false));
        let set = flag.clone();
        let handler = move || {
            if set.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            eprintln!("stopping after this step; the run will be saved");
        };
        // Without a handler Ctrl-C ends the process, as it would anyway.
        let _ = ctrlc::set_handler(handler);
        flag
    })
    .clone()
}

/// Trains a plan and writes its folder. `baseline` is the base model's held-out loss where it is
/// known already.
pub(crate) fn train(
    global: &Global,
    mut plan: Plan,
    resume: bool,
    baseline: Option<Evaluation>,
) -> anyhow::Result<Trained> {
    let folder = plan.recipe.output.clone();
    fs::create_dir_all(&folder)
        .with_context(|| format!("output: cannot create {}", folder.display()))?;
    let recipe = plan.recipe.to_yaml()?;
    write_file(&folder.join("recipe.yaml"), recipe.as_bytes())?;
    write_file(&folder.join("data.json"), &serde_json::to_vec_pretty(&plan.dataset.report)?)?;
    if let Some(heads) = &plan.heads {
        super::heads::write(&folder, heads)?;
        say(global, format!("experts  {}: {}", heads.num_experts, heads.reasons.join("; ")));
    }
    say(global, format!("model    {}", plan.metadata.base_model));
    say(global, format!("method   {}, {}", plan.recipe.method_name, plan.parameters()));
    say(global, plan.dataset.report.to_string());

    if !resume {
        plan.start_routers()?;
    }
    let stop = stop_flag();
    let baseline = match baseline {
        Some(known) => Some(known),
        None => measure_baseline(global, &plan, resume)?,
    };
    let Plan { base, tuned, .. } = &mut plan;
    if let Some(model) = tuned.as_whole_model() {
        base.decoder.release(|name| model.takes_over(name));
    }
    let fingerprint = plan.fingerprint();
    let weights = plan.dataset.report.weights();
    let run = Run {
        decoder: &plan.base.decoder,
        dataset: &plan.dataset,
        weights: &weights,
        shuffle: plan.recipe.data.shuffle,
        config: &plan.recipe.train,
        metadata: &plan.metadata,
        fingerprint: &fingerprint,
        folder: Some(&folder),
        stop: &stop,
    };
    let mut sinks: Vec<Box<dyn Sink>> = vec![
        Box::new(MetricsFile::open(&folder, resume)?),
        Box::new(TensorBoard::create(&folder.join("tensorboard"))?),
        Box::new(Progress::new(global.quiet)),
    ];
    let outcome = fit(&run, plan.tuned.as_mut(), resume, &mut sinks)?;
    drop(sinks);
    let metrics = read_metrics(&folder.join(METRICS_FILE))?;
    let trained = Trained { outcome, baseline, plan };
    write_report(&trained, &metrics, &recipe, &folder)?;
    Ok(trained)
}

/// Held-out loss of the base model, kept in the folder for a resumed run.
fn measure_baseline(
    global: &Global,
    plan: &Plan,
    resume: bool,
) -> anyhow::Result<Option<Evaluation>> {
    if plan.dataset.valid.is_empty() {
        return Ok(None);
    }
    let path = plan.recipe.output.join(BASELINE_FILE);
    if resume && let Ok(text) = fs::read(&path) {
        return Ok(serde_json::from_slice(&text).ok());
    }
    say(global, "measuring the base model's held-out loss");
    let (examples, domains) = (&plan.dataset.valid, &plan.dataset.domains);
    let found = evaluate(&plan.base.decoder, &NoAdapter, examples, domains)?;
    write_file(&path, &serde_json::to_vec_pretty(&found)?)?;
    Ok(Some(found))
}

fn write_report(
    trained: &Trained,
    metrics: &[Value],
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
        write_file(&folder.join("routing.json"), &serde_json::to_vec_pretty(routing)?)?;
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
    ];
    let title = format!("{} on {}", plan.recipe.method_name, plan.metadata.base_model);
    let page = render(&ReportInput {
        title: &title,
        facts: &facts,
        metrics,
        comparison: &comparison,
        routing,
        recipe,
    });
    Ok(write_file(&folder.join("report.html"), page.as_bytes())?)
}

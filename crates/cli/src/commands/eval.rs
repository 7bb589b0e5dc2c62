//! `hydralora eval`: benchmark scores of a base model and of adapters on it.

use super::generate::{given_arguments, note_unused};
use crate::adapter::{self, base_of};
use crate::args::{Global, TemplateArguments, spelling};
use crate::energy::{EnergyArguments, Meter, Work};
use crate::failure::bad_input;
use crate::in_force::{idle_note, trained_template};
use crate::output::check_file;
use crate::plan::{Base, source_for};
use crate::recipe::ModelDtype;
use crate::sources::HubFiles;
use crate::stop;
use crate::ui::{result, say, table, tell};
use clap::Args;
use hydralora_data::ChatTemplate;
use hydralora_files::try_place;
use hydralora_model::adapter::{NoAdapter, Pass};
use hydralora_peft::io::{CONFIG_FILE, LoadedAdapter, TENSOR_FILE};
use hydralora_run::ends;
use hydralora_run::eval::{
    self, Comparison, Error, Log, Opened, Progress, Reader, Results, Settings, Subject, tasks,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The name of the model without an adapter.
const BASE: &str = "base";
/// `--data` for data that come from the hub.
const HUB: &str = "hub";
/// Seconds between lines of progress where stderr is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Options of `eval`.
#[derive(Debug, Args)]
pub(crate) struct EvalArguments {
    /// Base model: a folder, a .gguf file, or a known name [default: the adapter's].
    #[arg(long, required_unless_present_any = ["compare", "list_tasks", "adapter"])]
    model: Option<String>,
    /// Adapter folder, or its run's; repeat it to score several in one pass over the data.
    #[arg(long, value_name = "[NAME=]DIR")]
    adapter: Vec<String>,
    /// The domain that all records count as, for adapters that have an update for each; without it a
    /// task counts as of the domain whose name it ends with, as that of `loss:law.jsonl` does.
    #[arg(long, value_name = "NAME", requires = "adapter")]
    domain: Option<String>,
    /// Score the adapters only.
    #[arg(long, requires = "adapter")]
    skip_base: bool,
    /// Tasks and groups, with commas between them; `loss:FILE`, `exact:FILE`, `rouge:FILE` and
    /// `choices:FILE` read that file.
    #[arg(long, value_delimiter = ',', required_unless_present_any = ["compare", "list_tasks"])]
    tasks: Vec<String>,
    /// Print the tasks there are.
    #[arg(long)]
    list_tasks: bool,
    /// Folder that holds `mmlu`, `gsm8k`, `bbh` and `humaneval`, or one of them; `hub` fetches what
    /// the tasks need, once.
    #[arg(long, value_name = "DIR|hub", default_value = "data/eval-sample")]
    data: PathBuf,
    /// Type or packing to hold the weights in; `stored` is what the file has.
    #[arg(long, default_value = "f32")]
    dtype: ModelDtype,
    /// Only the first N records of each task.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Examples before each question [default: the task's own number].
    #[arg(long, value_name = "K")]
    shots: Option<usize>,
    /// Seed of drawn examples and sampled programs.
    #[arg(long, default_value_t = 1234)]
    seed: u64,
    /// Programs to draw for each HumanEval problem; 10 or more give pass@10.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    repeats: Option<u64>,
    /// Temperature of drawn programs [default: 0 for one, 0.2 for several].
    #[arg(long)]
    temperature: Option<f64>,
    /// Most tokens to write [default: the task's own number].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_new_tokens: Option<u64>,
    /// Put prompts through the chat template, examples as turns.
    #[arg(long)]
    apply_chat_template: bool,
    #[command(flatten)]
    template: TemplateArguments,
    /// Let HumanEval run the programs that the model writes, in a sandbox.
    #[arg(long)]
    allow_code_execution: bool,
    /// Log of every record; a run that was interrupted goes on from it.
    #[arg(long, value_name = "FILE.jsonl")]
    samples: Option<PathBuf>,
    /// Results file; with several models one file each, `FILE.NAME.json`.
    #[arg(long, value_name = "FILE.json")]
    out: Option<PathBuf>,
    /// Compare two results files instead: paired differences with a bootstrap interval.
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"], conflicts_with = "model")]
    compare: Option<Vec<PathBuf>>,
    #[command(flatten)]
    energy: EnergyArguments,
}

pub(crate) fn run(global: &Global, arguments: &EvalArguments) -> anyhow::Result<ExitCode> {
    if arguments.list_tasks {
        return list(global);
    }
    if let Some([first, second]) = arguments.compare.as_deref() {
        let comparison = eval::compare(first, second)?;
        result(global, &comparison_json(&comparison), &comparison_text(&comparison))?;
        return Ok(ExitCode::SUCCESS);
    }
    let named = name_adapters(&arguments.adapter)?;
    if let Some(out) = &arguments.out {
        let ours = |path: &Path| {
            let text = hydralora_files::read(path).ok();
            let value: Option<Value> = text.and_then(|text| serde_json::from_slice(&text).ok());
            value.is_some_and(|value| value.get("hydralora_version").is_some())
        };
        let names = named.iter().map(|(name, _)| name.clone());
        let base = (!arguments.skip_base).then(|| BASE.to_owned());
        let names: Vec<String> = base.into_iter().chain(names).collect();
        for name in &names {
            check_file("--out", &out_path(out, name, names.len()), &[], "results file", ours)?;
        }
    }
    if let Some(samples) = &arguments.samples {
        try_place(samples)?;
    }
    let settings = settings(arguments)?;
    let spec = match (&arguments.model, named.first()) {
        (Some(given), _) => given.clone(),
        (None, Some((_, folder))) => base_of(None, folder)?,
        (None, None) => return Err(bad_input("expected --model, --adapter or both")),
    };
    // Wrong names are found before the model is opened.
    for task in &arguments.tasks {
        tasks::known(task)?;
    }
    let folders = data_folders(global, arguments, &settings)?;
    let paths: Vec<&Path> = named.iter().map(|(_, folder)| folder.as_path()).collect();
    let source = source_for(&spec, arguments.dtype, &paths)?;
    if !source.added.is_empty() && !arguments.skip_base {
        return Err(bad_input(
            "--adapter: adds tokens, which the base alone does not have; score it in a run of its own, \
             with --skip-base",
        ));
    }
    let base = Base::of(source, arguments.dtype)?;
    let adapters = open_adapters(&base, named, arguments.domain.as_deref())?;
    // What an adapter puts before every sequence takes its part of the context.
    let leads = adapters.iter().map(|adapter| {
        base.decoder.lead_rows(adapter.loaded.tuned.as_adapter(), &Pass::inference())
    });
    let lead = leads.max().unwrap_or(0);
    let context = base.source.config.max_position_embeddings.saturating_sub(lead);
    let settings = Settings { context, ..settings };
    for note in adapters.iter().filter_map(|adapter| idle_note(adapter.loaded.tuned.as_ref())) {
        say(global, note);
    }
    let template = template(global, &base, &adapters, arguments)?;
    let reader = Reader {
        tokenizer: base.tokenizer(),
        template: template.as_ref().filter(|_| arguments.apply_chat_template),
        record_template: template.as_ref(),
    };
    let opened: Vec<Opened> = (arguments.tasks.iter().zip(folders))
        .map(|(task, data)| tasks::open(task, &Settings { data, ..settings.clone() }, &reader))
        .collect::<eval::Result<_>>()?;
    for line in incomplete(&opened) {
        say(global, line);
    }
    let subjects = subjects(&base, &adapters, arguments);
    let end_ids =
        end_ids(&base, &adapters, template.as_ref(), &opened, arguments.apply_chat_template)?;
    let run = eval::Base { decoder: &base.decoder, reader, end_ids: &end_ids };

    let mut log = match &arguments.samples {
        Some(path) => {
            let identities: Vec<&Value> =
                subjects.iter().map(|subject| &subject.identity).collect();
            let mut fingerprint = json!({
                "models": identities,
                "seed": settings.seed,
                "temperature": settings.temperature,
                "chat_template": reader.template.map(ChatTemplate::source),
            });
            let given = template.as_ref().map(ChatTemplate::arguments);
            if let Some(given) = given.filter(|given| !given.is_empty()) {
                fingerprint["template_arguments"] = json!(given);
            }
            Some(Log::open(path, &fingerprint)?)
        }
        None => None,
    };
    let stop = stop::flag("stopping; what was scored is kept in the log, if there is one");
    let mut bar = Bar::new(global);
    let mut answers = 0;
    let mut show = |progress: Progress<'_>| {
        answers = progress.done - progress.resumed;
        bar.show(progress);
        Ok(())
    };
    let meter = Meter::start(global, &arguments.energy);
    let mark = meter.mark();
    let done = eval::run_until(stop, run, &subjects, &opened, &settings, log.as_mut(), &mut show);
    bar.end();
    let used = meter.since(&mark);
    let mut results = match done {
        Err(Error::Interrupted) => {
            match &arguments.samples {
                Some(path) => {
                    let path = path.display();
                    say(global, format!("interrupted; the same command goes on from {path}"));
                }
                None => say(global, "interrupted; with --samples FILE.jsonl a run can go on"),
            }
            return Ok(ExitCode::from(130));
        }
        other => other?,
    };
    let energy = meter.energy(used, Work::answers(answers));
    let noted = serde_json::to_value(&energy)?;
    results.iter_mut().for_each(|results| results.note("energy", noted.clone()));
    if let Some(out) = &arguments.out {
        for results in &results {
            let path = out_path(out, &results.name, subjects.len());
            results.save(&path)?;
            say(global, format!("results  {}", path.display()));
        }
    }
    let models: Map<String, Value> =
        results.iter().map(|results| (results.name.clone(), results.to_json())).collect();
    result(global, &json!({"models": models}), &results_text(&results))?;
    energy.say_if_known(global);
    Ok(ExitCode::SUCCESS)
}

fn settings(arguments: &EvalArguments) -> anyhow::Result<Settings> {
    let number = |value: Option<u64>| value.map(|value| value as usize);
    if let Some(temperature) = arguments.temperature
        && !(temperature.is_finite() && temperature >= 0.0)
    {
        return Err(bad_input(format!("--temperature: is {temperature}; expected 0 or more")));
    }
    Ok(Settings {
        data: arguments.data.clone(),
        shots: arguments.shots,
        limit: number(arguments.limit),
        seed: arguments.seed,
        repeats: number(arguments.repeats),
        temperature: arguments.temperature,
        max_new_tokens: number(arguments.max_new_tokens),
        allow_code_execution: arguments.allow_code_execution,
        context: 0,
    })
}

/// The folder each task's data are in; with `--data hub`, after fetching them.
fn data_folders(
    global: &Global,
    arguments: &EvalArguments,
    settings: &Settings,
) -> anyhow::Result<Vec<PathBuf>> {
    let named = arguments.data.clone();
    if named != Path::new(HUB) {
        return Ok(vec![named; arguments.tasks.len()]);
    }
    let mut hub = HubFiles::new(|line| say(global, line));
    let folder = |task: &String| Ok(tasks::fetch(task, settings, &mut hub)?.unwrap_or_default());
    arguments.tasks.iter().map(folder).collect()
}

fn list(global: &Global) -> anyhow::Result<ExitCode> {
    let rows: Vec<Vec<String>> = (tasks::FAMILIES.iter())
        .flat_map(|family| {
            let names = family.names();
            let more = names.len() - 1;
            let first = names.into_iter().next().unwrap_or_default();
            let more = if more > 0 { format!("and {more} parts") } else { String::new() };
            [vec![format!("{first}  {}", family.summary()), more]]
        })
        .collect();
    result(global, &json!({"tasks": tasks::names()}), &table(&rows))?;
    Ok(ExitCode::SUCCESS)
}

/// A line for each group that is scored without some of its parts; not for the parts of another one.
fn incomplete(opened: &[Opened]) -> Vec<String> {
    let first = opened.iter().filter_map(|opened| opened.groups.first());
    first
        .filter(|group| !group.absent.is_empty())
        .map(|group| {
            let parts = group.members.len() + group.absent.len();
            format!(
                "note: {} is scored on {} of its {parts} parts; no files for {}",
                group.name,
                group.members.len(),
                group.absent.join(", ")
            )
        })
        .collect()
}

/// An adapter with the name it is reported under.
struct Named {
    name: String,
    folder: PathBuf,
    loaded: LoadedAdapter,
    /// One for each domain, where it has an update for each and none was named.
    domains: Vec<(String, LoadedAdapter)>,
}

/// The adapters' names and folders.
fn name_adapters(specs: &[String]) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut adapters: Vec<(String, PathBuf)> = Vec::new();
    for spec in specs {
        let (name, given) = match spec.split_once('=') {
            Some((name, given)) => (Some(name.to_owned()), given),
            None => (None, spec.as_str()),
        };
        let folder = adapter::folder(given);
        let name = name.unwrap_or_else(|| name_of(folder.as_deref().unwrap_or(Path::new(given))));
        if name == BASE || adapters.iter().any(|(taken, _)| *taken == name) {
            return Err(bad_input(format!(
                "--adapter: `{name}` is taken; give each a name of its own, as in --adapter NAME=DIR"
            )));
        }
        if name.is_empty() || name.contains(['/', '\\']) {
            return Err(bad_input(format!("--adapter: `{name}` is no name; expected NAME=DIR")));
        }
        let folder =
            folder.map_err(|message| bad_input(format!("--adapter {given}: {message}")))?;
        adapters.push((name, folder));
    }
    Ok(adapters)
}

fn open_adapters(
    base: &Base,
    named: Vec<(String, PathBuf)>,
    domain: Option<&str>,
) -> anyhow::Result<Vec<Named>> {
    let mut adapters: Vec<Named> = Vec::new();
    let alone = named.len() == 1;
    for (name, folder) in named {
        let mut loaded = base.load_adapter(&folder)?;
        // Beside one that has domains there may be others.
        let asked = domain.filter(|_| alone || loaded.tuned.as_domain_aware().is_some());
        let each = match (loaded.tuned.as_domain_aware(), asked) {
            (Some(aware), None) => aware.domains().to_vec(),
            _ => Vec::new(),
        };
        if each.is_empty() {
            crate::domain::choose(loaded.tuned.as_mut(), asked)?;
        }
        let mut domains = Vec::with_capacity(each.len());
        for domain in each {
            let mut of_domain = base.load_adapter(&folder)?;
            crate::domain::choose(of_domain.tuned.as_mut(), Some(&domain))?;
            domains.push((domain, of_domain));
        }
        adapters.push(Named { name, folder, loaded, domains });
    }
    Ok(adapters)
}

/// The folder's name, or of `runs/law/adapter` the run's.
fn name_of(folder: &Path) -> String {
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let own = last(folder).unwrap_or_default();
    let parent = folder.parent().and_then(last).filter(|name| !name.is_empty());
    match (own.as_str(), parent) {
        ("adapter" | "best", Some(parent)) => parent,
        _ => own,
    }
}

/// The chat template of all models in this run, with the tokens it needs in the vocabulary.
fn template(
    global: &Global,
    base: &Base,
    adapters: &[Named],
    arguments: &EvalArguments,
) -> anyhow::Result<Option<ChatTemplate>> {
    // The command line goes before what the adapters were trained with.
    let asked = |template: ChatTemplate| -> anyhow::Result<ChatTemplate> {
        let given = given_arguments(&template, &arguments.template)?;
        Ok(template.with_arguments(&given))
    };
    let own = base.template()?.map(asked).transpose()?;
    let mut trained: Vec<(&str, ChatTemplate)> = Vec::new();
    for adapter in adapters {
        if let Some(template) = trained_template(adapter.loaded.metadata.as_ref())? {
            trained.push((&adapter.name, asked(template)?));
        }
    }
    // The base is asked with the adapter's arguments where the template is the same.
    let same = |own: &ChatTemplate| trained.iter().all(|(_, t)| t.source() == own.source());
    let alone = arguments.skip_base || own.as_ref().is_none_or(same);
    let template = match trained.first() {
        Some((_, template)) if alone => Some(template.clone()),
        _ => own,
    };
    match &template {
        Some(template) => note_unused(global, template, &arguments.template)?,
        None if arguments.template == TemplateArguments::default() => {}
        None => {
            return Err(bad_input(
                "--thinking and --template-arg: are for a chat template, and the model has none",
            ));
        }
    }
    if !arguments.apply_chat_template {
        return Ok(template);
    }
    let Some(template) = template else {
        return Err(bad_input("--apply-chat-template: the model has no chat template"));
    };
    if let Some((name, of_adapter)) = trained.iter().find(|(_, trained)| *trained != template) {
        let what = match of_adapter.source() == template.source() {
            true => "other arguments of the chat template",
            false => "another chat template",
        };
        return Err(bad_input(format!(
            "--apply-chat-template: the adapter `{name}` was trained with {what}; score it in a run of \
             its own, with --skip-base"
        )));
    }
    let (fault, note) = ends::template_fault(base.tokenizer(), &template)?;
    if let Some(fault) = fault {
        return Err(bad_input(format!("--apply-chat-template: {fault}")));
    }
    if let Some(note) = note {
        say(global, format!("note: {note}"));
    }
    Ok(Some(template))
}

fn subjects<'a>(
    base: &'a Base,
    adapters: &'a [Named],
    arguments: &EvalArguments,
) -> Vec<Subject<'a>> {
    let weights = spelling(&arguments.dtype);
    let identity = &base.source.identity;
    let of = |adapter: Value| {
        json!({
            "model": identity.name,
            "model_fingerprint": identity.fingerprint,
            "weights": weights,
            "adapter": adapter,
        })
    };
    let alone = Subject {
        name: BASE.to_owned(),
        adapter: &NoAdapter,
        domains: Vec::new(),
        identity: of(Value::Null),
    };
    let with = adapters.iter().map(|adapter| Subject {
        name: adapter.name.clone(),
        adapter: adapter.loaded.tuned.as_adapter(),
        domains: adapter
            .domains
            .iter()
            .map(|(domain, loaded)| (domain.clone(), loaded.tuned.as_adapter()))
            .collect(),
        identity: of(json!({
            "path": adapter.folder.display().to_string(),
            "sha256": folder_hashes(&adapter.folder),
        })),
    });
    (!arguments.skip_base).then_some(alone).into_iter().chain(with).collect()
}

/// SHA-256 of an adapter's two files.
fn folder_hashes(folder: &Path) -> Value {
    let hash = |name: &str| {
        let bytes = hydralora_files::bytes_of(&folder.join(name)).unwrap_or_default();
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    json!({CONFIG_FILE: hash(CONFIG_FILE), TENSOR_FILE: hash(TENSOR_FILE)})
}

/// Plain texts end where the model's configuration says; answers also where the template in force and
/// the adapters' folders say.
fn end_ids(
    base: &Base,
    adapters: &[Named],
    template: Option<&ChatTemplate>,
    opened: &[Opened],
    templated: bool,
) -> anyhow::Result<Vec<u32>> {
    let mut tasks = opened.iter().flat_map(|opened| &opened.tasks);
    let talks = tasks.any(|task| task.items().iter().any(|i| i.prompt.conversation.is_some()));
    let tokenizer = base.tokenizer();
    if !templated && !talks {
        return Ok(tokenizer.text_end_ids().to_vec());
    }
    let named = adapters.iter().filter_map(|adapter| adapter.loaded.metadata.as_ref());
    let named: Vec<String> = named.flat_map(|metadata| metadata.end_tokens.clone()).collect();
    let mut ids = ends::end_ids(tokenizer, template, &named, &[])?;
    ids.sort_unstable();
    Ok(ids)
}

fn out_path(out: &Path, name: &str, models: usize) -> PathBuf {
    if models == 1 { out.to_path_buf() } else { out.with_extension(format!("{name}.json")) }
}

/// The table: a row a metric, a column a model.
fn results_text(results: &[Results]) -> String {
    let mut header: Vec<String> = ["task", "n", "shots", "metric"].map(str::to_owned).to_vec();
    header.extend(results.iter().map(|results| results.name.clone()));
    let mut rows = vec![header];
    let Some(first) = results.first() else { return String::new() };
    for (index, line) in first.lines.iter().enumerate() {
        let mut row = vec![
            line.task.clone(),
            line.records.to_string(),
            line.shots.to_string(),
            line.metric.trim_end_matches(",none").to_owned(),
        ];
        row.extend(results.iter().map(|results| {
            let line = &results.lines[index];
            match line.stderr {
                Some(stderr) => format!("{:.4} ± {stderr:.4}", line.value),
                None => format!("{:.4}", line.value),
            }
        }));
        rows.push(row);
    }
    table(&rows)
}

fn comparison_text(comparison: &Comparison) -> String {
    let Comparison { first, second, differences, warnings } = comparison;
    let mut rows = vec![vec![
        "task".to_owned(),
        "n".to_owned(),
        "metric".to_owned(),
        first.clone(),
        second.clone(),
        "difference".to_owned(),
        "95 % interval".to_owned(),
        "higher/lower".to_owned(),
    ]];
    for row in differences {
        let [low, high] = row.interval;
        let [higher, lower] = row.higher_lower;
        rows.push(vec![
            row.task.clone(),
            row.records.to_string(),
            row.metric.trim_end_matches(",none").to_owned(),
            format!("{:.4}", row.first),
            format!("{:.4}", row.second),
            format!("{:+.4}", row.difference),
            format!("{low:+.4} to {high:+.4}"),
            format!("{higher}/{lower}"),
        ]);
    }
    let notes: String = warnings.iter().map(|warning| format!("\nnote: {warning}")).collect();
    table(&rows) + &notes
}

fn comparison_json(comparison: &Comparison) -> Value {
    let row = |row: &eval::Difference| {
        json!({
            "task": row.task,
            "metric": row.metric,
            "records": row.records,
            "first": row.first,
            "second": row.second,
            "difference": row.difference,
            "interval_95": row.interval,
            "higher": row.higher_lower[0],
            "lower": row.higher_lower[1],
        })
    };
    json!({
        "first": comparison.first,
        "second": comparison.second,
        "differences": comparison.differences.iter().map(row).collect::<Vec<_>>(),
        "warnings": comparison.warnings,
    })
}

/// How far the run is, and how long it takes yet.
struct Bar {
    bar: ProgressBar,
    /// Print lines, because nobody sees a bar.
    lines: bool,
    started: Instant,
    last: Instant,
}

impl Bar {
    fn new(global: &Global) -> Self {
        let terminal = std::io::stderr().is_terminal() && !global.quiet;
        let bar = ProgressBar::new(0);
        if !terminal {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let style = "{bar:28.cyan/dim} {pos}/{len}  {msg}";
        bar.set_style(
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        let now = Instant::now();
        Self { bar, lines: !terminal && !global.quiet, started: now, last: now }
    }

    fn show(&mut self, progress: Progress<'_>) {
        let fresh = progress.done - progress.resumed;
        let left = match fresh {
            0 => String::new(),
            _ => {
                let each = self.started.elapsed().as_secs_f64() / fresh as f64;
                format!("  {:.0} s left", each * (progress.total - progress.done) as f64)
            }
        };
        if self.lines {
            if self.last.elapsed() >= LINE_EVERY {
                self.last = Instant::now();
                let Progress { done, total, task, .. } = progress;
                tell(format!("{done}/{total}  {task}{left}"));
            }
            return;
        }
        self.bar.set_length(progress.total as u64);
        self.bar.set_position(progress.done as u64);
        self.bar.set_message(format!("{}{left}", progress.task));
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

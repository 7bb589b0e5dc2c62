//! A cell's work: child processes of this program, so that one that crashes or is killed takes its cell
//! with it and nothing else.

use super::recipes::Known;
use crate::args::{Global, spelling};
use crate::commands::analyze::of_cell;
use crate::energy::JOULES_PER_KWH;
use crate::recipe::Recipe;
use crate::sources;
use crate::ui::say;
use hydralora_files::Lock;
use hydralora_study::host::{Ended, Job, Runner, Scored};
use hydralora_study::result::{
    CurvePoint, DomainLoss, Energy, EvaluationPoint, Gates, Losses, Measured, Validated,
};
use hydralora_study::store::{CellFile, Kind, LOG, RECIPE, not_measured};
use hydralora_study::work::ADAPTER;
use hydralora_study::{Error, Result, sha256_of};
use hydralora_train::{METRICS_FILE, Routing, checkpoint, read_metrics};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// Time between looks at a child.
const POLL: Duration = Duration::from_millis(25);
/// Time that a child gets to save and end.
const GRACE: Duration = Duration::from_secs(50);
/// How often a child that was killed is started anew.
const RESTARTS: usize = 2;
/// Points that a result keeps of a training curve.
const CURVE: usize = 100;
/// Seconds between notes of the processor time used so far.
const NOTE_EVERY: Duration = Duration::from_secs(5);
/// Processor time of a run's attempts, in its folder.
const CPU_FILE: &str = "cpu_s";
/// What a child printed, in its folder.
const OUTPUT: &str = "output.json";
/// What looking at the weights printed, for as long as it is read.
const ANALYSIS: &str = "analysis.json";
/// The system's ticks in a second: on Linux 100 for every program, whatever the kernel's own.
const TICKS: f64 = 100.0;

/// Runs cells of a study.
pub(super) struct Children<'a> {
    pub(super) global: &'a Global,
    /// Threads of a child.
    pub(super) threads: usize,
    /// Cells at once.
    pub(super) jobs: usize,
    /// How children measure energy, as arguments.
    pub(super) energy: Vec<String>,
    /// The program itself.
    pub(super) program: PathBuf,
    /// What was checked in this process: fingerprints by model, hashes by path, length and time.
    pub(super) checked: Mutex<Checked>,
}

#[derive(Default)]
pub(super) struct Checked {
    bases: BTreeMap<String, String>,
    files: BTreeMap<(PathBuf, u64, Option<SystemTime>), String>,
}

impl Checked {
    fn sha256(&mut self, path: &Path) -> Result<String> {
        let metadata = fs::metadata(path).map_err(|source| Error::io(path, source))?;
        let key = (path.to_path_buf(), metadata.len(), metadata.modified().ok());
        if let Some(hash) = self.files.get(&key) {
            return Ok(hash.clone());
        }
        let hash = sha256_of(path)?;
        self.files.insert(key, hash.clone());
        Ok(hash)
    }
}

/// How a child ended, and the processor seconds it took.
enum Ran {
    Well,
    Stopped,
    Killed(String),
    Badly(String),
}

impl Children<'_> {
    /// Runs a command in a cell's folder; what it prints goes to `output.json` in the folder `run`.
    fn child(&self, job: &Job<'_>, arguments: &[String]) -> Result<Ran> {
        self.child_to(job, arguments, OUTPUT)
    }

    /// The same with another name for what it prints.
    fn child_to(&self, job: &Job<'_>, arguments: &[String], output: &str) -> Result<Ran> {
        let log = job.folder.join(LOG);
        let failed = |source| Error::io(&log, source);
        let stderr = File::options().create(true).append(true).open(&log).map_err(failed)?;
        let before = stderr.metadata().map_err(failed)?.len();
        let output = job.folder.join(job.run).join(output);
        let stdout = File::create(&output).map_err(|source| Error::io(&output, source))?;
        let mut command = Command::new(&self.program);
        command
            .args(["--json", "--quiet", "--stop-on-eof", "--threads", &self.threads.to_string()])
            .args(["--device", &spelling(&self.global.device)])
            .args(arguments)
            .current_dir(job.folder)
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(stderr);
        let child = command.spawn().map_err(|source| Error::io(&self.program, source))?;
        let status = self.watch(job, child)?;
        Ok(match status.code() {
            Some(0) => Ran::Well,
            Some(130) => Ran::Stopped,
            Some(code) => Ran::Badly(last_words(&log, before, &format!("exit status {code}"))),
            None => {
                Ran::Killed(last_words(&log, before, &format!("the command was killed: {status}")))
            }
        })
    }

    fn watch(&self, job: &Job<'_>, mut child: Child) -> Result<ExitStatus> {
        let noted = job.folder.join(job.run).join(CPU_FILE);
        let earlier = read_number(&noted);
        let note = |used: f64| fs::write(&noted, (earlier + used).to_string());
        let mut asked: Option<Instant> = None;
        let mut last_note = Instant::now();
        let failed = |source| Error::io(job.folder, source);
        loop {
            if job.claim.is_lost() {
                let _ = child.kill();
            } else if asked.is_none() && job.stop.load(Ordering::SeqCst) {
                // The end of its stdin is the request to save and stop.
                drop(child.stdin.take());
                asked = Some(Instant::now());
            }
            if asked.is_some_and(|asked| asked.elapsed() > GRACE) {
                let _ = child.kill();
            }
            // What it used is known until somebody asks how it ended.
            let used = processor_seconds(child.id());
            if used.is_none_or(|(_, ended)| ended)
                && let Some(status) = child.try_wait().map_err(failed)?
            {
                if let Some((seconds, _)) = used {
                    let _ = note(seconds);
                }
                return Ok(status);
            }
            if last_note.elapsed() >= NOTE_EVERY {
                last_note = Instant::now();
                let _ = used.map(|(seconds, _)| note(seconds));
            }
            std::thread::sleep(POLL);
        }
    }

    /// The energy that a child printed. A counter is the whole machine's, and so is a power: with several
    /// cells at once each is charged with the others.
    fn energy(&self, printed: &Value) -> Energy {
        let text = |key: &str| printed[key].as_str().map(str::to_owned);
        let energy_j = printed["energy_j"].as_f64();
        let kwh = energy_j.map(|joules| joules / JOULES_PER_KWH);
        let grams = kwh.zip(printed["grid_g_per_kwh"].as_f64());
        let mut found = Energy {
            energy_j,
            source: text("source"),
            reason: text("reason"),
            idle_watts: printed["idle_watts"].as_f64(),
            g_co2eq: grams.map(|(kwh, grams)| kwh * grams),
        };
        if found.energy_j.is_none() && found.reason.is_none() {
            found.reason = Some("the command does not say".to_owned());
        }
        if found.energy_j.is_some() && self.jobs > 1 {
            let others = format!("counts all of the {} cells at work at once", self.jobs);
            let reason = found.reason.take().map_or(String::new(), |reason| format!("{reason}; "));
            found.reason = Some(reason + &others);
        }
        found
    }

    /// What a finished run's folder says.
    fn trained(&self, run: &Path) -> Result<Validated> {
        let output = run.join(OUTPUT);
        let printed: Value = read(&output)?;
        let metrics_path = run.join(METRICS_FILE);
        let rows = read_metrics(&metrics_path).map_err(|error| Error::Failed(error.to_string()))?;
        let steps: Vec<&Value> = rows.iter().filter(|row| row.get("tokens").is_some()).collect();
        let evaluations: Vec<&Value> =
            rows.iter().filter(|row| row.get("valid_loss").is_some()).collect();
        let sum = |key: &str| steps.iter().filter_map(|row| row[key].as_u64()).sum();
        let last = steps.last().ok_or_else(|| damaged(&metrics_path, "has no step"))?;
        let peak = steps.iter().filter_map(|row| row["peak_rss_mb"].as_f64()).fold(0.0, f64::max);
        let valid = evaluations
            .last()
            .map(|row| losses(&row["valid_loss"], &row["valid_label_tokens"], &row["domains"]));
        let baseline = run.join("baseline.json");
        let base = match baseline.is_file() {
            true => {
                let found: Value = read(&baseline)?;
                Some(losses(&found["loss"], &found["label_tokens"], &found["domains"]))
            }
            false => None,
        };
        let routing = run.join("routing.json");
        let gates = match routing.is_file() {
            true => {
                let text = hydralora_files::bytes_of(&routing)
                    .map_err(|source| Error::io(&routing, source))?;
                let routing: Routing = serde_json::from_slice(&text)
                    .map_err(|error| Error::file(&routing, error.to_string()))?;
                Some(by_layer(&routing))
            }
            false => None,
        };
        let parameters = serde_json::from_value(printed["parameters"].clone())
            .map_err(|error| damaged(&output, &error.to_string()))?;
        // Up to the last step, as the seconds are.
        let mut of_steps = printed["energy"].clone();
        if last["energy_j"].is_f64() {
            of_steps["energy_j"] = last["energy_j"].clone();
            of_steps["source"] = last["energy_source"].clone();
        }
        let energy = self.energy(&of_steps);
        let every = steps.len().div_ceil(CURVE).max(1);
        let curve =
            steps.iter().enumerate().filter(|(at, _)| at % every == 0 || at + 1 == steps.len());
        Ok(Validated {
            valid,
            base,
            ending: printed["ending"].as_str().unwrap_or_default().to_owned(),
            steps: last["step"].as_u64().unwrap_or_default(),
            tokens: sum("tokens"),
            label_tokens: sum("label_tokens"),
            wall_s: last["elapsed_s"].as_f64().unwrap_or_default(),
            cpu_s: self.cpu_seconds(run),
            peak_rss_mb: (peak > 0.0).then_some(peak),
            energy,
            parameters,
            gates,
            curve: curve
                .map(|(_, row)| CurvePoint {
                    step: row["step"].as_u64().unwrap_or_default(),
                    loss: row["loss"].as_f64().unwrap_or(f64::NAN),
                })
                .collect(),
            evaluations: evaluations
                .iter()
                .map(|row| EvaluationPoint {
                    step: row["step"].as_u64().unwrap_or_default(),
                    valid_loss: row["valid_loss"].as_f64().unwrap_or(f64::NAN),
                    gate_entropy: row["gate_entropy"].as_f64(),
                    gate_spread: row["gate_spread"].as_f64(),
                    router_movement: row["router_movement"].as_f64(),
                })
                .collect(),
        })
    }

    fn cpu_seconds(&self, folder: &Path) -> Option<f64> {
        Some(read_number(&folder.join(CPU_FILE))).filter(|seconds| *seconds > 0.0)
    }
}

fn read_number(path: &Path) -> f64 {
    hydralora_files::text_of(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0.0)
}

/// Processor seconds of a process, and whether it has ended; none where the system does not say.
fn processor_seconds(pid: u32) -> Option<(f64, bool)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let ended = fields.next()? == "Z";
    let ticks: Vec<f64> = fields.skip(10).take(2).filter_map(|field| field.parse().ok()).collect();
    Some((ticks.iter().sum::<f64>() / TICKS, ended))
}

/// The error that a command wrote last, from `before` on in its log.
fn last_words(log: &Path, before: u64, otherwise: &str) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = hydralora_files::open(log)?;
        file.seek(SeekFrom::Start(before))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let text = read().unwrap_or_default();
    match text.rfind("error: ") {
        Some(at) => text[at + "error: ".len()..].trim().to_owned(),
        None => otherwise.to_owned(),
    }
}

fn strings(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|&argument| argument.to_owned()).collect()
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::file(path, format!("{what}; expected what the command writes"))
}

impl Runner for Children<'_> {
    fn train(&self, job: &Job<'_>) -> Result<Ended<Validated>> {
        let run = job.folder.join(job.run);
        let mut restarts = 0;
        loop {
            let saved = checkpoint::list(&run).map_err(|error| Error::Failed(error.to_string()))?;
            let output = format!("output={}", job.run);
            let mut arguments = strings(&["train", RECIPE, "--set", &output]);
            arguments.extend(self.energy.iter().cloned());
            if saved.is_empty() {
                // What an attempt without a checkpoint left would be in the way.
                let _ = fs::remove_dir_all(run.join(ADAPTER));
            } else {
                arguments.push("--resume".to_owned());
            }
            match self.child(job, &arguments)? {
                Ran::Well => return self.trained(&run).map(Ended::Done),
                Ran::Stopped => return Ok(Ended::Stopped),
                Ran::Badly(message) => return Ok(Ended::Failed(message)),
                Ran::Killed(message) => {
                    if job.claim.is_lost() || job.stop.load(Ordering::SeqCst) {
                        return Ok(Ended::Stopped);
                    }
                    if restarts == RESTARTS {
                        return Ok(Ended::Failed(message));
                    }
                    restarts += 1;
                }
            }
        }
    }

    fn score(&self, job: &Job<'_>, scored: &Scored<'_>) -> Result<Ended<Measured>> {
        let began = Instant::now();
        let run = job.folder.join(job.run);
        let recipe_path = job.folder.join(RECIPE);
        let text =
            hydralora_files::text_of(&recipe_path).map_err(|s| Error::io(&recipe_path, s))?;
        let recipe: Value = serde_saphyr::from_str(&text)
            .map_err(|error| Error::file(&recipe_path, error.to_string()))?;
        let model = recipe["model"]["path"].as_str().unwrap_or_default().to_owned();
        let dtype = recipe["model"]["dtype"].as_str().unwrap_or("f32").to_owned();
        if job.cell.kind == Kind::Combined {
            let made = run.join(ADAPTER);
            let _ = fs::remove_dir_all(&made);
            let place = format!("{}/{ADAPTER}", job.run);
            let mut arguments: Vec<String> =
                job.cell.combine.iter().map(|word| word.replace("{model}", &model)).collect();
            arguments.extend(strings(&["--out", &place]));
            arguments.extend(scored.sources.iter().map(|path| path.display().to_string()));
            match self.child(job, &arguments)? {
                Ran::Well => {}
                Ran::Stopped => return Ok(Ended::Stopped),
                Ran::Badly(message) | Ran::Killed(message) => return Ok(Ended::Failed(message)),
            }
        }
        let adapter = match job.cell.kind {
            Kind::Untrained => None,
            Kind::Combined => Some(format!("{}/{ADAPTER}", job.run)),
            Kind::Trained => Some(format!("run/{ADAPTER}")),
        };
        let whole = adapter
            .as_ref()
            .is_some_and(|adapter| job.folder.join(adapter).join("config.json").is_file());
        let mut arguments = strings(&["eval", "--dtype", &dtype]);
        match &adapter {
            // Full fine-tuning leaves a model, no adapter.
            Some(folder) if whole => arguments.extend(strings(&["--model", folder])),
            Some(folder) => {
                let named = format!("cell={folder}");
                arguments.extend(strings(&["--model", &model, "--adapter", &named, "--skip-base"]));
            }
            None => arguments.extend(strings(&["--model", &model])),
        }
        for task in scored.tasks {
            arguments.extend(strings(&["--tasks", task]));
        }
        arguments.extend(eval_arguments(scored, adapter.is_some() && !whole));
        arguments.extend(self.energy.iter().cloned());
        let (results, samples) =
            (format!("{}/results.json", job.run), format!("{}/samples.jsonl", job.run));
        arguments.extend(strings(&["--out", &results, "--samples", &samples]));
        match self.child(job, &arguments)? {
            Ran::Well => {}
            Ran::Stopped => return Ok(Ended::Stopped),
            Ran::Killed(_) if job.claim.is_lost() || job.stop.load(Ordering::SeqCst) => {
                return Ok(Ended::Stopped);
            }
            Ran::Badly(message) | Ran::Killed(message) => return Ok(Ended::Failed(message)),
        }
        let (mut found, energy) = measured(&job.folder.join(results))?;
        found.energy = self.energy(&energy);
        found.wall_s = began.elapsed().as_secs_f64();
        found.cpu_s = self.cpu_seconds(&run);
        Ok(Ended::Done(found))
    }

    fn analyze(&self, job: &Job<'_>) -> Result<Value> {
        let arguments = strings(&["analyze", &format!("{}/{ADAPTER}", job.run)]);
        let output = job.folder.join(job.run).join(ANALYSIS);
        let found = match self.child_to(job, &arguments, ANALYSIS)? {
            Ran::Well => of_cell(&read(&output)?),
            Ran::Badly(message) | Ran::Killed(message) => not_measured(&message),
            Ran::Stopped => not_measured("it was stopped before it was looked at"),
        };
        let _ = fs::remove_file(output);
        Ok(found)
    }

    fn check(&self, folder: &Path, cell: &CellFile) -> Result<()> {
        let mut checked = self.checked.lock().unwrap_or_else(|error| error.into_inner());
        let changed = |path: &Path, what: &str| {
            Error::file(
                path,
                format!(
                    "{what} since the cell {} was planned; put it back, or plan again, which makes a new cell",
                    cell.id
                ),
            )
        };
        for (task, noted) in
            cell.tasks.iter().zip(cell.identity["tasks"].as_array().into_iter().flatten())
        {
            let Some((_, file)) = task.split_once(':') else { continue };
            let path = folder.join(file);
            let known =
                noted.as_str().and_then(|noted| noted.rsplit(':').next()).unwrap_or_default();
            if checked.sha256(&path)? != known {
                return Err(changed(&path, "has changed"));
            }
        }
        let recipe_path = folder.join(RECIPE);
        let text =
            hydralora_files::text_of(&recipe_path).map_err(|s| Error::io(&recipe_path, s))?;
        let value: Value = serde_saphyr::from_str(&text)
            .map_err(|error| Error::file(&recipe_path, error.to_string()))?;
        if cell.kind == Kind::Trained {
            let mut recipe = Recipe::from_value(&value, folder).map_err(|faults| {
                let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
                Error::file(&recipe_path, faults.join("; "))
            })?;
            sources::locate(&mut recipe.data, folder)
                .map_err(|error| Error::bad(format!("{error:#}")))?;
            let mut files = Vec::new();
            for source in recipe.data.train.iter().chain(&recipe.data.valid) {
                files.extend(source.files(folder).map_err(|error| Error::bad(error.to_string()))?);
            }
            if files.len() != cell.files.len() {
                return Err(changed(&recipe_path, "its data files are others"));
            }
            for (path, (_, known)) in files.iter().zip(&cell.files) {
                if checked.sha256(path)? != *known {
                    return Err(changed(path, "has changed"));
                }
            }
        }
        let spec = value["model"]["path"].as_str().unwrap_or_default();
        if !checked.bases.contains_key(spec) {
            let found = Known::default().base(spec)?.identity.fingerprint.clone();
            checked.bases.insert(spec.to_owned(), found);
        }
        match checked.bases.get(spec) {
            Some(found) if cell.identity["base"] == json!(found) => Ok(()),
            _ => Err(changed(Path::new(spec), "the base model has changed")),
        }
    }

    fn wait_for(&self, run: &Path) {
        let until = Instant::now() + GRACE;
        let busy = || {
            Lock::folder(run).is_err_and(|error| error.kind() == std::io::ErrorKind::ResourceBusy)
        };
        while busy() && Instant::now() < until {
            std::thread::sleep(POLL);
        }
    }

    fn say(&self, line: &str) {
        say(self.global, line);
    }
}

fn eval_arguments(scored: &Scored<'_>, adapter: bool) -> Vec<String> {
    let options = scored.eval;
    let mut arguments = Vec::new();
    let mut number = |name: &str, value: Option<u64>| {
        if let Some(value) = value {
            arguments.extend([name.to_owned(), value.to_string()]);
        }
    };
    number("--limit", options.limit);
    number("--shots", options.shots);
    number("--seed", options.seed);
    number("--max-new-tokens", options.max_new_tokens);
    number("--repeats", options.repeats);
    for (name, value) in [("--data", &options.data), ("--domain", &options.domain)] {
        if let Some(value) = value
            && (name != "--domain" || adapter)
        {
            arguments.extend([name.to_owned(), value.clone()]);
        }
    }
    for (name, value) in [
        ("--apply-chat-template", options.apply_chat_template),
        ("--allow-code-execution", options.allow_code_execution),
    ] {
        if value == Some(true) {
            arguments.push(name.to_owned());
        }
    }
    arguments
}

fn read(path: &Path) -> Result<Value> {
    let text = hydralora_files::bytes_of(path).map_err(|source| Error::io(path, source))?;
    serde_json::from_slice(&text).map_err(|error| Error::file(path, error.to_string()))
}

fn losses(loss: &Value, label_tokens: &Value, domains: &Value) -> Losses {
    let of_domain = |row: &Value| {
        let loss = DomainLoss {
            loss: row["loss"].as_f64().unwrap_or(f64::NAN),
            label_tokens: row["label_tokens"].as_u64().unwrap_or_default(),
        };
        Some((row["domain"].as_str()?.to_owned(), loss))
    };
    Losses {
        loss: loss.as_f64().unwrap_or(f64::NAN),
        label_tokens: label_tokens.as_u64().unwrap_or_default(),
        domains: domains.as_array().into_iter().flatten().filter_map(of_domain).collect(),
    }
}

/// The mean over a layer's projections, in five digits.
fn by_layer(routing: &Routing) -> Gates {
    let mut layers: BTreeMap<usize, Vec<&Vec<Vec<f64>>>> = BTreeMap::new();
    for site in &routing.sites {
        layers.entry(site.layer).or_default().push(&site.mean_gate);
    }
    let mean = |sites: &Vec<&Vec<Vec<f64>>>| -> Vec<Vec<f64>> {
        let experts = sites.iter().map(|site| site.first().map_or(0, Vec::len)).min().unwrap_or(0);
        let of = |domain: usize, expert: usize| {
            let sum: f64 = sites.iter().map(|site| site[domain][expert]).sum();
            (1e5 * sum / sites.len() as f64).round() / 1e5
        };
        (0..routing.domains.len())
            .map(|domain| (0..experts).map(|expert| of(domain, expert)).collect())
            .collect()
    };
    Gates { domains: routing.domains.clone(), layers: layers.values().map(mean).collect() }
}

/// What a results file in the harness's layout says, and its energy.
fn measured(path: &Path) -> Result<(Measured, Value)> {
    let value = read(path)?;
    let object = |key: &str| -> Result<Map<String, Value>> {
        value[key].as_object().cloned().ok_or_else(|| damaged(path, &format!("has no `{key}`")))
    };
    let mut found = Measured::default();
    for (task, metrics) in object("results")? {
        // Groups that are called after a file say what their tasks say.
        if task.contains(':') {
            continue;
        }
        let mut metrics: BTreeMap<String, Value> = metrics
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        metrics.remove("alias");
        if let Some(weights) = value["scores"][&task]["weight"].as_array() {
            let tokens: f64 = weights.iter().filter_map(Value::as_f64).sum();
            metrics.insert("label_tokens".to_owned(), json!(tokens));
        }
        found.tasks.insert(task, metrics);
    }
    for (task, metrics) in object("higher_is_better")? {
        let metrics = metrics.as_object().into_iter().flatten();
        let better = metrics.filter_map(|(name, better)| Some((name.clone(), better.as_bool()?)));
        found.higher_is_better.insert(task, better.collect());
    }
    for (task, config) in object("configs")? {
        let mut files = Map::new();
        for (file, hash) in config["data_sha256"].as_object().into_iter().flatten() {
            // Files inside a study lie elsewhere on every machine; their names are enough.
            let name =
                Path::new(file).file_name().map_or(file.clone(), |n| n.to_string_lossy().into());
            files.insert(name, hash.clone());
        }
        found.data_sha256.insert(task, Value::Object(files));
    }
    Ok((found, value["energy"].clone()))
}

//! Working on the cells of a study, beside any number of other processes that do the same.

use crate::choose::{Choice, Progress, choose, groups};
use crate::claim::{Claim, Held, Observer};
use crate::disk::{make_folder, names_in};
use crate::error::{Error, Result};
use crate::host::{Ended, Job, Runner, Scored};
use crate::plan::{Plan, Planned, shown};
use crate::result::{CellResult, Machine};
use crate::spec::Keep;
use crate::store::{CellFile, FORMAT, Kind, Store, not_measured};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The folder of a finished run, and the beginning of the name of one under way.
pub const RUN: &str = "run";
const SCORE: &str = "score";
/// The adapter in a run's folder.
pub const ADAPTER: &str = "adapter";
/// What a finished run does not need any more.
const SPENT: [&str; 3] = ["checkpoints", "best", "tensorboard"];
/// Longest time between looks at what others do.
const POLL: Duration = Duration::from_secs(2);

/// How to work.
#[derive(Clone, Debug)]
pub struct WorkOptions {
    /// Cells at once in this process.
    pub jobs: usize,
    /// This cell alone: its name or the beginning of it.
    pub cell: Option<String>,
    /// The cells number `i`, `i + n`, … of the plan alone, `i` from 0.
    pub shard: Option<(usize, usize)>,
    /// Whether to wait for what other processes work on.
    pub wait: bool,
    /// Whether to try again what failed.
    pub retry: bool,
    /// A claim without a heartbeat for so long is dead.
    pub stale_after: Duration,
    /// What results say of the machine.
    pub machine: Machine,
    /// The program and its version.
    pub program: String,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Worked {
    /// Cells trained here.
    pub trained: usize,
    /// Cells scored here.
    pub scored: usize,
    /// Cells that failed here.
    pub failed: usize,
    /// Whether it was asked to stop.
    pub stopped: bool,
}

/// What is known of a cell.
enum State {
    Open,
    Failed,
    /// With what it needs for choosing, and whether it is scored.
    Trained(Option<f64>, bool),
}

enum Task {
    Train(usize),
    Score(usize, Vec<PathBuf>),
}

/// What there is to do next.
enum Next {
    Do(Task, Box<Claim>),
    Wait,
    End,
}

struct Board<'a> {
    store: &'a Store,
    plan: &'a Plan,
    /// One planned point of every cell.
    cells: Vec<usize>,
    /// All points of each group.
    groups: BTreeMap<BTreeMap<String, String>, Vec<usize>>,
    /// All points of each cell.
    points: HashMap<&'a str, Vec<usize>>,
    /// Choices that nothing can change any more.
    settled: HashMap<BTreeMap<String, String>, Choice>,
    states: HashMap<String, State>,
    /// Cells that cannot be scored here, because what they trained is not here.
    unscorable: HashSet<String>,
    observer: Observer,
    pruned: HashSet<usize>,
    /// Cells in which nothing of a dead worker is left.
    tidied: HashSet<String>,
}

/// Works until nothing is left to do, or it is asked to stop.
///
/// # Errors
/// If a cell was changed by hand, its data are not what they were, or the disk refuses. What is done
/// stays.
pub fn work(
    store: &Store,
    plan: &Plan,
    runner: &dyn Runner,
    options: &WorkOptions,
    stop: &AtomicBool,
) -> Result<Worked> {
    let cells = in_scope(plan, options)?;
    for &index in &cells {
        store.check_cell(&plan.cells[index].id)?;
        if options.retry {
            store.forgive(&plan.cells[index].id)?;
        }
    }
    let poll = POLL.min(options.stale_after / 4);
    let mut points: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, cell) in plan.cells.iter().enumerate() {
        points.entry(&cell.id).or_default().push(index);
    }
    let board = Mutex::new(Board {
        store,
        plan,
        groups: groups(plan),
        points,
        settled: HashMap::new(),
        states: HashMap::new(),
        unscorable: HashSet::new(),
        observer: Observer::new(options.stale_after),
        pruned: HashSet::new(),
        tidied: HashSet::new(),
        cells,
    });
    let counts = [const { AtomicUsize::new(0) }; 3];
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let over = AtomicBool::new(false);
    let worker = Worker { store, plan, runner, options, stop, counts: &counts };
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                if let Err(error) = worker.run(&board, poll, &over) {
                    over.store(true, Ordering::SeqCst);
                    failed.lock().unwrap_or_else(|error| error.into_inner()).get_or_insert(error);
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(|error| error.into_inner()) {
        return Err(error);
    }
    let [trained, scored, failed] = counts.map(AtomicUsize::into_inner);
    Ok(Worked { trained, scored, failed, stopped: stop.load(Ordering::SeqCst) })
}

/// The points to work on, one of every cell.
fn in_scope(plan: &Plan, options: &WorkOptions) -> Result<Vec<usize>> {
    let mut seen = HashSet::new();
    let distinct: Vec<usize> =
        (0..plan.cells.len()).filter(|index| seen.insert(&plan.cells[*index].id)).collect();
    if let Some(name) = &options.cell {
        let found: Vec<usize> =
            distinct.into_iter().filter(|index| plan.cells[*index].id.starts_with(name)).collect();
        return match found.len() {
            1 => Ok(found),
            0 => Err(Error::bad(format!("--cell: the study has no cell `{name}`"))),
            n => Err(Error::bad(format!(
                "--cell: {n} cells begin with `{name}`; give more of the name"
            ))),
        };
    }
    Ok(match options.shard {
        Some((shard, of)) => distinct.into_iter().skip(shard).step_by(of.max(1)).collect(),
        None => distinct,
    })
}

impl Board<'_> {
    fn state(&mut self, id: &str) -> Result<&State> {
        // What is trained may be scored by now, what is open may be done.
        let fixed =
            matches!(self.states.get(id), Some(State::Failed) | Some(State::Trained(_, true)));
        if !fixed {
            let failed = self.store.failure(id)?.is_some();
            let state = match self.store.result(id)? {
                // What failed to be scored is trained all the same.
                Some(result) => State::Trained(
                    result.metric(&self.plan.select),
                    failed || result.test.is_some(),
                ),
                None if failed => State::Failed,
                None => State::Open,
            };
            self.states.insert(id.to_owned(), state);
        }
        Ok(&self.states[id])
    }

    fn progress(&mut self, cells: &[usize]) -> Result<HashMap<usize, Progress>> {
        let mut found = HashMap::new();
        for &index in cells {
            let progress = match self.state(&self.plan.cells[index].id)? {
                State::Open => Progress::Open,
                State::Failed => Progress::Failed,
                State::Trained(valid, _) => Progress::Done(*valid),
            };
            found.insert(index, progress);
        }
        Ok(found)
    }

    /// The choice of a group; none if there is no such group.
    fn choice(&mut self, group: &BTreeMap<String, String>) -> Result<Option<Choice>> {
        if let Some(choice) = self.settled.get(group) {
            return Ok(Some(choice.clone()));
        }
        let Some(members) = self.groups.get(group).cloned() else { return Ok(None) };
        let progress = self.progress(&members)?;
        let choice = choose(self.plan, group.clone(), &members, &|index| progress[&index]);
        // What is complete stays, but for cells that are tried again, which no process does meanwhile.
        if members.iter().all(|index| progress[index] != Progress::Open) {
            self.settled.insert(group.clone(), choice.clone());
        }
        Ok(Some(choice))
    }

    /// The next thing to do, claimed.
    fn next(&mut self, wait: bool) -> Result<Next> {
        let mut held = false;
        for index in self.cells.clone() {
            let id = self.plan.cells[index].id.clone();
            let folder = self.store.folder(&id);
            let Some(task) = self.task(index)? else {
                self.tidy(&id, &folder)?;
                continue;
            };
            if let Some(claim) = self.observer.claim(&folder)? {
                // Somebody may have ended it between the look and the claim.
                self.states.remove(&id);
                match self.task(index)? {
                    Some(task) => return Ok(Next::Do(task, Box::new(claim))),
                    None => {
                        claim.finish()?;
                        continue;
                    }
                }
            }
            drop(task);
            held = true;
        }
        // What waits for a choice goes on when the cells that decide it are done by others.
        held = held || self.others_work()?;
        Ok(if held && wait { Next::Wait } else { Next::End })
    }

    /// Removes once what a worker left in a cell that died after its result was there.
    fn tidy(&mut self, id: &str, folder: &Path) -> Result<()> {
        if self.tidied.contains(id) || !matches!(self.state(id)?, State::Trained(..)) {
            return Ok(());
        }
        let left = names_in(folder)?.iter().any(|name| Claim::is_of(name) || is_attempt(name));
        if left {
            // Held by somebody, it is in good hands.
            let Some(claim) = self.observer.claim(folder)? else { return Ok(()) };
            clean(folder)?;
            claim.finish()?;
        }
        self.tidied.insert(id.to_owned());
        Ok(())
    }

    /// Whether some cell that is not done is held by somebody, and something here waits for it.
    fn others_work(&mut self) -> Result<bool> {
        let plan = self.plan;
        let mut waiting = false;
        for index in self.cells.clone() {
            let scored = matches!(self.state(&plan.cells[index].id)?, State::Trained(_, true));
            waiting |= !scored && !self.unscorable.contains(&plan.cells[index].id);
        }
        if !waiting {
            return Ok(false);
        }
        for cell in &plan.cells {
            let open = matches!(self.state(&cell.id)?, State::Open);
            if open && self.observer.look(&self.store.folder(&cell.id))? != Held::Free {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What can be done with a cell now.
    fn task(&mut self, index: usize) -> Result<Option<Task>> {
        let plan = self.plan;
        let cell = &plan.cells[index];
        let state = match self.state(&cell.id)? {
            State::Open => 0,
            State::Failed | State::Trained(_, true) => return Ok(None),
            State::Trained(_, false) => 1,
        };
        if state == 0 && cell.kind == Kind::Trained {
            return Ok(Some(Task::Train(index)));
        }
        if self.unscorable.contains(&cell.id) {
            return Ok(None);
        }
        match cell.kind {
            Kind::Untrained => Ok(Some(Task::Score(index, Vec::new()))),
            Kind::Combined => {
                let mut sources = Vec::new();
                for group in &cell.sources {
                    let Some(choice) = self.choice(group)?.filter(|choice| choice.complete) else {
                        return Ok(None);
                    };
                    let Some(tried) = choice.chosen() else { return Ok(None) };
                    let alike =
                        tried.cells.iter().find(|other| plan.cells[**other].seed == cell.seed);
                    let Some(&source) = alike else { return Ok(None) };
                    let source = &plan.cells[source].id;
                    if !matches!(self.state(source)?, State::Trained(..)) {
                        return Ok(None);
                    }
                    sources.push(self.store.folder(source).join(RUN).join(ADAPTER));
                }
                Ok(Some(Task::Score(index, sources)))
            }
            Kind::Trained => {
                for point in self.points[cell.id.as_str()].clone() {
                    let group = plan.cells[point].group(plan.tune.as_deref());
                    let Some(choice) = self.choice(&group)? else { continue };
                    let chosen = choice.chosen().is_some_and(|tried| tried.cells.contains(&point));
                    if choice.complete && chosen {
                        return Ok(Some(Task::Score(index, Vec::new())));
                    }
                }
                Ok(None)
            }
        }
    }

    /// Removes weights that the study does not keep.
    fn prune(&mut self, index: usize) -> Result<()> {
        let plan = self.plan;
        if plan.keep == Keep::All {
            return Ok(());
        }
        let needed = |cell: &Planned| {
            plan.cells.iter().any(|other| {
                other.sources.iter().any(|source| {
                    source.iter().all(|(axis, label)| cell.labels.get(axis) == Some(label))
                })
            })
        };
        let group = plan.cells[index].group(plan.tune.as_deref());
        let Some(choice) = self.choice(&group)?.filter(|choice| choice.complete) else {
            return Ok(());
        };
        let chosen: Vec<usize> = choice.chosen().map_or(Vec::new(), |tried| tried.cells.clone());
        let shared: HashSet<&str> =
            chosen.iter().map(|index| plan.cells[*index].id.as_str()).collect();
        for member in choice.tried.iter().flat_map(|tried| &tried.cells) {
            let cell = &plan.cells[*member];
            let scored = matches!(self.state(&cell.id)?, State::Trained(_, true));
            let spent = match shared.contains(cell.id.as_str()) {
                true => plan.keep == Keep::None && scored,
                false => true,
            };
            if spent && !needed(cell) && self.pruned.insert(*member) {
                let _ = fs::remove_dir_all(self.store.folder(&cell.id).join(RUN).join(ADAPTER));
            }
        }
        Ok(())
    }
}

struct Worker<'a> {
    store: &'a Store,
    plan: &'a Plan,
    runner: &'a dyn Runner,
    options: &'a WorkOptions,
    stop: &'a AtomicBool,
    /// Trained, scored, failed.
    counts: &'a [AtomicUsize; 3],
}

impl Worker<'_> {
    fn run(&self, board: &Mutex<Board<'_>>, poll: Duration, over: &AtomicBool) -> Result<()> {
        let lock = || board.lock().unwrap_or_else(|error| error.into_inner());
        while !self.stop.load(Ordering::SeqCst) && !over.load(Ordering::SeqCst) {
            let next = lock().next(self.options.wait)?;
            match next {
                Next::End => break,
                Next::Wait => {
                    let until = Instant::now() + poll;
                    while Instant::now() < until && !self.stop.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(50).min(poll));
                    }
                }
                Next::Do(Task::Train(index), claim) => {
                    let claim = *claim;
                    self.train(index, claim)?;
                    let mut board = lock();
                    board.states.remove(&self.plan.cells[index].id);
                    board.prune(index)?;
                }
                Next::Do(Task::Score(index, sources), claim) => {
                    let claim = *claim;
                    let here = self.score(index, &sources, claim)?;
                    let mut board = lock();
                    let id = &self.plan.cells[index].id;
                    board.states.remove(id);
                    if !here {
                        board.unscorable.insert(id.clone());
                    }
                    board.prune(index)?;
                }
            }
        }
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        let cell = &self.plan.cells[index];
        let seed = cell.seed.map_or(String::new(), |seed| format!(", seed {seed}"));
        format!("{}  {}{seed}", cell.id, shown(&cell.labels))
    }

    fn train(&self, index: usize, claim: Claim) -> Result<()> {
        let began = Instant::now();
        let id = &self.plan.cells[index].id;
        let folder = self.store.folder(id);
        let cell = self.store.check_cell(id)?;
        self.runner.check(&folder, &cell)?;
        let run = self.run_folder(&folder, RUN, &claim)?;
        let working = Instant::now();
        let job = Job { folder: &folder, cell: &cell, run: &run, claim: &claim, stop: self.stop };
        let ended = self.runner.train(&job)?;
        // Before the adapter may be removed.
        let analysis = match &ended {
            Ended::Done(_) if !job.claim.is_lost() => self.runner.analyze(&job)?,
            _ => unseen(),
        };
        let worked = working.elapsed();
        if !claim.is_held()? {
            self.lost(index);
            return Ok(());
        }
        match ended {
            Ended::Stopped => Ok(()),
            Ended::Failed(message) => self.failed(index, "train", &message, &claim),
            Ended::Done(trained) => {
                let valid = trained.valid.as_ref().map(|losses| losses.loss);
                rename(&folder.join(&run), &folder.join(RUN))?;
                let result = CellResult {
                    trained: Some(trained),
                    analysis,
                    overhead_s: (began.elapsed() - worked).as_secs_f64(),
                    ..self.empty_result(&cell, claim.number())
                };
                self.store.publish(&result)?;
                clean(&folder)?;
                claim.finish()?;
                self.counts[0].fetch_add(1, Ordering::SeqCst);
                let loss = valid.map_or(String::new(), |loss| format!("  held-out loss {loss:.4}"));
                let seconds = began.elapsed().as_secs_f64();
                self.runner
                    .say(&format!("trained  {}{loss}  ({seconds:.1} s)", self.describe(index)));
                Ok(())
            }
        }
    }

    /// Says whether the cell could be scored here.
    fn score(&self, index: usize, sources: &[PathBuf], claim: Claim) -> Result<bool> {
        let began = Instant::now();
        let id = &self.plan.cells[index].id;
        let folder = self.store.folder(id);
        let cell = self.store.check_cell(id)?;
        self.runner.check(&folder, &cell)?;
        let own = folder.join(RUN).join(ADAPTER);
        let needed = match cell.kind {
            Kind::Trained => std::slice::from_ref(&own),
            _ => sources,
        };
        if let Some(missing) = needed.iter().find(|path| !path.exists()) {
            self.runner.say(&format!(
                "not scored  {}: {} is not here (trained elsewhere, or removed)",
                self.describe(index),
                missing.display()
            ));
            return Ok(false);
        }
        let run = self.run_folder(&folder, SCORE, &claim)?;
        let working = Instant::now();
        let job = Job { folder: &folder, cell: &cell, run: &run, claim: &claim, stop: self.stop };
        let scored = Scored { tasks: &cell.tasks, eval: &cell.eval, sources };
        let ended = match cell.tasks.is_empty() {
            true => Ended::Done(Default::default()),
            false => self.runner.score(&job, &scored)?,
        };
        let made = cell.kind == Kind::Combined && matches!(ended, Ended::Done(_));
        let analysis = match made && folder.join(&run).join(ADAPTER).exists() {
            true => Some(self.runner.analyze(&job)?),
            false => None,
        };
        let worked = working.elapsed();
        if !claim.is_held()? {
            self.lost(index);
            return Ok(true);
        }
        match ended {
            Ended::Stopped => {}
            Ended::Failed(message) => self.failed(index, "score", &message, &claim)?,
            Ended::Done(measured) => {
                let before = self.store.result(id)?;
                let mut result = before.unwrap_or_else(|| self.empty_result(&cell, claim.number()));
                result.test = Some(measured);
                if let Some(analysis) = analysis {
                    result.analysis = analysis;
                }
                result.overhead_s += (began.elapsed() - worked).as_secs_f64();
                if cell.kind == Kind::Combined {
                    make_folder(&folder.join(RUN))?;
                    let made = folder.join(&run).join(ADAPTER);
                    let place = folder.join(RUN).join(ADAPTER);
                    if made.exists() && !place.exists() {
                        rename(&made, &place)?;
                    }
                }
                self.store.complete(&result)?;
                let _ = fs::remove_dir_all(folder.join(&run));
                claim.finish()?;
                self.counts[1].fetch_add(1, Ordering::SeqCst);
                let seconds = began.elapsed().as_secs_f64();
                self.runner.say(&format!("scored   {}  ({seconds:.1} s)", self.describe(index)));
            }
        }
        Ok(true)
    }

    fn empty_result(&self, cell: &CellFile, attempts: u64) -> CellResult {
        CellResult {
            format: FORMAT,
            cell: cell.id.clone(),
            program: self.options.program.clone(),
            identity: cell.identity.clone(),
            trained: None,
            test: None,
            machine: self.options.machine.clone(),
            attempts,
            overhead_s: 0.0,
            analysis: unseen(),
        }
    }

    fn lost(&self, index: usize) {
        let cell = self.describe(index);
        self.runner
            .say(&format!("lost     {cell}: another process took it over; its result counts"));
    }

    fn failed(&self, index: usize, stage: &str, message: &str, claim: &Claim) -> Result<()> {
        self.store.fail(&self.plan.cells[index].id, stage, message)?;
        let _ = claim;
        self.counts[2].fetch_add(1, Ordering::SeqCst);
        self.runner.say(&format!("failed   {}: {message}", self.describe(index)));
        Ok(())
    }

    /// The folder of this attempt, which takes over what an earlier attempt left: under another name, so
    /// that a process that lost the cell and does not know it yet writes nowhere.
    fn run_folder(&self, folder: &Path, stem: &str, claim: &Claim) -> Result<String> {
        let name = format!("{stem}-{}", claim.number());
        let mut earlier: Vec<(u64, String)> = Vec::new();
        for found in names_in(folder)? {
            if found == stem && stem == RUN {
                earlier.push((u64::MAX, found));
            } else if let Some(number) = found.strip_prefix(stem).and_then(|n| n.strip_prefix('-'))
                && let Ok(number) = number.parse()
            {
                earlier.push((number, found));
            }
        }
        earlier.sort();
        match earlier.pop() {
            Some((_, last)) if last != name => {
                self.runner.wait_for(&folder.join(&last));
                rename(&folder.join(last), &folder.join(&name))?
            }
            Some(_) => {}
            None => make_folder(&folder.join(&name))?,
        }
        Ok(name)
    }
}

/// Whether a name in a cell's folder is that of work under way.
fn is_attempt(name: &str) -> bool {
    let number = |stem| name.strip_prefix(stem)?.strip_prefix('-')?.parse::<u64>().ok();
    [RUN, SCORE].into_iter().any(|stem| number(stem).is_some())
}

/// Removes what a trained cell does not need any more, and what a command wrote that did not know yet
/// that its cell had been taken over.
fn clean(folder: &Path) -> Result<()> {
    for spent in SPENT {
        let _ = fs::remove_dir_all(folder.join(RUN).join(spent));
    }
    for name in names_in(folder)?.iter().filter(|name| is_attempt(name)) {
        let _ = fs::remove_dir_all(folder.join(name));
    }
    Ok(())
}

/// The analysis of a cell that nobody has looked at.
fn unseen() -> Value {
    not_measured("`hydralora analyze` has not looked at this cell")
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    if from == to {
        return Ok(());
    }
    fs::rename(from, to).map_err(|source| Error::io(from, source))
}

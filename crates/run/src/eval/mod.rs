//! Benchmarks: tasks ask, an engine answers for each model, tasks score.
//!
//! A *model* here is the base alone or the base with one adapter on; all of them are asked every
//! record in one pass over the data. Results have the layout of lm-evaluation-harness.

mod compare;
mod engine;
mod error;
mod filter;
mod log;
pub mod metrics;
mod prompt;
mod python_random;
mod results;
pub mod sandbox;
mod task;
pub mod tasks;
mod trie;

pub use compare::{Comparison, Difference, compare};
pub use engine::{Engine, Scored, Scoring, Writing, Written};
pub use error::{Error, Result};
pub use log::Log;
pub use prompt::{Conversation, Prompt, Reader};
pub use results::{Line, Results};
pub use task::{
    Answer, Family, Group, Info, Item, Metric, Opened, Remote, Score, Settings, Task, Work,
};

use crate::sample::Sampling;
use hydralora_model::Decoder;
use hydralora_model::adapter::Adapter;
use rayon::prelude::*;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use task::hex;

/// Records between which the models take turns.
const CHUNK: usize = 64;

/// The base model and how it reads.
#[derive(Clone, Copy)]
pub struct Base<'a> {
    /// The frozen decoder.
    pub decoder: &'a Decoder,
    /// Its tokenizer and templates.
    pub reader: Reader<'a>,
    /// Tokens at which a text ends.
    pub end_ids: &'a [u32],
}

/// A model to score: the base with something on it.
#[derive(Clone)]
pub struct Subject<'a> {
    /// Its name in results.
    pub name: String,
    /// What is on the base.
    pub adapter: &'a dyn Adapter,
    /// For one that does something else in each domain: what scores the tasks of these, which have a
    /// domain's name after an underscore; `adapter` then scores none.
    pub domains: Vec<(String, &'a dyn Adapter)>,
    /// What identifies it, for the results: hashes, paths.
    pub identity: Value,
}

impl Subject<'_> {
    /// The place of what scores a task of that name, 0 for `adapter`.
    fn place_of(&self, task: &str) -> Result<usize> {
        if self.domains.is_empty() {
            return Ok(0);
        }
        let is_of =
            |domain: &str| task.strip_suffix(domain).is_some_and(|rest| rest.ends_with('_'));
        match self.domains.iter().position(|(domain, _)| is_of(domain)) {
            Some(at) => Ok(1 + at),
            None => {
                let names: Vec<&str> = self.domains.iter().map(|(name, _)| name.as_str()).collect();
                let message = format!(
                    "`{}` has an update of its own for every domain, and `{task}` is of none; expected one \
                     of {}",
                    self.name,
                    names.join(", ")
                );
                Err(Error::Option { option: "domain", message })
            }
        }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Records answered, counted once a model.
    pub done: usize,
    /// Of so many.
    pub total: usize,
    /// Of those, taken from the log.
    pub resumed: usize,
    /// The task at hand.
    pub task: &'a str,
}

/// What a task's records scored: per record, per metric.
pub(crate) type Scores = Vec<Vec<Score>>;

/// Every task once: `mmlu,mmlu_law` names some subjects twice.
///
/// # Errors
/// If two tasks over different files have one name, under which only one could be reported.
fn distinct(opened: &[Opened]) -> Result<Vec<&dyn Task>> {
    let mut tasks: Vec<&dyn Task> = Vec::new();
    for task in opened.iter().flat_map(|opened| &opened.tasks).map(Box::as_ref) {
        let info = task.info();
        match tasks.iter().find(|known| known.info().name == info.name) {
            None => tasks.push(task),
            Some(known) if known.info().data == info.data => {}
            Some(known) => {
                let files = |info: &Info| info.data.keys().cloned().collect::<Vec<_>>().join(", ");
                return Err(Error::Option {
                    option: "tasks",
                    message: format!(
                        "`{}` is the name for {} and for {}; give the files other names, or score \
                         them in two runs",
                        info.name,
                        files(known.info()),
                        files(info)
                    ),
                });
            }
        }
    }
    Ok(tasks)
}

/// The groups, those of the same name as one: `loss:a.jsonl,loss:b.jsonl` is one mean over both.
///
/// # Errors
/// If one has the name of a task, under which only one of both could be reported.
fn joined(opened: &[Opened], tasks: &[&dyn Task]) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for group in opened.iter().flat_map(|opened| &opened.groups) {
        if tasks.iter().any(|task| task.info().name == group.name) {
            let message = format!(
                "`{}` is the name of a task and of a mean over others; give their files other names, or \
                 score them in two runs",
                group.name
            );
            return Err(Error::Option { option: "tasks", message });
        }
        let Some(known) = groups.iter_mut().find(|known| known.name == group.name) else {
            groups.push(group.clone());
            continue;
        };
        for member in &group.members {
            if !known.members.contains(member) {
                known.members.push(member.clone());
            }
        }
    }
    Ok(groups)
}

/// [`run_until`] nothing but `progress` ends the run.
///
/// # Errors
/// As [`run_until`].
pub fn run(
    base: Base<'_>,
    subjects: &[Subject<'_>],
    opened: &[Opened],
    settings: &Settings,
    log: Option<&mut Log>,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
) -> Result<Vec<Results>> {
    run_until(&AtomicBool::new(false), base, subjects, opened, settings, log, progress)
}

/// Asks all `subjects` everything in `opened` and gives each one's results. `log` is read for
/// records already answered, and added to. Before every pass `stop` is looked at.
///
/// # Errors
/// [`Error::Interrupted`] once `stop` is set; the first error of a task, a model, the log, or of
/// `progress`, which may end the run.
pub fn run_until(
    stop: &AtomicBool,
    base: Base<'_>,
    subjects: &[Subject<'_>],
    opened: &[Opened],
    settings: &Settings,
    mut log: Option<&mut Log>,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
) -> Result<Vec<Results>> {
    let started = Instant::now();
    let tasks = distinct(opened)?;
    let groups = joined(opened, &tasks)?;
    let total = tasks.iter().map(|task| task.items().len()).sum::<usize>() * subjects.len();
    for (task, subject) in tasks.iter().flat_map(|task| subjects.iter().map(move |s| (task, s))) {
        subject.place_of(&task.info().name)?;
    }
    let engine = |adapter| {
        Engine::new(base.decoder, base.reader.tokenizer, adapter, base.end_ids).until(stop)
    };
    let mut engines: Vec<Vec<Engine<'_>>> = subjects
        .iter()
        .map(|subject| {
            let of_domains = subject.domains.iter().map(|(_, adapter)| *adapter);
            std::iter::once(subject.adapter).chain(of_domains).map(engine).collect()
        })
        .collect();
    let mut results: Vec<Results> =
        subjects.iter().map(|subject| Results::new(subject, base, settings)).collect();
    let (mut done, mut resumed) = (0, 0);
    for task in tasks {
        let name = &task.info().name;
        progress(Progress { done, total, resumed, task: name })?;
        let mut scores: Vec<Scores> = subjects.iter().map(|_| Vec::new()).collect();
        let mut first_prompt = None;
        for items in task.items().chunks(CHUNK) {
            let asked: Vec<Asked<'_>> = items
                .par_iter()
                .map(|item| Asked::new(item, &base.reader, settings.seed))
                .collect::<Result<_>>()?;
            first_prompt.get_or_insert_with(|| asked[0].text.clone());
            for ((subject, engines), scores) in subjects.iter().zip(&mut engines).zip(&mut scores) {
                let engine = &mut engines[subject.place_of(name)?];
                let mut found: Vec<Option<Vec<Score>>> = asked
                    .iter()
                    .map(|asked| {
                        let log = log.as_deref()?;
                        let metrics = &task.info().metrics;
                        log.scores(&subject.name, name, asked.item.id, &asked.hash, metrics)
                    })
                    .collect();
                let open: Vec<usize> = (0..asked.len()).filter(|&i| found[i].is_none()).collect();
                resumed += asked.len() - open.len();
                done += asked.len() - open.len();
                let questions: Vec<&Asked<'_>> = open.iter().map(|&i| &asked[i]).collect();
                ask(engine, &questions, &mut |index, answer| {
                    let asked = questions[index];
                    if let Some(value) = answer.numbers().into_iter().find(|v| !v.is_finite()) {
                        let task = name.clone();
                        return Err(Error::NotFinite { task, record: asked.item.id, value });
                    }
                    let scored = task.score(asked.item, &answer)?;
                    if let Some(log) = log.as_deref_mut() {
                        let metrics = task.info().metrics.iter().cloned();
                        let pairs: Vec<_> = metrics.zip(scored.iter().cloned()).collect();
                        log.add(&subject.name, name, asked.item, &asked.hash, &answer, &pairs)?;
                    }
                    found[open[index]] = Some(scored);
                    done += 1;
                    progress(Progress { done, total, resumed, task: name })?;
                    if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
                })?;
                scores.extend(found.into_iter().flatten());
            }
        }
        for (results, scores) in results.iter_mut().zip(scores) {
            results.add(task, scores, first_prompt.clone().unwrap_or_default());
        }
    }
    if let Some(log) = log {
        log.sync()?;
    }
    for results in &mut results {
        results.finish(&groups, started.elapsed());
    }
    Ok(results)
}

/// A record with everything rendered and encoded.
struct Asked<'a> {
    item: &'a Item,
    text: String,
    hash: String,
    requests: Requests,
}

enum Requests {
    Score(Vec<Scoring>),
    /// Whole texts, and the number of tokens of each.
    Whole(Vec<Scoring>, Vec<usize>),
    Write(Vec<Writing>),
    Loss,
}

impl<'a> Asked<'a> {
    fn new(item: &'a Item, reader: &Reader<'_>, seed: u64) -> Result<Self> {
        let text = reader.render(&item.prompt)?;
        let requests = match &item.work {
            Work::Choices { delimiter, choices } => {
                let delimiter = reader.delimiter(delimiter);
                let mut requests = Vec::new();
                for choice in choices {
                    let continuation = format!("{delimiter}{choice}");
                    let (mut tokens, rest) = reader.encode_pair(&text, &continuation)?;
                    let from = tokens.len();
                    tokens.extend(rest);
                    requests.push(Scoring { tokens, from });
                }
                Requests::Score(requests)
            }
            Work::Whole(texts) => {
                let encoded: Vec<Vec<u32>> =
                    texts.iter().map(|text| reader.encode(text)).collect::<Result<_>>()?;
                let lengths: Vec<usize> = encoded.iter().map(Vec::len).collect();
                // Of texts of one length, the tokens they begin with change no comparison.
                let alike = encoded.iter().map(|tokens| trie::common(&encoded[0], tokens)).min();
                let same = lengths.iter().all(|length| *length == lengths[0]);
                let from = alike.filter(|_| same).unwrap_or(1);
                let request = |tokens: Vec<u32>| {
                    let from = from.clamp(1, tokens.len().saturating_sub(1).max(1));
                    Scoring { tokens, from }
                };
                Requests::Whole(encoded.into_iter().map(request).collect(), lengths)
            }
            Work::Write { stops, max_new_tokens, repeats, temperature, top_p } => {
                let prompt = reader.encode_prompt(&text)?;
                let request = |repeat: usize| Writing {
                    prompt: prompt.clone(),
                    stops: stops.clone(),
                    max_new_tokens: *max_new_tokens,
                    sampling: Sampling {
                        temperature: *temperature,
                        top_p: *top_p,
                        // Every text of every record has a stream of its own.
                        seed: seed ^ ((item.id * repeats + repeat) as u64).rotate_left(20),
                        ..Sampling::default()
                    },
                    // Answers are judged as texts of their own.
                    continues: false,
                };
                Requests::Write((0..*repeats).map(request).collect())
            }
            Work::Loss { .. } => Requests::Loss,
        };
        let hash = hex(format!("{text}\n{:?}\n{}", item.work, item.target).as_bytes());
        Ok(Self { item, text, hash, requests })
    }
}

/// Asks all of `questions`, which are of one kind, and hands each answer on with its index.
fn ask(
    engine: &mut Engine<'_>,
    questions: &[&Asked<'_>],
    each: &mut dyn FnMut(usize, Answer) -> Result<()>,
) -> Result<()> {
    let Some(first) = questions.first() else { return Ok(()) };
    match &first.requests {
        Requests::Score(_) | Requests::Whole(..) => {
            let of = |asked: &Asked<'_>| match &asked.requests {
                Requests::Score(requests) | Requests::Whole(requests, _) => requests.clone(),
                _ => Vec::new(),
            };
            let all: Vec<Scoring> = questions.iter().flat_map(|asked| of(asked)).collect();
            let scored = engine.score(&all)?;
            let mut rest = &scored[..];
            for (index, asked) in questions.iter().enumerate() {
                let (own, others) = rest.split_at(of(asked).len());
                rest = others;
                let answer = match &asked.requests {
                    Requests::Whole(_, lengths) => Answer::Whole(
                        (own.iter().zip(lengths))
                            .map(|(scored, &length)| -scored.log_likelihood / length as f64)
                            .collect(),
                    ),
                    _ => Answer::Choices(own.to_vec()),
                };
                each(index, answer)?;
            }
        }
        Requests::Write(_) => {
            let mut all = Vec::new();
            let mut owners = Vec::new();
            let mut texts: Vec<Vec<Option<String>>> = Vec::new();
            for (index, asked) in questions.iter().enumerate() {
                let Requests::Write(requests) = &asked.requests else { continue };
                owners.extend((0..requests.len()).map(|repeat| (index, repeat)));
                all.extend(requests.iter().cloned());
                texts.push(vec![None; requests.len()]);
            }
            engine.write(&all, &mut |request, written| {
                let (index, repeat) = owners[request];
                texts[index][repeat] = Some(written.text);
                if texts[index].iter().any(Option::is_none) {
                    return Ok(());
                }
                let texts = std::mem::take(&mut texts[index]).into_iter().flatten().collect();
                each(index, Answer::Texts(texts))
            })?;
        }
        Requests::Loss => {
            let sequences: Vec<(&[u32], &[u32])> = questions
                .iter()
                .filter_map(|asked| match &asked.item.work {
                    Work::Loss { tokens, labels } => Some((&tokens[..], &labels[..])),
                    _ => None,
                })
                .collect();
            for (index, (sum, tokens)) in engine.losses(&sequences)?.into_iter().enumerate() {
                each(index, Answer::Loss(sum, tokens))?;
            }
        }
    }
    Ok(())
}

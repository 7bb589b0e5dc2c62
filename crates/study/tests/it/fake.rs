//! A program that pretends: recipes are any mappings, a cell's loss follows from its recipe.

use hydralora_study::host::{Ended, Job, Recipes, Resolved, Runner, Scored};
use hydralora_study::plan::{Plan, plan};
use hydralora_study::result::{DomainLoss, Losses, Measured, Parameters, Validated};
use hydralora_study::spec::Spec;
use hydralora_study::store::{CellFile, RECIPE, Store};
use hydralora_study::work::{WorkOptions, Worked, work};
use hydralora_study::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub(crate) const STUDY: &str = "\
base: {model: {path: m}, method: {name: lora, rank: 4, alpha: 8}, train: {learning_rate: 0.001, seed: 0}}
grid:
  method:
    - {label: lora}
    - {label: hydralora, set: {method: {name: hydralora, rank: 4, alpha: 8}}}
  train.learning_rate: [1.0e-4, 1.0e-3, 1.0e-2]
tune: train.learning_rate
reference: lora
seeds: 3
tasks: [mmlu]
";

pub(crate) struct FakeRecipes;

impl Recipes for FakeRecipes {
    fn set(&self, recipe: &mut Value, key: &str, value: &Value) -> Result<()> {
        let mut place = recipe;
        for part in key.split('.') {
            let map =
                place.as_object_mut().ok_or_else(|| Error::bad(format!("{key}: no mapping")))?;
            place = map.entry(part).or_insert(json!({}));
        }
        *place = value.clone();
        Ok(())
    }

    fn resolve(&self, recipe: &Value, _: &Path) -> Result<Resolved> {
        for key in recipe["train"].as_object().into_iter().flatten().map(|(key, _)| key) {
            if !["learning_rate", "seed", "dropout"].contains(&key.as_str()) {
                return Err(Error::bad(format!("train.{key}: unknown option")));
            }
        }
        Ok(Resolved {
            recipe: recipe.clone(),
            identity: recipe.clone(),
            base: ["m".to_owned(), "fingerprint".to_owned()],
            files: Vec::new(),
        })
    }

    fn parameters(&self, recipe: &Value) -> Result<Option<u64>> {
        let rank = recipe["method"]["rank"].as_u64().unwrap_or(1);
        Ok(Some(if recipe["method"]["name"] == "lora" { 100 * rank } else { 250 * rank + 30 }))
    }

    fn scale(&self, recipe: &Value) -> Option<f64> {
        Some(recipe["method"]["alpha"].as_f64()? / recipe["method"]["rank"].as_f64()?)
    }

    fn check_task(&self, task: &str) -> Result<()> {
        if task == "mmlu" { Ok(()) } else { Err(Error::bad(format!("no task `{task}`"))) }
    }
}

/// Notes what it was asked for.
#[derive(Default)]
pub(crate) struct FakeRunner {
    pub(crate) trained: Mutex<Vec<String>>,
    pub(crate) scored: Mutex<Vec<String>>,
    /// Fails at this rate.
    pub(crate) diverges_at: Option<f64>,
    pub(crate) said: Mutex<Vec<String>>,
}

fn recipe(job: &Job<'_>) -> Value {
    let text = fs::read_to_string(job.folder.join(RECIPE)).unwrap();
    serde_saphyr::from_str(&text).unwrap()
}

/// Least at a rate of 1e-3, lower for hydralora, with noise by seed.
pub(crate) fn loss(recipe: &Value) -> f64 {
    let rate = recipe["train"]["learning_rate"].as_f64().unwrap();
    let seed = recipe["train"]["seed"].as_u64().unwrap();
    let gain = if recipe["method"]["name"] == "hydralora" { 0.2 } else { 0.0 };
    2.0 - gain + 0.3 * (rate.log10() + 3.0).powi(2) + 0.01 * ((seed * 7) % 5) as f64
}

impl Runner for FakeRunner {
    fn train(&self, job: &Job<'_>) -> Result<Ended<Validated>> {
        self.trained.lock().unwrap().push(job.cell.id.clone());
        let recipe = recipe(job);
        if recipe["train"]["learning_rate"].as_f64() == self.diverges_at {
            return Ok(Ended::Failed("the loss is not finite".to_owned()));
        }
        fs::create_dir_all(job.folder.join(job.run).join("adapter")).unwrap();
        fs::create_dir_all(job.folder.join(job.run).join("checkpoints")).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let loss = loss(&recipe);
        let domains = [("a".to_owned(), DomainLoss { loss, label_tokens: 10 })].into();
        Ok(Ended::Done(Validated {
            valid: Some(Losses { loss, label_tokens: 10, domains }),
            ending: "finished".to_owned(),
            steps: 10,
            wall_s: 1.0,
            parameters: Parameters { trainable: 400, ..Parameters::default() },
            ..Validated::default()
        }))
    }

    fn score(&self, job: &Job<'_>, scored: &Scored<'_>) -> Result<Ended<Measured>> {
        self.scored.lock().unwrap().push(job.cell.id.clone());
        let accuracy = 1.0 / loss(&recipe(job));
        let mut tasks = BTreeMap::new();
        for task in scored.tasks {
            tasks.insert(task.clone(), BTreeMap::from([("acc,none".to_owned(), json!(accuracy))]));
        }
        let better = [("mmlu".to_owned(), [("acc".to_owned(), true)].into())].into();
        Ok(Ended::Done(Measured { tasks, higher_is_better: better, ..Measured::default() }))
    }

    fn analyze(&self, job: &Job<'_>) -> Result<Value> {
        assert!(job.folder.join(job.run).join("adapter").is_dir(), "looked at before it is there");
        Ok(json!({"overall": {"effective_rank": 2.5, "head_cosine": null}}))
    }

    fn check(&self, _: &Path, _: &CellFile) -> Result<()> {
        Ok(())
    }

    fn wait_for(&self, _: &Path) {}

    fn say(&self, line: &str) {
        self.said.lock().unwrap().push(line.to_owned());
    }
}

/// Plans the text of a study file into a folder; how many cells are new.
pub(crate) fn planned(text: &str, folder: &Path) -> Result<(Store, Plan, usize)> {
    let spec = Spec::parse(text, "study.yaml", "example", None)?;
    let store = Store::create(folder)?;
    let (plan, new) = plan(&spec, text, Path::new("."), &store, &FakeRecipes)?;
    Ok((store, plan, new))
}

pub(crate) fn options(jobs: usize) -> WorkOptions {
    WorkOptions {
        jobs,
        cell: None,
        shard: None,
        wait: true,
        retry: false,
        stale_after: Duration::from_secs(10),
        machine: Default::default(),
        program: "test".to_owned(),
    }
}

pub(crate) fn worked(
    store: &Store,
    plan: &Plan,
    runner: &FakeRunner,
    options: &WorkOptions,
) -> Result<Worked> {
    work(store, plan, runner, options, &AtomicBool::new(false))
}

//! How a run ends: told to stop in the middle of an evaluation, stopped early, or finished before.

use super::{Case, Model, model};
use hydralora_kernels::DType;
use hydralora_peft::io::Metadata;
use hydralora_train::ranks::Team;
use hydralora_train::{Ending, Event, Outcome, Result, Run, Sink, TrainConfig, finished, fit};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Keeps what happens, and stops the run at a step, before whatever follows it.
struct Watch<'a> {
    seen: Vec<String>,
    stop_at: usize,
    stop: &'a AtomicBool,
}

impl Sink for Watch<'_> {
    fn record(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Step(step) => {
                self.seen.push(format!("step {} {}", step.step, step.loss));
                if step.step == self.stop_at {
                    self.stop.store(true, Ordering::Relaxed);
                }
            }
            Event::Evaluated { step, evaluation, best } => {
                self.seen.push(format!("evaluated {step} {} {best}", evaluation.loss));
            }
            Event::Note(note) => self.seen.push(note.clone()),
            Event::Started { .. } | Event::Saved { .. } => {}
        }
        Ok(())
    }
}

fn case() -> Case {
    super::cases().into_iter().find(|case| case.name() == "hydralora {}").unwrap()
}

fn go(
    model: &Model,
    config: &TrainConfig,
    folder: &Path,
    resume: bool,
    stop_at: usize,
) -> (Outcome, Vec<String>, Option<Outcome>) {
    let mut tuned = model.build(case().options().as_ref());
    let (stop, metadata) = (AtomicBool::new(false), Metadata::default());
    let run = Run {
        decoder: &model.decoder,
        dataset: &model.dataset,
        weights: &[1.0],
        shuffle: true,
        config,
        metadata: &metadata,
        fingerprint: "the same",
        continues: None,
        settings: &Value::Null,
        folder: Some(folder),
        meter: None,
        clusters: None,
        stop: &stop,
        team: &Team::alone(),
    };
    let mut watch = Watch { seen: Vec::new(), stop_at, stop: &stop };
    let outcome = fit(&run, tuned.as_mut(), resume, &mut watch).unwrap();
    let over = finished(&run).unwrap();
    (outcome, watch.seen, over)
}

fn config() -> TrainConfig {
    TrainConfig {
        epochs: 6.0,
        batch_size: 2,
        learning_rate: 5e-3,
        eval_every: 3,
        save_every: 0,
        ..TrainConfig::default()
    }
}

fn adapter(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name).join("adapter_model.safetensors")).unwrap()
}

#[test]
fn a_run_told_to_stop_in_an_evaluation_saves_first_and_makes_up_for_it() {
    let mut model = model(DType::F32);
    model.dataset.valid = model.dataset.train.clone();
    let root = tempfile::tempdir().unwrap();
    let straight = root.path().join("straight");
    let (_, expected, over) = go(&model, &config(), &straight, false, usize::MAX);
    assert_eq!(over.unwrap().ending, Ending::Finished);
    // Evaluations follow the steps 3, 6, 9 and the last one, 12.
    for at in [3, 6, 12, 4] {
        let folder = root.path().join(format!("stopped-{at}"));
        let (outcome, mut seen, over) = go(&model, &config(), &folder, false, at);
        assert_eq!((outcome.ending, outcome.steps), (Ending::Interrupted, at));
        assert!(over.is_none() && !folder.join("adapter").exists());
        let evaluated = seen.iter().any(|line| line.starts_with(&format!("evaluated {at} ")));
        assert!(!evaluated, "it saved after the evaluation: {seen:?}");
        let (outcome, rest, _) = go(&model, &config(), &folder, true, usize::MAX);
        assert_eq!((outcome.ending, outcome.steps), (Ending::Finished, 12));
        seen.extend(rest);
        assert_eq!(seen, expected, "stopped after step {at}");
        for name in ["adapter", "best"] {
            assert!(adapter(&folder, name) == adapter(&straight, name), "{name}, step {at}");
        }
    }
}

#[test]
fn a_finished_run_takes_no_step_and_gives_its_evaluation_again() {
    let mut model = model(DType::F32);
    model.dataset.valid = model.dataset.train.clone();
    let root = tempfile::tempdir().unwrap();
    // Nothing gets better than at first with such a rate, and yet every step changes the adapter.
    let early = TrainConfig { learning_rate: 1e-30, early_stopping_patience: 1, ..config() };
    for (name, config, ending) in
        [("last", config(), Ending::Finished), ("early", early, Ending::EarlyStopped)]
    {
        let folder = root.path().join(name);
        let (first, seen, over) = go(&model, &config, &folder, false, usize::MAX);
        assert_eq!((&first.ending, over.unwrap().steps), (&ending, first.steps), "{seen:?}");
        let (adapter_before, best) = (adapter(&folder, "adapter"), adapter(&folder, "best"));
        fs::remove_dir_all(folder.join("adapter")).unwrap();
        let (again, seen, _) = go(&model, &config, &folder, true, usize::MAX);
        assert!(seen.is_empty(), "{seen:?}");
        assert_eq!((again.ending, again.steps), (ending, first.steps));
        let losses = |outcome: &Outcome| outcome.evaluation.as_ref().unwrap().loss;
        assert_eq!(losses(&Outcome { ending: Ending::Finished, ..again }), losses(&first));
        assert!(adapter(&folder, "adapter") == adapter_before);
        assert!(adapter(&folder, "best") == best);
    }
}

//! Several ranks train as one process does, and none is left behind when one cannot go on.

use super::{Case, Model, cases, model};
use hydralora_data::Example;
use hydralora_kernels::DType;
use hydralora_peft::Tuned;
use hydralora_peft::io::Metadata;
use hydralora_runtime::Pool;
use hydralora_train::ranks::{Alone, Ranks, Team, Threads};
use hydralora_train::{Ending, Error, Event, Outcome, Result, Run, Sink, TrainConfig, fit};
use serde_json::{Value, json};
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// The records of the model's data four times over, each time cut elsewhere, all of them held out too.
fn larger(dtype: DType) -> Model {
    let mut model = model(dtype);
    let mut records: Vec<Example> = Vec::new();
    for round in 0..4_u32 {
        for example in model.dataset.train.iter() {
            let mut example = example.unwrap();
            let len = example.tokens.len() - round as usize;
            example.tokens.truncate(len);
            example.labels.truncate(len);
            example.row += 4 * round;
            records.push(example);
        }
    }
    model.dataset.report.train_examples = records.len();
    model.dataset.train = records.clone().into();
    model.dataset.valid = records.into();
    model
}

fn config() -> TrainConfig {
    TrainConfig {
        epochs: 3.0,
        batch_size: 2,
        grad_accumulation: 4,
        learning_rate: 5e-3,
        warmup_ratio: 0.0,
        eval_every: 2,
        save_every: 2,
        ..TrainConfig::default()
    }
}

/// What a rank saw of a run.
#[derive(Default)]
struct Seen {
    losses: Vec<f64>,
    held_out: Vec<f64>,
    tokens: Vec<usize>,
    entropies: Vec<f64>,
}

/// Notes what happens; sets the flag at a step; breaks down at another.
struct Watch<'a> {
    seen: Seen,
    stop: &'a AtomicBool,
    stop_at: usize,
    fails_at: usize,
}

impl Sink for Watch<'_> {
    fn record(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Step(step) => {
                self.seen.losses.push(step.loss + step.aux_loss);
                self.seen.tokens.push(step.tokens);
                let entropy = step.routers.as_ref().and_then(|routers| routers.gate_entropy);
                self.seen.entropies.extend(entropy);
                if step.step == self.stop_at {
                    self.stop.store(true, Ordering::Relaxed);
                }
                if step.step == self.fails_at {
                    let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
                    return Err(Error::Io(full));
                }
            }
            Event::Evaluated { evaluation, .. } => self.seen.held_out.push(evaluation.loss),
            _ => {}
        }
        Ok(())
    }
}

/// One rank of a run, and what befalls it.
struct One<'a> {
    model: &'a Model,
    config: &'a TrainConfig,
    folder: Option<&'a Path>,
    resume: bool,
    stop_at: usize,
    fails_at: usize,
}

impl<'a> One<'a> {
    fn of(model: &'a Model, config: &'a TrainConfig) -> Self {
        Self { model, config, folder: None, resume: false, stop_at: 0, fails_at: 0 }
    }

    fn train(&self, ranks: &dyn Ranks, tuned: &mut dyn Tuned) -> (Result<Outcome>, Seen) {
        let (stop, metadata) = (AtomicBool::new(false), Metadata::default());
        let team = Team::new(ranks, |_| 3);
        let run = Run {
            decoder: &self.model.decoder,
            dataset: &self.model.dataset,
            weights: &[1.0],
            shuffle: true,
            config: self.config,
            metadata: &metadata,
            fingerprint: "the same",
            continues: None,
            settings: &Value::Null,
            folder: self.folder,
            meter: None,
            clusters: None,
            stop: &stop,
            team: &team,
        };
        let (stop_at, fails_at) = (self.stop_at, self.fails_at);
        let mut watch = Watch { seen: Seen::default(), stop: &stop, stop_at, fails_at };
        let outcome = fit(&run, tuned, self.resume, &mut watch);
        if let Err(error) = &outcome
            && ranks.size() > 1
        {
            assert!(team.has_ended(), "{error}");
        }
        (outcome, watch.seen)
    }
}

/// What each rank of `size` gives, with a thread of its own for its kernels.
fn each<R: Ranks + Send, T: Send>(ranks: Vec<R>, work: impl Fn(&R) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let start = |rank: R| scope.spawn(move || Pool::new(1).enter(|| work(&rank)));
        let running: Vec<_> = ranks.into_iter().map(start).collect();
        running.into_iter().map(|one| one.join().unwrap()).collect()
    })
}

/// The values of an adapter, as bits.
fn bits(tuned: &dyn Tuned) -> Vec<u64> {
    let tensors = tuned.tensors();
    tensors.values().flat_map(hydralora_kernels::Tensor::to_f64).map(f64::to_bits).collect()
}

/// Losses and bits of a run of so many ranks.
fn run(model: &Model, config: &TrainConfig, case: &Case, size: usize) -> Vec<(Seen, Vec<u64>)> {
    let one = One::of(model, config);
    each(Threads::of(size), |ranks| {
        let mut tuned = model.build(case.options().as_ref());
        let (outcome, seen) = one.train(ranks, tuned.as_mut());
        outcome.unwrap_or_else(|error| panic!("{}: {error}", case.name()));
        (seen, bits(&*tuned))
    })
}

/// The largest relative difference of two series of numbers.
fn apart(one: &[f64], other: &[f64]) -> f64 {
    assert_eq!(one.len(), other.len());
    let of = |(a, b): (&f64, &f64)| (a - b).abs() / a.abs().max(1e-9);
    one.iter().zip(other).map(of).fold(0.0, f64::max)
}

fn case(method: &'static str, options: Value) -> Case {
    Case { method, options, start: super::Start::Same, learning_rate: 5e-3 }
}

#[test]
fn every_method_learns_the_same_from_any_number_of_ranks() {
    let model = larger(DType::F64);
    for (number, case) in cases().into_iter().enumerate() {
        // AdaLoRA plans by its steps.
        let steps = if case.method == "adalora" { 10 } else { 3 };
        let config = TrainConfig { max_steps: Some(steps), epochs: 5.0, eval_every: 0, ..config() };
        let expected = run(&model, &config, &case, 1).pop().unwrap().0;
        assert_eq!(expected.losses.len(), steps);
        for size in if number % 3 == 0 { &[2, 4][..] } else { &[2] } {
            let size = *size;
            let found = run(&model, &config, &case, size);
            let (seen, first) = &found[0];
            let off = apart(&seen.losses, &expected.losses)
                .max(apart(&seen.held_out, &expected.held_out));
            assert!(off < 1e-9, "{} on {size}: {off}", case.name());
            assert_eq!(seen.tokens, expected.tokens, "{} on {size}", case.name());
            for (other, bits) in &found[1..] {
                assert!(bits == first, "{} on {size}: ranks differ", case.name());
                assert_eq!(other.losses, seen.losses);
            }
        }
    }
}

#[test]
fn losses_agree_in_single_precision_and_adapters_are_the_same_bits_again() {
    let model = larger(DType::F32);
    // Differences in rounding grow with every step, the faster the larger the steps are: this is five times
    // the default.
    let config = TrainConfig { epochs: 10.0, learning_rate: 1e-3, ..config() };
    for case in [case("hydralora", json!({})), case("lora", json!({"dropout": 0.1}))] {
        let expected = run(&model, &config, &case, 1).pop().unwrap().0;
        assert_eq!(expected.losses.len(), 20);
        for size in [2, 4] {
            let [found, again] = [(); 2].map(|()| run(&model, &config, &case, size));
            let off = apart(&found[0].0.losses, &expected.losses);
            println!("{} on {size}: {off:.1e} apart", case.name());
            assert!(off < 1e-6, "{} on {size}: {off}", case.name());
            assert!(found[0].1 == again[0].1 && found[0].0.losses == again[0].0.losses);
        }
    }
}

#[test]
fn more_ranks_than_records_are_of_no_harm() {
    let model = model(DType::F64);
    let config = TrainConfig { batch_size: 1, grad_accumulation: 1, epochs: 1.0, ..config() };
    let case = case("hydralora", json!({}));
    let expected = run(&model, &config, &case, 1).pop().unwrap().0;
    let found = run(&model, &config, &case, 3);
    assert!(apart(&found[0].0.losses, &expected.losses) < 1e-9);
    assert!(apart(&found[0].0.entropies, &expected.entropies) < 1e-9);
    assert!(!expected.entropies.is_empty());
}

#[test]
fn what_needs_whole_micro_batches_is_named_where_ranks_cannot_have_them() {
    let model = larger(DType::F32);
    let config = TrainConfig { grad_accumulation: 3, ..config() };
    let both = json!({"dropout": 0.1, "router_top_k": 2, "balance_weight": 0.01});
    let one = One::of(&model, &config);
    let found = each(Threads::of(2), |ranks| {
        let mut tuned = model.build(case("hydralora", both.clone()).options().as_ref());
        one.train(ranks, tuned.as_mut()).0.unwrap_err().to_string()
    });
    let expected = "train.grad_accumulation: is 3; expected a multiple of 2, the number of ranks, since \
                    method.dropout and method.balance_weight look at a micro-batch as a whole";
    assert!(found[0].starts_with(expected), "{}", found[0]);
    assert!(found[1].starts_with(&format!("rank 0: {expected}")), "{}", found[1]);
}

/// A rank that is gone, as a process that is killed, when it is to send for the time `at`.
struct Mortal {
    ranks: Threads,
    at: usize,
    sent: Cell<usize>,
}

impl Mortal {
    fn lives(&self) -> Result<()> {
        self.sent.set(self.sent.get() + 1);
        if self.sent.get() > self.at {
            self.ranks.leave();
            return Err(Error::Lost { rank: self.rank() });
        }
        Ok(())
    }
}

impl Ranks for Mortal {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }
    fn size(&self) -> usize {
        self.ranks.size()
    }
    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.lives()?;
        self.ranks.gather(own)
    }
    fn exchange(&self, parts: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        self.lives()?;
        self.ranks.exchange(parts)
    }
}

/// The adapter in a run's folder.
fn written(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("adapter/adapter_model.safetensors")).unwrap()
}

#[test]
fn wherever_a_rank_dies_the_others_name_it_and_another_number_of_ranks_goes_on() {
    let model = larger(DType::F64);
    let config = TrainConfig { epochs: 2.0, save_every: 1, ..config() };
    let case = case("hydralora", json!({}));
    let build = || model.build(case.options().as_ref());
    let (whole, expected) = One::of(&model, &config).train(&Alone, build().as_mut());
    assert_eq!(whole.unwrap().steps, 4);
    let mut died = 0;
    for at in 0.. {
        let folder = tempfile::tempdir().unwrap();
        let one = One { folder: Some(folder.path()), ..One::of(&model, &config) };
        let victim = at % 3;
        let ranks = Threads::of(3).into_iter().map(|ranks| {
            let at = if ranks.rank() == victim { at } else { usize::MAX };
            Mortal { ranks, at, sent: Cell::new(0) }
        });
        let found = each(ranks.collect(), |ranks| one.train(ranks, build().as_mut()));
        if found.iter().all(|(outcome, _)| outcome.is_ok()) {
            break;
        }
        died += 1;
        for (outcome, _) in &found {
            let Err(Error::Lost { rank }) = outcome else { panic!("{at}: {outcome:?}") };
            assert_eq!(*rank, victim, "at {at}");
        }
        if at % 5 > 0 {
            continue;
        }
        let resume = folder.path().join("checkpoints").exists();
        let one = One { resume, ..one };
        let size = 1 + at % 2;
        let found = each(Threads::of(size), |ranks| one.train(ranks, build().as_mut()));
        let losses = &found[0].1.losses;
        assert_eq!(found[0].0.as_ref().unwrap().ending, Ending::Finished);
        let last = &expected.losses[expected.losses.len() - losses.len()..];
        assert!(apart(losses, last) < 1e-9, "after {at} on {size}");
        written(folder.path());
    }
    // Every step has its agreements and sums; beginning, evaluations and checkpoints have theirs.
    assert!(died > 30, "{died}");
}

#[test]
fn one_rank_that_is_told_to_stop_stops_all_at_one_step_which_is_saved() {
    let model = larger(DType::F64);
    let config = TrainConfig { save_every: 0, ..config() };
    let case = case("hydralora", json!({}));
    let build = || model.build(case.options().as_ref());
    let (_, expected) = One::of(&model, &config).train(&Alone, build().as_mut());
    let folder = tempfile::tempdir().unwrap();
    let one = One { folder: Some(folder.path()), ..One::of(&model, &config) };
    let found = each(Threads::of(4), |ranks| {
        let stop_at = if ranks.rank() == 2 { 3 } else { 0 };
        One { stop_at, ..one }.train(ranks, build().as_mut()).0.unwrap()
    });
    assert!(found.iter().all(|of| of.ending == Ending::Interrupted && of.steps == 3));
    assert!(folder.path().join("checkpoints/step-000003").exists());
    let one = One { resume: true, ..one };
    let found = each(Threads::of(2), |ranks| one.train(ranks, build().as_mut()));
    let (outcome, seen) = &found[0];
    assert_eq!(outcome.as_ref().unwrap().ending, Ending::Finished);
    assert!(apart(&seen.losses, &expected.losses[3..]) < 1e-9);
}

#[test]
fn a_full_disk_on_the_rank_that_writes_ends_all_with_its_words() {
    let model = larger(DType::F32);
    let config = config();
    let folder = tempfile::tempdir().unwrap();
    let one = One { folder: Some(folder.path()), ..One::of(&model, &config) };
    let found = each(Threads::of(3), |ranks| {
        let fails_at = if ranks.rank() == 0 { 3 } else { 0 };
        let mut tuned = model.build(case("lora", json!({})).options().as_ref());
        One { fails_at, ..one }.train(ranks, tuned.as_mut()).0.unwrap_err()
    });
    assert!(
        matches!(&found[0], Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull)
    );
    for error in &found[1..] {
        assert!(matches!(error, Error::OfRank { rank: 0, code: 3, .. }), "{error}");
    }
    assert!(folder.path().join("checkpoints/step-000002").exists());
}

#[test]
fn a_record_that_one_rank_cannot_use_ends_all_with_its_name() {
    let (good, mut bad) = (larger(DType::F32), larger(DType::F32));
    let mut records: Vec<Example> = bad.dataset.train.iter().map(|of| of.unwrap()).collect();
    records.iter_mut().for_each(|record| record.tokens[0] = 1_000_000);
    bad.dataset.train = records.into();
    let config = config();
    let found = each(Threads::of(2), |ranks| {
        let model = if ranks.rank() == 1 { &bad } else { &good };
        let mut tuned = good.build(case("lora", json!({})).options().as_ref());
        One::of(model, &config).train(ranks, tuned.as_mut()).0.unwrap_err()
    });
    assert!(matches!(found[1], Error::Model(_)), "{}", found[1]);
    let Error::OfRank { rank: 1, message, .. } = &found[0] else { panic!("{}", found[0]) };
    assert_eq!(*message, found[1].to_string());
}

#[test]
fn ranks_that_begin_from_other_values_are_refused() {
    let model = larger(DType::F32);
    let config = config();
    let found = each(Threads::of(3), |ranks| {
        let options = case("lora", json!({})).options();
        let sites = options.select(&model.decoder.sites()).unwrap();
        let seed = if ranks.rank() == 2 { 8 } else { 7 };
        let mut tuned = options.build(&sites, DType::F32, seed);
        One::of(&model, &config).train(ranks, tuned.as_mut()).0.unwrap_err().to_string()
    });
    let expected =
        "rank 2 has another value of the adapter to begin from than rank 0: step 0 with ";
    assert!(found.iter().all(|error| error.starts_with(expected)), "{}", found[0]);
}

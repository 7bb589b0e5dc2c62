use super::*;
use hydralora_data::{DataConfig, Dataset, LoadOptions, Sampler, SourceConfig};
use std::fs;

fn examples(count: usize) -> Vec<Example> {
    let example = |number: usize| {
        let tokens: Vec<u32> = (0..2 + number % 5).map(|at| (number * 10 + at) as u32).collect();
        Example { labels: tokens.clone(), tokens, domain: 0, source: 0, row: number as u32 }
    };
    (0..count).map(example).collect()
}

/// The order of two epochs over `examples`, three sequences a batch and two batches a step.
fn order(examples: &Examples) -> (Order, usize) {
    let sampler = Sampler::new(examples, &[1.0], 3, None, 7, true).unwrap();
    let steps: Vec<usize> = (0..2).map(|epoch| sampler.epoch(epoch).len().div_ceil(2)).collect();
    let total = steps.iter().sum();
    (Order::new(sampler, 2, steps), total)
}

/// All that a step's data are.
fn words(data: &StepData) -> Vec<String> {
    let batch = |micro: &MicroBatch| {
        let rows: Vec<u32> = micro.examples.iter().map(|example| example.row).collect();
        format!("{} {} {rows:?} {:?}", data.epoch, data.first_batch, micro.batch)
    };
    data.micro_batches.iter().map(batch).collect()
}

#[test]
fn steps_are_the_same_from_wherever_they_are_read_on() {
    let examples: Examples = examples(23).into();
    let (mut direct, total) = order(&examples);
    let expected: Vec<Vec<String>> = (0..total)
        .map(|step| words(&StepData::read(&examples, &mut direct, Share::ALL, step).unwrap()))
        .collect();
    assert!(expected[0] != expected[total / 2] && total == 8);
    for first in [0, 1, 3, total - 1, total] {
        thread::scope(|scope| {
            let order = order(&examples).0;
            let mut loader =
                Loader::start(scope, &examples, order, Share::ALL, first..total).unwrap();
            for expected in &expected[first..] {
                assert_eq!(words(&loader.next().unwrap()), *expected, "from step {first}");
            }
            let beyond = loader.next().err().map(|error| error.to_string());
            assert!(beyond.is_some_and(|error| error.contains("no more steps")));
            loader.end();
        });
    }
}

/// `thread::scope` waits for its threads, so one that went on would show as a test without end.
#[test]
fn the_thread_ends_when_nobody_listens_any_more() {
    let examples: Examples = examples(30).into();
    for taken in 0..3 {
        thread::scope(|scope| {
            let (order, total) = order(&examples);
            let mut loader = Loader::start(scope, &examples, order, Share::ALL, 0..total).unwrap();
            for _ in 0..taken {
                loader.next().unwrap();
            }
            if taken == 1 { drop(loader) } else { loader.end() }
        });
    }
}

#[test]
fn a_panic_of_the_thread_is_an_error_of_the_step() {
    let (all, few): (Examples, Examples) = (examples(30).into(), examples(4).into());
    thread::scope(|scope| {
        let (order, total) = order(&all);
        let mut loader = Loader::start(scope, &few, order, Share::ALL, 0..total).unwrap();
        let error = (0..total).find_map(|_| loader.next().err()).unwrap();
        assert!(matches!(error, Error::Loader { .. }), "{error}");
        assert!(error.to_string().contains("there is no example"), "{error}");
        loader.end();
    });
}

/// Token ids on disk that went away come out as an error of the step that needs them, and no panic.
#[test]
fn what_cannot_be_read_is_an_error_of_the_step() {
    let folder = tempfile::tempdir().unwrap();
    let record = |number: usize| format!("{{\"text\": \"text number {number}\"}}\n");
    fs::write(folder.path().join("a.jsonl"), (0..40).map(record).collect::<String>()).unwrap();
    let config = DataConfig {
        train: vec![SourceConfig::new("a.jsonl")],
        valid_fraction: 0.0,
        streaming: Some(true),
        ..DataConfig::default()
    };
    let options = LoadOptions { cache: folder.path().join("cache"), ..LoadOptions::new(1) };
    let encoder = hydralora_data::ByteEncoder::new(&[]).with_eos("</s>");
    let data = Dataset::load_with(&config, folder.path(), &encoder, None, &options).unwrap();
    assert!(data.report.streamed_bytes > 0);
    for entry in fs::read_dir(&options.cache).unwrap() {
        let path = entry.unwrap().path();
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(8).unwrap();
    }
    let (order, total) = order(&data.train);
    thread::scope(|scope| {
        let mut loader = Loader::start(scope, &data.train, order, Share::ALL, 0..total).unwrap();
        let error = loader.next().err().unwrap();
        assert!(matches!(error, Error::Data(_)), "{error}");
        loader.end();
    });
}

//! Token ids on disk: the same data set as in memory, made once.

use std::path::Path;

use hydralora_data::{
    DataConfig, Dataset, Dedup, Example, LoadOptions, Mixing, Sampler, SourceConfig, valid_batches,
};

use crate::{config, encoder, exchange, folder};

fn lines(tag: &str, count: usize) -> Vec<u8> {
    (0..count)
        .map(|index| exchange(&format!("{tag} question {index}"), &"x".repeat(index % 17 + 1)))
        .collect::<String>()
        .into_bytes()
}

fn options(cache: &Path) -> LoadOptions {
    LoadOptions { cache: cache.to_path_buf(), streaming_above: 1000, ..LoadOptions::new(41) }
}

fn load(config: &DataConfig, folder: &Path) -> Dataset {
    let options = options(&folder.join("cache"));
    Dataset::load_with(config, folder, &encoder(), None, &options).unwrap()
}

fn caches(folder: &Path) -> Vec<String> {
    let entries = fs_err::read_dir(folder.join("cache"));
    let name = |entry: std::io::Result<fs_err::DirEntry>| {
        entry.unwrap().file_name().to_string_lossy().into_owned()
    };
    let mut names: Vec<String> = entries.map(|all| all.map(name).collect()).unwrap_or_default();
    names.sort();
    names
}

#[test]
fn order_and_content_are_those_of_memory() {
    let folder = folder(&[("a.jsonl", &lines("a", 3000)), ("b.jsonl", &lines("b", 500))]);
    let mut memory = config(&["a.jsonl", "b.jsonl"]);
    memory.valid_fraction = 0.1;
    memory.train[1].weight = 2.5;
    memory.streaming = Some(false);
    for change in [
        |_: &mut DataConfig| {},
        |config: &mut DataConfig| config.dedup = Dedup::Near,
        |config: &mut DataConfig| {
            config.mixing = Some(Mixing { temperature: Some(2.0), shares: None });
        },
    ] {
        change(&mut memory);
        let disk = DataConfig { streaming: Some(true), ..memory.clone() };
        let (memory, disk) = (load(&memory, folder.path()), load(&disk, folder.path()));
        assert_eq!(memory.fingerprint(), disk.fingerprint());
        assert_eq!(memory.domains, disk.domains);
        assert_eq!(memory.report.streamed_bytes, 0);
        assert!(disk.report.streamed_bytes > 100_000);
        let sampler = |data: &Dataset| {
            Sampler::new(&data.train, &data.report.weights(), 8, Some(600), 7, true).unwrap()
        };
        let (first, second) = (sampler(&memory), sampler(&disk));
        for epoch in 0..2 {
            let batches = first.epoch(epoch);
            assert_eq!(batches, second.epoch(epoch));
            for batch in batches.iter().take(20) {
                for index in batch {
                    assert_eq!(memory.train.get(index).unwrap(), disk.train.get(index).unwrap());
                }
            }
        }
        let all = |data: &Dataset| -> Vec<Example> {
            data.valid.iter().map(|example| example.unwrap()).collect()
        };
        assert_eq!(all(&memory), all(&disk));
        assert_eq!(valid_batches(&memory.valid, 4, None), valid_batches(&disk.valid, 4, None));
        let mut report = disk.report.clone();
        report.streamed_bytes = 0;
        report.notes.retain(|note| !note.contains("kept on disk"));
        assert_eq!(report, memory.report);
    }
}

#[test]
fn a_cache_is_made_when_files_are_large_and_found_again() {
    let folder = folder(&[("a.jsonl", &lines("a", 400)), ("small.jsonl", &lines("s", 3))]);
    let small = load(&config(&["small.jsonl"]), folder.path());
    assert_eq!(small.report.streamed_bytes, 0);
    assert!(caches(folder.path()).is_empty());
    let mut large = config(&["a.jsonl"]);
    let first = load(&large, folder.path());
    assert!(first.report.streamed_bytes > 0);
    let made = caches(folder.path());
    assert_eq!(made.len(), 1);
    let stamp = |name: &str| {
        fs_err::metadata(folder.path().join("cache").join(name)).unwrap().modified().unwrap()
    };
    let before = stamp(&made[0]);
    // What decides about the split, the order or the repeats does not make it anew.
    large.valid_fraction = 0.3;
    large.train[0].weight = 2.0;
    large.dedup = Dedup::Exact;
    let again = load(&large, folder.path());
    assert_eq!((caches(folder.path()), stamp(&made[0])), (made.clone(), before));
    assert_eq!(again.report.sources[0].records, 400);
    assert_eq!(again.report.sources[0].valid_examples, 120);
    // What decides about tokens does.
    large.max_seq_len = 300;
    load(&large, folder.path());
    assert_eq!(caches(folder.path()).len(), 2);
    large.template = Some("vicuna".to_owned());
    load(&large, folder.path());
    assert_eq!(caches(folder.path()).len(), 3);
    fs_err::write(folder.path().join("a.jsonl"), lines("other", 400)).unwrap();
    let other = load(&large, folder.path());
    assert_eq!(caches(folder.path()).len(), 4);
    assert_ne!(other.fingerprint(), again.fingerprint());
}

#[test]
fn a_cut_cache_is_made_anew_and_a_failed_one_leaves_nothing() {
    let folder = folder(&[("a.jsonl", &lines("a", 400))]);
    let config = config(&["a.jsonl"]);
    let first = load(&config, folder.path());
    let path = folder.path().join("cache").join(&caches(folder.path())[0]);
    let whole = fs_err::read(&path).unwrap();
    fs_err::write(&path, &whole[..whole.len() / 2]).unwrap();
    let again = load(&config, folder.path());
    assert_eq!(fs_err::read(&path).unwrap(), whole);
    assert_eq!(first.fingerprint(), again.fingerprint());
    fs_err::remove_file(&path).unwrap();
    let broken = [lines("b", 400), b"{broken\n".to_vec()].concat();
    fs_err::write(folder.path().join("a.jsonl"), broken).unwrap();
    let options = options(&folder.path().join("cache"));
    let error = Dataset::load_with(&config, folder.path(), &encoder(), None, &options).unwrap_err();
    assert!(error.to_string().contains("a.jsonl: line 401: not valid JSON"), "{error}");
    assert!(caches(folder.path()).is_empty());
}

#[test]
fn without_a_cache_token_ids_are_held_and_the_report_says_why() {
    let folder = folder(&[("a.jsonl", &lines("a", 400)), ("file", b"in the way")]);
    let options = options(&folder.path().join("file/cache"));
    let load = |options: &LoadOptions| {
        Dataset::load_with(&config(&["a.jsonl"]), folder.path(), &encoder(), None, options).unwrap()
    };
    let held = load(&options);
    let notes = held.report.notes.join("\n");
    assert!(notes.contains("file/cache") && notes.contains("cannot be written"), "{notes}");
    assert_eq!(held.fingerprint(), load(&LoadOptions::new(41)).fingerprint());
}

#[cfg(unix)]
#[test]
fn a_cache_is_as_readable_as_any_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = folder(&[("a.jsonl", &lines("a", 400))]);
    let options = options(&folder.path().join("cache"));
    Dataset::load_with(&config(&["a.jsonl"]), folder.path(), &encoder(), None, &options).unwrap();
    let mode = |path: &Path| fs_err::metadata(path).unwrap().permissions().mode();
    let cache = folder.path().join("cache").join(&caches(folder.path())[0]);
    assert_eq!(mode(&cache), mode(&folder.path().join("a.jsonl")));
}

#[test]
fn shares_are_reported_and_drawn() {
    let folder = folder(&[("a.jsonl", &lines("a", 900)), ("b.jsonl", &lines("b", 100))]);
    let mut config = DataConfig {
        train: vec![SourceConfig::new("a.jsonl"), SourceConfig::new("b.jsonl")],
        mixing: Some(Mixing { temperature: Some(2.0), shares: None }),
        ..config(&[])
    };
    let dataset = load(&config, folder.path());
    let shares: Vec<f64> = dataset.report.sources.iter().map(|source| source.share).collect();
    assert!((shares[0] - 0.75).abs() < 1e-12 && (shares[1] - 0.25).abs() < 1e-12, "{shares:?}");
    assert!(dataset.report.to_string().contains("25.0 %"));
    let weights = dataset.report.weights();
    let sampler = Sampler::new(&dataset.train, &weights, 8, None, 7, true).unwrap();
    let mut counts = [0_usize; 2];
    for epoch in 0..4 {
        for index in sampler.epoch(epoch).iter().flatten() {
            counts[dataset.train.get(index).unwrap().source as usize] += 1;
        }
    }
    assert_eq!(counts, [3000, 1000]);
    config.mixing = Some(Mixing { temperature: None, shares: Some(vec![1.0]) });
    let options = options(&folder.path().join("cache"));
    let error = Dataset::load_with(&config, folder.path(), &encoder(), None, &options);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("expected one share for each of the 2 source(s), found 1"), "{error}");
}

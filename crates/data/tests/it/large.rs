//! Files larger than the memory there may be, read in a process of their own whose address space has
//! a limit.
//!
//! The files here are small, and so are the limits: 96 MiB of training data whose token ids alone
//! would take 384 MiB, under 256 MiB. `HYDRALORA_LARGE_FILES=1` adds 5 GiB under 1 GiB.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use hydralora_data::heads::{Corpus, Features, HeadsOptions, Room, find_heads};
use hydralora_data::{DataConfig, Dataset, LoadOptions, Sampler, SourceConfig};

use crate::encoder;

const MIB: usize = 1 << 20;
/// Variables that a test and its child talk through.
const FILE: &str = "HYDRALORA_LARGE_TEST_FILE";
const MODE: &str = "HYDRALORA_LARGE_TEST_MODE";

/// Writes exchanges of about 2 KiB on two subjects, every one with a word of its own, until the file
/// has `bytes`; gives how many.
fn write_exchanges(path: &Path, bytes: usize) -> usize {
    let subjects = [
        ["oven", "flour", "butter", "dough", "sugar", "yeast", "whisk", "recipe"],
        ["court", "clause", "judge", "appeal", "statute", "verdict", "lawyer", "contract"],
    ];
    let mut out = BufWriter::with_capacity(MIB, fs_err::File::create(path).unwrap());
    let (mut written, mut rows, mut state) = (0, 0, 7_u64);
    let mut line = String::new();
    while written < bytes {
        let words = subjects[rows % 2];
        line.clear();
        line.push_str(&format!("{{\"prompt\": \"what of q{rows:x}\", \"response\": \""));
        for _ in 0..300 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            line.push_str(words[(state >> 61) as usize]);
            line.push(' ');
        }
        line.push_str("\"}\n");
        out.write_all(line.as_bytes()).unwrap();
        written += line.len();
        rows += 1;
    }
    out.flush().unwrap();
    rows
}

/// Runs the ignored test `child` of this program with an address space of `limit` MiB.
fn spawn(file: &Path, mode: &str, limit: usize) -> Output {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v \"$0\" && exec \"$@\"", &(limit * 1024).to_string()]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", "large::child", "--ignored", "--nocapture"]);
    command.env(FILE, file).env(MODE, mode);
    // What threads reserve and do not use counts as address space.
    command.env("MALLOC_ARENA_MAX", "1").env("RAYON_NUM_THREADS", "2");
    command.output().unwrap()
}

fn succeed(file: &Path, mode: &str, limit: usize) -> String {
    let output = spawn(file, mode, limit);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let faults = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{mode} under {limit} MiB: {text}\n{faults}");
    let line = text.lines().find_map(|line| line.split_once("RESULT "));
    line.unwrap_or_else(|| panic!("{mode}: {text}")).1.to_owned()
}

/// The process's largest resident memory and address space in MiB.
fn peaks() -> String {
    let status = fs_err::read_to_string("/proc/self/status").unwrap();
    let peak = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() >> 10
    };
    format!("peak {} MiB resident, {} MiB of addresses", peak("VmHWM:"), peak("VmPeak:"))
}

fn train(file: &Path, streaming: bool) -> String {
    let folder = file.parent().unwrap();
    let config = DataConfig {
        train: vec![SourceConfig::new(file)],
        template: Some("plain".to_owned()),
        max_seq_len: 4096,
        streaming: Some(streaming),
        ..DataConfig::default()
    };
    let options = LoadOptions { cache: folder.join("cache"), ..LoadOptions::new(41) };
    let data = Dataset::load_with(&config, folder, &encoder(), None, &options).unwrap();
    let weights = data.report.weights();
    let sampler = Sampler::new(&data.train, &weights, 8, Some(16_384), 7, true).unwrap();
    let batches = sampler.epoch(0);
    let mut tokens = 0;
    // One batch of eight: every part of the file is read from, in random order.
    for index in batches.iter().step_by(8).flatten() {
        tokens += data.train.get(index).unwrap().tokens.len();
    }
    assert!(tokens > 0);
    format!(
        "{} examples, {} batches, {tokens} tokens read back",
        data.train.len() + data.valid.len(),
        batches.len()
    )
}

fn heads(file: &Path, room: Room) -> String {
    let sources = [SourceConfig::new(file)];
    let corpus = Corpus::read_within(&sources, Path::new(""), room).unwrap();
    let features = Features::tfidf(&corpus, 8, 41).unwrap();
    let options = HeadsOptions { k_max: 4, seeds: 5, ..HeadsOptions::default() };
    let report = find_heads(&features, &corpus, &options).unwrap();
    let rows = report.features.rows;
    format!("{rows} rows, {} held, {} heads", corpus.len(), report.num_experts)
}

#[test]
#[ignore = "run by the other tests of this file, in a process with a limit"]
fn child() {
    let Some(file) = std::env::var_os(FILE).map(PathBuf::from) else { return };
    let small = Room { bytes: 16 * MIB, ..Room::default() };
    let found = match std::env::var(MODE).unwrap().as_str() {
        "train" => train(&file, true),
        "train-in-memory" => train(&file, false),
        "heads" => heads(&file, small),
        "heads-default" => heads(&file, Room::default()),
        other => panic!("{other}"),
    };
    println!("RESULT {found}; {}", peaks());
}

#[test]
fn files_larger_than_the_limit_are_trained_on_and_clustered() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("large.jsonl");
    let rows = write_exchanges(&file, 96 * MIB);
    let found = succeed(&file, "train", 256);
    assert!(found.starts_with(&format!("{rows} examples")), "{found}");
    // The limit is one: with all token ids in memory it does not do.
    let output = spawn(&file, "train-in-memory", 256);
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let found = succeed(&file, "heads", 192);
    assert!(found.starts_with(&format!("{rows} rows")), "{found}");
    // A sample was held, and every row counted.
    let held = found.split([' ', ',']).nth(3).and_then(|held| held.parse::<usize>().ok());
    assert!(held.is_some_and(|held| held > 1000 && held * 4 < rows), "{found}");
}

#[test]
fn five_gigabytes_under_one() {
    if std::env::var_os("HYDRALORA_LARGE_FILES").is_none() {
        let why = "HYDRALORA_LARGE_FILES=1 runs it, with 30 GB of disk for some minutes";
        hydralora_testing::skip("large", why);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("large.jsonl");
    let rows = write_exchanges(&file, 5 * 1024 * MIB);
    for (mode, unit) in [("train", "examples"), ("heads-default", "rows")] {
        let started = std::time::Instant::now();
        let found = succeed(&file, mode, 1024);
        println!("{mode}: {found}; {:.0} s", started.elapsed().as_secs_f64());
        assert!(found.starts_with(&format!("{rows} {unit}")), "{found}");
    }
}

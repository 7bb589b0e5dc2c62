//! Ranks under `mpirun`, which `HYDRALORA_MPIRUN` names: Open MPI's or MPICH's.

use crate::support::{Place, Ran, ran};
use serde_json::Value;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than any run here takes; ranks that wait for each other for ever are a failure.
const PATIENCE: Duration = Duration::from_secs(120);

/// Settings of a run: whole micro-batches for each of up to four ranks, a checkpoint at every step.
const SETTINGS: [&str; 6] = [
    "train.grad_accumulation=4",
    "train.batch_size=2",
    "train.save_every=1",
    "train.max_steps=8",
    "train.eval_every=4",
    "train.learning_rate=1e-3",
];

fn launcher() -> String {
    std::env::var("HYDRALORA_MPIRUN").unwrap_or_else(|_| "mpirun".to_owned())
}

fn is_open_mpi() -> bool {
    let told = Command::new(launcher()).arg("--version").output().unwrap();
    String::from_utf8_lossy(&told.stdout).contains("Open MPI")
}

/// The command of several groups of ranks, each with its number, program and arguments.
fn groups(place: &Place, groups: &[(usize, &Path, Vec<String>)]) -> Command {
    let like = place.command(&[]);
    let mut command = Command::new(launcher());
    command.current_dir(like.get_current_dir().unwrap()).stdin(Stdio::null());
    for (name, value) in like.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    if is_open_mpi() {
        // Tests run as root in a container with fewer cores than ranks.
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.args(["--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]);
    }
    for (at, (count, program, arguments)) in groups.iter().enumerate() {
        if at > 0 {
            command.arg(":");
        }
        command.args(["-n", &count.to_string()]).arg(program).args(arguments);
    }
    command
}

fn arguments(recipe: &str, more: &[&str]) -> Vec<String> {
    let mut arguments = vec!["train".to_owned(), recipe.to_owned(), "--threads".into(), "1".into()];
    for setting in SETTINGS {
        arguments.extend(["--set".to_owned(), setting.to_owned()]);
    }
    arguments.extend(more.iter().map(|of| (*of).to_owned()));
    arguments
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hydralora"))
}

/// The command of `size` ranks of a run.
fn ranks(place: &Place, size: usize, more: &[&str]) -> Command {
    groups(place, &[(size, program(), arguments("recipe.yaml", more))])
}

/// Runs a command, which has to end by itself.
fn ended(mut command: Command) -> Ran {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    finished(command.spawn().unwrap())
}

fn finished(child: Child) -> Ran {
    let (sender, receiver) = std::sync::mpsc::channel();
    let id = child.id();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(PATIENCE) {
        Ok(output) => ran(output.unwrap()),
        Err(_) => {
            let group = format!("-{id}");
            let _ = Command::new("kill").args(["-9", "--", &group]).status();
            let output = receiver.recv().unwrap().unwrap();
            panic!("ranks waited for each other: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Runs `size` ranks and insists on success.
fn succeed(place: &Place, size: usize, more: &[&str]) -> Ran {
    let ran = ended(ranks(place, size, more));
    assert_eq!(ran.code, Some(0), "{size} ranks, {more:?}\n{}\n{}", ran.stdout, ran.stderr);
    ran
}

/// The values of one field of a run's metrics, where it stands.
fn metrics(place: &Place, run: &str, field: &str) -> Vec<f64> {
    let text = place.read(&format!("{run}/metrics.jsonl"));
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter_map(|row| row[field].as_f64()).collect()
}

fn adapter(place: &Place, run: &str) -> Vec<u8> {
    fs::read(place.path(run).join("adapter/adapter_model.safetensors")).unwrap()
}

fn assert_close(one: &[f64], other: &[f64]) {
    assert_eq!(one.len(), other.len());
    for (a, b) in one.iter().zip(other) {
        assert!((a - b).abs() <= 1e-6 * b.abs(), "{one:?} {other:?}");
    }
}

/// The processes of a place's ranks, by rank.
fn processes(place: &Place) -> Vec<(usize, u32)> {
    let folder = place.path("").canonicalize().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let of = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let here = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder);
        if !here || !of("cmdline").starts_with(program().as_os_str().as_encoded_bytes()) {
            continue;
        }
        let environment = String::from_utf8_lossy(&of("environ")).into_owned();
        let rank = environment.split('\0').find_map(|entry| {
            let (name, value) = entry.split_once('=')?;
            ["OMPI_COMM_WORLD_RANK", "PMI_RANK"].contains(&name).then(|| value.parse().ok())?
        });
        found.extend(rank.map(|rank| (rank, id)));
    }
    found.sort_unstable();
    found
}

fn signal(id: u32, name: &str) {
    let done = Command::new("kill").args([&format!("-{name}"), &id.to_string()]).status();
    assert!(done.unwrap().success());
}

/// Waits for something to come true while a run goes on.
fn until(child: &mut Child, mut reached: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if reached() {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("it never came");
}

#[test]
fn any_number_of_ranks_gives_the_same_losses_and_one_number_the_same_bits() {
    let place = Place::new();
    for (kind, more) in [("whole", ""), ("records", "method.dropout=0")] {
        let more: Vec<&str> = if more.is_empty() { vec![] } else { vec!["--set", more] };
        let run = |name: &str, size: usize| {
            let name = format!("{name}-{kind}");
            let output = format!("output={name}");
            let mut all = vec!["--set", &output];
            all.extend(&more);
            succeed(&place, size, &all);
            name
        };
        let alone = run("alone", 1);
        for size in [2, 4] {
            let [one, again] = ["one", "again"].map(|of| run(&format!("{of}-{size}"), size));
            for field in ["loss", "valid_loss", "tokens", "label_tokens"] {
                let (found, expected) =
                    (metrics(&place, &one, field), metrics(&place, &alone, field));
                assert!(!expected.is_empty());
                assert_close(&found, &expected);
            }
            assert!(adapter(&place, &one) == adapter(&place, &again), "{kind} {size}");
            assert_eq!(metrics(&place, &one, "loss"), metrics(&place, &again, "loss"));
        }
        let report = place.read(&format!("{}/baseline.json", alone));
        assert!(report.contains("label_tokens"));
    }
}

#[test]
fn only_the_first_rank_talks() {
    let place = Place::new();
    let ran = succeed(&place, 4, &[]);
    assert_eq!(ran.stdout.matches("trained 8 steps").count(), 1, "{}", ran.stdout);
    assert_eq!(ran.stderr.matches("method   hydralora").count(), 1, "{}", ran.stderr);
    let shares = metrics(&place, "run", "loss").len();
    assert_eq!(shares, 8);
    let row: Value =
        serde_json::from_str(place.read("run/metrics.jsonl").lines().next().unwrap()).unwrap();
    assert_eq!(row["ranks"]["ranks"], 4);
    assert!(row["ranks"]["bytes"].as_u64().unwrap() > 0);
}

/// Where a run is, as its folder and words say.
type Reached = fn(&Place) -> bool;

fn has_rows(place: &Place, field: &str, count: usize) -> bool {
    let text = fs::read_to_string(place.path("run/metrics.jsonl")).unwrap_or_default();
    text.lines().filter(|line| line.contains(&format!("\"{field}\""))).count() >= count
}

#[test]
fn wherever_a_rank_is_killed_the_job_ends_naming_it_and_goes_on_with_other_ranks() {
    let phases: [(&str, Reached); 7] = [
        ("opening", |place| processes(place).len() == 3),
        ("the lock", |place| place.path("run/.hydralora.lock").exists()),
        ("the first step", |place| place.path("run/metrics.jsonl").exists()),
        ("a step", |place| has_rows(place, "grad_norm", 3)),
        ("a checkpoint", |place| place.path("run/checkpoints/step-000005").exists()),
        ("an evaluation", |place| has_rows(place, "grad_norm", 10)),
        ("the end", |place| has_rows(place, "grad_norm", 19)),
    ];
    let steps = ["--set", "train.max_steps=20"];
    let expected = {
        let place = Place::new();
        succeed(&place, 1, &steps);
        metrics(&place, "run", "loss")
    };
    let mut struck = 0;
    for (number, (name, reached)) in phases.into_iter().enumerate() {
        let place = Place::new();
        let victim = number % 3;
        let mut command =
            ranks(&place, 3, &[&steps[..], &["--set", "train.grad_accumulation=3"]].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap();
        until(&mut child, || reached(&place));
        let Some((_, id)) = processes(&place).into_iter().find(|(rank, _)| *rank == victim) else {
            finished(child);
            continue;
        };
        signal(id, "KILL");
        let ran = finished(child);
        let said = format!("{}{}", ran.stdout, ran.stderr).to_lowercase();
        if ran.code == Some(0) {
            continue;
        }
        struck += 1;
        let named = [format!("rank {victim} with pid"), format!("rank {victim} pid")];
        assert!(named.iter().any(|named| said.contains(named)), "{name}: {said}");
        assert!(processes(&place).is_empty(), "{name}");
        let going_on = fs::read_dir(place.path("run/checkpoints")).is_ok_and(|all| all.count() > 0);
        let resume = ["--resume"];
        let more = [
            &steps[..],
            &["--set", "train.grad_accumulation=3"],
            if going_on { &resume[..] } else { &[] },
        ]
        .concat();
        // What was dealt to three in whole micro-batches of two one takes as well.
        succeed(&place, 1, &more);
        assert_eq!(metrics(&place, "run", "loss").len(), expected.len(), "{name}");
    }
    assert!(struck >= 4, "{struck}");
}

#[test]
fn a_run_that_was_killed_goes_on_with_another_number_of_ranks_to_the_same_losses() {
    let place = Place::new();
    succeed(&place, 1, &["--set", "output=whole"]);
    let mut command = ranks(&place, 4, &[]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap();
    until(&mut child, || place.path("run/checkpoints/step-000003").exists());
    if let Some((_, id)) = processes(&place).last() {
        signal(*id, "KILL");
    }
    finished(child);
    succeed(&place, 2, &["--resume"]);
    assert_close(&metrics(&place, "run", "loss"), &metrics(&place, "whole", "loss"));
}

#[test]
fn a_signal_to_one_rank_stops_all_after_a_checkpoint() {
    let place = Place::new();
    let long = [
        "--set",
        "train.max_steps=5000",
        "--set",
        "train.epochs=5000",
        "--set",
        "train.save_every=0",
    ];
    for victim in [0, 2] {
        let resume = if victim == 0 { vec![] } else { vec!["--resume"] };
        let mut command = ranks(&place, 4, &[&long[..], &resume].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap();
        let rows =
            fs::read_to_string(place.path("run/metrics.jsonl")).unwrap_or_default().lines().count();
        assert!(until(&mut child, || has_rows(&place, "grad_norm", rows + 3)));
        let all = processes(&place);
        assert_eq!(all.len(), 4);
        signal(all[victim].1, "INT");
        let ran = finished(child);
        assert_eq!(ran.code, Some(130), "{}", ran.stderr);
        let mut saved: Vec<PathBuf> = fs::read_dir(place.path("run/checkpoints"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        saved.sort();
        let last = saved.last().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let step: usize = last.trim_start_matches("step-").parse().unwrap();
        assert_eq!(metrics(&place, "run", "loss").len(), step);
    }
}

#[test]
fn ranks_that_would_train_something_else_are_refused() {
    let place = Place::new();
    let recipe = place.read("recipe.yaml");
    place.write("other.yaml", &recipe.replace("rank: 2", "rank: 4"));
    place.write("bad.yaml", &recipe.replace("rank: 2", "rank: nine"));
    place.write("data.yaml", &recipe.replace("animals.jsonl", "changed.jsonl"));
    place.write("changed.jsonl", &place.read("animals.jsonl").replace("barks", "sings"));
    let copy = place.path("hydralora");
    let mut bytes = fs::read(program()).unwrap();
    bytes.push(0);
    fs::write(&copy, bytes).unwrap();
    fs::set_permissions(&copy, fs::metadata(program()).unwrap().permissions()).unwrap();
    let refused = |program_of: &Path, recipe: &str, expected: &str| {
        let both = [
            (2, program(), arguments("recipe.yaml", &[])),
            (1, program_of, arguments(recipe, &[])),
        ];
        let ran = ended(groups(&place, &both));
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert_eq!(ran.stderr.matches("error: ").count(), 1, "{}", ran.stderr);
        assert!(ran.stderr.contains(&format!("error: rank 2{expected}")), "{}", ran.stderr);
        assert!(!place.path("run").exists());
    };
    refused(program(), "other.yaml", " has another value of the hash of the recipe than rank 0: ");
    refused(program(), "data.yaml", " has another value of the hash of the data than rank 0: ");
    refused(&copy, "recipe.yaml", " has another value of the hash of the program than rank 0: ");
    refused(program(), "bad.yaml", ": ");
    refused(program(), "nowhere.yaml", ": ");
}

#[test]
fn what_cannot_be_dealt_evenly_is_refused() {
    let place = Place::new();
    let ran = ended(ranks(&place, 3, &[]));
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    let expected = "train.grad_accumulation: is 4; expected a multiple of 3, the number of ranks, since \
                    method.dropout";
    assert!(ran.stderr.contains(expected), "{}", ran.stderr);
    assert!(!place.path("run").exists());
}

#[test]
fn a_full_disk_ends_all_ranks_with_the_last_checkpoint_whole() {
    let place = Place::new();
    // A disk of its own in a namespace of its own.
    let mount = "mkdir -p run && mount -t tmpfs -o size=1200k tmpfs run && \"$@\"; code=$?; \
                 cp -r run kept; exit $code";
    let tried =
        Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        hydralora_testing::skip("tmpfs", "no disk can be mounted here");
        return;
    }
    let inner = ranks(
        &place,
        2,
        &[
            "--set",
            "train.max_steps=5000",
            "--set",
            "train.epochs=5000",
            "--set",
            "train.keep_checkpoints=1000",
        ],
    );
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", mount, "sh"]).arg(inner.get_program()).args(inner.get_args());
    command.current_dir(inner.get_current_dir().unwrap()).stdin(Stdio::null());
    for (name, value) in inner.get_envs() {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    let ran = ended(command);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("No space left"), "{}", ran.stderr);
    let kept = fs::read_dir(place.path("kept/checkpoints")).unwrap().count();
    assert!(kept > 0);
}

#[test]
fn processes_that_no_mpi_joined_are_refused() {
    let place = Place::new();
    let ran = place.run_in(&[("OMPI_COMM_WORLD_SIZE", "3")], &["train", "recipe.yaml"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    let expected = "mpirun started 3 processes, and the MPI that this build was linked with sees 1; expected \
                    the mpirun of ";
    assert!(ran.stderr.contains(expected), "{}", ran.stderr);
}

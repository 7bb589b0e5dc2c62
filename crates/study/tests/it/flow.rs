//! Planning, working, choosing, reporting; and what is refused.

use crate::fake::{FakeRunner, STUDY, options, planned, worked};
use hydralora_study::report::analysis::Analysis;
use hydralora_study::report::write;
use hydralora_study::store::{RESULT, Store};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

fn place() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn fails(text: &str, expected: &str) {
    let place = place();
    match planned(text, &place.path().join("s")) {
        Err(error) => {
            assert!(error.is_bad_input(), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        Ok(_) => panic!("{text}\nwas planned; expected: {expected}"),
    }
}

#[test]
fn cells_are_trained_once_and_only_the_chosen_are_scored() {
    let place = place();
    let folder = place.path().join("s");
    let (store, plan, new) = planned(STUDY, &folder).unwrap();
    assert_eq!((plan.cells.len(), new), (18, 18));
    let runner = FakeRunner::default();
    // Several workers with several jobs each, as several processes would be.
    let all: Vec<_> = std::thread::scope(|scope| {
        let (store, plan, runner) = (&store, &plan, &runner);
        let start = |_| scope.spawn(move || worked(store, plan, runner, &options(2)).unwrap());
        let workers: Vec<_> = (0..3).map(start).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert_eq!(all.iter().map(|worked| worked.trained).sum::<usize>(), 18);
    assert_eq!(all.iter().map(|worked| worked.scored).sum::<usize>(), 6);
    let trained = runner.trained.lock().unwrap().clone();
    assert_eq!(trained.iter().collect::<BTreeSet<_>>().len(), trained.len(), "none twice");
    for cell in &plan.cells {
        let result = store.result(&cell.id).unwrap().unwrap();
        let best = cell.labels["train.learning_rate"] == "1e-3";
        assert_eq!(result.test.is_some(), best, "{cell:?}");
        assert!(
            !store.file(&cell.id, "claims").exists()
                && !store.file(&cell.id, "run/checkpoints").exists()
        );
    }
    // Again: nothing is left to do.
    let again = worked(&store, &plan, &FakeRunner::default(), &options(2)).unwrap();
    assert_eq!((again.trained, again.scored), (0, 0));

    // A rate more gives its cells alone, and the old ones stay as they are.
    let before = fs::read(store.file(&plan.cells[0].id, RESULT)).unwrap();
    let (store, more, new) =
        planned(&STUDY.replace("1.0e-2]", "1.0e-2, 3.0e-3]"), &folder).unwrap();
    assert_eq!((more.cells.len(), new), (24, 6));
    let runner = FakeRunner::default();
    assert_eq!(worked(&store, &more, &runner, &options(1)).unwrap().trained, 6);
    assert_eq!(fs::read(store.file(&plan.cells[0].id, RESULT)).unwrap(), before);
    // One less: its cells stay in the folder and are not counted.
    let (store, ..) = planned(&STUDY.replace(", 1.0e-2]", "]"), &folder).unwrap();
    let analysis = Analysis::read(&store).unwrap();
    assert_eq!((analysis.counts().cells, analysis.unplanned), (12, 12));
    // Another revision makes all of them anew.
    let (_, _, new) = planned(&format!("{STUDY}revision: 2\n"), &folder).unwrap();
    assert_eq!(new, 18);
}

/// A worker may die when its cell's result is there and its traces are too.
#[test]
fn what_a_dead_worker_left_in_a_cell_that_is_done_is_cleared_away() {
    let place = place();
    let (store, plan, _) = planned(STUDY, &place.path().join("s")).unwrap();
    worked(&store, &plan, &FakeRunner::default(), &options(2)).unwrap();
    let id = &plan.cells[0].id;
    let result = fs::read(store.file(id, RESULT)).unwrap();
    let traces = ["claims", ".claims-1", "run-3", "score-2", "run/checkpoints"];
    for folder in traces {
        fs::create_dir_all(store.file(id, folder)).unwrap();
        fs::write(store.file(id, folder).join("000001.json"), "{\"host\"").unwrap();
    }
    fs::write(store.file(id, "run-of-mine.txt"), "kept").unwrap();
    let again = worked(&store, &plan, &FakeRunner::default(), &options(2)).unwrap();
    assert_eq!((again.trained, again.scored), (0, 0));
    for folder in traces {
        assert!(!store.file(id, folder).exists(), "{folder}");
    }
    assert!(store.file(id, "run-of-mine.txt").exists());
    assert_eq!(fs::read(store.file(id, RESULT)).unwrap(), result);
}

#[test]
fn a_report_is_written_whole_and_partial() {
    let place = place();
    let (store, plan, _) = planned(STUDY, &place.path().join("s")).unwrap();
    let out = place.path().join("report");
    let report = |expected: &str| {
        let analysis = Analysis::read(&store).unwrap();
        let written = write("Example", &[analysis], &out).unwrap();
        let page = fs::read_to_string(&written.page).unwrap();
        assert!(page.contains(expected), "{page}");
        assert!(!page.contains("NaN"), "{page}");
        written
    };
    report("Nothing can be compared yet");
    let shard = hydralora_study::work::WorkOptions { shard: Some((0, 2)), ..options(1) };
    let runner = FakeRunner { diverges_at: Some(0.01), ..FakeRunner::default() };
    let half = worked(&store, &plan, &runner, &shard).unwrap();
    assert_eq!((half.trained, half.failed), (6, 3));
    report("Partial: 9 of 18 cells are not done");
    worked(&store, &plan, &runner, &options(1)).unwrap();
    let written = report("6 cells failed: the loss is not finite");
    assert!(written.findings[0].contains("1 shows a difference"), "{:?}", written.findings);
    assert!(
        written.findings[1].starts_with("hydralora is better than lora"),
        "{:?}",
        written.findings
    );
    let csv = fs::read_to_string(out.join("results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 19);
    assert!(
        csv.lines().next().unwrap().starts_with("study,cell,kind,status,chosen,seed,axis_method")
    );
    assert!(fs::metadata(out.join("results.parquet")).unwrap().len() > 500);
    assert!(out.join("figures/tuning.svg").is_file() && out.join("figures/tuning.csv").is_file());
    // What failed is tried again when that is wanted, and not before.
    let healed = FakeRunner::default();
    assert_eq!(worked(&store, &plan, &healed, &options(1)).unwrap().trained, 0);
    let retry = hydralora_study::work::WorkOptions { retry: true, ..options(1) };
    assert_eq!(worked(&store, &plan, &healed, &retry).unwrap().trained, 6);
}

#[test]
fn constraints_are_solved_or_say_what_is_possible() {
    let with = |constraint: &str| format!("{STUDY}constraints:\n  - {constraint}\n");
    let place = place();
    let equal = "equal_parameters: {reference: hydralora, solve: method.rank, tolerance: 0.05}";
    let scale = "equal_scale: {reference: hydralora, solve: method.alpha}";
    let text = with(&format!("{equal}\n  - {scale}"));
    let (store, plan, _) = planned(&text, &place.path().join("s")).unwrap();
    let lora = plan.cells.iter().find(|cell| cell.labels["method"] == "lora").unwrap();
    assert_eq!(lora.parameters, Some(1000), "rank 10 comes nearest to 1030");
    let recipe = fs::read_to_string(store.file(&lora.id, "recipe.yaml")).unwrap();
    assert!(recipe.contains("rank: 10") && recipe.contains("alpha: 20"), "{recipe}");

    let tight = equal.replace("0.05", "0.01");
    fails(&with(&tight), "no method.rank gives `lora` 1030 parameters within 1 %");
    fails(&with(&tight), "10 gives 1000, 11 gives 1100");
    let unequal = STUDY
        .replace("{name: hydralora, rank: 4, alpha: 8}", "{name: hydralora, rank: 4, alpha: 16}");
    fails(
        &format!("{unequal}constraints: [{{equal_scale: {{reference: hydralora}}}}]\n"),
        "`lora` scales its update by 2, `hydralora` by 4",
    );
    fails(&with("equal_parameters: {reference: hydra, solve: method.rank}"), "no label `hydra`");
}

#[test]
fn what_makes_no_sense_is_named() {
    fails(
        &STUDY.replace("train.learning_rate: [", "train.learning_rat: ["),
        "tune: there is no axis",
    );
    let unknown = STUDY.replace("train.learning_rate", "train.learning_rat");
    fails(&unknown.replace("tune: train.learning_rat\n", ""), "train.learning_rat: unknown option");
    fails(&STUDY.replace("[mmlu]", "[mmul]"), "no task `mmul`");
    fails(&STUDY.replace("reference: lora", "reference: lara"), "no label `lara`");
    fails(&STUDY.replace("label: lora", "labl: lora"), "grid.method: [0]: ");
    let combine = "    - {label: joined, combine: {of: {method: [lora]}, with: [rm, -rf]}}\n  train.learning_rate";
    fails(
        &STUDY.replacen("  train.learning_rate", combine, 1),
        "begins with `rm`; expected compose or import",
    );
    let combine = combine.replace("[rm, -rf]", "[compose]").replace("[lora]", "[lara]");
    fails(&STUDY.replacen("  train.learning_rate", &combine, 1), "no trained cell has method lara");
}

#[test]
fn adapters_of_others_are_put_together_at_their_best() {
    let combine = "    - {label: joined, combine: {of: {method: [lora, hydralora]}, with: [compose]}}\n    - {label: base, untrained: true}\n  train.learning_rate";
    let text = STUDY.replacen("  train.learning_rate", combine, 1);
    let place = place();
    let (store, plan, _) = planned(&text, &place.path().join("s")).unwrap();
    // Three seeds of the joined one, one of the base.
    assert_eq!(plan.cells.len(), 18 + 3 + 1);
    let runner = FakeRunner::default();
    let done = worked(&store, &plan, &runner, &options(2)).unwrap();
    assert_eq!((done.trained, done.scored), (18, 6 + 3 + 1));
    let analysis = Analysis::read(&store).unwrap();
    let joined = analysis.comparisons.iter().find(|found| found.label == "joined").unwrap();
    assert_eq!(joined.pairs.len(), 3);
}

#[test]
fn changed_cells_other_studies_and_other_versions_are_refused() {
    let place = place();
    let folder = place.path().join("s");
    let (store, plan, _) = planned(STUDY, &folder).unwrap();
    worked(&store, &plan, &FakeRunner::default(), &options(1)).unwrap();
    let id = &plan.cells[3].id;
    let refused = |expected: &str| {
        let error = Analysis::read(&store).err().unwrap();
        assert!(error.is_bad_input() && error.to_string().contains(expected), "{error}");
        assert!(error.to_string().contains(id), "{error}");
    };
    let changed = |name: &str, from: &str, to: &str, expected: &str| {
        let path = store.file(id, name);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        refused(expected);
        fs::write(&path, text).unwrap();
    };
    changed("recipe.yaml", "rank: 4", "rank: 5", "was changed by hand");
    changed("cell.json", "\"rank\": 4", "\"rank\": 5", "was changed by hand");
    changed(RESULT, "\"format\": 1", "\"format\": 0", "is of format 0, which is not read any more");
    changed(RESULT, "\"format\": 1", "\"format\": 2", "of a newer hydralora");
    changed(RESULT, "\"format\": 1,", "", "has no `format`");
    changed(RESULT, "{", "", "result.json");
    let broken = store.file(id, "recipe.yaml");
    fs::write(&broken, "rank: 5").unwrap();
    let error = worked(&store, &plan, &FakeRunner::default(), &options(1)).unwrap_err();
    assert!(error.to_string().contains("was changed by hand"), "{error}");

    let other = planned(&format!("name: other\n{STUDY}"), &folder).err().unwrap();
    assert!(other.to_string().contains("holds the study `example`"), "{other}");
    fs::create_dir(place.path().join("full")).unwrap();
    fs::write(place.path().join("full/x"), "").unwrap();
    let full = planned(STUDY, &place.path().join("full")).err().unwrap();
    assert!(full.to_string().contains("a folder of other files"), "{full}");
    let none = Store::open(Path::new("nowhere")).unwrap_err();
    assert!(none.is_bad_input() && none.to_string().contains("holds no planned study"), "{none}");
}

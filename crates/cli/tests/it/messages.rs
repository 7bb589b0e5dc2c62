//! Messages and results that cannot be written.

use crate::support::{Place, model};
use std::fs::{self, OpenOptions};
use std::process::Stdio;

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_told_ends_no_work() {
    let place = Place::new();
    let train = |output: &'static str| ["train", "recipe.yaml", "--set", output];
    place.succeed(&train("output=told"));
    let mut command = place.command(&train("output=untold"));
    assert!(command.stderr(full()).stdout(Stdio::null()).status().unwrap().success());
    let adapter = |run: &str| fs::read(place.path(run).join("adapter/adapter_model.safetensors"));
    assert_eq!(adapter("told").unwrap(), adapter("untold").unwrap());
    let heads = ["heads", "animals.jsonl", "colours.jsonl", "--seeds", "1", "--out", "heads"];
    assert!(place.command(&heads).stderr(full()).status().unwrap().success());
    // An error that cannot be told is an error all the same.
    let wrong = ["train", "nothing.yaml"];
    assert_eq!(place.command(&wrong).stderr(full()).status().unwrap().code(), Some(2));
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_that_is_lost_is_a_failure_and_a_reader_that_leaves_is_none() {
    let place = Place::new();
    let base = model().display().to_string();
    let generate = ["generate", "--model", &base, "--raw", "--prompt", "Once", "--quiet"];
    let inspect = ["inspect", "--model", &base];
    for arguments in [&generate[..], &inspect] {
        let mut command = place.command(arguments);
        let ended = command.stdout(full()).stderr(Stdio::piped()).spawn().unwrap();
        let ended = ended.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{arguments:?}: {told}");
        assert!(told.contains("cannot write to stdout"), "{told}");
        // As `| true` does.
        let mut child = place.start(arguments);
        drop(child.stdout.take());
        drop(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{arguments:?}");
    }
}

//! What a command may write over. Asked before any work is done, as is whether the place can be
//! written at all.

use crate::failure::bad_input;
use hydralora_files::{Kind, check_replaceable, try_place};
use std::fs;
use std::path::Path;

/// Refuses an `--out` that is or holds one of `inputs`.
fn check_inputs(out: &Path, inputs: &[&Path]) -> anyhow::Result<()> {
    let Ok(real) = out.canonicalize() else { return Ok(()) };
    for input in inputs {
        if input.canonicalize().is_ok_and(|input| input.starts_with(&real)) {
            return Err(bad_input(format!(
                "--out: {} is or holds {}, which is read from; expected another place",
                out.display(),
                input.display()
            )));
        }
    }
    Ok(())
}

/// Refuses an `--out` for a folder that holds one of `inputs` or anything but an older result of
/// this `kind`, or that cannot be written.
pub(crate) fn check_folder(out: &Path, kind: &Kind, inputs: &[&Path]) -> anyhow::Result<()> {
    check_inputs(out, inputs)?;
    check_replaceable(out, kind)
        .map_err(|error| bad_input(format!("--out: {error}; expected another place")))?;
    Ok(try_place(out)?)
}

/// Refuses an `option` for a file that is one of `inputs`, or a file that is not empty and none of
/// `ours`, or that cannot be written. `what` is what ours would be.
pub(crate) fn check_file(
    option: &str,
    out: &Path,
    inputs: &[&Path],
    what: &str,
    ours: impl Fn(&Path) -> bool,
) -> anyhow::Result<()> {
    check_inputs(out, inputs)?;
    let refuse = |why: &str| {
        let out = out.display();
        Err(bad_input(format!("{option}: {out} is {why}; expected another place")))
    };
    match fs::metadata(out) {
        Ok(metadata) if metadata.is_dir() => return refuse("a folder"),
        Ok(metadata) if !metadata.is_file() => return refuse("no file"),
        Ok(metadata) if metadata.len() > 0 && !ours(out) => {
            return refuse(&format!("no {what} that hydralora wrote, and it would be lost"));
        }
        _ => {}
    }
    Ok(try_place(out)?)
}

//! What a command may write over.

use crate::failure::bad_input;
use std::path::Path;

/// Refuses an `--out` that would take the place of something else: a folder that holds one of
/// `inputs`, or a folder with files in it that has no `marker`, the file by which its kind is known.
pub(crate) fn check_out(out: &Path, marker: &str, inputs: &[&Path]) -> anyhow::Result<()> {
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
    let filled = real.is_dir() && std::fs::read_dir(&real)?.next().is_some();
    if filled && !real.join(marker).is_file() {
        return Err(bad_input(format!(
            "--out: {} is a folder of other files (no {marker}), which would be lost; expected another \
             place",
            out.display()
        )));
    }
    Ok(())
}

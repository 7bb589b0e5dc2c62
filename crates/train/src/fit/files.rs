//! What a run writes beside its checkpoints, and what it says of its files.

use super::Run;
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::event::{Event, Sink};
use hydralora_data::{Dataset, Example};
use hydralora_files::set_aside;
use hydralora_peft::{Tuned, io};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What is told once of what did not work out.
#[derive(Default)]
pub(super) struct Notes(BTreeSet<String>);

impl Notes {
    pub(super) fn add(&mut self, note: String, sink: &mut dyn Sink) -> Result<()> {
        match self.0.insert(note.clone()) {
            true => sink.record(&Event::Note(note)),
            false => Ok(()),
        }
    }

    pub(super) fn set_aside(&mut self, kept: Option<PathBuf>, sink: &mut dyn Sink) -> Result<()> {
        let Some(kept) = kept else { return Ok(()) };
        let kept = kept.display();
        self.add(
            format!("files that hydralora did not write were in the way; they are in {kept}"),
            sink,
        )
    }
}

/// Writes an adapter of the run; what somebody put there is kept under another name, since a run of
/// hours does not end for it.
pub(super) fn save_adapter(
    folder: &Path,
    tuned: &dyn Tuned,
    run: &Run<'_>,
    notes: &mut Notes,
    sink: &mut dyn Sink,
) -> Result<()> {
    notes.set_aside(set_aside(folder, &io::TRAINED)?, sink)?;
    Ok(io::save(folder, tuned, run.metadata, &run.decoder.sites())?)
}

/// Weights that a step spoilt are what became of that step, rather than of a file.
pub(super) fn of_step(error: Error, step: usize, run: &Run<'_>) -> Error {
    match error {
        Error::Adapter(hydralora_peft::Error::NonFinite { name, .. }) => {
            Error::NonFiniteWeights { step, name, kept: kept(run.folder) }
        }
        other => other,
    }
}

/// File and record of each example of a batch.
pub(super) fn name_records(dataset: &Dataset, examples: &[Example]) -> String {
    let name = |example: &Example| {
        let source = dataset.report.sources.get(example.source as usize);
        let file = source.map_or_else(String::new, |source| source.path.display().to_string());
        format!("{file} record {}", example.row + 1)
    };
    examples.iter().take(8).map(name).collect::<Vec<_>>().join(", ")
}

/// What is left of a run that stops with an error.
pub(super) fn kept(folder: Option<&Path>) -> String {
    match folder.and_then(|folder| checkpoint::list(folder).ok()).and_then(|mut all| all.pop()) {
        Some((_, path)) => format!("the last checkpoint is {}", path.display()),
        None => "no checkpoint had been written yet".to_owned(),
    }
}

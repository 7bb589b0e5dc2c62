//! Whose fault an error is: 2 for bad input, 1 for a failure.

use hydralora_train::Error as TrainError;

/// An error in what the user gave.
#[derive(Debug)]
pub(crate) struct BadInput(pub(crate) String);

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

/// An [`anyhow::Error`] that is the user's to mend.
pub(crate) fn bad_input(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(BadInput(message.into()))
}

/// The process's exit status for `error`.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if cause.is::<BadInput>() || cause.is::<hydralora_data::Error>() {
            return 2;
        }
        if let Some(error) = cause.downcast_ref::<TrainError>() {
            return code_of_training(error);
        }
        if let Some(error) = cause.downcast_ref::<hydralora_run::eval::Error>() {
            return if error.is_bad_input() { 2 } else { 1 };
        }
        if let Some(error) = cause.downcast_ref::<hydralora_run::engine::Error>() {
            return if matches!(error, hydralora_run::engine::Error::Refused(_)) { 2 } else { 1 };
        }
        if let Some(error) = cause.downcast_ref::<hydralora_study::Error>() {
            return if error.is_bad_input() { 2 } else { 1 };
        }
        if let Some(error) = cause.downcast_ref::<hydralora_model::Error>() {
            return of_model(error);
        }
        if let Some(error) = cause.downcast_ref::<hydralora_peft::Error>() {
            return of_adapter(error);
        }
    }
    1
}

/// The same for an error of training.
pub(crate) fn code_of_training(error: &TrainError) -> u8 {
    match error {
        TrainError::Config { .. } | TrainError::Checkpoint { .. } => 2,
        TrainError::Data(_) | TrainError::Nothing { .. } => 2,
        TrainError::Disagree { .. } | TrainError::Ranks { .. } => 2,
        TrainError::OfRank { code, .. } => *code,
        TrainError::Model(error) => of_model(error),
        TrainError::Adapter(error) => of_adapter(error),
        _ => 1,
    }
}

fn of_model(error: &hydralora_model::Error) -> u8 {
    use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, StorageFull, WriteZero};
    match error {
        hydralora_model::Error::Unavailable { .. }
        | hydralora_model::Error::NonFiniteActivations => 1,
        // What cannot be written is no fault of what was given.
        hydralora_model::Error::Io(error)
            if matches!(
                error.kind(),
                PermissionDenied | ReadOnlyFilesystem | StorageFull | WriteZero
            ) =>
        {
            1
        }
        _ => 2,
    }
}

fn of_adapter(error: &hydralora_peft::Error) -> u8 {
    match error {
        // Reading what is not there is the user's to mend; failing to write is not.
        hydralora_peft::Error::Io(error) => match error.kind() {
            std::io::ErrorKind::NotFound
            | std::io::ErrorKind::AlreadyExists
            | std::io::ErrorKind::InvalidInput => 2,
            _ => 1,
        },
        hydralora_peft::Error::Model(error) => of_model(error),
        hydralora_peft::Error::NonFinite { .. } => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_full_disk_is_no_bad_input() {
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let model = || hydralora_model::Error::Io(full());
        let adapter = hydralora_peft::Error::Model(model());
        assert_eq!(exit_code(&anyhow::Error::new(full())), 1);
        assert_eq!(exit_code(&anyhow::Error::new(model())), 1);
        assert_eq!(exit_code(&anyhow::Error::new(adapter)), 1);
        assert_eq!(exit_code(&anyhow::Error::new(TrainError::Model(model()))), 1);
    }

    #[test]
    fn causes_are_named_once() {
        let message = |error: &anyhow::Error| format!("{error:#}");
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let told = hydralora_peft::Error::Io(std::io::Error::other("a.json: entity not found"));
        assert_eq!(message(&anyhow::Error::new(told)), "a.json: entity not found");
        let opened = anyhow::Error::new(missing()).context("cannot open a.json");
        assert_eq!(message(&opened), "cannot open a.json: entity not found");
        let reported: anyhow::Result<()> = Err(bad_input("rank: expected a number"));
        let within = reported.context("recipe.yaml").map_err(|error| message(&error));
        assert_eq!(within, Err("recipe.yaml: rank: expected a number".to_owned()));
    }
}

//! `hydralora model get`.

use crate::args::{Global, ModelAction, ModelArguments};
use crate::ui::{result, say};
use anyhow::Context;
use hydralora_model::hub;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

pub(crate) fn run(global: &Global, arguments: &ModelArguments) -> anyhow::Result<ExitCode> {
    let ModelAction::Get { name, to } = &arguments.action;
    let found = hub::resolve(name, &mut |line| say(global, line))?;
    let path = match to {
        None => found,
        Some(folder) => {
            let file = found.file_name().unwrap_or_default();
            let target = folder.join(file);
            copy(&found, &target).with_context(|| format!("copying to {}", target.display()))?;
            target
        }
    };
    result(global, &json!({"path": path}), &path.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    if from.is_dir() {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(from)? {
            let path = entry?.path();
            copy(&path, &to.join(path.file_name().unwrap_or_default()))?;
        }
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    // A copy under another name first, so that a half-copied model is never found.
    let part = to.with_extension("part");
    fs::copy(from, &part)?;
    fs::File::open(&part)?.sync_all()?;
    fs::rename(&part, to)
}

//! `hydralora model get` and `hydralora model random`.

use crate::args::{Global, ModelAction, ModelArguments};
use crate::failure::bad_input;
use crate::output::check_file;
use crate::ui::{result, say, thousands};
use anyhow::Context;
use hydralora_files::{NewFile, expect_file, try_place};
use hydralora_kernels::block::BlockFormat;
use hydralora_model::gguf::is_ours;
use hydralora_model::hub;
use hydralora_model::save::random_gguf;
use hydralora_model::shapes::{self, SHAPES, Shape};
use serde_json::json;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::ExitCode;

pub(crate) fn run(global: &Global, arguments: &ModelArguments) -> anyhow::Result<ExitCode> {
    match &arguments.action {
        ModelAction::Get { name, to } => get(global, name, to.as_deref()),
        ModelAction::Random { shape, format, seed, to } => random(global, shape, format, *seed, to),
    }
}

fn random(
    global: &Global,
    shape: &str,
    format: &str,
    seed: u64,
    to: &Path,
) -> anyhow::Result<ExitCode> {
    let config = known_shape(shape)?.config()?;
    let format = match format {
        "f32" => BlockFormat::F32,
        "f16" => BlockFormat::F16,
        "bf16" => BlockFormat::BF16,
        "q8_0" => BlockFormat::Q8_0,
        _ => BlockFormat::Q4_0,
    };
    check_file("--to", to, &[], "GGUF file", is_ours)?;
    random_gguf(&config, format, seed, to)?;
    let parameters = config.num_parameters();
    let text = format!("{}: {} parameters", to.display(), thousands(parameters));
    result(global, &json!({"path": to, "parameters": parameters}), &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The shape of that name.
pub(crate) fn known_shape(name: &str) -> anyhow::Result<&'static Shape> {
    shapes::find(name).ok_or_else(|| {
        let known: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
        bad_input(format!("--shape: `{name}` is unknown; expected one of {}", known.join(", ")))
    })
}

fn get(global: &Global, name: &str, to: Option<&Path>) -> anyhow::Result<ExitCode> {
    if let Some(folder) = to {
        try_place(&folder.join("model"))?;
    }
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
    if to.exists() {
        if same(from, to)? {
            return Ok(());
        }
        let message = "there is another file of that name, which would be lost";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
    }
    let mut file = NewFile::create(to)?;
    io::copy(&mut hydralora_files::open(from)?, &mut file)?;
    file.finish()
}

/// Whether two files hold the same.
fn same(one: &Path, other: &Path) -> io::Result<bool> {
    expect_file(other)?;
    let (one, other) = (hydralora_files::open(one)?, hydralora_files::open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (BufReader::new(one), BufReader::new(other));
    loop {
        let (left, right) = (one.fill_buf()?, other.fill_buf()?);
        let len = left.len().min(right.len());
        if left[..len] != right[..len] {
            return Ok(false);
        }
        if len == 0 {
            return Ok(left.len() == right.len());
        }
        one.consume(len);
        other.consume(len);
    }
}

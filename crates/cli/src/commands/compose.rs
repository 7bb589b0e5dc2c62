//! `hydralora compose`: one LoRA out of several.

use crate::args::Global;
use crate::calibration::{Measured, open_decoder};
use crate::exchange_args::{ComposeArguments, How};
use crate::failure::bad_input;
use crate::output::check_folder;
use crate::plan::{check_base, open_source};
use crate::ui::{result, say};
use hydralora_kernels::DType;
use hydralora_peft::compose::{COMPOSITIONS, ComposeOptions, compose, lorahub};
use hydralora_peft::exchange::{Lora, read_loras};
use hydralora_peft::io;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub(crate) fn run(global: &Global, arguments: &ComposeArguments) -> anyhow::Result<ExitCode> {
    let inputs: Vec<&Path> = arguments.adapters.iter().map(PathBuf::as_path).collect();
    check_folder(&arguments.out, &io::MADE, &inputs)?;
    let loras = read_loras(&arguments.adapters)?;
    if arguments.how == How::Lorahub {
        return search(global, arguments, &loras);
    }
    let name = match arguments.how {
        How::Average => "average",
        How::TaskArithmetic => "task-arithmetic",
        How::Linear => "linear",
        How::Ties => "ties",
        How::DareLinear => "dare-linear",
        How::DareTies => "dare-ties",
        How::Lorahub => "lorahub",
    };
    let Some(way) = COMPOSITIONS.iter().find(|way| way.name() == name) else {
        return Err(bad_input(format!("--how: {name} is not known")));
    };
    if arguments.how == How::Average && arguments.weights.is_some() {
        return Err(bad_input("--weights: average has none; expected --how task-arithmetic"));
    }
    let even = || vec![1.0 / loras.len() as f64; loras.len()];
    let options = ComposeOptions {
        weights: arguments.weights.clone().unwrap_or_else(even),
        density: arguments.density,
        seed: arguments.seed,
        rank: arguments.rank,
    };
    let composed = compose(*way, &loras, &options)?;
    composed.write(&arguments.out)?;
    let text = format!(
        "{}: {name} of {} LoRAs, rank {}, {} layers",
        arguments.out.display(),
        loras.len(),
        composed.rank,
        composed.sites.len()
    );
    let json = json!({
        "out": arguments.out, "how": name, "weights": options.weights, "rank": composed.rank,
        "layers": composed.sites.len(),
    });
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn search(
    global: &Global,
    arguments: &ComposeArguments,
    loras: &[Lora],
) -> anyhow::Result<ExitCode> {
    let (Some(model), Some(file)) = (&arguments.model, &arguments.data) else {
        return Err(bad_input("--how lorahub: needs --model and --data to measure weights on"));
    };
    if arguments.weights.is_some() {
        return Err(bad_input("--weights: lorahub finds them; expected another --how"));
    }
    if arguments.budget == 0 {
        return Err(bad_input("--budget: is 0; expected at least 1"));
    }
    let source = open_source(model)?;
    for lora in loras {
        check_base(&source, &lora.path)?;
    }
    let data = Measured::read(file, &source, loras[0].metadata.as_ref(), false)?;
    let decoder = open_decoder(&source)?;
    let mut evaluation = 0;
    let mut loss = |lora: &Lora| -> anyhow::Result<f64> {
        let live = lora.attach(&source.config, DType::F32)?;
        let loss = data.own_loss(&decoder, live.as_adapter())?;
        evaluation += 1;
        say(global, format!("{evaluation:>4} of {}  loss {loss:.4}", arguments.budget));
        Ok(loss)
    };
    let found = lorahub::search(loras, arguments.budget, &mut loss)?;
    let composed = lorahub::weighted(loras, &found.weights)?;
    composed.write(&arguments.out)?;
    let shown: Vec<String> = loras
        .iter()
        .zip(&found.weights)
        .map(|(lora, weight)| format!("{weight:>8.4}  {}", lora.path.display()))
        .collect();
    let text = format!(
        "{}\n{}: loss {:.4} without, {:.4} with these weights",
        shown.join("\n"),
        arguments.out.display(),
        found.base_loss,
        found.loss
    );
    let json = json!({
        "out": arguments.out, "how": "lorahub", "weights": found.weights,
        "base_loss": found.base_loss, "loss": found.loss, "evaluations": evaluation,
    });
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

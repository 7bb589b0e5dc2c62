//! `hydralora export`: an adapter in another program's form.

use crate::adapter::base_of;
use crate::args::Global;
use crate::calibration::{Cost, Measured, chosen_gates, open_decoder, with_advice};
use crate::domain;
use crate::exchange_args::{ExportArguments, ExportForm};
use crate::grown::add_of_adapter;
use crate::output::{check_file, check_folder};
use crate::plan::{load_on, open_source};
use crate::ui::{result, say, thousands};
use anyhow::Context;
use hydralora_kernels::DType;
use hydralora_model::family::kit::Q_PROJ;
use hydralora_model::gguf::is_ours;
use hydralora_peft::exchange::{Lora, shapes_in, write_gguf, write_official};
use hydralora_peft::io::{self, Metadata};
use hydralora_peft::merge::{Gates, MergePlan};
use serde_json::{Value, json};
use std::process::ExitCode;

/// Notes what a form without `hydralora.json` does not say.
fn note_lost(global: &Global, metadata: Option<&Metadata>) {
    let arguments = metadata.map(|metadata| &metadata.template_arguments);
    if let Some(arguments) = arguments.filter(|arguments| !arguments.is_empty()) {
        let arguments = Value::Object(arguments.clone());
        say(
            global,
            format!(
                "note: it was trained with {arguments} for the chat template, which this form does not \
                 say; give them to the program that runs it"
            ),
        );
    }
}

pub(crate) fn run(global: &Global, arguments: &ExportArguments) -> anyhow::Result<ExitCode> {
    let folder = &arguments.adapter;
    let gguf = arguments.form == ExportForm::LoraGguf;
    if gguf {
        check_file("--out", &arguments.out, &[folder], "GGUF file", is_ours)?;
    } else {
        check_folder(&arguments.out, &io::MADE, &[folder])?;
    }
    let config = io::read_config(folder)?;
    let told = gguf || arguments.gates.calibration.is_some();
    // What is trained beside the layers is placed by the model's dimensions.
    let beside = ["trainable_token_indices", "modules_to_save"];
    let beside = beside.iter().any(|key| config.get(*key).is_some_and(|value| !value.is_null()));
    let needed = told || beside;
    let source = match &arguments.model {
        None if !needed => None,
        given => {
            let option = match (gguf, told) {
                (true, _) => "--as lora-gguf",
                (_, true) => "--calibration",
                _ => "--model",
            };
            let base = base_of(given.as_deref(), folder);
            let base = base.with_context(|| format!("{option}: needs the base model"))?;
            let mut source = open_source(&base)?;
            add_of_adapter(&mut source, Some(folder))?;
            Some(source)
        }
    };
    let (mut loaded, all) = match &source {
        Some(source) => (load_on(source, folder, DType::F32)?, source.config.sites()),
        None => {
            let options = io::read_options(folder)?;
            let shapes = if options.whole_model() {
                Vec::new()
            } else {
                shapes_in(&io::decode(&io::stored_tensors(folder), DType::F32)?)
            };
            if options.whole_model() {
                // Its tensors cannot be placed without the model, but the answer is the same.
                let tuned = options.build(&[], DType::F32, 0);
                let any = hydralora_model::adapter::SiteShape {
                    site: hydralora_model::adapter::Site { layer: 0, linear: &Q_PROJ },
                    in_features: 1,
                    out_features: 1,
                };
                MergePlan::new(tuned.as_ref(), &[any], &Gates::Uniform)?;
            }
            (io::load_unbound(folder, &shapes, DType::F32)?, shapes)
        }
    };
    if arguments.form != ExportForm::HydraloraOfficial {
        domain::choose(loaded.tuned.as_mut(), arguments.gates.domain.as_deref())?;
    }
    let tuned = loaded.tuned.as_ref();
    let base = config.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default();
    if arguments.form == ExportForm::HydraloraOfficial {
        write_official(&arguments.out, tuned, base, &all)?;
        note_lost(global, loaded.metadata.as_ref());
        let json = json!({"out": arguments.out, "as": "hydralora-official"});
        result(global, &json, &format!("{}: written", arguments.out.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut gates = chosen_gates(&arguments.gates);
    let mut measured = None;
    if let (Some(file), Some(source)) = (&arguments.gates.calibration, &source) {
        MergePlan::new(tuned, &all, &Gates::Uniform)?;
        let data = Measured::read(file, source, loaded.metadata.as_ref(), true)?;
        let decoder = open_decoder(source)?;
        gates = data.gates(&decoder, tuned)?;
        let adapted = data.held_out_loss(&decoder, tuned.as_adapter())?;
        measured = Some((data, decoder, adapted));
    }
    let mut lora = Lora::from_tuned(tuned, &all, &gates, arguments.compact)
        .map_err(|error| with_advice(error, tuned, &all))?;
    lora.base_model = base.to_owned();
    lora.metadata = loaded.metadata.clone();
    if !told && let Some(names) = config.get("target_modules") {
        lora.target_modules = names.clone();
    }
    if gguf {
        note_lost(global, loaded.metadata.as_ref());
    }
    match (&source, gguf) {
        (Some(source), true) => write_gguf(&lora, &source.config, &arguments.out)?,
        _ => lora.write(&arguments.out)?,
    }
    let mut text = format!(
        "{}: LoRA of rank {}, scale {}, {} layers",
        arguments.out.display(),
        lora.rank,
        lora.scale(),
        lora.sites.len()
    );
    let mut json = json!({
        "out": arguments.out, "as": if gguf { "lora-gguf" } else { "lora" },
        "rank": lora.rank, "alpha": lora.alpha, "layers": lora.sites.len(),
    });
    if let (Some((data, decoder, adapted)), Some(source)) = (measured, &source) {
        let live = lora.attach(&source.config, DType::F32)?;
        let fixed = data.held_out_loss(&decoder, live.as_adapter())?;
        let cost = Cost { adapted, fixed };
        if matches!(gates, Gates::Fixed(_)) {
            text.push_str(&format!(
                "\ngates          mean over {} tokens",
                thousands(data.tokens())
            ));
        }
        text.push_str(&format!("\n{}", cost.line("exported")));
        json["held_out_loss"] = cost.json();
    }
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

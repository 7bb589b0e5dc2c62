//! `hydralora merge`: an adapter folded into its base model.

use crate::adapter::base_of;
use crate::args::Global;
use crate::calibration::{Cost, Measured, chosen_gates, open_decoder, with_advice};
use crate::domain;
use crate::exchange_args::{MergeArguments, ModelFormat, NumberFormat};
use crate::failure::bad_input;
use crate::grown::add_of_adapter;
use crate::in_force::{InForce, idle_note, trained_template};
use crate::output::{check_file, check_folder};
use crate::plan::{load_on, open_source};
use crate::ui::{result, say, thousands};
use hydralora_kernels::DType;
use hydralora_kernels::block::BlockFormat;
use hydralora_model::adapter::NoAdapter;
use hydralora_model::save::{FOLDER, Saving};
use hydralora_model::{ModelSource, gguf};
use hydralora_peft::merge::{Gates, MergePlan};
use serde_json::json;
use std::process::ExitCode;

pub(crate) fn run(global: &Global, arguments: &MergeArguments) -> anyhow::Result<ExitCode> {
    let by_name = arguments.out.extension().is_some_and(|extension| extension == "gguf");
    let default = if by_name { ModelFormat::Gguf } else { ModelFormat::Hf };
    let format = arguments.format.unwrap_or(default);
    let numbers = match arguments.dtype {
        NumberFormat::F32 => BlockFormat::F32,
        NumberFormat::F16 => BlockFormat::F16,
        NumberFormat::Bf16 => BlockFormat::BF16,
        NumberFormat::Q8 if format == ModelFormat::Hf => {
            return Err(bad_input(
                "--dtype: q8_0 is a format of GGUF files; expected f32, f16 or bf16, or --format gguf",
            ));
        }
        NumberFormat::Q8 => BlockFormat::Q8_0,
    };
    let mut source = open_source(&base_of(arguments.model.as_deref(), &arguments.adapter)?)?;
    add_of_adapter(&mut source, Some(&arguments.adapter))?;
    let inputs = [source.weights.path(), &arguments.adapter];
    match format {
        ModelFormat::Hf => check_folder(&arguments.out, &FOLDER, &inputs)?,
        ModelFormat::Gguf => {
            check_file("--out", &arguments.out, &inputs, "GGUF file", gguf::is_ours)?;
        }
    }
    let mut loaded = load_on(&source, &arguments.adapter, DType::F32)?;
    domain::choose(loaded.tuned.as_mut(), arguments.gates.domain.as_deref())?;
    let (tuned, metadata) = (loaded.tuned.as_ref(), loaded.metadata.as_ref());
    let all = source.config.sites();
    let mut gates = chosen_gates(&arguments.gates);
    let mut measured = None;
    if let Some(file) = &arguments.gates.calibration {
        // A method that no gate makes foldable is refused before anything is measured.
        MergePlan::new(tuned, &all, &Gates::Uniform)?;
        let data = Measured::read(file, &source, metadata, true)?;
        let decoder = open_decoder(&source)?;
        gates = data.gates(&decoder, tuned)?;
        let adapted = data.held_out_loss(&decoder, tuned.as_adapter())?;
        measured = Some((data, adapted));
    }
    let in_force = InForce::of(&source, metadata, false)?;
    for note in in_force.notes.iter().chain(&idle_note(tuned)) {
        say(global, note);
    }
    let plan =
        MergePlan::new(tuned, &all, &gates).map_err(|error| with_advice(error, tuned, &all))?;
    // Other programs know of no arguments, so they become a part of the template.
    let template = trained_template(metadata)?.map(|template| template.source_with_arguments());
    let name = format!("{} merged", source.identity.name);
    let saving = Saving {
        source: &source,
        format: numbers,
        chat_template: template.as_deref(),
        end_ids: &in_force.end_ids,
        name: &name,
        edit: &|name, tensor| plan.edit(name, tensor),
        untie: plan.unties(),
    };
    match format {
        ModelFormat::Hf => saving.folder(&arguments.out)?,
        ModelFormat::Gguf => saving.gguf(&arguments.out)?,
    }
    let changed = plan.sites().len();
    let mut text = format!(
        "{}: {changed} layers changed, {numbers}, {}",
        arguments.out.display(),
        if format == ModelFormat::Hf { "Hugging Face folder" } else { "GGUF file" }
    );
    let mut json = json!({
        "out": arguments.out, "layers": changed, "dtype": numbers.to_string(),
        "format": if format == ModelFormat::Hf { "hf" } else { "gguf" },
    });
    if let Some((data, adapted)) = measured {
        say(global, "measuring the merged model");
        // What was written is measured, with its rounding.
        let written = ModelSource::open(&arguments.out)?;
        let fixed = data.held_out_loss(&open_decoder(&written)?, &NoAdapter)?;
        let cost = Cost { adapted, fixed };
        if let Gates::Fixed(found) = &gates {
            let tokens = thousands(data.tokens());
            text.push_str(&format!("\ngates          mean over {tokens} tokens"));
            let by_name: serde_json::Map<_, _> =
                found.iter().map(|(site, gates)| (site.to_string(), json!(gates))).collect();
            json["gates"] = by_name.into();
        }
        text.push_str(&format!("\n{}", cost.line("merged")));
        json["held_out_loss"] = cost.json();
    }
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

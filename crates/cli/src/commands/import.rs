//! `hydralora import`: adapters made of others.

use crate::args::Global;
use crate::exchange_args::{ImportArguments, ImportForm};
use crate::failure::bad_input;
use crate::in_force::InForce;
use crate::output::check_folder;
use crate::plan::{Parameters, load_on, open_source};
use crate::ui::{result, thousands};
use hydralora_kernels::DType;
use hydralora_model::ModelSource;
use hydralora_peft::Tuned;
use hydralora_peft::exchange::{Lora, hydralora_from, read_loras, shapes_in};
use hydralora_peft::io::{self, Metadata};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// An adapter and what else its folder says.
struct Imported {
    tuned: Box<dyn Tuned>,
    target_modules: Value,
    base_model: String,
    metadata: Option<Metadata>,
}

pub(crate) fn run(global: &Global, arguments: &ImportArguments) -> anyhow::Result<ExitCode> {
    let inputs: Vec<&Path> = arguments.adapters.iter().map(PathBuf::as_path).collect();
    check_folder(&arguments.out, &io::MADE, &inputs)?;
    let source = arguments.model.as_deref().map(open_source).transpose()?;
    let imported = match arguments.form {
        ImportForm::Lora => from_loras(arguments)?,
        ImportForm::HydraloraOfficial => from_official(arguments, source.as_ref())?,
    };
    let Imported { tuned, target_modules, base_model, metadata } = imported;
    let (all, names, base_model, metadata) = match &source {
        None => (shapes_in(&tuned.tensors()), Some(target_modules), base_model, metadata),
        Some(source) => {
            let all = source.config.sites();
            for shape in shapes_in(&tuned.tensors()) {
                if !all.contains(&shape) {
                    return Err(bad_input(format!(
                        "{} [{}, {}] is no layer of the model `{}`",
                        shape.site, shape.out_features, shape.in_features, source.identity.name
                    )));
                }
            }
            let ends = InForce::of(source, metadata.as_ref(), false)?.end_ids;
            let ends = ends.iter();
            let of_source = Metadata {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                base_model: source.identity.reference.clone(),
                base_fingerprint: source.identity.fingerprint.clone(),
                chat_template: metadata.as_ref().and_then(|m| m.chat_template.clone()),
                template_arguments: metadata
                    .as_ref()
                    .map_or_else(Default::default, |m| m.template_arguments.clone()),
                end_tokens: ends.filter_map(|&id| source.tokenizer.id_to_token(id)).collect(),
                ..Metadata::default()
            };
            if let Some(metadata) = &metadata {
                let identity = &source.identity;
                let folder = &arguments.adapters[0];
                io::check_base(folder, metadata, &identity.reference, &identity.fingerprint)?;
            }
            (all, None, source.identity.reference.clone(), Some(of_source))
        }
    };
    let out = &arguments.out;
    io::save_unbound(out, tuned.as_ref(), &all, names, &base_model, metadata.as_ref())?;
    let method = io::read_config(out)?.get("peft_type").cloned().unwrap_or_default();
    let layers = tuned.sites().len();
    let counted = Parameters::of(0, tuned.as_ref());
    let text = format!(
        "{}: {}, {layers} layers, A {}, B {}, router {}",
        out.display(),
        method.as_str().unwrap_or_default(),
        thousands(counted.a),
        thousands(counted.b),
        thousands(counted.router)
    );
    let json = json!({"out": out, "peft_type": method, "layers": layers, "parameters": {
        "a": counted.a, "b": counted.b, "router": counted.router,
    }});
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn from_loras(arguments: &ImportArguments) -> anyhow::Result<Imported> {
    let loras = read_loras(&arguments.adapters)?;
    let tuned = hydralora_from(&loras, arguments.seed)?;
    let first = &loras[0];
    /// Whether all adapters that say something say the same.
    fn agree<T: PartialEq>(loras: &[Lora], pick: fn(&Metadata) -> &T) -> bool {
        let mut found = loras.iter().filter_map(|lora| lora.metadata.as_ref()).map(pick);
        let first = found.next();
        found.all(|other| Some(other) == first)
    }
    let mut metadata = first.metadata.clone();
    let agreed = agree(&loras, |m| &m.chat_template) && agree(&loras, |m| &m.template_arguments);
    if let Some(metadata) = metadata.as_mut().filter(|_| !agreed) {
        metadata.chat_template = None;
        metadata.template_arguments.clear();
    }
    Ok(Imported {
        tuned,
        target_modules: first.target_modules.clone(),
        base_model: first.base_model.clone(),
        metadata,
    })
}

fn from_official(
    arguments: &ImportArguments,
    source: Option<&ModelSource>,
) -> anyhow::Result<Imported> {
    let [folder] = arguments.adapters.as_slice() else {
        let count = arguments.adapters.len();
        return Err(bad_input(format!("--from hydralora-official: {count} folders; expected one")));
    };
    let config = io::read_config(folder)?;
    if !config.contains_key("lora_nums") {
        return Err(bad_input(format!(
            "{}: lora_nums is missing; expected a checkpoint of HydraLoRA's or LoRAMoE's published code",
            folder.join(io::CONFIG_FILE).display()
        )));
    }
    let loaded = match source {
        Some(source) => load_on(source, folder, DType::F32)?,
        None => {
            let tensors = io::decode(&io::stored_tensors(folder), DType::F32)?;
            io::load_unbound(folder, &shapes_in(&tensors), DType::F32)?
        }
    };
    let base = config.get("base_model_name_or_path").and_then(Value::as_str);
    Ok(Imported {
        tuned: loaded.tuned,
        target_modules: config.get("target_modules").cloned().unwrap_or(Value::Null),
        base_model: base.unwrap_or_default().to_owned(),
        metadata: loaded.metadata,
    })
}

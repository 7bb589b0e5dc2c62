//! `hydralora inspect`: parameters of a model, of an adapter, of the paper's table; logits.

use super::table::{llama2_7b, paper_table};
use crate::args::{Dimensions, Global, InspectArguments};
use crate::device::placed;
use crate::domain;
use crate::failure::bad_input;
use crate::grown::add_of_adapter;
use crate::in_force::idle_note;
use crate::plan::{Parameters, load_on, open_source};
use crate::ui::{megabytes, result, thousands};
use hydralora_kernels::{DType, no_grad};
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_model::{Decoder, Held, ModelSource, Packed};
use hydralora_peft::{TensorMap, io};
use hydralora_train::{HeadSummary, Routing, router_movement};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

pub(crate) fn run(global: &Global, arguments: &InspectArguments) -> anyhow::Result<ExitCode> {
    let mut json = Map::new();
    let mut text = Vec::new();
    let opened = match &arguments.model {
        Some(spec) => {
            let mut source = open_source(spec)?;
            add_of_adapter(&mut source, arguments.adapter.as_deref())?;
            // Only logits are computed; to be counted, weights stay as they are in the file.
            let held = if arguments.logits.is_some() { Held::Wide } else { Held::Stored };
            let (config, weights) = (&source.config, &source.weights);
            let decoder = placed(Decoder::load_held(config, weights, DType::F32, held)?);
            let (value, shown) = model(&source, &decoder);
            json.insert("model".to_owned(), value);
            text.push(shown);
            Some((source, decoder))
        }
        None => None,
    };
    if let Some(folder) = &arguments.adapter {
        let (value, shown) = adapter(folder, opened.as_ref())?;
        json.insert("adapter".to_owned(), value);
        text.push(shown);
    }
    if arguments.table {
        let (value, shown) = match &opened {
            Some((source, _)) => paper_table(&source.config, &source.identity.name)?,
            None => {
                let Dimensions::Llama2Of7B = arguments.dims.unwrap_or(Dimensions::Llama2Of7B);
                paper_table(&llama2_7b(), "LLaMA2-7B")?
            }
        };
        json.insert("table".to_owned(), value);
        text.push(shown);
    }
    if let (Some(prompt), Some((source, decoder))) = (&arguments.logits, &opened) {
        let (value, shown) = logits(prompt, source, decoder, arguments)?;
        json.insert("logits".to_owned(), value);
        text.push(shown);
    }
    if text.is_empty() {
        return Err(bad_input("nothing to inspect; give --model, --adapter or --table"));
    }
    result(global, &Value::Object(json), &text.join("\n\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// The logits after the last token of `prompt`.
fn logits(
    prompt: &str,
    source: &ModelSource,
    decoder: &Decoder,
    arguments: &InspectArguments,
) -> anyhow::Result<(Value, String)> {
    let tokenizer = &source.tokenizer;
    let mut tokens = tokenizer.encode(prompt)?;
    if let Some((bos, _)) = tokenizer.bos().filter(|_| tokenizer.add_bos()) {
        tokens.insert(0, bos);
    }
    let load = |folder: &Path| load_on(source, folder, decoder.dtype());
    let mut loaded = arguments.adapter.as_deref().map(load).transpose()?;
    if let Some(loaded) = &mut loaded {
        domain::choose(loaded.tuned.as_mut(), arguments.domain.as_deref())?;
    }
    let adapter: &dyn Adapter = loaded.as_ref().map_or(&NoAdapter, |l| l.tuned.as_adapter());
    let _guard = no_grad();
    let packed = Packed { tokens: &tokens, offsets: &[0, tokens.len()] };
    let hidden = decoder.hidden(packed, adapter, &Pass::inference())?;
    let values = decoder.logits_with(adapter, hidden.value(), &[tokens.len() - 1]).to_f64();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    let mut shown = vec![format!("likeliest tokens after {} tokens", tokens.len())];
    for &id in order.iter().take(5) {
        let token = tokenizer.id_to_token(id as u32).unwrap_or_default();
        shown.push(format!("{:>10.4}  {token:?}", values[id]));
    }
    Ok((json!({"tokens": tokens, "last": values}), shown.join("\n")))
}

fn model(source: &ModelSource, decoder: &Decoder) -> (Value, String) {
    let config = &source.config;
    let rows = [
        ("model", source.identity.name.clone()),
        ("family", config.model_type.clone()),
        ("parameters", thousands(decoder.num_parameters())),
        ("layers", config.num_hidden_layers.to_string()),
        ("hidden_size", config.hidden_size.to_string()),
        ("intermediate_size", config.intermediate_size.to_string()),
        (
            "attention heads",
            format!(
                "{} ({} for keys and values)",
                config.num_attention_heads, config.num_key_value_heads
            ),
        ),
        ("vocabulary", thousands(config.vocab_size)),
        ("context", thousands(config.max_position_embeddings)),
        ("on disk", megabytes(source.weights.stored_bytes())),
        ("in memory (f32)", megabytes(4 * decoder.num_parameters())),
        ("fingerprint", source.identity.fingerprint.clone()),
    ];
    let shown: Vec<String> =
        rows.iter().map(|(name, value)| format!("{name:<18} {value}")).collect();
    let value = json!({
        "name": source.identity.name, "fingerprint": source.identity.fingerprint,
        "model_type": config.model_type, "parameters": decoder.num_parameters(),
        "num_hidden_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
    });
    (value, shown.join("\n"))
}

/// An adapter's parameters. Without its base model they are counted from the file alone.
fn adapter(
    folder: &Path,
    opened: Option<&(ModelSource, Decoder)>,
) -> anyhow::Result<(Value, String)> {
    let options = io::read_options(folder)?;
    let recipe = Value::Object(options.to_recipe());
    let metadata = io::read_metadata(folder)?;
    let named = metadata.as_ref().map(|m| m.base_model.as_str()).filter(|name| !name.is_empty());
    let base = named.unwrap_or("not recorded");
    let mut text = vec![
        format!("adapter            {}", folder.display()),
        format!("trained on         {base}"),
        format!("options            {recipe}"),
    ];
    let mut value = json!({"options": recipe, "base_model": base});
    match opened {
        Some((source, decoder)) => {
            let loaded = load_on(source, folder, decoder.dtype())?;
            let parameters = Parameters::of(decoder.num_parameters(), loaded.tuned.as_ref());
            let sites = loaded.tuned.sites();
            let kinds: BTreeSet<&str> = sites.iter().map(|site| site.linear.module()).collect();
            let kinds: Vec<&str> = kinds.into_iter().collect();
            text.push(format!("parameters         {parameters}"));
            text.push(format!("layers             {} ({})", sites.len(), kinds.join(", ")));
            text.extend(idle_note(loaded.tuned.as_ref()));
            value["parameters"] = serde_json::to_value(&parameters)?;
        }
        None => {
            let tensors = io::decode(&io::stored_tensors(folder), DType::F32)?;
            let of = |part: &str| -> usize {
                let of_part = tensors.iter().filter(|(name, _)| name.contains(part));
                of_part.map(|(_, tensor)| tensor.len()).sum()
            };
            let (a, b, router) = (of(".lora_A"), of(".lora_B"), of(".lora_route"));
            text.push(format!(
                "parameters         A {}, B {}, router {}",
                thousands(a),
                thousands(b),
                thousands(router)
            ));
            value["parameters"] = json!({"a": a, "b": b, "router": router});
        }
    }
    let tensors = io::decode(&io::stored_tensors(folder), DType::F32)?;
    text.extend(heads_and_routers(folder, tensors, &mut value)?);
    Ok((value, text.join("\n")))
}

/// What an adapter's heads have in common, from its `tensors`, and what its routers do, from what its run
/// noted; for people and into `value`.
fn heads_and_routers(
    folder: &Path,
    tensors: TensorMap,
    value: &mut Value,
) -> anyhow::Result<Vec<String>> {
    let mut text = Vec::new();
    let run = folder.parent();
    let read = |run: &Path| hydralora_files::bytes_of(&run.join("routing.json")).ok();
    let routing = run.and_then(read);
    let routing = routing.and_then(|bytes| serde_json::from_slice::<Routing>(&bytes).ok());
    let movement = match run {
        Some(run) => router_movement(run, &tensors)?,
        None => None,
    };
    if let Some(heads) = HeadSummary::of(tensors, routing.as_ref()) {
        text.push(format!("heads              {}", heads.in_words()));
        value["heads"] = serde_json::to_value(&heads)?;
    }
    let Some(routing) = routing else { return Ok(text) };
    text.push(format!("gates by domain    {}", routing.in_words()));
    let of_domain = routing.domain_entropy();
    if let Some(entropy) = routing.entropy() {
        let each = of_domain.iter().map(|(domain, entropy)| format!("{domain} {entropy:.3}"));
        let each: Vec<String> = each.collect();
        let each = if each.is_empty() { String::new() } else { format!(": {}", each.join(", ")) };
        text.push(format!("entropy of gates   {entropy:.3} of that of even ones{each}"));
    }
    if let Some(movement) = movement {
        text.push(format!("routers moved      by {movement:.3} of where they started"));
    }
    value["routing"] = json!({
        "specialisation": routing.specialisation(),
        "spread_by_layer": routing.spread_by_layer(),
        "entropy": routing.entropy(),
        "entropy_by_domain": of_domain,
        "entropy_by_layer": routing.layer_entropy(),
        "router_movement": movement,
    });
    Ok(text)
}

//! `hydralora inspect`: parameters of a model, of an adapter, and of the paper's table.

use crate::args::{Global, InspectArguments};
use crate::failure::bad_input;
use crate::plan::Parameters;
use crate::ui::{result, table, thousands};
use hydralora_kernels::DType;
use hydralora_model::adapter::{Projection, Site, SiteShape};
use hydralora_model::{Decoder, ModelConfig, ModelSource, RopeConfig, RopeScaling, hub};
use hydralora_peft::{io, methods};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

pub(crate) fn run(global: &Global, arguments: &InspectArguments) -> anyhow::Result<ExitCode> {
    let mut json = Map::new();
    let mut text = Vec::new();
    if arguments.table {
        let (value, shown) = paper_table()?;
        json.insert("table".to_owned(), value);
        text.push(shown);
    }
    let opened = match &arguments.model {
        Some(spec) => {
            let path = hub::resolve(spec, &mut |line| eprintln!("{line}"))?;
            let source = ModelSource::open(&path)?;
            let decoder = Decoder::load(&source.config, &source.weights, DType::F32)?;
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
    if text.is_empty() {
        return Err(bad_input("nothing to inspect; give --model, --adapter or --table"));
    }
    result(global, &Value::Object(json), &text.join("\n\n"))?;
    Ok(ExitCode::SUCCESS)
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
        ("on disk", format!("{} MB", thousands(source.weights.stored_bytes() >> 20))),
        ("in memory (f32)", format!("{} MB", thousands(decoder.weight_bytes() >> 20))),
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
    let base = metadata.as_ref().map_or("not recorded", |m| m.base_model.as_str());
    let mut text = vec![
        format!("adapter            {}", folder.display()),
        format!("trained on         {base}"),
        format!("options            {recipe}"),
    ];
    let mut value = json!({"options": recipe, "base_model": base});
    match opened {
        Some((source, decoder)) => {
            let loaded = io::load(folder, &decoder.sites(), decoder.dtype())?;
            if let Some(metadata) = &metadata {
                let identity = &source.identity;
                io::check_base(folder, metadata, &identity.name, &identity.fingerprint)?;
            }
            let parameters = Parameters::of(decoder.num_parameters(), loaded.tuned.as_ref());
            let sites = loaded.tuned.sites();
            let kinds: BTreeSet<&str> = sites.iter().map(|site| site.projection.name()).collect();
            let kinds: Vec<&str> = kinds.into_iter().collect();
            text.push(format!("parameters         {parameters}"));
            text.push(format!("layers             {} ({})", sites.len(), kinds.join(", ")));
            value["parameters"] = serde_json::to_value(&parameters)?;
        }
        None => {
            let tensors = io::decode(&folder.join(io::TENSOR_FILE), DType::F32)?;
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
    if let Some(routing) = folder.parent().map(|run| run.join("routing.json"))
        && let Ok(bytes) = std::fs::read(&routing)
        && let Ok(routing) = serde_json::from_slice::<hydralora_train::Routing>(&bytes)
    {
        text.push("mean gate of each expert".to_owned());
        let rows: Vec<Vec<String>> = routing
            .domains
            .iter()
            .zip(routing.overall())
            .map(|(domain, gates)| {
                std::iter::once(domain.clone())
                    .chain(gates.iter().map(|gate| format!("{gate:.3}")))
                    .collect()
            })
            .collect();
        text.push(table(&rows));
        value["routing"] = serde_json::to_value(routing.overall())?;
    }
    Ok((value, text.join("\n")))
}

/// LLaMA2-7B's dimensions.
fn llama2_7b() -> ModelConfig {
    ModelConfig {
        model_type: "llama".to_owned(),
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 11_008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        rope: RopeConfig { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        attention_bias: false,
        mlp_bias: false,
        sliding_window: None,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

/// A row of the paper's table: name, method, options, what the paper prints in percent, and whether
/// the method's layers are its own affair instead of q and v or the FFN.
type PaperRow = (&'static str, &'static str, Value, &'static str, bool);

fn paper_rows() -> Vec<PaperRow> {
    let virtual_tokens = || json!({"num_virtual_tokens": 20});
    vec![
        ("Prompt tuning v=20", "prompt-tuning", virtual_tokens(), ".001", true),
        ("Prefix tuning v=20", "prefix-tuning", virtual_tokens(), ".077", true),
        ("(IA)3", "ia3", json!({}), ".009", true),
        ("AdaLoRA r0=12", "adalora", json!({"init_r": 12}), ".093", false),
        ("LoRA r=8", "lora", json!({"rank": 8}), ".062", false),
        ("LoRA r=16", "lora", json!({"rank": 16}), ".124", false),
        ("LoRA r=32", "lora", json!({"rank": 32}), ".248", false),
        ("LoRA-Split 4x8", "lora-split", json!({"rank": 8, "num_experts": 4}), ".248", false),
        ("HydraLoRA r=8 N=3", "hydralora", json!({"rank": 8, "num_experts": 3}), ".124", false),
        ("HydraLoRA r=8 N=10", "hydralora", json!({"rank": 8, "num_experts": 10}), ".341", false),
    ]
}

/// Parameters of a method on `config`, without and of the router.
fn parameters_on(
    config: &ModelConfig,
    method: &str,
    options: &Map<String, Value>,
) -> anyhow::Result<(usize, usize)> {
    let options = methods::find(method)?
        .read_recipe(options)
        .map_err(|faults| hydralora_peft::Error::Options { faults })?;
    let (sites, times) = if options.whole_model() {
        (config.sites(), 1)
    } else {
        // One layer is enough: all are alike.
        let layer = Projection::ALL.map(|projection| Site { layer: 0, projection });
        let layer: Vec<SiteShape> = layer.map(|site| config.site_shape(site)).to_vec();
        (options.targets().select(&layer)?, config.num_hidden_layers)
    };
    let tuned = options.build(&sites, DType::F32, 0);
    let counted = Parameters::of(0, tuned.as_ref());
    Ok(((counted.trainable - counted.router) * times, counted.router * times))
}

/// Counts on LLaMA2-7B, for the targets the paper's percentages fit and those its code uses.
fn paper_table() -> anyhow::Result<(Value, String)> {
    let config = llama2_7b();
    let base = base_parameters(&config);
    // The paper cuts digits off rather than rounding.
    let percent = |count: usize| {
        let exact = 100.0 * count as f64 / (base + count) as f64;
        format!("{:.3}", (exact * 1000.0).floor() / 1000.0)
    };
    let mut rows = vec![
        ["", "paper %", "q,v", "%", "router", "% with it", "FFN", "%", "router", "% with it"]
            .map(str::to_owned)
            .to_vec(),
    ];
    let mut values = Vec::new();
    for (name, method, options, paper, own_layers) in paper_rows() {
        let mut row = vec![name.to_owned(), paper.to_owned()];
        let mut value = json!({"name": name, "paper_percent": paper});
        let targets: &[&str] = if own_layers { &["own"] } else { &["qv", "ffn"] };
        for &targets in targets {
            let mut options = options.as_object().cloned().unwrap_or_default();
            if !own_layers {
                options.insert("targets".to_owned(), json!(targets));
            }
            let (counted, router) = parameters_on(&config, method, &options)?;
            row.extend([thousands(counted), percent(counted)]);
            row.extend([thousands(router), percent(counted + router)]);
            value[targets] = json!({
                "parameters": counted, "percent": percent(counted), "router": router,
                "percent_with_router": percent(counted + router),
            });
        }
        rows.push(row);
        values.push(value);
    }
    let note = format!(
        "LLaMA2-7B, {} parameters. Percent of trainable in all parameters, cut off after three digits. \
         The paper's figures count q and v without the router; its code adapts the FFN. The first three \
         methods have layers of their own.",
        thousands(base)
    );
    Ok((Value::Array(values), format!("{}\n{note}", table(&rows))))
}

fn base_parameters(config: &ModelConfig) -> usize {
    let linear: usize =
        config.sites().iter().map(|shape| shape.in_features * shape.out_features).sum();
    let norms = (2 * config.num_hidden_layers + 1) * config.hidden_size;
    linear + norms + 2 * config.vocab_size * config.hidden_size
}

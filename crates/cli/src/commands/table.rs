//! The paper's table: how many parameters each method trains.

use crate::plan::Parameters;
use crate::ui::{table, thousands};
use hydralora_kernels::DType;
use hydralora_model::{Arithmetic, ModelConfig, RopeConfig};
use hydralora_peft::methods;
use serde_json::{Map, Value, json};

/// LLaMA2-7B's dimensions.
pub(super) fn llama2_7b() -> ModelConfig {
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
        rope: RopeConfig::plain(10_000.0),
        sliding_rope: None,
        rotated_layers: None,
        arithmetic: Arithmetic::default(),
        layer_embeddings: None,
        linear_attention: None,
        tie_word_embeddings: false,
        attention_bias: false,
        mlp_bias: false,
        sliding_window: None,
        sliding_layers: None,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

/// A row of the paper's table.
struct PaperRow {
    name: &'static str,
    method: &'static str,
    options: Value,
    /// What the paper prints in percent.
    paper: &'static str,
    /// Whether the method's layers are its own affair instead of q and v or the FFN.
    own_layers: bool,
    /// How many such adapters there are; the paper then multiplies the cut-off figure of one.
    copies: usize,
}

fn paper_rows() -> Vec<PaperRow> {
    let row = |name, method, options, paper, own_layers| PaperRow {
        name,
        method,
        options,
        paper,
        own_layers,
        copies: 1,
    };
    let virtual_tokens = || json!({"num_virtual_tokens": 20});
    let lstm = json!({
        "num_virtual_tokens": 50, "encoder": "lstm", "encoder_hidden_size": 256,
    });
    let several = |name, paper, copies| PaperRow {
        copies,
        ..row(name, "lora", json!({"rank": 8}), paper, false)
    };
    let hydra = |experts| json!({"rank": 8, "num_experts": experts});
    vec![
        row("Prompt tuning v=20", "prompt-tuning", virtual_tokens(), ".001", true),
        row("P-tuning LSTM 256 v=50", "p-tuning", lstm, ".193", true),
        row("Prefix tuning v=20", "prefix-tuning", virtual_tokens(), ".077", true),
        row("(IA)3", "ia3", json!({}), ".009", true),
        row("AdaLoRA r0=12", "adalora", json!({"init_r": 12}), ".093", false),
        row("LoRA r=8", "lora", json!({"rank": 8}), ".062", false),
        row("LoRA r=16", "lora", json!({"rank": 16}), ".124", false),
        row("LoRA r=32", "lora", json!({"rank": 32}), ".248", false),
        row("LoRA-Split 4x8", "lora-split", json!({"rank": 8, "num_experts": 4}), ".248", false),
        row("HydraLoRA r=8 N=3", "hydralora", hydra(3), ".124", false),
        row("HydraLoRA r=8 N=10", "hydralora", hydra(10), ".341", false),
        several("LoRAHub 20 x r=8", "1.240", 20),
        several("LoRAMoE 48 x r=8", "2.976", 48),
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
        let mut layer = config.sites();
        layer.retain(|shape| shape.site.layer == 0);
        (options.select(&layer)?, config.num_hidden_layers)
    };
    let tuned = options.build(&sites, DType::F32, 0);
    let counted = Parameters::of(0, tuned.as_ref());
    Ok(((counted.trainable - counted.router) * times, counted.router * times))
}

/// Counts on `config`, for the targets the paper's percentages fit and those its code uses.
pub(super) fn paper_table(config: &ModelConfig, model: &str) -> anyhow::Result<(Value, String)> {
    let base = base_parameters(config);
    // The paper cuts digits off rather than rounding.
    let thousandths =
        |count: usize| (100_000.0 * count as f64 / (base + count) as f64).floor() / 1000.0;
    let mut rows = vec![
        ["", "paper %", "q,v", "%", "router", "% with it", "FFN", "%", "router", "% with it"]
            .map(str::to_owned)
            .to_vec(),
    ];
    let mut values = Vec::new();
    for PaperRow { name, method, options, paper, own_layers, copies } in paper_rows() {
        let mut row = vec![name.to_owned(), paper.to_owned()];
        let mut value = json!({"name": name, "paper_percent": paper, "copies": copies});
        let targets: &[&str] = if own_layers { &["own"] } else { &["qv", "ffn"] };
        for &targets in targets {
            let mut options = options.as_object().cloned().unwrap_or_default();
            if !own_layers {
                options.insert("targets".to_owned(), json!(targets));
            }
            let (counted, router) = parameters_on(config, method, &options)?;
            let percent = |count: usize| format!("{:.3}", copies as f64 * thousandths(count));
            let (without, with) = (percent(counted), percent(counted + router));
            let (counted, router) = (copies * counted, copies * router);
            row.extend([thousands(counted), without.clone(), thousands(router), with.clone()]);
            value[targets] = json!({
                "parameters": counted, "percent": without, "router": router,
                "percent_with_router": with,
            });
        }
        rows.push(row);
        values.push(value);
    }
    let note = format!(
        "{model}, {} parameters. Percent of trainable in all parameters, cut off after three digits \
         (of one adapter where there are several). The paper's figures are for LLaMA2-7B; they count \
         q and v without the router, while its code adapts the FFN. The first four methods have \
         layers of their own.",
        thousands(base)
    );
    Ok((Value::Array(values), format!("{}\n{note}", table(&rows))))
}

fn base_parameters(config: &ModelConfig) -> usize {
    let linear: usize =
        config.sites().iter().map(|shape| shape.in_features * shape.out_features).sum();
    linear + config.norm_parameters() + 2 * config.vocab_size * config.hidden_size
}

//! A GGUF file.

use super::Saving;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::family::{self, GgufNames, Layout, NEXT_LAYERS};
use crate::gguf::{Array, GgufFile, GgufWriter, VERSION_KEY, Value};
use hydralora_kernels::block::{BlockFormat, quantize};
use std::path::Path;

/// Metadata that may be lists with an entry for every layer.
const BY_LAYER: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.recurrent_layers",
    "feed_forward_length",
];
/// Metadata that is written anew, or holds only for the file it was in.
const NOT_CARRIED: &[&str] =
    &["general.file_type", "general.name", "general.alignment", VERSION_KEY];

pub(super) fn write(saving: &Saving<'_>, out: &Path) -> Result<()> {
    let config = &saving.source.config;
    let file_type = file_type(saving.format, out)?;
    let mut writer = GgufWriter::marked();
    let base = saving.source.weights.gguf();
    match base {
        Some(base) => carry_metadata(&mut writer, base, saving),
        None => fresh_metadata(&mut writer, saving)?,
    }
    name_ends(&mut writer, base, saving);
    writer.metadata("general.file_type", Value::U32(file_type));
    if saving.format == BlockFormat::Q8_0
        && base.is_none_or(|base| base.get("general.quantization_version").is_none())
    {
        writer.metadata("general.quantization_version", Value::U32(2));
    }
    write_factors(&mut writer, config);
    let names = config.gguf_names();
    for name in saving.names() {
        let stored = names.in_gguf(name).ok_or_else(|| {
            Error::malformed(
                saving.source.weights.path(),
                format!("tensor `{name}` has no name in a GGUF file"),
            )
        })?;
        let layout = config.gguf_layout(name);
        let mut shape = saving.shape(name).to_vec();
        if layout.squeezed && shape.get(1) == Some(&1) {
            shape.remove(1);
        }
        let format = match (shape.as_slice(), saving.format) {
            ([_], _) => BlockFormat::F32,
            // llama.cpp convolves with single precision alone.
            _ if layout.squeezed => BlockFormat::F32,
            ([.., width], format) if !width.is_multiple_of(format.block_len()) => BlockFormat::F16,
            (_, format) => format,
        };
        if let Some(fault) = layout_fault(&layout, &shape) {
            let message = format!("tensor `{name}` has {fault}");
            return Err(Error::malformed(saving.source.weights.path(), message));
        }
        let len = format.bytes_for(shape.iter().product());
        writer
            .lazy_tensor(stored, format, &shape, len, move || saving.encode(name, format, &layout));
    }
    writer.write(out)
}

/// Adds the divisors of the rotary frequencies.
pub(super) fn write_factors(writer: &mut GgufWriter<'_>, config: &ModelConfig) {
    let family = family::find(&config.model_type);
    for (name, factors) in family.map(|family| family.gguf_factors(config)).unwrap_or_default() {
        let mut bytes = Vec::new();
        quantize(BlockFormat::F32, &factors, &mut bytes);
        writer.tensor(name, BlockFormat::F32, &[factors.len()], bytes);
    }
}

/// Says why a tensor of `shape` has no rows or columns in that order, if it has none.
fn layout_fault(layout: &Layout, shape: &[usize]) -> Option<String> {
    let extent = |axis: usize| shape.get(axis).copied().unwrap_or(0);
    let rows = layout.rows.and_then(|order| order.fault(extent(0)));
    rows.or_else(|| layout.columns.and_then(|order| order.fault(extent(1))))
}

/// GGUF's names for tokens at which generation stops, beside that of the end of a text.
const FURTHER_ENDS: [&str; 2] = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Says where answers end beside the end of a text: the format has a key for the end of a turn and one
/// for that of a message. What the base says stays where it still holds.
fn name_ends(writer: &mut GgufWriter<'_>, base: Option<&GgufFile>, saving: &Saving<'_>) {
    let said = |key: &str| base.and_then(|base| base.u64(key).ok().flatten());
    let kept: Vec<(&str, u64)> = FURTHER_ENDS
        .iter()
        .filter_map(|key| Some((*key, said(key)?)))
        .filter(|(_, id)| saving.end_ids.iter().any(|end| u64::from(*end) == *id))
        .collect();
    let eos = saving.source.tokenizer.eos().map(|(id, _)| id);
    let named = |id: u32| eos == Some(id) || kept.iter().any(|(_, kept)| *kept == u64::from(id));
    let mut new = saving.end_ids.iter().copied().filter(|id| !named(*id));
    for key in FURTHER_ENDS {
        if !kept.iter().any(|(kept, _)| *kept == key)
            && let Some(id) = new.next()
        {
            writer.metadata(key.to_owned(), Value::U32(id));
        }
    }
}

fn carry_metadata(writer: &mut GgufWriter<'_>, base: &GgufFile, saving: &Saving<'_>) {
    let template = "tokenizer.chat_template";
    let architecture = saving.source.config.gguf_names().architecture;
    let layers = saving.source.config.num_hidden_layers;
    let counted = |key: &str| key.strip_prefix(architecture)?.strip_prefix('.').map(str::to_owned);
    for (key, value) in base.metadata() {
        match counted(key).as_deref() {
            // Layers that predict later tokens are left out.
            Some(NEXT_LAYERS) => continue,
            Some("block_count") => {
                writer.metadata(key.clone(), size(layers));
                continue;
            }
            Some(counted) if BY_LAYER.contains(&counted) => {
                writer.metadata(key.clone(), first(value, layers));
                continue;
            }
            _ => {}
        }
        let grown = with_added(key, value, saving);
        let value = grown.as_ref().unwrap_or(value);
        let dropped = NOT_CARRIED.contains(&key.as_str())
            || key.starts_with("split.")
            || (key == template && saving.chat_template.is_some());
        if !dropped {
            writer.metadata(key.clone(), value.clone());
        }
    }
    writer.metadata("general.name", Value::String(saving.name.to_owned()));
    if let Some(text) = saving.chat_template {
        writer.metadata(template, Value::String(text.to_owned()));
    }
}

/// A value of a GGUF file with the model's added tokens, if it says something of tokens.
fn with_added(key: &str, value: &Value, saving: &Saving<'_>) -> Option<Value> {
    /// What a token that nothing is known of is.
    const UNUSED: i32 = 5;
    let source = saving.source;
    if source.added.is_empty() {
        return None;
    }
    let rows = source.config.vocab_size;
    let added = source.added.iter().filter(|token| (token.id as usize) < rows);
    let kind = |special: bool| if special { 3 } else { 4 };
    match (key.strip_prefix("tokenizer.ggml."), value) {
        (Some("tokens"), Value::Array(Array::String(tokens))) => {
            let more = (tokens.len()..rows).map(|id| format!("[PAD{id}]"));
            let mut tokens: Vec<String> = tokens.iter().cloned().chain(more).collect();
            added.for_each(|token| tokens[token.id as usize].clone_from(&token.content));
            Some(Value::Array(Array::String(tokens)))
        }
        (Some("token_type"), Value::Array(Array::I32(kinds))) => {
            let mut kinds = kinds.clone();
            kinds.resize(rows.max(kinds.len()), UNUSED);
            added.for_each(|token| kinds[token.id as usize] = kind(token.special));
            Some(Value::Array(Array::I32(kinds)))
        }
        (Some("scores"), Value::Array(Array::F32(scores))) => {
            let mut scores = scores.clone();
            scores.resize(rows.max(scores.len()), 0.0);
            Some(Value::Array(Array::F32(scores)))
        }
        (None, _) if key.ends_with(".vocab_size") => {
            Some(Value::U32(u32::try_from(rows).unwrap_or(u32::MAX)))
        }
        _ => None,
    }
}

/// The first `count` entries of a list, if it has more.
fn first(value: &Value, count: usize) -> Value {
    fn of<T: Clone>(list: &[T], count: usize) -> Vec<T> {
        list.iter().take(count).cloned().collect()
    }
    match value {
        Value::Array(Array::Bool(list)) => Value::Array(Array::Bool(of(list, count))),
        Value::Array(Array::I32(list)) => Value::Array(Array::I32(of(list, count))),
        Value::Array(Array::U32(list)) => Value::Array(Array::U32(of(list, count))),
        other => other.clone(),
    }
}

fn size(value: usize) -> Value {
    Value::U32(u32::try_from(value).unwrap_or(u32::MAX))
}

/// GGUF's number for files whose matrices are of a format.
pub(super) fn file_type(format: BlockFormat, out: &Path) -> Result<u32> {
    Ok(match format {
        BlockFormat::F32 => 0,
        BlockFormat::F16 => 1,
        BlockFormat::Q4_0 => 2,
        BlockFormat::Q8_0 => 7,
        BlockFormat::BF16 => 32,
        other => {
            let message =
                format!("{other} cannot be written; expected f32, f16, bf16, q8_0 or q4_0");
            return Err(Error::malformed(out, message));
        }
    })
}

fn fresh_metadata(writer: &mut GgufWriter<'_>, saving: &Saving<'_>) -> Result<()> {
    let config = &saving.source.config;
    metadata_of_config(writer, config, saving.name, saving.source.weights.path())?;
    let (tokenizer, pieces) = (&saving.source.tokenizer, config.gguf_names().pieces);
    let template = saving.chat_template;
    for (key, value) in tokenizer.gguf_metadata(config.vocab_size, template, pieces)? {
        writer.metadata(key, value);
    }
    Ok(())
}

/// Adds what `config`, which came from `path`, says of the model `name`.
pub(super) fn metadata_of_config(
    writer: &mut GgufWriter<'_>,
    config: &ModelConfig,
    name: &str,
    path: &Path,
) -> Result<()> {
    let GgufNames { architecture, windowed, .. } = config.gguf_names();
    let family = family::find(&config.model_type);
    if let Some((field, why)) = family.and_then(|family| family.gguf_fault(config)) {
        let message = format!("{why}; write a Hugging Face folder instead");
        return Err(Error::config(path, field, message));
    }
    let window = config.sliding_window.filter(|&window| window < config.max_position_embeddings);
    if let Some(window) = window.filter(|_| !windowed) {
        let message = format!(
            "attention reaches {window} tokens back, which a GGUF file of the architecture \
             `{architecture}` cannot say; write a Hugging Face folder instead"
        );
        return Err(Error::config(path, "sliding_window", message));
    }
    writer.metadata("general.architecture", Value::String((*architecture).to_owned()));
    writer.metadata("general.type", Value::String("model".to_owned()));
    writer.metadata("general.name", Value::String(name.to_owned()));
    let own = family.map(|family| family.gguf_metadata(config)).unwrap_or_default();
    let common = [
        ("vocab_size", size(config.vocab_size)),
        ("context_length", size(config.max_position_embeddings)),
        ("embedding_length", size(config.hidden_size)),
        ("block_count", size(config.num_hidden_layers)),
        ("feed_forward_length", size(config.intermediate_size)),
        ("attention.head_count", size(config.num_attention_heads)),
        ("attention.head_count_kv", size(config.num_key_value_heads)),
        ("attention.key_length", size(config.head_dim)),
        ("attention.value_length", size(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        ("rope.dimension_count", size(config.rope.rotary_dim(config.head_dim))),
        ("rope.freq_base", Value::F32(config.rope.theta as f32)),
    ];
    let window = window.map(|window| ("attention.sliding_window", size(window)));
    for (key, value) in common.into_iter().chain(window) {
        if !own.iter().any(|(other, _)| *other == key) {
            writer.metadata(format!("{architecture}.{key}"), value);
        }
    }
    let of_rope = config.rope.gguf_metadata().ok_or_else(|| {
        let message = "a GGUF file cannot say how these frequencies are stretched; write a Hugging \
                       Face folder instead";
        Error::config(path, "rope_parameters", message)
    })?;
    let of_rope = of_rope.into_iter().map(|(key, value)| (format!("rope.scaling.{key}"), value));
    let own = own.into_iter().map(|(key, value)| (key.to_owned(), value));
    for (key, value) in of_rope.chain(own) {
        writer.metadata(format!("{architecture}.{key}"), value);
    }
    Ok(())
}

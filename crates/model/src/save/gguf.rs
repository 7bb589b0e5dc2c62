//! A GGUF file.

use super::Saving;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::family::{self, GgufNames, interleaved_row};
use crate::gguf::{GgufFile, GgufWriter, Value};
use hydralora_kernels::block::{BlockFormat, quantize};
use std::path::Path;

/// Metadata that is written anew, or holds only for the file it was in.
const NOT_CARRIED: &[&str] = &["general.file_type", "general.name", "general.alignment"];

pub(super) fn write(saving: &Saving<'_>, out: &Path) -> Result<()> {
    let config = &saving.source.config;
    let file_type = file_type(saving.format, out)?;
    let mut writer = GgufWriter::new();
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
    for (name, factors) in config.rope.gguf_factors(config.head_dim) {
        let mut bytes = Vec::new();
        quantize(BlockFormat::F32, &factors, &mut bytes);
        writer.tensor(name, BlockFormat::F32, &[factors.len()], bytes);
    }
    let names = config.gguf_names();
    for name in saving.names() {
        let stored = names.in_gguf(name).ok_or_else(|| {
            Error::malformed(
                saving.source.weights.path(),
                format!("tensor `{name}` has no name in a GGUF file"),
            )
        })?;
        let shape = saving.shape(name);
        let format = match (shape, saving.format) {
            ([_], _) => BlockFormat::F32,
            ([.., width], format) if !width.is_multiple_of(format.block_len()) => BlockFormat::F16,
            (_, format) => format,
        };
        let rows = shape.first().copied().unwrap_or(0);
        let heads = config.interleaved_heads(name);
        if let Some(heads) = heads.filter(|&heads| !rows.is_multiple_of(2 * heads)) {
            let message = format!("tensor `{name}` has {rows} rows for {heads} heads");
            return Err(Error::malformed(saving.source.weights.path(), message));
        }
        let len = shape.iter().product();
        let shift = config.norm_shift_of(name) as f32;
        writer.lazy_tensor(stored, format, shape, format.bytes_for(len), move || match heads {
            Some(heads) => {
                let order = move |row: usize| interleaved_row(row, rows, heads);
                saving.encode(name, format, Some(&order), shift)
            }
            None => saving.encode(name, format, None, shift),
        });
    }
    writer.write(out)
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
    for (key, value) in base.metadata() {
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

/// GGUF's number for files whose matrices are of a format.
pub(super) fn file_type(format: BlockFormat, out: &Path) -> Result<u32> {
    Ok(match format {
        BlockFormat::F32 => 0,
        BlockFormat::F16 => 1,
        BlockFormat::Q4_0 => 2,
        BlockFormat::Q8_0 => 7,
        BlockFormat::BF16 => 32,
        other => {
            let message = format!("{other} cannot be written; expected f32, f16, bf16 or q8_0");
            return Err(Error::malformed(out, message));
        }
    })
}

fn fresh_metadata(writer: &mut GgufWriter<'_>, saving: &Saving<'_>) -> Result<()> {
    let config = &saving.source.config;
    metadata_of_config(writer, config, saving.name, saving.source.weights.path())?;
    let template = saving.chat_template;
    for (key, value) in saving.source.tokenizer.gguf_metadata(config.vocab_size, template)? {
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
    let GgufNames { architecture, windowed, supported, .. } = config.gguf_names();
    if !supported {
        let message = format!(
            "models of the type `{}` are not written as GGUF; write a Hugging Face folder instead",
            config.model_type
        );
        return Err(Error::malformed(path, message));
    }
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
    let size = |value: usize| Value::U32(u32::try_from(value).unwrap_or(u32::MAX));
    writer.metadata("general.architecture", Value::String((*architecture).to_owned()));
    writer.metadata("general.type", Value::String("model".to_owned()));
    writer.metadata("general.name", Value::String(name.to_owned()));
    for (key, value) in [
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
    ] {
        writer.metadata(format!("{architecture}.{key}"), value);
    }
    if let Some(window) = window {
        writer.metadata(format!("{architecture}.attention.sliding_window"), size(window));
    }
    let of_rope = config.rope.gguf_metadata().ok_or_else(|| {
        let message = "a GGUF file cannot say how these frequencies are stretched; write a Hugging \
                       Face folder instead";
        Error::config(path, "rope_parameters", message)
    })?;
    let of_rope = of_rope.into_iter().map(|(key, value)| (format!("rope.scaling.{key}"), value));
    let own = family.map(|family| family.gguf_metadata(config)).unwrap_or_default();
    let own = own.into_iter().map(|(key, value)| (key.to_owned(), value));
    for (key, value) in of_rope.chain(own) {
        writer.metadata(format!("{architecture}.{key}"), value);
    }
    Ok(())
}

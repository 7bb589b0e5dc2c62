//! A model of random weights as a GGUF file: for benchmarks and trials of sizes whose weights are not at
//! hand.

use super::gguf::{file_type, metadata_of_config, write_factors};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::family::{self, Numbers, kit::ModulesPlan};
use crate::gguf::{Array, GgufWriter, Value};
use crate::site::{Site, TensorSite, name_hash};
use hydralora_kernels::block::{BlockFormat, quantize};
use std::path::Path;

/// Numbers that are drawn for a tensor; a larger one repeats them.
const POOL: usize = 1 << 16;

/// Writes a model of the dimensions `config` to `out`, whole or not at all: matrices in `format`, drawn from
/// a normal distribution that keeps activations as large as they are, norms of ones, and a tokenizer whose
/// tokens are bytes. The same `seed` gives the same file.
///
/// # Errors
/// If the family has no form in GGUF, the format cannot be written or does not divide a row, or the file
/// system refuses.
pub fn random_gguf(config: &ModelConfig, format: BlockFormat, seed: u64, out: &Path) -> Result<()> {
    let file_type = file_type(format, out)?;
    let family = family::find(&config.model_type)
        .ok_or_else(|| Error::malformed(out, format!("`{}` is unknown", config.model_type)))?;
    let mut writer = GgufWriter::marked();
    metadata_of_config(&mut writer, config, "random", out)?;
    writer.metadata("general.file_type", Value::U32(file_type));
    for (key, value) in byte_tokenizer(config) {
        writer.metadata(key, value);
    }
    write_factors(&mut writer, config);
    let hidden = config.hidden_size;
    let mut matrices = vec![("model.embed_tokens.weight".to_owned(), config.vocab_size, hidden)];
    if !config.tie_word_embeddings {
        matrices.push(("lm_head.weight".to_owned(), config.vocab_size, hidden));
    }
    let mut lists = vec![(TensorSite::FINAL_NORM.to_string(), vec![hidden])];
    let mut add = |layer: Option<usize>, plan: ModulesPlan| {
        for plan in plan.linears {
            let site = Site { layer: layer.unwrap_or(0), linear: plan.linear };
            matrices.push((format!("{site}.weight"), plan.out_features, plan.in_features));
            if plan.bias {
                lists.push((format!("{site}.bias"), vec![plan.out_features]));
            }
        }
        for plan in plan.tensors {
            let site = TensorSite { layer, name: plan.name, is_weight: plan.is_weight };
            lists.push((site.to_string(), plan.shape));
        }
        for (name, rows, cols) in plan.tables {
            matrices.push((format!("model.{name}.weight"), rows, cols));
        }
    };
    add(None, family.outside(config));
    (0..config.num_hidden_layers)
        .for_each(|layer| add(Some(layer), family.layer(config, layer).modules));
    let names = config.gguf_names();
    let stored = |name: &str| {
        let missing = || Error::malformed(out, format!("`{name}` has no name in a GGUF file"));
        names.in_gguf(name).ok_or_else(missing)
    };
    for (name, rows, cols) in &matrices {
        if !cols.is_multiple_of(format.block_len()) {
            let message =
                format!("`{name}` has rows of {cols} numbers, no whole blocks of {format}");
            return Err(Error::malformed(out, message));
        }
        let len = format.bytes_for(rows * cols);
        let seed = seed ^ name_hash(name);
        let deviation = 1.0 / (*cols as f64).sqrt();
        writer.lazy_tensor(stored(name)?, format, &[*rows, *cols], len, move || {
            let mut pool = Vec::new();
            quantize(format, &normals(POOL, deviation, seed), &mut pool);
            Ok(pool.iter().copied().cycle().take(len).collect())
        });
    }
    for (name, shape) in &lists {
        let len = shape.iter().product();
        // What multiplies is near one, and what is added near zero; a convolution keeps sizes.
        let (centre, deviation) = match (name.rsplit_once('.'), shape.as_slice()) {
            (_, [_, .., taps]) => (0.0, 1.0 / (*taps as f64).sqrt()),
            (Some((module, "weight")), _) if module.ends_with("norm") => (1.0, 0.02),
            (Some((_, "layer_scalar")), _) => (1.0, 0.02),
            _ => (0.0, 0.02),
        };
        let layout = config.gguf_layout(name);
        let drawn = normals(len, deviation, seed ^ name_hash(name));
        // Norms are drawn as a file keeps them.
        let values: Vec<f32> = match layout.numbers {
            Numbers::NegativeExp => drawn.iter().map(|&x| layout.numbers.write(x)).collect(),
            Numbers::Same | Numbers::Plus(_) => drawn.iter().map(|x| x + centre).collect(),
        };
        let mut shape = shape.clone();
        if layout.squeezed && shape.len() == 3 {
            shape.remove(1);
        }
        let mut bytes = Vec::new();
        quantize(BlockFormat::F32, &values, &mut bytes);
        writer.tensor(stored(name)?, BlockFormat::F32, &shape, bytes);
    }
    writer.write(out)
}

/// Draws from a normal distribution around zero.
fn normals(len: usize, deviation: f64, seed: u64) -> Vec<f32> {
    let mut state = seed;
    // SplitMix64 (Steele, Lea & Flood, 2014).
    let mut uniform = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    };
    (0..len)
        .map(|_| {
            let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
            (deviation * radius * (2.0 * std::f64::consts::PI * uniform()).cos()) as f32
        })
        .collect()
}

/// The metadata of a tokenizer whose tokens are bytes; the ids after them stand for nothing.
fn byte_tokenizer(config: &ModelConfig) -> Vec<(&'static str, Value)> {
    // GPT-2's letters for bytes: those that print stand for themselves, the others come after.
    let prints = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256_u32..;
    let mut letter = |byte: u32| match prints(byte) {
        true => byte,
        false => others.next().unwrap_or(byte),
    };
    let letters: Vec<String> = (0..256)
        .map(|byte| char::from_u32(letter(byte)).map(String::from).unwrap_or_default())
        .collect();
    let rows = config.vocab_size;
    let tokens: Vec<String> =
        (letters.into_iter()).chain((256..rows).map(|id| format!("<|{id}|>"))).take(rows).collect();
    let kinds = (0..rows).map(|id| if id < 256 { 1 } else { 3 }).collect();
    let end = u32::try_from(rows - 1).unwrap_or(0);
    vec![
        ("tokenizer.ggml.model", Value::String("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".to_owned())),
        ("tokenizer.ggml.tokens", Value::Array(Array::String(tokens))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds))),
        ("tokenizer.ggml.merges", Value::Array(Array::String(Vec::new()))),
        ("tokenizer.ggml.eos_token_id", Value::U32(end)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
    ]
}

//! llama.cpp's adapter files: a GGUF file with `general.type = adapter` and, for every layer, `A`
//! and `B` under the base tensor's name with `.lora_a` and `.lora_b`.
//!
//! llama.cpp scales by `adapter.lora.alpha / r`. Rows of `B` and columns of `A` are in the order that
//! its base files have.

use super::Lora;
use crate::error::{Error, Result};
use hydralora_kernels::block::{BlockFormat, quantize};
use hydralora_model::gguf::{GgufWriter, Value};
use hydralora_model::{ModelConfig, Order};
use std::path::Path;

/// Writes `lora` for a model of `config`, its numbers in `f32`.
///
/// # Errors
/// If a layer has no name in GGUF or none that llama.cpp adapts, or the file system refuses.
pub fn write_gguf(lora: &Lora, config: &ModelConfig, out: &Path) -> Result<()> {
    if let Some(name) = lora.beside.tensors.keys().next() {
        let message = format!(
            "llama.cpp's adapter files have no place for `{name}`, which is trained beside the layers; \
             merge it into the model instead"
        );
        return Err(Error::Malformed { path: out.to_path_buf(), message });
    }
    let mut writer = GgufWriter::marked();
    let text = |value: &str| Value::String(value.to_owned());
    let names = config.gguf_names();
    writer.metadata("general.architecture", text(names.architecture));
    writer.metadata("general.type", text("adapter"));
    writer.metadata("general.base_model.count", Value::U32(1));
    writer.metadata("general.base_model.0.name", text(&lora.base_model));
    writer.metadata("general.file_type", Value::U32(0));
    writer.metadata("adapter.type", text("lora"));
    let alpha = lora.scale() * lora.rank as f64;
    writer.metadata("adapter.lora.alpha", Value::F32(alpha as f32));
    for (site, pair) in &lora.sites {
        let tensor = format!("{site}.weight");
        let name = names.in_gguf(&tensor).ok_or_else(|| Error::Malformed {
            path: out.to_path_buf(),
            message: format!("{site} has no name in a GGUF file"),
        })?;
        if site.linear.outside {
            let message = format!(
                "llama.cpp applies no adapter to {site}, which lies outside the layers; merge it into \
                 the model instead"
            );
            return Err(Error::Malformed { path: out.to_path_buf(), message });
        }
        let layout = config.gguf_layout(&tensor);
        let (mut a, mut b) = (pair.a.to_f32(), pair.b.to_f32());
        // Rows of a change are rows of B, its columns those of A.
        if let Some(order) = layout.columns {
            a = columns(&a, pair.a.cols(), order);
        }
        if let Some(order) = layout.rows {
            b = rows(&b, pair.b.rows(), order);
        }
        for (part, values, shape) in [("lora_a", a, pair.a.shape()), ("lora_b", b, pair.b.shape())]
        {
            let mut bytes = Vec::new();
            quantize(BlockFormat::F32, &values, &mut bytes);
            writer.tensor(format!("{name}.{part}"), BlockFormat::F32, shape, bytes);
        }
    }
    Ok(writer.write(out)?)
}

/// `rows` rows of `values` in a file's order.
fn rows(values: &[f32], rows: usize, order: Order) -> Vec<f32> {
    let mut ordered = vec![0.0f32; values.len()];
    order.apply(rows, values.len() / rows.max(1), values, &mut ordered);
    ordered
}

/// The columns of `values`, `columns` in every row, in a file's order.
fn columns(values: &[f32], columns: usize, order: Order) -> Vec<f32> {
    let mut ordered = vec![0.0f32; values.len()];
    let width = columns.max(1);
    for (from, to) in values.chunks_exact(width).zip(ordered.chunks_exact_mut(width)) {
        order.apply(columns, 1, from, to);
    }
    ordered
}

//! llama.cpp's adapter files: a GGUF file with `general.type = adapter` and, for every layer, `A`
//! and `B` under the base tensor's name with `.lora_a` and `.lora_b`.
//!
//! llama.cpp scales by `adapter.lora.alpha / r`. The rows of `B` at query and key layers are in the
//! order its base files have.

use super::Lora;
use crate::error::{Error, Result};
use hydralora_kernels::Tensor;
use hydralora_kernels::block::{BlockFormat, quantize};
use hydralora_model::gguf::{GgufWriter, Value};
use hydralora_model::{ModelConfig, interleaved_row};
use std::path::Path;

/// Writes `lora` for a model of `config`, its numbers in `f32`.
///
/// # Errors
/// If models of the family have no form in GGUF, or the file system refuses.
pub fn write_gguf(lora: &Lora, config: &ModelConfig, out: &Path) -> Result<()> {
    let mut writer = GgufWriter::marked();
    let text = |value: &str| Value::String(value.to_owned());
    let names = config.gguf_names();
    if !names.supported {
        let message = format!("models of the type `{}` are not written as GGUF", config.model_type);
        return Err(Error::Malformed { path: out.to_path_buf(), message });
    }
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
        let heads = config.interleaved_heads(&tensor);
        let b = heads.map_or_else(|| pair.b.clone(), |heads| interleave(&pair.b, heads));
        for (part, tensor) in [("lora_a", &pair.a), ("lora_b", &b)] {
            let mut bytes = Vec::new();
            quantize(BlockFormat::F32, &tensor.to_f32(), &mut bytes);
            writer.tensor(format!("{name}.{part}"), BlockFormat::F32, tensor.shape(), bytes);
        }
    }
    Ok(writer.write(out)?)
}

/// The rows of `b` in the order of a file whose heads are interleaved.
fn interleave(b: &Tensor, heads: usize) -> Tensor {
    let (rows, width) = (b.rows(), b.cols());
    let values = b.to_f32();
    let mut ordered = vec![0.0f32; values.len()];
    for (row, from) in values.chunks_exact(width).enumerate() {
        ordered[interleaved_row(row, rows, heads) * width..][..width].copy_from_slice(from);
    }
    Tensor::new(ordered, b.shape())
}

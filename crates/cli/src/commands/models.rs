//! `hydralora models`: the families that load, what was checked for each, and the memory that published
//! sizes take.

use crate::args::Global;
use crate::ui::result;
use hydralora_kernels::block::BlockFormat;
use hydralora_model::family::FAMILIES;
use hydralora_model::shapes::SHAPES;
use serde_json::{Value, json};
use std::process::ExitCode;

/// Formats whose sizes are listed.
const FORMATS: [BlockFormat; 4] =
    [BlockFormat::F32, BlockFormat::BF16, BlockFormat::Q8_0, BlockFormat::Q4_0];

pub(crate) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    let mut rows = vec![words(&["model_type", "models", "GGUF", "checked against transformers"])];
    let mut families = Vec::new();
    for family in FAMILIES {
        let (about, gguf) = (family.about(), family.gguf());
        rows.push(words(&[family.model_type(), about.models, gguf.architecture, about.checked]));
        families.push(json!({
            "model_type": family.model_type(), "class": family.class(), "models": about.models,
            "gguf": gguf.architecture, "checked": about.checked,
        }));
    }
    let mut sizes = vec![words(&["shape", "model_type", "parameters"])];
    sizes[0]
        .extend(FORMATS.iter().map(|format| format!("{} (GB)", format.to_string().to_lowercase())));
    let mut shapes = Vec::new();
    for shape in SHAPES {
        let parameters = shape.config()?.num_parameters();
        let bytes = |format: &BlockFormat| {
            parameters as f64 / format.block_len() as f64 * format.block_bytes() as f64
        };
        let gigabytes: Vec<f64> = FORMATS.iter().map(|format| bytes(format) / 1e9).collect();
        let mut row = vec![shape.name.to_owned(), shape.family().to_owned()];
        row.push(format!("{:.2} B", parameters as f64 / 1e9));
        row.extend(gigabytes.iter().map(|size| format!("{size:.1}")));
        sizes.push(row);
        let by_format: serde_json::Map<String, Value> = (FORMATS.iter().zip(&gigabytes))
            .map(|(format, size)| (format.to_string().to_lowercase(), json!(size)))
            .collect();
        shapes.push(json!({
            "name": shape.name, "model_type": shape.family(), "parameters": parameters,
            "gigabytes": by_format,
        }));
    }
    let text = format!(
        "{}\n\nWeights in memory, by the format they are held in (`model.dtype`):\n\n{}",
        markdown(&rows),
        markdown(&sizes)
    );
    result(global, &json!({"families": families, "shapes": shapes}), &text)?;
    Ok(ExitCode::SUCCESS)
}

/// A table as Markdown, so that the guide can hold it as printed.
fn markdown(rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let mut lines: Vec<String> = rows.iter().map(|row| line(row)).collect();
    let columns = rows.first().map_or(0, Vec::len);
    lines.insert(1, format!("|{}", " --- |".repeat(columns)));
    lines.join("\n")
}

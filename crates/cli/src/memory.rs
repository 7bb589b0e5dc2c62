//! Whether a model's weights fit this machine, before they are fetched or read.

use crate::args::spelling;
use crate::failure::bad_input;
use crate::recipe::ModelDtype;
use hydralora_kernels::DType;
use hydralora_model::{Held, ModelConfig};

/// Types to advise, the one that loses least first.
const SMALLER: [ModelDtype; 3] = [ModelDtype::Bf16, ModelDtype::Q80, ModelDtype::Q40];

/// Refuses a model whose weights alone would take more memory than there is, pages on disk included.
pub(crate) fn refuse_too_large(config: &ModelConfig, dtype: ModelDtype) -> anyhow::Result<()> {
    match total().and_then(|total| too_large(config.num_parameters(), dtype, total)) {
        Some(message) => Err(bad_input(message)),
        None => Ok(()),
    }
}

fn too_large(parameters: usize, dtype: ModelDtype, total: f64) -> Option<String> {
    let bytes = |dtype| Some(bytes_each(dtype)? * parameters as f64);
    let needed = bytes(dtype).filter(|needed| *needed > total)?;
    let gigabytes = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
    let fitting = SMALLER
        .iter()
        .find_map(|&smaller| Some((smaller, bytes(smaller)?)).filter(|(_, n)| *n < total));
    let advice = match fitting {
        Some((smaller, needed)) => {
            format!("as `dtype: {}` they take {}", spelling(&smaller), gigabytes(needed))
        }
        None => "choose a smaller model".to_owned(),
    };
    Some(format!(
        "the model's {:.1} billion parameters take {} as {}, and this machine has {}; {advice}",
        parameters as f64 / 1e9,
        gigabytes(needed),
        spelling(&dtype),
        gigabytes(total)
    ))
}

/// Bytes of a weight that is held so; none where the file decides it.
fn bytes_each(dtype: ModelDtype) -> Option<f64> {
    match dtype.plan() {
        (_, Held::Packed(format)) => Some(format.block_bytes() as f64 / format.block_len() as f64),
        (DType::F64, Held::Wide) => Some(8.0),
        (_, Held::Wide) => Some(4.0),
        _ => None,
    }
}

/// Bytes of this machine's memory and of what is behind it on disk, if the system says.
fn total() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let of = |name: &str| -> Option<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kilobytes| kilobytes * 1024.0)
    };
    Some(of("MemTotal")? + of("SwapTotal").unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_larger_than_the_machine_is_said_with_what_would_fit() {
        let of = |dtype, total| too_large(8_000_000_000, dtype, total);
        assert_eq!(of(ModelDtype::F32, 64e9), None);
        assert_eq!(of(ModelDtype::Stored, 1e9), None);
        let said = of(ModelDtype::F32, 16.5e9).unwrap();
        assert!(said.contains("take 32.0 GB as f32, and this machine has 16.5 GB"), "{said}");
        assert!(said.ends_with("as `dtype: bf16` they take 16.0 GB"), "{said}");
        let said = of(ModelDtype::Bf16, 8e9).unwrap();
        assert!(said.contains("q4_0"), "{said}");
        assert!(of(ModelDtype::Q40, 1e9).unwrap().ends_with("choose a smaller model"));
    }
}

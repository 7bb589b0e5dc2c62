//! The methods that `hydralora bench train` compares, and the memory each needs on its own.

use crate::args::{BenchTrainArguments, Global, spelling};
use crate::failure::bad_input;
use crate::recipe::read_method;
use anyhow::Context;
use hydralora_peft::MethodOptions;
use serde_json::{Value, json};
use std::process::Command;

/// The frozen model's own forward and backward.
const BASE: &str = "base";

/// A method as `--method` names it.
pub(super) struct Asked {
    /// The text on the command line.
    pub(super) text: String,
    /// Its options; none for the frozen base.
    pub(super) options: Option<Box<dyn MethodOptions>>,
}

/// Reads `--method`: names, and `{name: lora, use_dora: true}` as a recipe has them, parted by commas.
///
/// # Errors
/// If a method or an option is not known.
pub(super) fn asked(arguments: &BenchTrainArguments) -> anyhow::Result<Vec<Asked>> {
    let texts: Vec<&str> = arguments.method.iter().flat_map(|text| parts(text)).collect();
    if texts.is_empty() {
        return Err(bad_input("--method: is empty; expected at least one method"));
    }
    texts.into_iter().map(|text| read(text, arguments)).collect()
}

fn read(text: &str, arguments: &BenchTrainArguments) -> anyhow::Result<Asked> {
    let fault = |message: String| bad_input(format!("--method {text}: {message}"));
    if text == BASE {
        return Ok(Asked { text: text.to_owned(), options: None });
    }
    let section: Value = if text.starts_with('{') {
        serde_saphyr::from_str(text).map_err(|error| fault(error.to_string()))?
    } else {
        let mut section = json!({"name": text});
        match text {
            "hydralora" => {
                section["rank"] = json!(arguments.rank);
                section["num_experts"] = json!(arguments.num_experts);
            }
            "lora" => section["rank"] = json!(arguments.rank * arguments.num_experts),
            _ => {}
        }
        if matches!(text, "hydralora" | "lora") {
            section["targets"] = json!(["gate_proj", "up_proj", "down_proj"]);
            section["dropout"] = json!(0.0);
        }
        section
    };
    let mut faults = Vec::new();
    let method = read_method(Some(&section), &mut faults);
    let Some((_, options)) = method.filter(|_| faults.is_empty()) else {
        let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
        return Err(fault(faults.join("; ")));
    };
    Ok(Asked { text: text.to_owned(), options: Some(options) })
}

/// The pieces of `text` between commas that stand outside of brackets.
fn parts(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut found) = (0_usize, 0, Vec::new());
    for (at, character) in text.char_indices() {
        match character {
            '{' | '[' => depth += 1,
            '}' | ']' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                found.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    found.push(&text[start..]);
    found.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect()
}

/// The largest resident memory in MB of a process that trains by `method` alone, on the largest batch.
/// In a process that holds several methods each would be charged with the others' tensors, and full
/// fine-tuning with a base that it would not keep.
///
/// # Errors
/// If the process cannot be started or fails.
pub(super) fn peak_alone(
    global: &Global,
    arguments: &BenchTrainArguments,
    method: &Asked,
) -> anyhow::Result<f64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "train", "--json", "--quiet", "--largest-batch-only"]);
    command.args(["--method", &method.text, "--model", &arguments.model]);
    command.args(["--dtype", &spelling(&arguments.dtype)]);
    let numbers = [
        ("--threads", hydralora_runtime::threads()),
        ("--rank", arguments.rank),
        ("--num-experts", arguments.num_experts),
        ("--batches", arguments.batches),
        ("--batch-size", arguments.batch_size),
        ("--seq-len", arguments.seq_len),
    ];
    for (option, number) in numbers {
        command.args([option, &number.to_string()]);
    }
    command.args(["--device", &spelling(&global.device)]);
    if let Some(tokens) = &arguments.tokens {
        command.arg("--tokens").arg(tokens);
    }
    if arguments.gradient_checkpointing {
        command.arg("--gradient-checkpointing");
    }
    let ran = command.output().context("starting a process to measure memory in")?;
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr);
        anyhow::bail!("measuring the memory of {}: {}", method.text, said.trim());
    }
    let found: Value = serde_json::from_slice(&ran.stdout)
        .with_context(|| format!("measuring the memory of {}", method.text))?;
    Ok(found["methods"][0]["peak_rss_mb"].as_f64().unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn commas_inside_of_brackets_belong_to_a_method() {
        let text = "base, lora,{name: lora, targets: [q_proj, v_proj]},";
        assert_eq!(parts(text), ["base", "lora", "{name: lora, targets: [q_proj, v_proj]}"]);
        assert!(parts(" ,").is_empty());
    }
}

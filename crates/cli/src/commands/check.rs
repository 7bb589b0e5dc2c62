//! `hydralora check`: everything but the training.

use crate::args::{CheckArguments, Global};
use crate::estimate::Estimate;
use crate::plan::Plan;
use crate::recipe::Recipe;
use crate::ui::{megabytes, result, say, thousands};
use hydralora_data::{Example, IGNORE_LABEL};
use hydralora_model::TokenStream;
use serde_json::json;
use std::fmt::Write;
use std::process::ExitCode;

pub(crate) fn run(global: &Global, arguments: &CheckArguments) -> anyhow::Result<ExitCode> {
    let recipe = Recipe::read(&arguments.recipe.recipe, &arguments.recipe.set)?;
    let mut plan = Plan::open(recipe, None)?;
    let estimate = Estimate::of(&mut plan, 1)?;
    plan.recipe.notes.iter().for_each(|note| say(global, note));
    let memory = plan.memory();
    let mut text = String::new();
    let _ = writeln!(text, "model    {}", plan.metadata.base_model);
    let _ = writeln!(text, "method   {}, {}", plan.recipe.method_name, plan.parameters());
    if let Some(heads) = &plan.heads {
        let _ = writeln!(text, "experts  {}: {}", heads.num_experts, heads.reasons.join("; "));
    }
    let _ = writeln!(text, "layers   {} of {}", plan.sites.len(), plan.base.decoder.sites().len());
    let _ = writeln!(
        text,
        "memory   about {}: weights {}, adapter and optimizer {}, activations {} (largest batch, {} \
         tokens), output layer {}",
        megabytes(memory.total()),
        megabytes(memory.weights),
        megabytes(memory.trainable),
        megabytes(memory.activations),
        thousands(memory.largest_batch_tokens),
        megabytes(memory.output_layer),
    );
    let _ = writeln!(text, "steps    {estimate}");
    let _ = writeln!(text, "{}", plan.dataset.report);
    let sample = match plan.dataset.train.iter().next() {
        Some(example) => Some(show(&plan, &example?)?),
        None => None,
    };
    if let Some(sample) = &sample {
        let _ =
            writeln!(text, "the first record as the model sees it ([[ ]] marks what is trained):");
        let _ = write!(text, "{sample}");
    }
    let json = json!({
        "parameters": plan.parameters(),
        "memory_bytes": memory,
        "estimate": estimate,
        "data": plan.dataset.report,
        "recipe": plan.recipe.resolved(),
    });
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

/// A record's tokens as text, each run of trained ones between brackets.
fn show(plan: &Plan, example: &Example) -> anyhow::Result<String> {
    let mut text = String::new();
    let marked: Vec<bool> = example.labels.iter().map(|&label| label != IGNORE_LABEL).collect();
    let mut stream = TokenStream::with_special(plan.base.tokenizer());
    let mut open = false;
    for (&token, &trained) in example.tokens.iter().zip(&marked) {
        if trained != open {
            text.push_str(if trained { "[[" } else { "]]" });
            open = trained;
        }
        text.push_str(&stream.push(token)?);
    }
    text.push_str(&stream.finish()?);
    if open {
        text.push_str("]]");
    }
    Ok(text)
}

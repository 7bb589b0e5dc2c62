//! `hydralora init`: a recipe to begin with, and the schema of recipes.

use crate::args::{Global, InitArguments};
use crate::failure::bad_input;
use crate::recipe::relative;
use crate::schema;
use crate::ui::{result, say};
use anyhow::Context;
use hydralora_peft::{INIT_FROM, methods};
use hydralora_train::TrainConfig;
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

/// The option of methods that have an update for each domain.
const DOMAINS: &str = "domains";
/// Options that a first recipe sets; the others are shown as comments.
const SHOWN: [&str; 12] = [
    DOMAINS,
    "rank",
    "alpha",
    "num_experts",
    "targets",
    "dropout",
    "epochs",
    "batch_size",
    "learning_rate",
    "eval_every",
    "save_every",
    "gradient_checkpointing",
];

/// Prints the JSON schema of recipes.
pub(crate) fn schema(global: &Global) -> anyhow::Result<ExitCode> {
    let schema = schema::of_recipe();
    result(global, &schema, &serde_json::to_string_pretty(&schema)?)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn run(global: &Global, arguments: &InitArguments) -> anyhow::Result<ExitCode> {
    let path = &arguments.recipe;
    let text = recipe(arguments)?;
    let shown = path.display();
    // Never over something that is there.
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    let mut file = file.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => bad_input(format!("{shown}: is there already")),
        _ => anyhow::Error::new(error).context(format!("{shown}: cannot write the recipe")),
    })?;
    file.write_all(text.as_bytes()).with_context(|| format!("{shown}: cannot write the recipe"))?;
    say(global, format!("wrote {shown}; next: hydralora check {shown}"));
    result(global, &json!({"recipe": path}), &format!("{shown}"))?;
    Ok(ExitCode::SUCCESS)
}

fn recipe(arguments: &InitArguments) -> anyhow::Result<String> {
    let method = methods::find(&arguments.method)?;
    let schema = schema::of_recipe();
    let mut out = String::new();
    let name = arguments.recipe.file_stem().map_or("run".into(), |stem| stem.to_string_lossy());
    let _ = write!(
        out,
        "# {}\n# Lines behind a `#` show the defaults. `hydralora check` tells what the recipe does.\n\n\
         model:\n  # {}\n  path: {}\n  # {}\n  # dtype: f32\n\ndata:\n  # {}\n  train:\n",
        method.summary(),
        meaning(&schema["properties"]["model"], "path"),
        yaml(&model_from(arguments))?,
        meaning(&schema["properties"]["model"], "dtype"),
        meaning(&schema["properties"]["data"], "train"),
    );
    for path in &arguments.data {
        let _ = writeln!(out, "    - path: {}", yaml(path)?);
        if let Some(domain) = domain_of(path) {
            let _ = writeln!(out, "      domain: {}", yaml(&domain)?);
        }
    }
    let data = &schema["properties"]["data"];
    for (option, default) in [("valid_fraction", "0.05"), ("max_seq_len", "1024")] {
        let _ = write!(out, "  # {}\n  {option}: {default}\n", meaning(data, option));
    }
    let _ = write!(out, "\nmethod:\n  name: {}\n", method.name());
    let of_method = schema["properties"]["method"]["oneOf"].as_array();
    let of_method = of_method.and_then(|all| {
        all.iter().find(|schema| schema["properties"]["name"]["const"] == method.name())
    });
    let mut defaults = method.defaults();
    if let Some(domains) = defaults.get_mut(DOMAINS) {
        *domains = arguments.data.iter().filter_map(|path| domain_of(path)).collect();
    }
    let of_method = of_method.unwrap_or(&Value::Null);
    if of_method["properties"].get(INIT_FROM).is_some() {
        defaults.insert(INIT_FROM.to_owned(), Value::Null);
    }
    options(&mut out, &defaults, of_method)?;
    out += "\ntrain:\n";
    options(&mut out, &TrainConfig::default(), &schema["properties"]["train"])?;
    let _ = write!(out, "\noutput: {}\n", yaml(&format!("runs/{name}"))?);
    Ok(out)
}

/// The model as it is called from the recipe's folder, where it is a path from here.
fn model_from(arguments: &InitArguments) -> String {
    let model = Path::new(&arguments.model);
    let folder = arguments.recipe.parent().filter(|folder| !folder.as_os_str().is_empty());
    let moved = folder
        .filter(|_| model.is_relative() && model.exists())
        .and_then(|folder| relative(model, folder));
    moved.map_or_else(|| arguments.model.clone(), |path| path.to_string_lossy().into_owned())
}

/// Writes a section's options, each under what it means.
fn options(out: &mut String, defaults: &impl Serialize, schema: &Value) -> anyhow::Result<()> {
    let Value::Object(defaults) = serde_json::to_value(defaults)? else { return Ok(()) };
    for (option, default) in &defaults {
        let _ = writeln!(out, "  # {}", meaning(schema, option));
        let shown = if SHOWN.contains(&option.as_str()) { "" } else { "# " };
        // On one line, as JSON is YAML.
        let _ = writeln!(out, "  {shown}{option}: {default}");
    }
    Ok(())
}

/// The domain of a file: its name without the ending.
fn domain_of(path: &str) -> Option<String> {
    Path::new(path).file_stem().map(|stem| stem.to_string_lossy().into_owned())
}

/// What an option of a section means, on one line.
fn meaning(section: &Value, option: &str) -> String {
    let text = schema::description(section, option).replace('\n', " ");
    text.split_once(". ").map_or(&*text, |(first, _)| first).trim_end_matches('.').to_owned()
}

fn yaml(text: &str) -> anyhow::Result<String> {
    Ok(serde_saphyr::to_string(&text)?.trim_end().to_owned())
}

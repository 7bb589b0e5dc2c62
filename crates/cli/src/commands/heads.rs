//! `hydralora heads`: how many experts a data set needs.

use crate::args::{FeatureChoice, Global, HeadsArguments};
use crate::failure::bad_input;
use crate::features::mean_hidden;
use crate::plan::open_base;
use crate::recipe::ModelDtype;
use crate::sources;
use crate::ui::{result, say, table, thousands};
use hydralora_data::heads::{
    Corpus, Features, HeadsOptions, HeadsReport, Room, elbow_svg, find_heads, map_svg, page,
};
use hydralora_data::{DataConfig, Error, SourceConfig, named_sources};
use hydralora_peft::nearest;

use hydralora_files::{try_place, write_file};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

/// What a report consists of. The first tells that the others are ours.
const FILES: [&str; 4] = ["heads.json", "heads.html", "elbow.svg", "map.svg"];

/// Bytes of mean hidden states, and the texts that may have one whatever their size.
const HIDDEN_BYTES: usize = 128 << 20;
const LEAST_HIDDEN: usize = 10_000;

pub(crate) fn run(global: &Global, arguments: &HeadsArguments) -> anyhow::Result<ExitCode> {
    let options = HeadsOptions {
        k_min: arguments.k_min,
        k_max: arguments.k_max,
        seeds: arguments.seeds,
        seed: arguments.seed,
        rule: arguments.rule.into(),
    };
    if options.k_max < options.k_min {
        let (k_min, k_max) = (options.k_min, options.k_max);
        return Err(bad_input(format!("--k-max is {k_max}, below --k-min, which is {k_min}")));
    }
    if let Some(folder) = &arguments.out {
        check(folder).map_err(|error| error.context("--out"))?;
    }
    let sources = sources(global, arguments)?;
    let named = |error: Error| match error {
        Error::NoFeatures | Error::TooFewRows { .. } => {
            let names: Vec<String> =
                arguments.data.iter().map(|d| d.display().to_string()).collect();
            bad_input(format!("{}: {error}", names.join(", ")))
        }
        error => error.into(),
    };
    let (corpus, features) = match arguments.features {
        FeatureChoice::Tfidf if arguments.model.is_some() || arguments.layer.is_some() => {
            return Err(bad_input("--model and --layer are for --features model"));
        }
        FeatureChoice::Tfidf => {
            let corpus = read(global, &sources, Room::default())?;
            let features = Features::tfidf(&corpus, arguments.dimensions, arguments.seed);
            let features = features.map_err(named)?;
            (corpus, features)
        }
        FeatureChoice::Model => of_model(global, arguments, &sources)?,
    };
    let report = find_heads(&features, &corpus, &options).map_err(named)?;
    if let Some(folder) = &arguments.out {
        write(folder, &report)?;
    }
    result(global, &report, &text(&report, arguments.out.as_deref()))?;
    Ok(ExitCode::SUCCESS)
}

/// The files and named sources to look at, found.
fn sources(global: &Global, arguments: &HeadsArguments) -> anyhow::Result<Vec<SourceConfig>> {
    let train = arguments.data.iter().map(|path| source(arguments, path));
    let train = train.collect::<anyhow::Result<_>>()?;
    let mut data = DataConfig { train, ..DataConfig::default() };
    let mut faults: Vec<String> =
        data.validate(Path::new("")).iter().map(|fault| as_option(&fault.to_string())).collect();
    faults.dedup();
    if !faults.is_empty() {
        return Err(bad_input(faults.join("\n")));
    }
    sources::locate(&mut data, Path::new(""))?;
    for named in data.train.iter().filter_map(SourceConfig::named) {
        say(global, format!("{}: licence: {}", named.name, named.licence));
    }
    Ok(data.train)
}

/// A fault of the data section, as one of the option it comes from.
fn as_option(fault: &str) -> String {
    match fault.split_once("].").map_or(fault, |(_, rest)| rest).split_once(": ") {
        Some(("path", message)) => message.to_owned(),
        Some((key, message)) if key.starts_with("fields.") => format!("--field: {message}"),
        Some((key, message)) => format!("--{key}: {message}"),
        None => fault.to_owned(),
    }
}

/// A file of that path, or else the source of that name.
fn source(arguments: &HeadsArguments, path: &Path) -> anyhow::Result<SourceConfig> {
    let names = || named_sources().map(|named| named.name);
    let mut source = match names().find(|name| path == Path::new(name)) {
        _ if path.exists() => SourceConfig::new(path),
        Some(name) => SourceConfig::of(name),
        None => {
            let near = path.to_str().and_then(|path| nearest(path, names()));
            let hint = near.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            let path = path.display();
            return Err(bad_input(format!("{path}: no such file and no data source{hint}")));
        }
    };
    source.format.clone_from(&arguments.format);
    source.limit = arguments.limit;
    if let Some(field) = &arguments.domain_field {
        source.fields.insert("domain".to_owned(), field.clone());
    }
    source.fields.extend(arguments.fields.iter().cloned());
    Ok(source)
}

/// The texts, or a sample that fits `room`.
fn read(global: &Global, sources: &[SourceConfig], room: Room) -> anyhow::Result<Corpus> {
    let corpus = Corpus::read_within(sources, Path::new(""), room)?;
    let held = match corpus.is_sample() {
        true => format!(", of which {} are held", thousands(corpus.len())),
        false => String::new(),
    };
    let total = thousands(corpus.total());
    let from = match sources.len() {
        1 => "1 source".to_owned(),
        n => format!("{n} sources"),
    };
    say(global, format!("{total} texts from {from}{held}"));
    Ok(corpus)
}

fn of_model(
    global: &Global,
    arguments: &HeadsArguments,
    sources: &[SourceConfig],
) -> anyhow::Result<(Corpus, Features)> {
    let Some(model) = &arguments.model else {
        return Err(bad_input("--features model needs --model: whose hidden states to cluster"));
    };
    let base = open_base(model, ModelDtype::F32)?;
    let layers = base.decoder.config().num_hidden_layers;
    let layer = arguments.layer.unwrap_or(layers / 2);
    if layer > layers {
        return Err(bad_input(format!(
            "--layer: is {layer}; {model} has the layers 0 to {}, and {layers} for the final state",
            layers - 1
        )));
    }
    say(global, format!("hidden states of layer {layer} of {layers}"));
    let width = base.decoder.config().hidden_size;
    let texts = (HIDDEN_BYTES / (width * size_of::<f32>()).max(1)).max(LEAST_HIDDEN);
    let room = Room::default();
    let corpus = read(global, sources, Room { texts: texts.min(room.texts), ..room })?;
    let values = mean_hidden(global, &base, corpus.texts(), layer)?;
    let features = Features::dense(values, width, arguments.dimensions, arguments.seed)?;
    Ok((corpus, features))
}

/// `heads.json`, `heads.html` and the pictures.
pub(crate) fn write(folder: &Path, report: &HeadsReport) -> anyhow::Result<()> {
    fs::create_dir_all(folder).map_err(|error| {
        bad_input(format!("--out: cannot create {}: {error}", folder.display()))
    })?;
    for (name, bytes) in files(report)? {
        write_file(&folder.join(name), &bytes)?;
    }
    Ok(())
}

/// The files of a report, by their names.
pub(crate) fn files(report: &HeadsReport) -> anyhow::Result<Vec<(&'static str, Vec<u8>)>> {
    let contents = [
        serde_json::to_vec_pretty(report)?,
        page(report).into_bytes(),
        elbow_svg(report).into_bytes(),
        map_svg(report).into_bytes(),
    ];
    Ok(FILES.into_iter().zip(contents).collect())
}

/// Refuses a folder that cannot be written, or whose files of these names are no earlier report.
pub(crate) fn check(folder: &Path) -> anyhow::Result<()> {
    let report = |path: &Path| {
        let text = hydralora_files::read(path).ok();
        let value: Option<Value> = text.and_then(|text| serde_json::from_slice(&text).ok());
        value.is_some_and(|value| {
            ["num_experts", "reasons", "clusters", "curve"]
                .iter()
                .all(|key| value.get(key).is_some())
        })
    };
    let ours = report(&folder.join(FILES[0]));
    let mut there = FILES.iter().map(|name| folder.join(name)).filter(|path| path.exists());
    if let Some(path) = there.find(|path| !ours || !path.is_file()) {
        let path = path.display();
        return Err(bad_input(format!(
            "{path} belongs to no report of heads, and would be lost; expected another folder"
        )));
    }
    Ok(try_place(&folder.join(FILES[0]))?)
}

fn text(report: &HeadsReport, out: Option<&Path>) -> String {
    let mut lines = vec![format!("suggested number of heads: {}", report.num_experts)];
    lines.extend(report.reasons.iter().map(|reason| format!("  - {reason}")));
    lines.extend(report.notes.iter().map(|note| format!("  note: {note}")));
    if !report.curve.is_empty() {
        let head = ["k", "error", "silhouette", "gap", "strength"].map(str::to_owned);
        let mut rows = vec![head.to_vec()];
        let number = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.3}"));
        for at in &report.curve {
            rows.push(vec![
                at.k.to_string(),
                format!("{:.4}", at.error),
                number(at.silhouette),
                format!("{:.3}", at.gap),
                number(at.strength),
            ]);
        }
        lines.push(format!("\n{}", table(&rows)));
    }
    lines.push(String::new());
    let several = report.domains.len() > 1;
    for (at, cluster) in report.clusters.iter().enumerate() {
        let what = match cluster.terms.as_slice() {
            [] => format!("\"{}\"", cluster.example),
            terms => terms.join(", "),
        };
        let mut line = format!(
            "cluster {}  {} rows ({:.1} %)  {what}",
            at + 1,
            thousands(cluster.size),
            100.0 * cluster.share,
        );
        if several {
            let from: Vec<String> = cluster
                .domains
                .iter()
                .take(4)
                .map(|d| format!("{} {}", d.domain, d.rows))
                .collect();
            line.push_str(&format!("\n           from {}", from.join(", ")));
        }
        lines.push(line);
    }
    if let Some(agreement) = &report.agreement {
        lines.push(format!(
            "\nagreement with the domains: adjusted Rand index {:.3}, normalised mutual information {:.3}",
            agreement.adjusted_rand, agreement.normalized_mutual_information
        ));
    }
    if let Some(out) = out {
        lines.push(format!("\nreport   {}", out.join("heads.html").display()));
    }
    lines.join("\n")
}

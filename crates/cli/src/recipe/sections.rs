//! From a recipe's plain values to its sections, noting everything that is wrong with them.

use super::names::{self, GUIDE};
use super::paths::Origins;
use super::{ModelSection, NUM_EXPERTS, Origin, Recipe, SECTIONS, keys};
use crate::adapter;
use hydralora_data::{ChatTemplate, DataConfig, SourceConfig};
use hydralora_model::hub::Hub;
use hydralora_model::{ModelConfig, source};
use hydralora_peft::{
    Error, Fault, INIT_FROM, MethodOptions, methods, nearest, read_rest, suggestion,
};
use hydralora_train::{Chosen, TrainConfig};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A method's registered name and its options.
type NamedOptions = (&'static str, Box<dyn MethodOptions>);

/// A recipe from its values; relative paths are those of `base`.
pub(super) fn read(value: &Value, base: &Path, origin: Origin) -> Result<Recipe, Vec<Fault>> {
    let Value::Object(sections) = value else {
        let message = format!("expected a mapping of the sections {}", SECTIONS.join(", "));
        return Err(vec![Fault::new("recipe", message)]);
    };
    let mut faults = Vec::new();
    let unknown = sections.keys().filter(|key| !SECTIONS.contains(&key.as_str()));
    if let Some(program) = names::program(sections) {
        let message = format!(
            "this is {program}; a recipe of hydralora has the sections {} ({GUIDE})",
            SECTIONS.join(", ")
        );
        faults.push(Fault::new("recipe", message));
        let words = |key: &String| Some(Fault::new(key, names::answer("", key, &[])?));
        faults.extend(sections.keys().filter(|key| *key != "output").filter_map(words));
        return Err(faults);
    }
    for key in unknown {
        let hint = names::answer("", key, SECTIONS)
            .unwrap_or_else(|| suggestion(key, SECTIONS.iter().copied()));
        faults.push(Fault::new(key.clone(), format!("unknown section; {hint}")));
    }
    let set = |field: &str| origin.sets(field);
    let mut origins = Origins { base, set: &set, notes: Vec::new() };
    let model = read_model(sections, &mut origins, &mut faults);
    let data = read_data(sections, &mut origins, &mut faults);
    let train = read_train(sections, &mut faults);
    if let (Some(train), Some(data)) = (&train, &data) {
        faults.extend(best_set_fault(train, data));
    }
    let (mut method_section, auto_experts) = without_auto(sections.get("method"));
    let init_from = read_init_from(method_section.as_mut(), &mut origins, &mut faults);
    let notes = origins.notes;
    let method = read_method(method_section.as_ref(), &mut faults);
    if let (Some(_), Some((_, options))) = (&init_from, &method) {
        faults.extend(other_starts(options.as_ref()));
    }
    let targets = match &method {
        Some(_) => None,
        None => method_section.as_ref().and_then(of_targets_alone),
    };
    let output = match sections.get("output") {
        Some(Value::String(output)) if !output.is_empty() => PathBuf::from(output),
        None => PathBuf::from("runs/default"),
        Some(other) => {
            faults.push(Fault::new("output", format!("is {other}; expected a folder")));
            PathBuf::new()
        }
    };
    let options = method.as_ref().or(targets.as_ref()).map(|(_, options)| options.as_ref());
    let length = data.as_ref().map(|data| data.max_seq_len);
    check_with_model(model.as_ref(), options, length, &mut faults);
    match (model, data, method, train) {
        (Some(model), Some(data), Some((method_name, method)), Some(train))
            if faults.is_empty() =>
        {
            let base = base.to_path_buf();
            Ok(Recipe {
                model,
                data,
                method_name,
                method,
                auto_experts,
                train,
                output,
                base,
                init_from,
                origin,
                notes,
            })
        }
        _ => Err(faults),
    }
}

/// What a section holds, if it is a mapping; nothing where it is missing and may be.
fn mapping(
    sections: &Map<String, Value>,
    name: &str,
    example: Option<&str>,
    faults: &mut Vec<Fault>,
) -> Option<Map<String, Value>> {
    match (sections.get(name), example) {
        (Some(Value::Object(section)), _) => Some(section.clone()),
        (None | Some(Value::Null), None) => Some(Map::new()),
        (None | Some(Value::Null), Some(example)) => {
            faults.push(Fault::new(
                name,
                format!("the section is missing; expected one such as {example}"),
            ));
            None
        }
        (Some(other), example) => {
            let example = example.map(|example| format!(" such as {example}")).unwrap_or_default();
            faults.push(Fault::new(name, format!("is {other}; expected a mapping{example}")));
            None
        }
    }
}

/// Reads a section, answering names of other programs with ours.
fn read_named<T: DeserializeOwned>(
    prefix: &str,
    mut section: Map<String, Value>,
    known: &Map<String, Value>,
    faults: &mut Vec<Fault>,
) -> Option<T> {
    take_names(prefix, &mut section, known, faults);
    let (value, found) = read_rest(prefix, &section, known);
    faults.extend(found);
    value
}

/// Takes out of a section the options that have another name here, with a fault for each.
fn take_names(
    prefix: &str,
    section: &mut Map<String, Value>,
    known: &Map<String, Value>,
    faults: &mut Vec<Fault>,
) {
    let own: Vec<&str> = known.keys().map(String::as_str).collect();
    section.retain(|key, _| {
        let answer = match known.contains_key(key) {
            true => None,
            false => names::answer(prefix, key, &own),
        };
        if let Some(answer) = &answer {
            faults.push(Fault::new(format!("{prefix}.{key}"), format!("unknown option; {answer}")));
        }
        answer.is_none()
    });
}

/// Adds `more` but for what is said of a field of which something is said already.
fn extend(faults: &mut Vec<Fault>, more: impl IntoIterator<Item = Fault>) {
    for fault in more {
        if !faults.iter().any(|said| said.field == fault.field) {
            faults.push(fault);
        }
    }
}

fn read_model(
    sections: &Map<String, Value>,
    origins: &mut Origins<'_>,
    faults: &mut Vec<Fault>,
) -> Option<ModelSection> {
    let section = mapping(sections, "model", Some("{path: smollm2-135m}"), faults)?;
    let before = faults.len();
    let mut model: ModelSection = read_named("model", section, &keys::of_model(), faults)?;
    if let Some(found) = origins.find("model.path", Path::new(&model.path)) {
        model.path = found.to_string_lossy().into_owned();
    }
    if model.path.is_empty() && faults.len() == before {
        let message = "missing; expected a folder, a .gguf file or a name";
        extend(faults, [Fault::new("model.path", message)]);
    }
    Some(model)
}

fn read_train(sections: &Map<String, Value>, faults: &mut Vec<Fault>) -> Option<TrainConfig> {
    let mut section = mapping(sections, "train", None, faults)?;
    take_names("train", &mut section, &keys::of_train(), faults);
    let optimizer = Chosen::take(&mut section).unwrap_or_else(|found| {
        faults.extend(found);
        Chosen::default()
    });
    let (train, found) = read_rest("train", &section, &keys::of_train());
    faults.extend(found);
    let train = TrainConfig { optimizer, ..train? };
    extend(faults, train.faults().into_iter().map(|(field, message)| Fault::new(field, message)));
    Some(train)
}

/// What is wrong with the name of the set that decides which adapter is the best.
fn best_set_fault(train: &TrainConfig, data: &DataConfig) -> Option<Fault> {
    let asked = train.best_set.as_deref()?;
    let mut known: Vec<&str> = data.valid.iter().filter_map(|of| of.set.as_deref()).collect();
    known.dedup();
    if known.contains(&asked) {
        return None;
    }
    let hint = match known.as_slice() {
        [] => "`data.valid` names no sets; expected a mapping there such as {law: [{path: FILE}]}"
            .to_owned(),
        known => suggestion(asked, known.iter().copied()),
    };
    Some(Fault::new("train.best_set", format!("`{asked}` is no set of `data.valid`; {hint}")))
}

/// The entries of `data.valid` where that is a mapping of a set's name to its files: a list, or one alone.
/// Each comes with its set and with what it is called in faults.
fn entries_of_sets(sets: Map<String, Value>) -> Vec<(String, String, Value)> {
    let mut entries = Vec::new();
    for (set, files) in sets {
        let field = format!("data.valid.{set}");
        match files {
            Value::Array(items) => {
                let items = items.into_iter().enumerate();
                entries
                    .extend(items.map(|(at, item)| (set.clone(), format!("{field}[{at}]"), item)));
            }
            one => entries.push((set, field, one)),
        }
    }
    entries
}

/// Calls entries of sets in faults as the recipe does: by their set, in the place of their number.
fn by_set(faults: &mut [Fault], fields: &[String]) {
    for (number, field) in fields.iter().enumerate() {
        let counted = format!("data.valid[{number}]");
        for fault in faults.iter_mut() {
            if let Some(rest) = fault.field.strip_prefix(&counted) {
                fault.field = format!("{field}{rest}");
            }
        }
    }
}

fn read_data(
    sections: &Map<String, Value>,
    origins: &mut Origins<'_>,
    faults: &mut Vec<Fault>,
) -> Option<DataConfig> {
    let mut section = mapping(sections, "data", Some("{train: [{path: FILE}]}"), faults)?;
    // Sources are read one by one, so that one that is wrong hides no other.
    let mut of_sets = Vec::new();
    let mut list = |name: &str, faults: &mut Vec<Fault>| -> Vec<SourceConfig> {
        match section.remove(name) {
            Some(Value::Array(items)) => {
                let sources = items.into_iter().enumerate();
                let field = |index: usize| format!("data.{name}[{index}]");
                sources.map(|(index, item)| read_source(field(index), item, faults)).collect()
            }
            Some(Value::Object(sets)) if name == "valid" && !sets.contains_key("path") => {
                let of_set = |(set, field, item): (String, String, Value)| {
                    let source = read_source(field.clone(), item, faults);
                    of_sets.push(field);
                    SourceConfig { set: Some(set), ..source }
                };
                entries_of_sets(sets).into_iter().map(of_set).collect()
            }
            None | Some(Value::Null) => Vec::new(),
            Some(other) => {
                let entry = match &other {
                    Value::String(path) => format!("[{{path: {path}}}]"),
                    _ => "[{path: FILE}]".to_owned(),
                };
                let message = format!("is no list; expected one such as {entry}");
                faults.push(Fault::new(format!("data.{name}"), message));
                Vec::new()
            }
        }
    };
    let (train, valid) = (list("train", faults), list("valid", faults));
    section.insert("train".to_owned(), json!([]));
    let data: Option<DataConfig> = read_named("data", section, &keys::of_data(), faults);
    let mut data = DataConfig { train, valid, ..data? };
    for (name, sources) in [("train", &mut data.train), ("valid", &mut data.valid)] {
        for (index, source) in sources.iter_mut().enumerate() {
            let of_set = of_sets.get(index).filter(|_| name == "valid").cloned();
            let field = of_set.unwrap_or_else(|| format!("data.{name}[{index}]"));
            settle(&format!("{field}.path"), &mut source.path, origins);
        }
    }
    for (index, file) in data.overlap_check.iter_mut().enumerate() {
        settle(&format!("data.overlap_check[{index}]"), file, origins);
    }
    if let Some(template) = &mut data.template
        && ChatTemplate::builtin(template).is_err()
    {
        let mut path = PathBuf::from(&*template);
        settle("data.template", &mut path, origins);
        *template = path.to_string_lossy().into_owned();
    }
    let found = data.validate(origins.base);
    let mut found: Vec<Fault> =
        found.into_iter().map(|fault| Fault::new(fault.path, fault.message)).collect();
    by_set(&mut found, &of_sets);
    let of_source = |fault: &Fault, said: &Fault| {
        // Who wrote `file: x` is told so, and not that `path` is missing.
        let entry = fault.field.strip_suffix(".path");
        entry.is_some_and(|entry| {
            said.field.starts_with(&format!("{entry}.")) || said.field == entry
        }) && fault.message.contains("is missing")
    };
    let said = |fault: &Fault, faults: &[Fault]| {
        faults.iter().any(|said| of_source(fault, said))
            || fault.field == "data.train"
                && faults.iter().any(|said| {
                    said.field.starts_with("data.") && said.message.contains("data.train")
                        || said.message.contains("is `train`")
                })
    };
    found.retain(|fault| !said(fault, faults));
    extend(faults, found);
    Some(data)
}

/// Makes a path that counts from elsewhere one that is right from the recipe's folder.
fn settle(field: &str, path: &mut PathBuf, origins: &mut Origins<'_>) {
    let found = origins.find(field, path);
    if let Some(found) = found.filter(|found| *found != origins.base.join(&*path)) {
        *path = found;
    }
}

/// Reads an entry of a list of sources, called `prefix` in faults.
fn read_source(prefix: String, item: Value, faults: &mut Vec<Fault>) -> SourceConfig {
    let section = match item {
        Value::Object(section) => section,
        Value::String(path) => {
            let message =
                format!("is the text `{path}`; expected a mapping such as {{path: {path}}}");
            faults.push(Fault::new(prefix, message));
            return SourceConfig::new(path);
        }
        other => {
            let message = format!("is {other}; expected a mapping such as {{path: FILE}}");
            faults.push(Fault::new(prefix, message));
            return SourceConfig::new("");
        }
    };
    let found = read_named(&prefix, section, &keys::of_source(), faults);
    found.unwrap_or_else(|| SourceConfig::new(""))
}

/// The method's section with `num_experts: auto` taken out, if the method has experts to count, and
/// whether it was there. Until the data have been looked at, the method's own default stands in.
fn without_auto(section: Option<&Value>) -> (Option<Value>, bool) {
    let mut section = section.cloned();
    let mut auto = false;
    if let Some(Value::Object(map)) = &mut section
        && map.get(NUM_EXPERTS) == Some(&json!("auto"))
        && let Some(Value::String(name)) = map.get("name")
        && methods::find(name).is_ok_and(|method| method.defaults().contains_key(NUM_EXPERTS))
    {
        map.remove(NUM_EXPERTS);
        auto = true;
    }
    (section, auto)
}

/// Takes the adapter that training starts from out of the method's section.
fn read_init_from(
    section: Option<&mut Value>,
    origins: &mut Origins<'_>,
    faults: &mut Vec<Fault>,
) -> Option<PathBuf> {
    let field = format!("method.{INIT_FROM}");
    let given = match section?.as_object_mut()?.remove(INIT_FROM)? {
        Value::Null => return None,
        Value::String(given) => given,
        other => {
            let message = format!("is {other}; expected the folder of an adapter, or of its run");
            faults.push(Fault::new(field, message));
            return None;
        }
    };
    let found =
        origins.find(&field, Path::new(&given)).unwrap_or_else(|| origins.base.join(&given));
    match adapter::folder(&found.to_string_lossy()) {
        Ok(folder) => Some(folder),
        Err(message) => {
            faults.push(Fault::new(field, format!("{}: {message}", found.display())));
            None
        }
    }
}

/// Options that say where to start, beside an adapter that does.
fn other_starts(options: &dyn MethodOptions) -> Vec<Fault> {
    let options = options.to_recipe();
    let usual = [("init_lora_weights", "kaiming"), ("router_init", "random"), ("init", "random")];
    let other = |(key, usual): &(&str, &str)| {
        options.get(*key).and_then(Value::as_str).is_some_and(|value| value != *usual)
    };
    let fault = |key: &str| {
        let message = format!("says where to start, as {INIT_FROM} does; use one of them");
        Fault::new(format!("method.{key}"), message)
    };
    let gain = options.get("router_gain").and_then(Value::as_f64).filter(|gain| *gain != 1.0);
    let named = usual.into_iter().filter(other).map(|(key, _)| key);
    named.chain(gain.map(|_| "router_gain")).map(fault).collect()
}

/// Reads a `method:` section, noting what is wrong with it.
pub(crate) fn read_method(value: Option<&Value>, faults: &mut Vec<Fault>) -> Option<NamedOptions> {
    let example = "{name: hydralora, rank: 4}";
    let mut section = match value {
        Some(Value::Object(section)) => section.clone(),
        None | Some(Value::Null) => {
            let message = format!("the section is missing; expected one such as {example}");
            faults.push(Fault::new("method", message));
            return None;
        }
        Some(other) => {
            let message = format!("is {other}; expected a mapping such as {example}");
            faults.push(Fault::new("method", message));
            return None;
        }
    };
    let before = faults.len();
    let Some(name) = method_name(&mut section, faults) else {
        // Whichever it is to be, names of other programs are no options of it.
        take_names("method", &mut section, &keys::of_methods(), faults);
        return None;
    };
    let method = methods::find(name).ok()?;
    take_names("method", &mut section, &method.defaults(), faults);
    match method.read_recipe(&section) {
        Ok(options) if faults.len() == before => Some((method.name(), options)),
        Ok(_) => None,
        Err(found) => {
            faults.extend(found);
            None
        }
    }
}

/// Takes the method's name out of its section; where there is none of ours, the one that is meant.
fn method_name(section: &mut Map<String, Value>, faults: &mut Vec<Fault>) -> Option<&'static str> {
    let known: Vec<&'static str> = methods::METHODS.iter().map(|method| method.name()).collect();
    let mut key = "name";
    if !section.contains_key(key)
        && let Some(other) =
            ["type", "method", "peft_type"].into_iter().find(|key| section.contains_key(*key))
    {
        key = other;
        faults.push(Fault::new(format!("method.{key}"), "unknown option; here it is `name`"));
    }
    let field = format!("method.{key}");
    let name = match section.remove(key) {
        Some(Value::String(name)) => name,
        Some(other) if !other.is_null() => {
            let message = format!("is {other}; expected one of {}", known.join(", "));
            faults.push(Fault::new(field, message));
            return None;
        }
        _ => {
            let message = format!("missing; expected one of {}", known.join(", "));
            faults.push(Fault::new(field, message));
            return None;
        }
    };
    if let Some(known) = known.iter().find(|known| **known == name) {
        return Some(known);
    }
    let (meant, hint) = match names::method(&name) {
        Some((meant, hint)) => (meant, hint.to_owned()),
        None => {
            let spelled = name.to_lowercase().replace('_', "-");
            match nearest(&spelled, known.iter().copied()) {
                Some(nearest) => (
                    known.iter().copied().find(|known| *known == nearest),
                    format!("did you mean `{nearest}`?"),
                ),
                None => (None, format!("expected one of {}", known.join(", "))),
            }
        }
    };
    faults.push(Fault::new(field, format!("`{name}` is not known; {hint}")));
    meant
}

/// The method of a section with all options but the targets at their defaults, to look for the targets
/// although other options are wrong.
fn of_targets_alone(section: &Value) -> Option<NamedOptions> {
    let section = section.as_object()?;
    let name = method_name(&mut section.clone(), &mut Vec::new())?;
    let method = methods::find(name).ok()?;
    let targets = ("targets".to_owned(), section.get("targets")?.clone());
    Some((method.name(), method.read_recipe(&Map::from_iter([targets])).ok()?))
}

/// Checks what the model's configuration decides, where that is on this machine already.
fn check_with_model(
    model: Option<&ModelSection>,
    options: Option<&dyn MethodOptions>,
    length: Option<usize>,
    faults: &mut Vec<Fault>,
) {
    let Some(model) = model.filter(|model| !model.path.is_empty()) else { return };
    let path = match Hub::from_environment().find(&model.path) {
        Ok(Some(path)) => path,
        Ok(None) => return,
        Err(error) => {
            faults.push(Fault::new("model.path", error.to_string()));
            return;
        }
    };
    match source::config_at(&path) {
        Ok(config) => extend(faults, faults_with(&config, options, length)),
        Err(error) => faults.push(Fault::new("model.path", error.to_string())),
    }
}

/// What is wrong with a method's options and the length of sequences, for a model of this configuration.
pub(crate) fn faults_with(
    config: &ModelConfig,
    options: Option<&dyn MethodOptions>,
    length: Option<usize>,
) -> Vec<Fault> {
    let mut faults = Vec::new();
    let limit = config.max_position_embeddings;
    if let Some(asked) = length.filter(|asked| *asked > limit) {
        let message = format!("is {asked}; the model's context holds {limit}");
        faults.push(Fault::new("data.max_seq_len", message));
    }
    let Some(options) = options else { return faults };
    let sites = config.sites();
    let chosen = if options.whole_model() { Ok(sites) } else { options.select(&sites) };
    match chosen.and_then(|sites| options.check_layers(&sites)) {
        Ok(()) => {}
        Err(Error::Options { faults: found }) => faults.extend(found),
        Err(error) => {
            let message = error.to_string();
            let message = message.strip_prefix("method.targets: ").unwrap_or(&message);
            faults.push(Fault::new("method.targets", message));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(value: Value) -> Vec<String> {
        let found = read(&value, Path::new(""), Origin::default()).err().unwrap_or_default();
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_fault_hides_no_other() {
        let found = faults(json!({
            "model": {"path": "org/name", "dtyp": "f32"},
            "data": {
                "train": [{"path": "no", "weight": "1"}, {"file": "x"}, "y", 3],
                "max_seq_len": 0, "valid_fraction": 1.5, "lenght": 3,
            },
            "method": {"type": "hydralora", "r": 8, "num_heads": 4, "dropout": 2, "rank": "4"},
            "train": {"lr": 1, "epochs": 0, "learning_rate": -1, "batch_size": "8"},
            "seed": 3,
        }));
        let expected = [
            "seed: unknown section; ",
            "model.dtyp: unknown option; did you mean `dtype`?",
            "data.train[0].weight: is the text `1`; expected a number: write it without quotes",
            "data.train[1].file: unknown option; here it is `path`",
            "data.train[2]: is the text `y`; expected a mapping such as {path: y}",
            "data.train[3]: is 3; expected a mapping such as {path: FILE}",
            "data.lenght: unknown option; ",
            "data.train[0].path: there is no file no",
            "data.train[2].path: there is no file y",
            "data.valid_fraction: must be",
            "data.max_seq_len: must be",
            "train.lr: unknown option; here it is `learning_rate`",
            "train.batch_size: is the text `8`; expected a whole number",
            "train.epochs: is 0;",
            "train.learning_rate: is -1;",
            "method.type: unknown option; here it is `name`",
            "method.r: unknown option; here it is `rank`",
            "method.num_heads: unknown option; here it is `num_experts`",
            "method.rank: is the text `4`; expected a whole number",
            "method.dropout: is 2;",
        ];
        for line in expected {
            assert!(found.iter().any(|found| found.starts_with(line)), "{line}\n{found:#?}");
        }
        assert_eq!(found.len(), expected.len(), "{found:#?}");
    }

    #[test]
    fn methods_of_other_names_are_answered() {
        for (name, expected) in [
            ("qlora", "it is `name: lora` with `model.dtype: q4_0`"),
            ("dpo", "preference and reward training are not here"),
            ("HydraLoRA", "did you mean `hydralora`?"),
            ("prefix_tuning", "did you mean `prefix-tuning`?"),
            ("frobnicate", "expected one of full, lora"),
        ] {
            let found = faults(json!({"method": {"name": name, "rank": 0}})).join("\n");
            assert!(
                found.contains(&format!("method.name: `{name}` is not known; {expected}")),
                "{found}"
            );
            assert_eq!(
                found.contains("method.rank: is 0"),
                !["dpo", "frobnicate", "prefix_tuning"].contains(&name),
                "{found}"
            );
        }
    }

    #[test]
    fn sections_of_another_shape_are_said() {
        let found = faults(
            json!({"model": "m", "data": {"train": "x.jsonl"}, "method": "lora", "train": [1]}),
        );
        let expected = [
            "model: is \"m\"; expected a mapping such as {path: smollm2-135m}",
            "data.train: is no list; expected one such as [{path: x.jsonl}]",
            "train: is [1]; expected a mapping",
            "method: is \"lora\"; expected a mapping such as {name: hydralora, rank: 4}",
        ];
        assert_eq!(found, expected);
        let found = faults(json!({"data": {"dataset": "x"}}));
        assert!(!found.iter().any(|line| line.starts_with("data.train:")), "{found:?}");
    }

    #[test]
    fn a_file_of_another_program_is_called_so() {
        let found = faults(json!({
            "base_model": "x", "datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}],
            "adapter": "qlora", "lora_r": 8, "micro_batch_size": 2, "frobnicate": 1,
        }));
        assert!(found[0].contains("this is an Axolotl configuration"), "{found:?}");
        assert!(found.contains(&"lora_r: here it is `method.rank`".to_owned()), "{found:?}");
        assert_eq!(found.len(), 6, "{found:#?}");
    }
}

//! The shape of the house, held by what cargo and the files say.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn crates_import_only_from_those_below() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut found = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let short = |name: &Value| name.as_str().unwrap().replace("hydralora-", "");
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let mut inside: Vec<String> = dependencies
            .filter(|dependency| dependency["path"].is_string() && dependency["kind"].is_null())
            .map(|dependency| short(&dependency["name"]))
            .collect();
        inside.sort();
        found.insert(short(&package["name"]), inside.join(" "));
    }
    let allowed = [
        ("cluster", ""),
        ("data", "cluster files"),
        ("energy", ""),
        ("files", ""),
        ("hydralora", "data energy files kernels model peft run runtime serve study train"),
        ("kernels", "runtime"),
        ("model", "files kernels runtime"),
        ("peft", "files kernels model"),
        ("run", "data files kernels model"),
        ("runtime", ""),
        ("serve", "data kernels model peft run runtime"),
        ("study", "files"),
        ("testing", ""),
        ("train", "data energy files kernels model peft runtime"),
    ];
    let allowed = allowed.map(|(name, inside)| (name.to_owned(), inside.to_owned()));
    assert_eq!(found, allowed.into_iter().collect());
}

fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

#[test]
fn the_base_model_names_no_method() {
    // But for the one that tells which files hold no model: llama.cpp's adapters are among them.
    let named = |path: &PathBuf| !path.ends_with("gguf/kind.rs");
    let all = sources(&root().join("crates/model/src")).into_iter();
    for (path, text) in all.filter(|(path, _)| named(path)) {
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//!")) {
            let code = line.to_lowercase().replace("hydralora", "");
            let named = ["lora", "ia3", "prefix_tuning"].iter().any(|name| code.contains(name));
            assert!(!named, "{}: {line}", path.display());
        }
    }
}

#[test]
fn every_method_is_one_file_and_is_documented() {
    let folder = root().join("crates/peft/src/methods");
    let files = sources(&folder).len() - 1;
    assert_eq!(files, hydralora_peft::methods::METHODS.len(), "mod.rs lists every file");
    let index = fs::read_to_string(root().join("docs/methods.md")).unwrap();
    for method in hydralora_peft::methods::METHODS {
        let name = method.name();
        assert!(index.contains(&format!("[`{name}`](methods/{name}.md)")), "{name}");
        let page = root().join(format!("docs/methods/{name}.md"));
        let page = fs::read_to_string(&page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
        for option in method.defaults().keys() {
            let named = format!("`{option}`");
            assert!(page.contains(&named) || index.contains(&named), "{name} {option}");
        }
    }
}

#[test]
fn every_training_option_is_documented() {
    let guide = fs::read_to_string(root().join("docs/recipes.md")).unwrap();
    let defaults = serde_json::to_value(hydralora_train::TrainConfig::default()).unwrap();
    for option in defaults.as_object().unwrap().keys() {
        assert!(guide.contains(&format!("`{option}`")), "{option}");
    }
}

#[test]
fn no_source_file_outgrows_a_reader() {
    for (path, text) in sources(&root().join("crates")) {
        let lines = text.lines().count();
        assert!(lines <= 800, "{} has {lines} lines", path.display());
    }
}

/// Files that open what has to be no file of a user's, or look at it first.
const OPENERS: [&str; 15] = [
    // Where the check itself lives, and folders are opened to be flushed.
    "files/src",
    // What the kernel says.
    "energy/src/powercap.rs",
    "run/src/eval/sandbox",
    "cli/src/memory.rs",
    "cli/src/commands/study",
    "study/src/claim.rs",
    "train/src/event.rs",
    // An argument of the command line may be a pipe, as in `train <(sed ... recipe.yaml)`.
    "cli/src/recipe.rs",
    "cli/src/commands/batch.rs",
    "cli/src/commands/bench/train.rs",
    "cli/src/commands/serve.rs",
    // These ask `expect_file` first.
    "data/src/input.rs",
    "data/src/layout/parquet.rs",
    "data/src/store.rs",
    "model/src/weights/map.rs",
];

/// A pipe in the place of a file would be waited for for ever.
#[test]
fn files_are_opened_by_the_crate_that_refuses_pipes() {
    for (path, text) in sources(&root().join("crates")) {
        let shown = path.display().to_string();
        let exempt = OPENERS.iter().any(|known| shown.contains(&format!("crates/{known}")));
        if exempt || !shown.contains("/src/") || shown.contains("tests") {
            continue;
        }
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let code = code.split("#[cfg(all(test").next().unwrap_or_default();
        for call in ["fs::read(", "fs::read_to_string(", "fs_err::read(", "File::open("] {
            // `MappedFile::open` looks itself.
            let part_of_name = |at: usize| code[..at].ends_with(char::is_alphanumeric);
            let found = code.match_indices(call).find(|(at, _)| !part_of_name(*at));
            let line = found.map(|(at, _)| code[..at].lines().count());
            assert!(
                line.is_none(),
                "{shown}:{line:?}: {call}; use hydralora_files::open, read, ..."
            );
        }
    }
}

//! Files that hydralora did not write, in the way of what it writes.

use crate::support::{Place, Ran, model};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/interop");
    folder.join(name).display().to_string()
}

fn base() -> String {
    model().display().to_string()
}

/// Everything below a folder with its content; locks, which come and go, aside.
pub(crate) fn all_below(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(inner) = open.pop() {
        for entry in fs::read_dir(inner).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if !path.ends_with(".hydralora.lock") {
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Runs what has to be refused, says why, and changes nothing in `folder`.
fn refused(place: &Place, folder: &str, arguments: &[&str], words: &[&str]) {
    let before = all_below(&place.path(folder));
    let ran = place.run(arguments);
    assert_eq!(ran.code, Some(2), "{arguments:?}\n{}\n{}", ran.stdout, ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{word} is missing in\n{}", ran.stderr);
    }
    assert!(before == all_below(&place.path(folder)), "{arguments:?} changed {folder}");
}

/// Every command that writes a folder, but for its `--out`.
fn commands() -> Vec<Vec<String>> {
    let (lora, base) = (fixture("lora"), base());
    let official = fixture("official_hydralora");
    let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    vec![
        own(&["merge", "--model", &base, "--adapter", &lora]),
        own(&["export", "--adapter", &lora, "--as", "lora"]),
        own(&["export", "--adapter", &official, "--as", "hydralora-official"]),
        own(&["import", "--from", "lora", &lora, &lora]),
        own(&["compose", &lora, &lora, "--how", "average"]),
    ]
}

#[test]
fn a_project_with_a_common_file_name_is_no_old_result() {
    let place = Place::new();
    for file in ["config.json", "adapter_config.json"] {
        place.write(&format!("proj/{file}"), "{}");
    }
    place.write("proj/src/main.rs", "fn main() {}");
    place.write("proj/.git/HEAD", "ref: refs/heads/main");
    for command in commands() {
        let mut arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        arguments.extend(["--out", "proj"]);
        refused(&place, "proj", &arguments, &["--out", "would be lost", "another place"]);
    }
}

#[test]
fn a_result_is_replaced_unless_it_holds_more_than_was_written() {
    let place = Place::new();
    for command in commands() {
        let mut arguments: Vec<&str> = command.iter().map(String::as_str).collect();
        let out = format!("out-{}", arguments[..2].join("-").replace('/', "_"));
        let out = if arguments.contains(&"hydralora-official") { format!("{out}-o") } else { out };
        arguments.extend(["--out", &out]);
        place.succeed(&arguments);
        place.succeed(&arguments);
        place.write(&format!("{out}/notes/thesis.tex"), "mine");
        refused(&place, &out, &arguments, &["notes/thesis.tex", "would be lost"]);
        fs::remove_dir_all(place.path(&out).join("notes")).unwrap();
        let config = ["config.json", "adapter_config.json"].map(|name| place.path(&out).join(name));
        let config = config.iter().find(|path| path.exists()).unwrap();
        let text = fs::read_to_string(config).unwrap();
        fs::write(config, text + " ").unwrap();
        refused(&place, &out, &arguments, &["was changed since it was written"]);
    }
    // One kind never takes the place of another.
    let lora = fixture("lora");
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", "train.max_steps=2"]);
    let export = ["export", "--adapter", &lora, "--as", "lora", "--out", "run/adapter"];
    refused(&place, "run", &export, &["holds a trained adapter"]);
}

#[test]
fn models_and_adapters_of_others_are_kept_and_those_of_earlier_builds_replaced() {
    let place = Place::new();
    let (lora, base) = (fixture("lora"), base());
    let copy = |from: &str, to: &str| {
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                fs::create_dir_all(place.path(to)).unwrap();
                fs::copy(&path, place.path(to).join(name)).unwrap();
            }
        }
    };
    copy(&base, "downloaded");
    let merge = ["merge", "--model", &base, "--adapter", &lora, "--out", "downloaded"];
    refused(&place, "downloaded", &merge, &["nothing says that hydralora wrote it"]);
    copy(&lora, "peft");
    let export = ["export", "--adapter", &lora, "--as", "lora", "--out", "peft"];
    refused(&place, "peft", &export, &["nothing says that hydralora wrote it"]);
    // An adapter without the list, as builds before this one left it.
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", "train.max_steps=2"]);
    copy(&place.path("run/adapter").display().to_string(), "earlier");
    fs::remove_file(place.path("earlier/.hydralora-files.json")).unwrap();
    let export = ["export", "--adapter", &lora, "--as", "lora", "--out", "earlier"];
    place.write("earlier/README.md", "mine");
    refused(&place, "earlier", &export, &["README.md"]);
    fs::remove_file(place.path("earlier/README.md")).unwrap();
    place.succeed(&export);
}

#[test]
fn files_named_by_out_are_replaced_if_they_are_ours() {
    let place = Place::new();
    let (lora, base) = (fixture("lora"), base());
    place.write("thesis.txt", "mine");
    fs::copy(model().join("stories260K.gguf"), place.path("theirs.gguf")).unwrap();
    let merge = ["merge", "--model", &base, "--adapter", &lora, "--format", "gguf", "--out"];
    let export = ["export", "--model", &base, "--adapter", &lora, "--as", "lora-gguf", "--out"];
    let random = ["model", "random", "--shape", "llama2-7b", "--to"];
    for out in ["thesis.txt", "theirs.gguf"] {
        for command in [&merge[..], &export, &random] {
            refused(&place, "", &[command, &[out]].concat(), &["that hydralora wrote"]);
        }
    }
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/eval-sample");
    let data = data.display().to_string();
    let eval = ["eval", "--model", &base, "--data", &data, "--tasks", "mmlu", "--limit", "1"];
    let eval = [&eval[..], &["--out"]].concat();
    refused(&place, "", &[&eval[..], &["thesis.txt"]].concat(), &["no results file"]);
    place.write("empty.gguf", "");
    place.write("empty.json", "");
    for (command, out) in [(&merge[..], "empty.gguf"), (&export, "l.gguf"), (&eval, "empty.json")] {
        let arguments = [command, &[out]].concat();
        place.succeed(&arguments);
        place.succeed(&arguments);
    }
    // A model that came from somewhere is not written over by one of the same name.
    place.write("have/theirs.gguf", "another");
    let ran = place.run(&["model", "get", "theirs.gguf", "--to", "have"]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert_eq!(place.read("have/theirs.gguf"), "another");
    place.succeed(&["model", "get", "theirs.gguf", "--to", "new"]);
    place.succeed(&["model", "get", "theirs.gguf", "--to", "new"]);
}

#[test]
fn places_that_cannot_be_written_are_found_before_the_work() {
    let place = Place::new();
    let (lora, base) = (fixture("lora"), base());
    place.write("file", "in the way");
    // A model that does not exist: it would be the first thing to fail otherwise.
    for arguments in [
        vec!["eval", "--model", "no/such", "--tasks", "mmlu", "--out", "file/results.json"],
        vec!["eval", "--model", "no/such", "--tasks", "mmlu", "--samples", "file/log.jsonl"],
        vec!["heads", "no.jsonl", "--out", "file/heads"],
        vec!["quickstart", "--model", "no/such", "--out", "file/quickstart"],
        vec!["model", "get", "no/such", "--to", "file/models"],
        vec!["model", "random", "--shape", "llama2-7b", "--to", "file/x.gguf"],
        vec!["export", "--adapter", &lora, "--as", "lora", "--out", "file/out"],
        vec!["merge", "--model", &base, "--adapter", &lora, "--out", "file/out.gguf"],
        vec!["compose", &lora, &lora, "--how", "average", "--out", "file/out"],
        vec!["import", "--from", "lora", &lora, &lora, "--out", "file/out"],
    ] {
        let ran = place.run(&arguments);
        assert_eq!(ran.code, Some(1), "{arguments:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains("cannot write file/"), "{arguments:?}\n{}", ran.stderr);
    }
}

#[test]
fn heads_keeps_files_of_its_names() {
    let place = Place::new();
    place.write("mine/map.svg", "<svg/>");
    let heads = ["heads", "animals.jsonl", "colours.jsonl", "--seeds", "1", "--out"];
    refused(&place, "mine", &[&heads[..], &["mine"]].concat(), &["map.svg", "would be lost"]);
    place.succeed(&[&heads[..], &["run"]].concat());
    place.write("run/notes.txt", "mine");
    place.succeed(&[&heads[..], &["run"]].concat());
    assert_eq!(place.read("run/notes.txt"), "mine");
}

#[test]
fn a_run_takes_no_folder_in_which_its_files_are_somebody_elses() {
    let place = Place::new();
    let train = |output: &str| {
        let output = format!("output={output}");
        ["train", "recipe.yaml", "--set", "train.max_steps=2", "--quiet", "--set", &output]
            .map(str::to_owned)
    };
    for (folder, file) in [
        ("notes", "metrics.jsonl"),
        ("page", "report.html"),
        ("other", "recipe.yaml"),
        ("kept", "best/notes.txt"),
    ] {
        place.write(&format!("{folder}/{file}"), "mine");
        let arguments = train(folder);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        refused(&place, folder, &arguments, &["output: ", "would be lost"]);
    }
    // The recipe itself would become the run's record.
    refused(&place, "", &["train", "recipe.yaml", "--set", "output=."], &["output: ", "recipe"]);
    place.write("free/thesis.tex", "mine");
    let arguments = train("free");
    place.succeed(&arguments.each_ref().map(String::as_str));
    assert_eq!(place.read("free/thesis.tex"), "mine");
}

/// Runs to the end, which has to come without anybody writing into the pipes that lie about.
#[cfg(unix)]
fn ended(place: &Place, arguments: &[&str]) -> Ran {
    let mut child = place.start(arguments);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        if std::time::Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{arguments:?} waits for a pipe");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    crate::support::ran(child.wait_with_output().unwrap())
}

#[cfg(unix)]
fn make_pipe(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[cfg(unix)]
#[test]
fn pipes_in_place_of_files_are_refused_at_once() {
    let place = Place::new();
    let pipe = |name: &str| make_pipe(&place.path(name));
    fs::create_dir(place.path("model")).unwrap();
    for entry in fs::read_dir(model()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_file() && !name.ends_with(".gguf") {
            fs::copy(&path, place.path("model").join(name)).unwrap();
        }
    }
    let limited = |arguments: &[&str]| {
        let ended = ended(&place, arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}\n{}", ended.stderr);
        let said = ended.stderr.contains("a pipe") && ended.stderr.contains("expected a file");
        assert!(said, "{}", ended.stderr);
    };
    for file in ["model.safetensors", "config.json", "tokenizer.json"] {
        let path = place.path("model").join(file);
        let aside = place.path("aside");
        fs::rename(&path, &aside).unwrap();
        pipe(&format!("model/{file}"));
        limited(&["inspect", "--model", "model"]);
        fs::remove_file(&path).unwrap();
        fs::rename(&aside, &path).unwrap();
    }
    pipe("data.jsonl");
    limited(&["heads", "data.jsonl"]);
    pipe("model.gguf");
    limited(&["inspect", "--model", "model.gguf"]);
    fs::create_dir(place.path("adapter")).unwrap();
    pipe("adapter/adapter_config.json");
    limited(&["inspect", "--adapter", "adapter"]);
}

#[cfg(unix)]
#[test]
fn no_command_waits_for_a_pipe_in_a_run() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--set", "output=run", "--set", "train.save_every=2"]);
    let resume = ["train", "recipe.yaml", "--set", "output=run", "--resume"];
    let commands: [&[&str]; 4] = [
        &resume,
        &["inspect", "--adapter", "run/adapter"],
        &["analyze", "run/adapter", "--out", "analysis"],
        &["generate", "--adapter", "run", "--prompt", "Who", "--max-new-tokens", "1"],
    ];
    let files = files_in(&place.path("run"));
    assert!(files.len() > 12, "{files:?}");
    for path in files {
        let bytes = fs::read(&path).unwrap();
        for command in commands {
            let _ = fs::remove_file(&path);
            make_pipe(&path);
            let ended = ended(&place, command);
            assert!(matches!(ended.code, Some(0..=2)), "{command:?} {}", path.display());
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    }
}

/// Every file in a folder and the folders in it.
#[cfg(unix)]
fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files_in(&path)),
            false => found.push(path),
        }
    }
    found
}

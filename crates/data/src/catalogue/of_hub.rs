//! Any data set of the hub, by its id: which of its files are a split of a configuration.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::Fetch;
use crate::config::SourceConfig;
use crate::error::{Error, Result};
use crate::layout;

/// Where the hub keeps what it has converted: `CONFIGURATION/SPLIT/0000.parquet`.
const CONVERTED: &str = "refs/convert/parquet";
/// The configuration of data sets that have one.
const DEFAULT: &str = "default";
/// The split that is read where none is named.
const TRAIN: &str = "train";
/// What is put before a split of which only a part was converted.
const PARTIAL: &str = "partial-";

/// A data set of the hub.
#[derive(Debug, PartialEq)]
pub(crate) struct HubSet {
    repository: String,
    revision: Option<String>,
}

impl SourceConfig {
    /// The data set of the hub that `path` means: `owner/name` or `owner/name@revision`, where there is
    /// no such file and, unless `split` or `name` say that it is one, nothing that it would lie in.
    pub(crate) fn of_hub(&self, base_dir: &Path) -> Option<HubSet> {
        let text = self.path.to_str()?;
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = repository.split_once('/')?;
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
        };
        if !(plain(owner) && plain(name)) || base_dir.join(&self.path).exists() {
            return None;
        }
        let is_said = self.split.is_some() || self.name.is_some();
        let is_file = has_ending(name);
        (is_said || !is_file && !base_dir.join(owner).exists()).then(|| HubSet {
            repository: repository.to_owned(),
            revision: revision.map(str::to_owned),
        })
    }
}

/// Finds the files of a data set of the hub, and fetches them.
pub(super) fn find(
    source: &SourceConfig,
    set: &HubSet,
    fetch: &mut dyn Fetch,
) -> Result<Vec<PathBuf>> {
    let (name, split) = (source.name.as_deref(), source.split.as_deref());
    let mut tried = Vec::new();
    // What was published under a name of its own is not what was converted.
    let own = set.revision.as_deref().unwrap_or("main");
    let places: &[(&str, Choose)] = match &set.revision {
        None => &[(CONVERTED, converted), (own, published)],
        Some(_) => &[(own, published)],
    };
    for (revision, choose) in places {
        let files = match fetch.list(&set.repository, revision) {
            Ok(files) => files,
            Err(problem) => {
                tried.push(format!("hub, {revision}: {problem}"));
                continue;
            }
        };
        match choose(&files, name, split) {
            Err(problem) => {
                tried.push(format!("hub, {revision}: {problem}"));
                // What is there and does not hold what was asked for is the answer.
                if files.iter().any(|file| has_ending(file)) {
                    break;
                }
            }
            Ok(files) => {
                let fetched =
                    files.iter().map(|file| fetch.file(&set.repository, revision, file, None));
                match fetched.collect::<std::result::Result<Vec<PathBuf>, String>>() {
                    Ok(files) => return Ok(files),
                    Err(problem) => tried.push(format!("hub, {revision}: {problem}")),
                }
            }
        }
    }
    tried.insert(0, format!("no file {}", source.path.display()));
    Err(Error::Unavailable { name: set.repository.clone(), tried })
}

/// Whether a name ends as files of data do, compressed or not.
fn has_ending(name: &str) -> bool {
    let known = |part: &str| layout::endings().chain(["txt"]).any(|ending| ending == part);
    name.to_lowercase().split('.').skip(1).any(known)
}

type Choose = fn(&[String], Option<&str>, Option<&str>) -> std::result::Result<Vec<String>, String>;

/// Of the converted files those of a configuration's split.
fn converted(
    files: &[String],
    name: Option<&str>,
    split: Option<&str>,
) -> std::result::Result<Vec<String>, String> {
    let parts = |file: &'_ String| -> Option<(String, String)> {
        let parts: Vec<&str> = file.split('/').collect();
        match parts[..] {
            [name, split, last] if last.ends_with(".parquet") => {
                let split = split.strip_prefix(PARTIAL).unwrap_or(split);
                Some((name.to_owned(), split.to_owned()))
            }
            _ => None,
        }
    };
    let names: BTreeSet<String> = files.iter().filter_map(parts).map(|(name, _)| name).collect();
    let name = match name {
        None if names.contains(DEFAULT) => DEFAULT,
        None => one_of("configurations", "name", &names)?,
        Some(name) if names.contains(name) => name,
        Some(name) => return Err(no_such("configuration", "name", name, &names)),
    };
    let of_name = |file: &&String| parts(file).is_some_and(|(of, _)| of == name);
    let splits: BTreeSet<String> =
        files.iter().filter(of_name).filter_map(parts).map(|(_, split)| split).collect();
    let split = match split {
        None if splits.contains(TRAIN) => TRAIN,
        None => one_of("splits", "split", &splits)?,
        Some(split) if splits.contains(split) => split,
        Some(split) => return Err(no_such("split", "split", split, &splits)),
    };
    let wanted = |file: &&String| parts(file).is_some_and(|(of, part)| of == name && part == split);
    let mut chosen: Vec<String> = files.iter().filter(wanted).cloned().collect();
    chosen.sort();
    Ok(chosen)
}

/// Of the files as they were published those whose names say the split, and nothing else where none
/// says any.
fn published(
    files: &[String],
    name: Option<&str>,
    split: Option<&str>,
) -> std::result::Result<Vec<String>, String> {
    let data = |file: &&String| has_ending(file);
    let hidden = |file: &&String| file.split('/').any(|part| part.starts_with('.'));
    let of_name =
        |file: &&String| name.is_none_or(|name| words(file, false).any(|word| word == name));
    let files: Vec<&String> =
        files.iter().filter(data).filter(|file| !hidden(file)).filter(of_name).collect();
    let says = |file: &str, split: &str| {
        let names = SPLITS.iter().find(|names| names.contains(&split));
        words(file, true).any(|word| match names {
            Some(names) => names.contains(&word.as_str()),
            None => word == split,
        })
    };
    let wanted = split.unwrap_or(TRAIN);
    let named: Vec<&String> = files.iter().copied().filter(|file| says(file, wanted)).collect();
    let any = |file: &&String| SPLITS.iter().any(|names| says(file, names[0]));
    let chosen = match named.is_empty() {
        false => named,
        true if split.is_none_or(|split| split == TRAIN) && !files.iter().any(any) => files.clone(),
        true => Vec::new(),
    };
    if chosen.is_empty() {
        return Err(match files.is_empty() {
            true => "it has no data file that can be read".to_owned(),
            false => format!("none of its files says the split `{wanted}`"),
        });
    }
    // The same records may be there in several forms.
    let ending = FORMS.iter().find(|ending| chosen.iter().any(|file| file.contains(**ending)));
    let mut chosen: Vec<String> = match ending {
        Some(ending) => chosen.into_iter().filter(|file| file.contains(ending)).cloned().collect(),
        None => chosen.into_iter().cloned().collect(),
    };
    chosen.sort();
    let folder = |file: &String| file.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
    let folders: BTreeSet<String> = chosen.iter().map(folder).collect();
    if name.is_none() && folders.len() > 1 {
        let folders: Vec<&str> = folders.iter().map(String::as_str).collect();
        let message = format!("its files are in {}; choose one with `name`", folders.join(", "));
        return Err(message);
    }
    Ok(chosen)
}

/// Names of splits that mean the same.
const SPLITS: [&[&str]; 3] = [
    &["train", "training"],
    &["validation", "valid", "val", "dev"],
    &["test", "testing", "eval", "evaluation"],
];
/// Forms of data, the one that is taken first.
const FORMS: [&str; 4] = [".parquet", ".jsonl", ".json", ".csv"];

/// The folders and the name of a path; with `fine`, the words they are made of.
fn words(file: &str, fine: bool) -> impl Iterator<Item = String> {
    let apart = move |c: char| c == '/' || fine && ['-', '_', '.'].contains(&c);
    let words: Vec<String> = file.split(apart).map(str::to_owned).collect();
    words.into_iter()
}

fn one_of<'a>(
    kind: &str,
    key: &str,
    names: &'a BTreeSet<String>,
) -> std::result::Result<&'a str, String> {
    let mut all = names.iter().map(String::as_str);
    match (all.next(), all.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err("it has no Parquet file".to_owned()),
        _ => Err(format!("it has the {kind} {}; choose one with `{key}`", list(names))),
    }
}

fn no_such(kind: &str, key: &str, name: &str, names: &BTreeSet<String>) -> String {
    format!("`{key}` is {name}, which is no {kind} of it; expected one of {}", list(names))
}

fn list(names: &BTreeSet<String>) -> String {
    const MOST: usize = 12;
    let first: Vec<&str> = names.iter().map(String::as_str).take(MOST).collect();
    let more = if names.len() > MOST { ", …" } else { "" };
    format!("{}{more}", first.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_split_of_a_configuration_is_chosen() {
        let one = files(&["default/train/0000.parquet", "default/test/0000.parquet", "README.md"]);
        assert_eq!(converted(&one, None, None).unwrap(), ["default/train/0000.parquet"]);
        assert_eq!(converted(&one, None, Some("test")).unwrap(), ["default/test/0000.parquet"]);
        let error = converted(&one, None, Some("tset")).unwrap_err();
        assert!(error.contains("expected one of test, train"), "{error}");
        let two = files(&[
            "main/train/0001.parquet",
            "main/train/0000.parquet",
            "socratic/train/0000.parquet",
            "big/partial-train/0000.parquet",
        ]);
        let error = converted(&two, None, None).unwrap_err();
        assert!(error.contains("big, main, socratic; choose one with `name`"), "{error}");
        let main = ["main/train/0000.parquet", "main/train/0001.parquet"];
        assert_eq!(converted(&two, Some("main"), None).unwrap(), main);
        assert_eq!(converted(&two, Some("big"), None).unwrap(), ["big/partial-train/0000.parquet"]);
        assert!(converted(&two, Some("other"), None).unwrap_err().contains("no configuration"));
        assert!(converted(&files(&["x.md"]), None, None).unwrap_err().contains("no Parquet"));
    }

    #[test]
    fn published_files_say_their_split() {
        let set = files(&[
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
            ".cache/train.parquet",
        ]);
        assert_eq!(published(&set, None, None).unwrap().len(), 2);
        assert_eq!(published(&set, None, Some("test")).unwrap(), set[3..4]);
        assert!(published(&set, None, Some("validation")).unwrap_err().contains("`validation`"));
        assert_eq!(
            published(&files(&["dev.jsonl"]), None, Some("validation")).unwrap(),
            ["dev.jsonl"]
        );
        assert_eq!(
            published(&files(&["alpaca.json", "alpaca.csv"]), None, None).unwrap(),
            ["alpaca.json"]
        );
        assert!(published(&files(&["test.json"]), None, None).is_err());
        let configurations = files(&["main/train.jsonl", "socratic/train.jsonl"]);
        assert!(published(&configurations, None, None).unwrap_err().contains("main, socratic"));
        assert_eq!(published(&configurations, Some("main"), None).unwrap(), ["main/train.jsonl"]);
    }

    #[test]
    fn an_id_is_no_path() {
        let folder = tempfile::tempdir().unwrap();
        fs_err::create_dir(folder.path().join("data")).unwrap();
        let of = |path: &str| SourceConfig::new(path).of_hub(folder.path());
        let set = of("tatsu-lab/alpaca").unwrap();
        assert_eq!((set.repository.as_str(), set.revision), ("tatsu-lab/alpaca", None));
        assert_eq!(of("a/b@v1").unwrap().revision.as_deref(), Some("v1"));
        for path in ["data/smaple", "a/b.jsonl", "alpaca", "a/b/c", "../x", "/a/b", "./a", ""] {
            assert_eq!(of(path), None, "{path}");
        }
        let said =
            SourceConfig { split: Some("train".to_owned()), ..SourceConfig::new("data/x.json") };
        assert!(said.of_hub(folder.path()).is_some());
    }
}

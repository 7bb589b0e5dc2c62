//! Named data sources: one file each, one line each in [`SOURCES`].
//!
//! A source says where its files are on the hub and in a folder of copies, how their records are
//! read, and under which licence they come. This crate asks no network: files reach it through
//! [`Fetch`], which the caller implements.

mod alpaca;
mod chatdoctor;
mod code_alpaca;
mod dolly_15k;
mod flan_v2;
mod gsm8k;
mod icliniq;
mod lawyer_instruct;
mod of_hub;
mod t0;
mod us_terms;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::{DataConfig, SourceConfig};
use crate::error::{Error, Result};

/// Every named source.
static SOURCES: &[&NamedSource] = &[
    &alpaca::SOURCE,
    &chatdoctor::SOURCE,
    &code_alpaca::SOURCE,
    &dolly_15k::SOURCE,
    &flan_v2::SOURCE,
    &gsm8k::SOURCE,
    &icliniq::SOURCE,
    &lawyer_instruct::SOURCE,
    &t0::SOURCE,
    &us_terms::SOURCE,
];

/// A data set that can be had by a short name.
#[derive(Debug)]
pub struct NamedSource {
    /// The name in recipes.
    pub name: &'static str,
    /// What it is.
    pub title: &'static str,
    /// Its licence, as its publisher states it.
    pub licence: &'static str,
    /// Where it is described.
    pub homepage: &'static str,
    /// The domain of records that bring none.
    pub domain: &'static str,
    /// The repository on the hub; empty if it is not there.
    pub repository: &'static str,
    /// The revision of the repository.
    pub revision: &'static str,
    /// Its files there; `*` stands for any characters but `/`.
    pub remote: &'static str,
    /// Where copies lie in a folder of data sets; the first pattern that any file fits counts.
    pub local: &'static [&'static str],
    /// SHA-256 of files that are known to be what they should be: on the hub nothing else is
    /// accepted, where there is one.
    pub known: &'static [&'static str],
    /// How records are read: the first that fits the first record counts.
    pub shapes: &'static [Shape],
}

/// A way records are read.
#[derive(Debug)]
pub struct Shape {
    /// The format's name.
    pub format: &'static str,
    /// From the format's field names to those of the file.
    pub fields: &'static [(&'static str, &'static str)],
}

impl Shape {
    /// The mapping as a recipe's `fields`.
    pub(crate) fn fields(&self) -> BTreeMap<String, String> {
        self.fields.iter().map(|(ours, theirs)| ((*ours).into(), (*theirs).into())).collect()
    }
}

impl NamedSource {
    /// The one checksum a file fetched from the hub must have, where there is one.
    fn pinned(&self) -> Option<&'static str> {
        match self.remote.contains('*') {
            true => None,
            false => self.known.first().copied(),
        }
    }
}

/// Every named source, in the order of their names.
pub fn named_sources() -> impl Iterator<Item = &'static NamedSource> {
    SOURCES.iter().copied()
}

/// The names of all named sources.
pub(crate) fn names() -> Vec<&'static str> {
    SOURCES.iter().map(|source| source.name).collect()
}

/// The source of that name.
pub(crate) fn find(name: &str) -> Option<&'static NamedSource> {
    SOURCES.iter().copied().find(|source| source.name == name)
}

/// Gets files from a hub.
pub trait Fetch {
    /// The names of a repository's files.
    ///
    /// # Errors
    /// A message for people.
    fn list(
        &mut self,
        repository: &str,
        revision: &str,
    ) -> std::result::Result<Vec<String>, String>;
    /// A file, from the cache or the hub. With `sha256`, only a file that has it.
    ///
    /// # Errors
    /// A message for people.
    fn file(
        &mut self,
        repository: &str,
        revision: &str,
        file: &str,
        sha256: Option<&str>,
    ) -> std::result::Result<PathBuf, String>;
}

/// Finds the files of every named source of a recipe: below its `path` if it has one, else in
/// `copies` (a folder of data sets), else by `fetch`; and those of every data set of the hub. Relative
/// paths are those of `base_dir`.
///
/// # Errors
/// [`Error::Unavailable`] with all that was tried.
pub fn locate(
    config: &mut DataConfig,
    base_dir: &Path,
    copies: Option<&Path>,
    fetch: &mut dyn Fetch,
) -> Result<()> {
    for source in config.train.iter_mut().chain(&mut config.valid) {
        if source.located.is_empty()
            && let Some(set) = source.of_hub(base_dir)
        {
            source.located = of_hub::find(source, &set, fetch)?;
        }
        let named = source.path.as_os_str().is_empty().then(|| source.named()).flatten();
        if let Some(named) = named.filter(|_| source.located.is_empty()) {
            source.located = find_files(named, copies, fetch)?;
        }
    }
    Ok(())
}

fn find_files(
    named: &NamedSource,
    copies: Option<&Path>,
    fetch: &mut dyn Fetch,
) -> Result<Vec<PathBuf>> {
    let mut tried = Vec::new();
    match copies {
        Some(folder) => {
            for pattern in named.local {
                let files = matching(folder, pattern)?;
                if !files.is_empty() {
                    return Ok(files);
                }
                tried.push(format!("no file {}", folder.join(pattern).display()));
            }
        }
        None => tried.push("no folder of copies: HYDRALORA_DATA_DIR is not set".to_owned()),
    }
    let unavailable = |mut tried: Vec<String>, problem: String| {
        tried.push(problem);
        Error::Unavailable { name: named.name.to_owned(), tried }
    };
    if named.repository.is_empty() {
        let problem = format!("it is not on the hub as a file; see {}", named.homepage);
        return Err(unavailable(tried, problem));
    }
    let (repository, revision) = (named.repository, named.revision);
    let names = if named.remote.contains('*') {
        let all = fetch.list(repository, revision);
        let all = all.map_err(|problem| unavailable(tried.clone(), format!("hub: {problem}")))?;
        let mut names: Vec<String> =
            all.into_iter().filter(|name| fits(name, named.remote)).collect();
        names.sort();
        names
    } else {
        vec![named.remote.to_owned()]
    };
    if names.is_empty() {
        let problem = format!("hub: {repository} has no file {}", named.remote);
        return Err(unavailable(tried, problem));
    }
    names
        .iter()
        .map(|name| fetch.file(repository, revision, name, named.pinned()))
        .collect::<std::result::Result<_, _>>()
        .map_err(|problem| unavailable(tried, format!("hub: {problem}")))
}

/// The files of a named source below a folder that a recipe names for it: the folder of copies
/// itself, the source's own folder in it, or a folder of nothing but data.
pub(crate) fn files_below(named: &NamedSource, folder: &Path) -> Result<Vec<PathBuf>> {
    for pattern in named.local {
        let own = pattern.split_once('/').map_or(*pattern, |(_, rest)| rest);
        for pattern in [pattern, own] {
            let files = matching(folder, pattern)?;
            if !files.is_empty() {
                return Ok(files);
            }
        }
    }
    SourceConfig::new(folder).files(Path::new(""))
}

/// The files below a folder that fit a pattern, in the order of their paths.
fn matching(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    let mut found = vec![folder.to_path_buf()];
    for part in pattern.split('/') {
        let mut deeper = Vec::new();
        for place in found {
            if !part.contains('*') {
                deeper.push(place.join(part));
                continue;
            }
            if !place.is_dir() {
                continue;
            }
            for entry in fs_err::read_dir(&place)? {
                let entry = entry?;
                if fits(&entry.file_name().to_string_lossy(), part) {
                    deeper.push(entry.path());
                }
            }
        }
        found = deeper;
    }
    found.retain(|path| path.is_file());
    found.sort();
    Ok(found)
}

/// Whether a path fits a pattern in which `*` stands for any characters but `/`.
fn fits(path: &str, pattern: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return path == pattern };
    let Some(rest) = path.strip_prefix(before) else { return false };
    let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    ends.take_while(|&at| !rest[..at].contains('/')).any(|at| fits(&rest[at..], after))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format;

    #[test]
    fn patterns_stay_inside_a_folder() {
        for (path, pattern, expected) in [
            ("a.json", "a.json", true),
            ("a.json", "*.json", true),
            ("x/a.json", "*.json", false),
            ("data/train-00000-of-00001-ab.parquet", "data/train-*.parquet", true),
            ("data/test-0.parquet", "data/train-*.parquet", false),
            ("a/train.json", "*/train.json", true),
            ("a/b/train.json", "*/train.json", false),
        ] {
            assert_eq!(fits(path, pattern), expected, "{path} {pattern}");
        }
    }

    #[test]
    fn sources_are_sorted_and_refer_to_what_there_is() {
        assert!(SOURCES.windows(2).all(|pair| pair[0].name < pair[1].name));
        for source in SOURCES {
            assert!(!source.licence.is_empty() && !source.shapes.is_empty(), "{}", source.name);
            for shape in source.shapes {
                let known = format::field_names(shape.format).unwrap();
                assert!(
                    shape.fields.iter().all(|(ours, _)| known.contains(ours)),
                    "{}",
                    source.name
                );
            }
            assert!(source.known.iter().all(|sum| sum.len() == 64), "{}", source.name);
        }
    }

    struct Hub(Vec<&'static str>, PathBuf, Vec<String>);

    impl Fetch for Hub {
        fn list(&mut self, _: &str, _: &str) -> std::result::Result<Vec<String>, String> {
            Ok(self.0.iter().map(|name| (*name).to_owned()).collect())
        }

        fn file(
            &mut self,
            repository: &str,
            revision: &str,
            file: &str,
            sha256: Option<&str>,
        ) -> std::result::Result<PathBuf, String> {
            self.2.push(format!("{repository} {revision} {file} {}", sha256.is_some()));
            Ok(self.1.join(file))
        }
    }

    #[test]
    fn copies_come_before_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        fs_err::create_dir(folder.path().join("gsm8k")).unwrap();
        fs_err::write(folder.path().join("gsm8k/train.jsonl"), "{}").unwrap();
        let here = Path::new("");
        let mut hub = Hub(vec!["main/train-0.parquet", "main/test-0.parquet"], "h".into(), vec![]);
        let mut config = DataConfig {
            train: vec![SourceConfig::of("gsm8k"), SourceConfig::of("dolly-15k")],
            ..DataConfig::default()
        };
        let mut offline = config.clone();
        locate(&mut config, here, Some(folder.path()), &mut hub).unwrap();
        assert_eq!(config.train[0].located, [folder.path().join("gsm8k/train.jsonl")]);
        assert_eq!(config.train[1].located, [PathBuf::from("h/databricks-dolly-15k.jsonl")]);
        assert!(hub.2[0].ends_with("databricks-dolly-15k.jsonl true"), "{:?}", hub.2);
        locate(&mut offline, here, None, &mut hub).unwrap();
        assert_eq!(offline.train[0].located, [PathBuf::from("h/main/train-0.parquet")]);
        assert_eq!(hub.2[1], "openai/gsm8k main main/train-0.parquet false");
        hub.0.clear();
        let mut none = DataConfig { train: vec![SourceConfig::of("gsm8k")], ..offline };
        let error = locate(&mut none, here, None, &mut hub).unwrap_err().to_string();
        assert!(error.contains("HYDRALORA_DATA_DIR is not set"), "{error}");
        assert!(error.contains("openai/gsm8k has no file"), "{error}");
    }

    #[test]
    fn a_data_set_of_the_hub_is_found_by_its_id() {
        let mut hub = Hub(vec!["default/train/0000.parquet"], "h".into(), vec![]);
        let mut config =
            DataConfig { train: vec![SourceConfig::new("org/set")], ..DataConfig::default() };
        let here = Path::new("/nowhere");
        assert_eq!(config.validate(here), []);
        locate(&mut config, here, None, &mut hub).unwrap();
        assert_eq!(config.train[0].located, [PathBuf::from("h/default/train/0000.parquet")]);
        assert_eq!(hub.2, ["org/set refs/convert/parquet default/train/0000.parquet false"]);
        assert_eq!(config.train[0].domain_name(), "set");
        let mut other = SourceConfig { split: Some("tset".to_owned()), ..SourceConfig::new("a/b") };
        other.name = Some("default".to_owned());
        let mut config = DataConfig { train: vec![other], ..DataConfig::default() };
        let error = locate(&mut config, here, None, &mut hub).unwrap_err().to_string();
        assert!(error.contains("no split of it; expected one of train"), "{error}");
    }
}

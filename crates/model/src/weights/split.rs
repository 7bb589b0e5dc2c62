//! GGUF models in several files, as `llama-gguf-split` writes them.
//!
//! The files `NAME-00001-of-00003.gguf` to `NAME-00003-of-00003.gguf` lie beside each other. Each
//! says which one it is (`split.no`, from 0 on), of how many (`split.count`), and how many tensors
//! all of them hold (`split.tensors.count`); the rest of the metadata is in the first one.

use super::map::MappedFile;
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, kind};
use std::path::{Path, PathBuf};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";
/// Metadata that is the same in all files of a model, where more than the first have it.
const SHARED: [&str; 2] = ["general.architecture", "general.name"];

/// What the name of a file says.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Named<'a> {
    /// What comes before the number.
    prefix: &'a str,
    /// From 1 on.
    number: u64,
    count: u64,
}

impl<'a> Named<'a> {
    /// Reads `PREFIX-00002-of-00003`, a file's name without `.gguf`.
    fn parse(stem: &'a str) -> Option<Self> {
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let parse = |digits: &str| {
            let plain = digits.len() >= 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
            plain.then(|| digits.parse().ok()).flatten()
        };
        Some(Self { prefix, number: parse(number)?, count: parse(count)? })
    }

    fn of(path: &'a Path) -> Option<Self> {
        Self::parse(path.file_name()?.to_str()?.strip_suffix(".gguf")?)
    }

    fn file_name(&self) -> String {
        format!("{}-{:05}-of-{:05}.gguf", self.prefix, self.number, self.count)
    }
}

/// Gives the name of the model whose file, without `.gguf`, is called `stem`.
pub(crate) fn model_name(stem: &str) -> &str {
    Named::parse(stem).map_or(stem, |named| named.prefix)
}

/// Gives the names of all files of the model that the file called `name` belongs to.
pub(crate) fn all_files(name: &str) -> Vec<String> {
    /// More are not believed.
    const MOST: u64 = 1000;
    match name.strip_suffix(".gguf").and_then(Named::parse) {
        Some(named) if (1..=MOST).contains(&named.count) => {
            (1..=named.count).map(|number| Named { number, ..named }.file_name()).collect()
        }
        _ => vec![name.to_owned()],
    }
}

/// Gives the first of `files`, in order of their names, if all are parts of one model.
pub(crate) fn one_series(files: &[PathBuf]) -> Option<&Path> {
    let first = files.iter().min()?;
    let series = Named::of(first)?;
    let same = |named: Named<'_>| (named.prefix, named.count) == (series.prefix, series.count);
    files.iter().all(|file| Named::of(file).is_some_and(same)).then_some(first)
}

/// Opens the GGUF file at `path`, and the other ones if it is one of several: the files in order,
/// and their description, which has the metadata of the first and the tensors of all.
///
/// # Errors
/// If one cannot be read, or they do not belong together, or hold no dense text model.
pub(super) fn open(path: &Path) -> Result<(Vec<MappedFile>, GgufFile)> {
    let (file, description) = read(path)?;
    let count = description.u64(COUNT)?.unwrap_or(1);
    if count <= 1 {
        kind::check_metadata(&description)?;
        kind::check_tensors(&description)?;
        return Ok((vec![file], description));
    }
    let number = position(&description, count)?;
    let asked = Named::of(path)
        .filter(|named| (named.number, named.count) == (number + 1, count))
        .ok_or_else(|| {
            let message = format!(
                "this is part {} of a model in {count} files, which are found by their names; \
                 expected `NAME-{:05}-of-{count:05}.gguf`",
                number + 1,
                number + 1
            );
            Error::malformed(path, message)
        })?;
    let mut opened = Some((file, description));
    let mut part = |at: u64| {
        let (file, description) = match opened.take_if(|_| at == number) {
            Some(opened) => opened,
            None => read_part(path, &Named { number: at + 1, ..asked })?,
        };
        if position(&description, count)? != at {
            let message = format!("its metadata says that it is another part than part {}", at + 1);
            return Err(Error::config(description.path(), NUMBER, message));
        }
        Ok((file, description))
    };
    let (file, mut whole) = part(0)?;
    kind::check_metadata(&whole)?;
    let mut files = vec![file];
    for at in 1..count {
        let (file, description) = part(at)?;
        belongs(&whole, &description)?;
        whole.append(files.len(), description);
        files.push(file);
    }
    let found = whole.tensors().len() as u64;
    if let Some(expected) = whole.u64(TENSORS)?.filter(|&expected| expected != found) {
        let message = format!("is {expected}, the {count} parts hold {found}");
        return Err(Error::config(whole.path(), TENSORS, message));
    }
    kind::check_tensors(&whole)?;
    Ok((files, whole))
}

fn read(path: &Path) -> Result<(MappedFile, GgufFile)> {
    let file = MappedFile::open(path)?;
    let description = GgufFile::parse(file.bytes(), path)?;
    Ok((file, description))
}

/// Reads the part called `named` beside `path`.
fn read_part(path: &Path, named: &Named<'_>) -> Result<(MappedFile, GgufFile)> {
    let name = named.file_name();
    let beside = path.with_file_name(&name);
    if !beside.is_file() {
        let message = format!(
            "part {} of {} is missing: there is no `{name}` beside this file",
            named.number, named.count
        );
        return Err(Error::malformed(path, message));
    }
    read(&beside)
}

/// Which of `count` parts a file says it is, from 0 on.
fn position(file: &GgufFile, count: u64) -> Result<u64> {
    let found = file.u64(COUNT)?;
    if found != Some(count) {
        let found = found.map_or("missing".to_owned(), |found| format!("is {found}"));
        let message = format!("{found}; expected {count}, as the other parts have it");
        return Err(Error::config(file.path(), COUNT, message));
    }
    file.u64(NUMBER)?.filter(|&number| number < count).ok_or_else(|| {
        Error::config(file.path(), NUMBER, format!("expected a number below {COUNT}, {count}"))
    })
}

/// Checks that `part` is of the same model as `first`, as far as they say.
fn belongs(first: &GgufFile, part: &GgufFile) -> Result<()> {
    let differ = |key: &str, found: String, expected: String| {
        let message = format!(
            "is {found}, but {expected} in {}: the files are parts of different models",
            first.path().display()
        );
        Err(Error::config(part.path(), key, message))
    };
    if let (Some(expected), Some(found)) = (first.u64(TENSORS)?, part.u64(TENSORS)?)
        && expected != found
    {
        return differ(TENSORS, found.to_string(), expected.to_string());
    }
    for key in SHARED {
        if let (Some(expected), Some(found)) = (first.str(key)?, part.str(key)?)
            && expected != found
        {
            return differ(key, format!("`{found}`"), format!("`{expected}`"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_parts_of_a_model() {
        let named = |prefix, number, count| Some(Named { prefix, number, count });
        assert_eq!(Named::parse("m-00002-of-00003"), named("m", 2, 3));
        assert_eq!(Named::parse("a-b.c-00001-of-00010"), named("a-b.c", 1, 10));
        assert_eq!(Named::parse("m-123456-of-123457"), named("m", 123456, 123457));
        for other in ["m", "m-of-3", "m-00002", "00002-of-00003", "m-2-of-3", "m-00002-of-0000x"] {
            assert_eq!(Named::parse(other), None, "{other}");
        }
        assert_eq!(named("m", 2, 3).unwrap().file_name(), "m-00002-of-00003.gguf");
        assert_eq!(model_name("m-00002-of-00003"), "m");
        assert_eq!(model_name("m-Q8_0"), "m-Q8_0");
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let series = paths(&["d/m-00002-of-00002.gguf", "d/m-00001-of-00002.gguf"]);
        assert_eq!(one_series(&series), Some(series[1].as_path()));
        assert_eq!(one_series(&paths(&["m-00001-of-00002.gguf", "n-00002-of-00002.gguf"])), None);
        assert_eq!(one_series(&paths(&["m-00001-of-00002.gguf", "m.gguf"])), None);
        assert_eq!(one_series(&[]), None);
        let both = ["s/m-00001-of-00002.gguf", "s/m-00002-of-00002.gguf"];
        assert_eq!(all_files("s/m-00002-of-00002.gguf"), both);
        assert_eq!(all_files("m.gguf"), ["m.gguf"]);
        assert_eq!(all_files("m-00001-of-99999.gguf"), ["m-00001-of-99999.gguf"]);
    }
}

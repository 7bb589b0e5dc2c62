//! Parting a data file into train, valid and test.
//!
//! The part of a line follows from its content and the seed. So equal lines lie on one side, the same
//! file gives the same parts everywhere, and a line that is added moves no other.

use crate::disk::{make_folder, sha256_of};
use crate::error::{Error, Result};
use crate::spec::Split;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

const PARTS: [&str; 3] = ["train", "valid", "test"];

/// Parts the files of recipes, each once.
pub(crate) struct Splitter<'a> {
    split: Split,
    /// Where relative paths start.
    base: &'a Path,
    /// The folder of the parts.
    out: &'a Path,
    done: HashMap<(PathBuf, String), [PathBuf; 3]>,
}

impl<'a> Splitter<'a> {
    pub(crate) fn new(split: Split, base: &'a Path, out: &'a Path) -> Self {
        Self { split, base, out, done: HashMap::new() }
    }

    /// Puts the parts of the training files in the places of `data.train` and `data.valid` of a recipe,
    /// and gives the files of its test part.
    pub(crate) fn apply(&mut self, recipe: &mut Value) -> Result<Vec<PathBuf>> {
        let Some(Value::Array(sources)) = recipe["data"].get("train").cloned() else {
            return Err(Error::bad("data.train: the recipe names no file to split"));
        };
        if recipe["data"].get("valid").and_then(Value::as_array).is_some_and(|v| !v.is_empty()) {
            return Err(Error::bad(
                "split: data.valid names files too; leave out one of them (with files of one's own, `tasks` \
                 names those of the test)",
            ));
        }
        let (mut train, mut valid, mut test) = (Vec::new(), Vec::new(), Vec::new());
        let mut domains: Vec<String> = Vec::new();
        for (index, source) in sources.iter().enumerate() {
            let fault = |message: String| Error::bad(format!("data.train[{index}]: {message}"));
            let Some(path) = source.get("path").and_then(Value::as_str) else {
                return Err(fault("split takes files alone; give a `path`".to_owned()));
            };
            let path = self.base.join(path);
            let lines = path.extension().is_some_and(|ending| ending == "jsonl");
            if !lines || !path.is_file() {
                return Err(fault(format!(
                    "{} is no .jsonl file, of which alone lines can be parted; name files of one's own in \
                     data.train, data.valid and tasks",
                    path.display()
                )));
            }
            for key in ["fields", "columns", "system"] {
                let given =
                    source.get(key).is_some_and(|value| !value.is_null() && *value != json!({}));
                if given {
                    return Err(fault(format!(
                        "`{key}` does not reach the scoring of the test part; rename the fields in the file"
                    )));
                }
            }
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let domain = source.get("domain").and_then(Value::as_str).unwrap_or(&stem).to_owned();
            if domains.contains(&domain) {
                return Err(fault(format!(
                    "`{domain}` is a domain twice; the test part needs each of its own"
                )));
            }
            let parts = self.part(&path, &domain)?;
            let with = |path: &Path| {
                let mut source = source.clone();
                source["path"] = json!(path);
                source["domain"] = json!(domain);
                source
            };
            train.push(with(&parts[0]));
            let mut held = with(&parts[1]);
            for key in ["weight", "limit"] {
                held.as_object_mut().map(|held| held.remove(key));
            }
            valid.push(held);
            test.push(parts[2].clone());
            domains.push(domain);
        }
        recipe["data"]["train"] = Value::Array(train);
        recipe["data"]["valid"] = Value::Array(valid);
        Ok(test)
    }

    /// The three parts of a file, each named after the domain.
    fn part(&mut self, path: &Path, domain: &str) -> Result<[PathBuf; 3]> {
        let key = (path.to_path_buf(), domain.to_owned());
        if let Some(parts) = self.done.get(&key) {
            return Ok(parts.clone());
        }
        let Split { valid, test, seed, .. } = self.split;
        let name = format!("{} {valid} {test} {seed} {domain}", sha256_of(path)?);
        let folder = self.out.join(&crate::disk::sha256(name.as_bytes())[..12]);
        let file_name: String = domain
            .chars()
            .map(|c| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' })
            .collect();
        let parts = PARTS.map(|part| folder.join(part).join(format!("{file_name}.jsonl")));
        if !folder.is_dir() {
            self.write(path, &folder, &format!("{file_name}.jsonl"))?;
        }
        for (name, part) in PARTS.iter().zip(&parts) {
            let empty = fs::metadata(part).map_err(|source| Error::io(part, source))?.len() == 0;
            if empty {
                return Err(Error::bad(format!(
                    "split: {} leaves no line for `{name}`; it is too small for these shares",
                    path.display()
                )));
            }
        }
        self.done.insert(key, parts.clone());
        Ok(parts)
    }

    fn write(&self, path: &Path, folder: &Path, file_name: &str) -> Result<()> {
        make_folder(self.out)?;
        let failed = |source| Error::io(self.out, source);
        // Whole or not at all: filled elsewhere, then renamed.
        let temporary =
            tempfile::Builder::new().prefix(".split-").tempdir_in(self.out).map_err(failed)?;
        let mut files = Vec::new();
        for part in PARTS {
            let folder = temporary.path().join(part);
            make_folder(&folder)?;
            files.push(BufWriter::new(File::create(folder.join(file_name)).map_err(failed)?));
        }
        let source = hydralora_files::open(path).map_err(|source| Error::io(path, source))?;
        for line in BufReader::new(source).split(b'\n') {
            let line = line.map_err(|source| Error::io(path, source))?;
            let text = line.trim_ascii();
            if text.is_empty() {
                continue;
            }
            let file = &mut files[self.part_of(text)];
            file.write_all(text).and_then(|()| file.write_all(b"\n")).map_err(failed)?;
        }
        for file in files {
            let file = file.into_inner().map_err(|error| failed(error.into_error()))?;
            file.sync_all().map_err(failed)?;
        }
        #[cfg(unix)]
        {
            // A temporary folder is its owner's alone; workers of other users read this one.
            use std::os::unix::fs::PermissionsExt;
            let readable = fs::Permissions::from_mode(0o755);
            fs::set_permissions(temporary.path(), readable).map_err(failed)?;
        }
        match fs::rename(temporary.path(), folder) {
            Ok(()) => {
                let _ = temporary.keep();
                Ok(())
            }
            // Another process parted the same file at the same time.
            Err(_) if folder.is_dir() => Ok(()),
            Err(error) => Err(Error::io(folder, error)),
        }
    }

    /// 0 for train, 1 for valid, 2 for test.
    fn part_of(&self, line: &[u8]) -> usize {
        let mut hash = Sha256::new();
        hash.update(self.split.seed.to_le_bytes());
        hash.update(line);
        let mut first = [0; 8];
        first.copy_from_slice(&hash.finalize()[..8]);
        let share = u64::from_le_bytes(first) as f64 / u64::MAX as f64;
        if share < self.split.test {
            2
        } else if share < self.split.test + self.split.valid {
            1
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::TestOn;

    #[test]
    fn parts_are_disjoint_whole_and_keep_their_lines() {
        let folder = tempfile::tempdir().unwrap();
        let lines: Vec<String> = (0..400).map(|i| format!("{{\"i\": {}}}", i / 2)).collect();
        let write = |name: &str, lines: &[String]| {
            fs::write(folder.path().join(name), lines.join("\n")).unwrap();
        };
        write("a.jsonl", &lines);
        let split = Split { valid: 0.2, test: 0.1, seed: 3, test_on: TestOn::Trained };
        let out = folder.path().join("data");
        let mut splitter = Splitter::new(split, folder.path(), &out);
        let part = |splitter: &mut Splitter<'_>, name: &str| {
            let mut recipe =
                json!({"data": {"train": [{"path": name, "domain": "x", "weight": 2.0}]}});
            let test = splitter.apply(&mut recipe).unwrap();
            let read = |path: &str| -> Vec<String> {
                fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
            };
            assert_eq!(recipe["data"]["valid"][0].get("weight"), None);
            [
                read(recipe["data"]["train"][0]["path"].as_str().unwrap()),
                read(recipe["data"]["valid"][0]["path"].as_str().unwrap()),
                read(test[0].to_str().unwrap()),
            ]
        };
        let [train, valid, test] = part(&mut splitter, "a.jsonl");
        assert_eq!(train.len() + valid.len() + test.len(), 400);
        // Every line stands there twice, and both lie on one side.
        for (one, others) in [(&train, [&valid, &test]), (&valid, [&train, &test])] {
            assert!(one.iter().all(|line| others.iter().all(|other| !other.contains(line))));
            assert!(one.iter().all(|line| one.iter().filter(|l| *l == line).count() == 2));
        }
        assert!((40..160).contains(&valid.len()) && (10..80).contains(&test.len()));

        let mut more = lines.clone();
        more.insert(7, "{\"i\": 1000}".to_owned());
        write("b.jsonl", &more);
        let after = part(&mut splitter, "b.jsonl");
        for (before, after) in [train, valid, test].iter().zip(&after) {
            assert!(before.iter().all(|line| after.contains(line)));
        }
    }

    #[test]
    fn what_cannot_be_parted_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.jsonl"), "{}\n").unwrap();
        fs::write(folder.path().join("a.csv"), "a\n").unwrap();
        let split = Split { valid: 0.2, test: 0.1, seed: 0, test_on: TestOn::Trained };
        let out = folder.path().join("data");
        let fails = |recipe: Value, expected: &str| {
            let mut splitter = Splitter::new(split, folder.path(), &out);
            let error = splitter.apply(&mut recipe.clone()).unwrap_err();
            assert!(error.is_bad_input() && error.to_string().contains(expected), "{error}");
        };
        let train = |source: Value| json!({"data": {"train": [source]}});
        fails(train(json!({"path": "a.csv"})), "a.csv is no .jsonl file");
        fails(train(json!({"path": "b.jsonl"})), "b.jsonl is no .jsonl file");
        fails(train(json!({"source": "gsm8k"})), "split takes files alone");
        fails(train(json!({"path": "a.jsonl", "fields": {"output": "x"}})), "`fields`");
        fails(train(json!({"path": "a.jsonl"})), "too small for these shares");
        let both =
            json!({"data": {"train": [{"path": "a.jsonl"}], "valid": [{"path": "a.jsonl"}]}});
        fails(both, "leave out one of them");
    }
}

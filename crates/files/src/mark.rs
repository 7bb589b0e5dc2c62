//! How a folder is known as a result of this program: by a list of its files that lies in it.
//!
//! A name such as `config.json` proves nothing, many programs write it. The list has the size of
//! every file, and of small ones, which people edit, the hash. A folder in which all is as listed
//! may be replaced by a result of the same kind; one file more, or one that was changed, and it may
//! not.

use crate::LOCK_FILE;
use crate::temporary::is_temporary;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The list's name.
pub const MARK_FILE: &str = ".hydralora-files.json";

/// Bytes up to which a file's content counts as well as its size.
const HASHED: u64 = 1 << 20;
/// Bytes of the largest list that is read.
const LONGEST: u64 = 1 << 24;

/// A kind of result, replaced by its like alone: an export never takes the place of what was trained.
#[derive(Debug)]
pub struct Kind {
    /// What it is, as `trained adapter`.
    pub name: &'static str,
    /// How builds that left no list are known to have written a folder; never if none.
    pub earlier: Option<Proof>,
}

/// What shows that a folder without a list is a result of an earlier build.
#[derive(Debug)]
pub struct Proof {
    /// A JSON file that only this program writes,
    pub file: &'static str,
    /// with these fields.
    pub fields: &'static [&'static str],
    /// All files that such a folder may hold.
    pub files: &'static [&'static str],
}

impl Proof {
    fn holds(&self, folder: &Path) -> bool {
        let path = folder.join(self.file);
        let Some(text) = read_up_to(&path, LONGEST) else { return false };
        let value: Option<serde_json::Value> = serde_json::from_slice(&text).ok();
        value.is_some_and(|value| self.fields.iter().all(|field| value.get(field).is_some()))
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    /// Version that wrote the folder.
    hydralora: String,
    kind: String,
    /// By their path in the folder, with `/`.
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

impl Entry {
    fn of(path: &Path, bytes: u64) -> io::Result<Self> {
        let sha256 = match bytes {
            0..=HASHED => {
                let hash = Sha256::digest(fs::read(path)?);
                Some(hash.iter().map(|byte| format!("{byte:02x}")).collect())
            }
            _ => None,
        };
        Ok(Self { bytes, sha256 })
    }
}

fn read_up_to(path: &Path, most: u64) -> Option<Vec<u8>> {
    if !fs::symlink_metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(most).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Takes a file by its path in the folder, its path, and what the system says of it.
type Visit<'a> = dyn FnMut(String, &Path, &fs::Metadata) -> io::Result<ControlFlow<()>> + 'a;

/// Shows every file in `folder` and the folders in it, by its path in there. The list itself, locks
/// and what is being written are left out; links are not followed.
fn walk(folder: &Path, each: &mut Visit<'_>) -> io::Result<()> {
    let mut open: Vec<(PathBuf, String)> = vec![(folder.to_path_buf(), String::new())];
    while let Some((folder, inside)) = open.pop() {
        let mut entries = fs::read_dir(&folder)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name();
            let listed = inside.is_empty() && name == MARK_FILE;
            if listed || name == LOCK_FILE || is_temporary(&name, None) {
                continue;
            }
            let within = format!("{inside}{}", name.to_string_lossy());
            let metadata = fs::symlink_metadata(entry.path())?;
            if metadata.is_dir() {
                open.push((entry.path(), format!("{within}/")));
            } else if each(within, &entry.path(), &metadata)?.is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Leaves the list of everything that `folder` holds.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn write(folder: &Path, kind: &Kind) -> io::Result<()> {
    let mut files = BTreeMap::new();
    walk(folder, &mut |name, path, metadata| {
        files.insert(name, Entry::of(path, metadata.len())?);
        Ok(ControlFlow::Continue(()))
    })?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let mark = Mark { hydralora: version, kind: kind.name.to_owned(), files };
    let mut text = serde_json::to_vec_pretty(&mark).map_err(io::Error::other)?;
    text.push(b'\n');
    fs::write(folder.join(MARK_FILE), text)
}

/// What would be lost if a result of this kind took the place of `folder`, in words that follow its
/// name; none if it is empty, not there, or a result of the same kind and nothing else.
///
/// # Errors
/// Whatever the file system says.
pub fn loss(folder: &Path, kind: &Kind) -> io::Result<Option<String>> {
    if !folder.is_dir() {
        return Ok(folder.exists().then(|| "is no folder".to_owned()));
    }
    let text = read_up_to(&folder.join(MARK_FILE), LONGEST);
    let mark: Option<Mark> = text.and_then(|text| serde_json::from_slice(&text).ok());
    let Some(mark) = mark else { return unlisted(folder, kind) };
    if mark.kind != kind.name {
        return Ok(Some(format!("holds a {}, not a {}", mark.kind, kind.name)));
    }
    let mut lost = None;
    walk(folder, &mut |name, path, metadata| {
        lost = match mark.files.get(&name) {
            _ if !metadata.is_file() => Some(foreign(&name)),
            None => Some(foreign(&name)),
            Some(entry) if *entry == Entry::of(path, metadata.len())? => None,
            Some(_) => Some(format!("holds `{name}`, which was changed since it was written")),
        };
        Ok(if lost.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    Ok(lost)
}

fn foreign(name: &str) -> String {
    format!("holds `{name}`, which hydralora did not write")
}

fn unlisted(folder: &Path, kind: &Kind) -> io::Result<Option<String>> {
    let proof = kind.earlier.as_ref().filter(|proof| proof.holds(folder));
    let mut lost = None;
    walk(folder, &mut |name, _, metadata| {
        let known = proof.is_some_and(|proof| proof.files.contains(&name.as_str()));
        if known && metadata.is_file() {
            return Ok(ControlFlow::Continue(()));
        }
        lost = Some(match proof {
            Some(_) => foreign(&name),
            None => format!("holds `{name}`, and nothing says that hydralora wrote it"),
        });
        Ok(ControlFlow::Break(()))
    })?;
    Ok(lost)
}

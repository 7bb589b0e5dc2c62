//! Files that a reader, or a crash, never sees half of.

use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use tempfile::NamedTempFile;

/// A temporary file in the folder of `path` that holds `bytes`, on disk. Others may read it as any other
/// file: workers of several users share a study.
fn beside(path: &Path, bytes: &[u8]) -> Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let made = || -> io::Result<NamedTempFile> {
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        #[cfg(unix)]
        builder.permissions(everybody);
        let mut file = builder.prefix(".study-").tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        Ok(file)
    };
    made().map_err(|source| Error::io(path, source))
}

/// Writes `bytes` to `path` in place of whatever was there.
///
/// # Errors
/// Whatever the file system says; `path` is then as it was.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = beside(path, bytes)?;
    file.persist(path).map_err(|error| Error::io(path, error.error))?;
    Ok(())
}

/// Writes `bytes` to `path` unless there is a file already: of several that try at once, one succeeds.
/// Says whether it was this one.
///
/// # Errors
/// Whatever else the file system says.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<bool> {
    let file = beside(path, bytes)?;
    match file.persist_noclobber(path) {
        Ok(_) => Ok(true),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(Error::io(path, error.error)),
    }
}

/// Writes `value` as indented JSON to `path`.
///
/// # Errors
/// As [`write_file`].
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_file(path, &to_json(value)?)
}

/// `value` as indented JSON that ends with a line break.
///
/// # Errors
/// If it cannot be written as JSON.
pub(crate) fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut text =
        serde_json::to_vec_pretty(value).map_err(|error| Error::Failed(error.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

/// The text of a file.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    hydralora_files::text_of(path).map_err(|source| Error::io(path, source))
}

/// The JSON of a file.
///
/// # Errors
/// If it cannot be read, or is not what `T` says: with the field.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read_text(path)?;
    let mut reader = serde_json::Deserializer::from_str(&text);
    serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let field = error.path().to_string();
        let message = match field.as_str() {
            "." => error.inner().to_string(),
            _ => format!("{field}: {}", error.inner()),
        };
        Error::file(path, message)
    })
}

/// Makes a folder and those above it.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|source| Error::io(path, source))
}

/// The entries of a folder by name, sorted; none if there is no such folder.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn names_in(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(folder, error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| Error::io(folder, source))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// SHA-256 of `bytes`, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// SHA-256 of a file's content, in hexadecimal.
///
/// # Errors
/// If it cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let hash = || -> io::Result<String> {
        let mut file = hydralora_files::open(path)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                return Ok(hexadecimal(&hash.finalize()));
            }
            hash.update(&buffer[..read]);
        }
    };
    hash().map_err(|source| Error::io(path, source))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_writers_one_wins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("one");
        let wins: Vec<bool> = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8_u8)
                .map(|n| {
                    let path = &path;
                    scope.spawn(move || write_new(path, &[n; 1000]).unwrap())
                })
                .collect();
            tries.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(wins.iter().filter(|won| **won).count(), 1);
        let winner = wins.iter().position(|won| *won).unwrap() as u8;
        assert_eq!(fs::read(&path).unwrap(), [winner; 1000]);
        assert_eq!(names_in(folder.path()).unwrap(), ["one"], "nothing temporary is left");
    }

    #[test]
    fn errors_name_the_path_and_the_field() {
        let error = write_file(Path::new("/no-such-folder/x"), b"").unwrap_err();
        assert!(error.to_string().contains("/no-such-folder/x"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_file(&path, b"{\"a\": {\"b\": \"x\"}}").unwrap();
        type Nested = std::collections::BTreeMap<String, std::collections::BTreeMap<String, u32>>;
        let error = read_json::<Nested>(&path).unwrap_err();
        assert!(error.to_string().contains("a.json: a.b: "), "{error}");
        assert!(error.is_bad_input());
    }
}

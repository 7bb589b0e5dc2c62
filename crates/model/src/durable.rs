//! Writing files so that a reader, or a crash, never sees half of one.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::{fs, process};

/// Writes `bytes` to `path`: to a temporary file beside it, flushed to disk, then renamed.
///
/// # Errors
/// Whatever the file system says, with the path in the message; `path` is then as it was.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = sibling(path);
    let written = (|| {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_parent(path)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        with_path(&error, path)
    })
}

/// Fills a fresh folder with `fill` and puts it in place of `path`, whatever was there before.
///
/// # Errors
/// Whatever `fill` or the file system says; `path` is then as it was.
pub fn replace_folder<E: From<io::Error>>(
    path: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(|error| with_path(&error, parent))?;
    }
    let temporary = sibling(path);
    let placed = (|| {
        fs::create_dir_all(&temporary).map_err(|error| with_path(&error, &temporary))?;
        fill(&temporary)?;
        sync_tree(&temporary).map_err(|error| with_path(&error, path))?;
        put_in_place(&temporary, path).map_err(|error| with_path(&error, path))?;
        Ok(())
    })();
    if placed.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    placed
}

fn put_in_place(from: &Path, to: &Path) -> io::Result<()> {
    if to.exists() {
        let old = sibling(&to.with_extension("old"));
        fs::rename(to, &old)?;
        fs::rename(from, to)?;
        fs::remove_dir_all(&old)?;
    } else {
        fs::rename(from, to)?;
    }
    sync_parent(to)
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            fs::File::open(&path)?.sync_all()?;
        }
    }
    fs::File::open(folder)?.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

fn sibling(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", process::id()))
}

fn with_path(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_fill_leaves_the_old_folder() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("adapter");
        let write = |folder: &Path, text: &str| fs::write(folder.join("a"), text);
        replace_folder::<io::Error>(&target, |folder| write(folder, "one")).unwrap();
        let failed = replace_folder::<io::Error>(&target, |folder| {
            write(folder, "two")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "one");
        replace_folder::<io::Error>(&target, |folder| write(folder, "three")).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "three");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no temporary is left");
    }

    #[test]
    fn the_path_is_named() {
        let error = write_file(Path::new("/nonexistent-folder/x"), b"").unwrap_err();
        assert!(error.to_string().contains("/nonexistent-folder/x"), "{error}");
    }
}

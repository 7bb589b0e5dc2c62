//! Memory-mapped files: the only unsafe code of the crate.

use crate::error::{Error, Result};
use hydralora_files::expect_file;
use memmap2::Mmap;
use std::fs::Metadata;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A read-only file mapped into memory.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Option<Mmap>,
    seen: Seen,
}

/// How a file stood when it was opened.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// The file's own number, which another file of the same name has not.
    number: u64,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Seen {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let number = std::os::unix::fs::MetadataExt::ino(metadata);
        #[cfg(not(unix))]
        let number = 0;
        Self { number, bytes: metadata.len(), modified: metadata.modified().ok() }
    }
}

impl MappedFile {
    /// Maps the file at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        expect_file(path)?;
        let file = fs_err::File::open(path)?;
        let seen = Seen::of(&file.metadata()?);
        // The system refuses to map nothing.
        let map = (file.metadata()?.len() > 0).then(|| map(file.file())).transpose().map_err(
            |error| {
                std::io::Error::new(error.kind(), format!("cannot map {}: {error}", path.display()))
            },
        )?;
        let mapped = Self { path: path.to_path_buf(), map, seen };
        // Mapping takes the size anew.
        if mapped.bytes().len() as u64 != mapped.seen.bytes {
            return Err(mapped.changed());
        }
        Ok(mapped)
    }

    /// Refuses a file that was written to since it was opened. A file that was replaced, by another
    /// of the same name, is as it was.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let now = std::fs::metadata(&self.path).map(|metadata| Seen::of(&metadata));
        match now {
            Ok(now) if now.number == self.seen.number && now != self.seen => Err(self.changed()),
            _ => Ok(()),
        }
    }

    fn changed(&self) -> Error {
        Error::malformed(
            &self.path,
            "was written to while it was read; expected a file that is replaced by renaming another \
             into its place",
        )
    }

    /// The file's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// Lets the system take back the memory of the pages inside `range`, which it reads again should
    /// they be asked for.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            const PAGE: usize = 1 << 12;
            let (first, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
            if first < end {
                release(map, first, end - first);
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

#[allow(unsafe_code)]
fn map(file: &std::fs::File) -> std::io::Result<Mmap> {
    // SAFETY: the map is private and read-only, and every byte pattern is a valid `u8`. A process
    // that rewrites a weight file in place while it is loaded would change the bytes under the
    // slice; weight files are replaced by rename, which leaves the mapped one untouched.
    unsafe { Mmap::map(file) }
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn release(map: &Mmap, offset: usize, len: usize) {
    // SAFETY: the pages of a private map that was never written to are the file's; they are read
    // from it again on the next use. A refusal costs nothing.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_that_is_written_to_is_noticed_and_one_that_is_replaced_is_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, b"first").unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        mapped.check_unchanged().unwrap();
        let other = folder.path().join("other");
        std::fs::write(&other, b"another one").unwrap();
        std::fs::rename(&other, &path).unwrap();
        mapped.check_unchanged().unwrap();
        assert_eq!(mapped.bytes(), b"first");
        let mapped = MappedFile::open(&path).unwrap();
        let mut open = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        open.write_all(b", longer").unwrap();
        let error = mapped.check_unchanged().unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains("written to"), "{error}");
    }
}

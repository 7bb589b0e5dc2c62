//! Memory-mapped files: the only unsafe code of the crate.

use crate::error::Result;
use memmap2::Mmap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A read-only file mapped into memory.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the file at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        // Opening a pipe waits for somebody to write; a device has no end.
        let kind = fs_err::metadata(path)?.file_type();
        if !kind.is_file() {
            let what = if kind.is_dir() { "a folder" } else { "a pipe, a socket or a device" };
            let message = format!("{} is {what}; expected a file", path.display());
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, message).into());
        }
        let file = fs_err::File::open(path)?;
        // The system refuses to map nothing.
        let map = (file.metadata()?.len() > 0).then(|| map(file.file())).transpose().map_err(
            |error| {
                std::io::Error::new(error.kind(), format!("cannot map {}: {error}", path.display()))
            },
        )?;
        Ok(Self { path: path.to_path_buf(), map })
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

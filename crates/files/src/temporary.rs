//! Files and folders under a temporary name, locked while they are written.

use crate::{folder_of, is_at, unwritable};
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempDir};

/// How every temporary name ends.
const SUFFIX: &str = ".hydralora.tmp";
/// Random characters of a temporary name.
const RANDOM: usize = 12;
/// Bytes of the target's name that a temporary one repeats; file systems take 255 in all.
const LONGEST: usize = 200;
/// How often another name is tried, should somebody take the first one for a left-over.
const TRIES: usize = 16;

/// How the temporary names of `target` begin.
fn prefix(target: &Path) -> String {
    let name = target.file_name().unwrap_or(OsStr::new("out")).to_string_lossy();
    let mut end = name.len().min(LONGEST);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!(".{}.", &name[..end])
}

/// Whether `name` is one that this module gives; `prefix` leaves those of other targets out.
pub(crate) fn is_temporary(name: &OsStr, prefix: Option<&str>) -> bool {
    let Some(name) = name.to_str() else { return false };
    let Some(body) = name.strip_suffix(SUFFIX) else { return false };
    let Some((start, random)) =
        body.len().checked_sub(RANDOM).and_then(|at| body.split_at_checked(at))
    else {
        return false;
    };
    let plain = random.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let begins = match prefix {
        Some(prefix) => start == prefix,
        None => start.starts_with('.') && start.ends_with('.') && start.len() > 2,
    };
    plain && begins
}

fn builder(prefix: &str) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(SUFFIX).rand_bytes(RANDOM);
    builder
}

/// Locks what was just made. False if somebody else holds or removed it: they took it for a
/// left-over. Where the file system has no locks, there is nobody who could.
fn claim(file: &File, path: &Path) -> bool {
    !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && is_at(file, path)
}

fn taken() -> io::Error {
    io::Error::other("temporary files disappear as they are made")
}

/// A file that appears at its place when it is finished, and not at all if it is dropped before.
#[derive(Debug)]
pub struct NewFile {
    file: NamedTempFile,
    target: PathBuf,
}

impl NewFile {
    /// Begins a file whose place is `target`, and removes what killed runs left of the same one.
    /// It is as readable as any new file, by the umask.
    ///
    /// # Errors
    /// If the folder cannot be written; the message names `target`.
    pub fn create(target: &Path) -> io::Result<Self> {
        Self::begin(target).map_err(|error| unwritable(&error, target))
    }

    fn begin(target: &Path) -> io::Result<Self> {
        if target.file_name().is_none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not the name of a file",
            ));
        }
        let (folder, prefix) = (folder_of(target), prefix(target));
        for _ in 0..TRIES {
            let mut builder = builder(&prefix);
            #[cfg(unix)]
            builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
            let file = builder.tempfile_in(folder)?;
            if claim(file.as_file(), file.path()) {
                sweep(folder, Some(&prefix), file.as_file());
                return Ok(Self { file, target: target.to_path_buf() });
            }
        }
        Err(taken())
    }

    /// Flushes the file to disk and puts it at its place.
    ///
    /// # Errors
    /// Whatever the file system says; its place is then as it was.
    pub fn finish(self) -> io::Result<()> {
        let Self { file, target } = self;
        let placed = (|| {
            file.as_file().sync_all()?;
            file.persist(&target).map_err(|error| error.error)?;
            sync_folder(folder_of(&target))
        })();
        placed.map_err(|error| unwritable(&error, &target))
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes).map_err(|error| unwritable(&error, &self.target))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush().map_err(|error| unwritable(&error, &self.target))
    }
}

/// A folder under a temporary name, removed when it is dropped.
pub(crate) struct NewFolder {
    folder: TempDir,
    /// Holds the lock.
    _open: Option<File>,
}

impl NewFolder {
    /// An empty folder in `parent` for `target`.
    pub(crate) fn create(parent: &Path, target: &Path) -> io::Result<Self> {
        let prefix = prefix(target);
        for _ in 0..TRIES {
            let folder = builder(&prefix).tempdir_in(parent)?;
            // Elsewhere folders cannot be opened, nor therefore locked.
            if cfg!(not(unix)) {
                return Ok(Self { folder, _open: None });
            }
            let Ok(open) = File::open(folder.path()) else { continue };
            if claim(&open, folder.path()) {
                sweep(parent, Some(&prefix), &open);
                return Ok(Self { folder, _open: Some(open) });
            }
        }
        Err(taken())
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Removes the folder and what it holds.
    pub(crate) fn remove(self) -> io::Result<()> {
        self.folder.close()
    }

    /// Leaves the folder where it is, or was moved to.
    pub(crate) fn keep(self) {
        let _ = self.folder.keep();
    }
}

/// Removes everything in `folder` that killed runs left under a temporary name. What somebody is
/// writing stays, and so does what cannot be removed.
pub fn sweep_within(folder: &Path) {
    if let Ok(open) = File::open(folder) {
        sweep(folder, None, &open);
    }
}

/// Removes what is under a temporary name in `folder`, belongs to the owner of `own`, and is not
/// locked. Failures leave it for the next time.
fn sweep(folder: &Path, prefix: Option<&str>, own: &File) {
    #[cfg(unix)]
    {
        use rustix::fs::{Mode, OFlags};
        use std::os::unix::fs::MetadataExt;
        let Ok(owner) = own.metadata().map(|metadata| metadata.uid()) else { return };
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            if !is_temporary(&entry.file_name(), prefix) {
                continue;
            }
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            let kind = metadata.file_type();
            if metadata.uid() != owner || !(kind.is_file() || kind.is_dir()) {
                continue;
            }
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let Ok(open) = rustix::fs::open(&path, flags, Mode::empty()) else { continue };
            let open = File::from(open);
            if open.try_lock().is_ok() && is_at(&open, &path) {
                let _ =
                    if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }
        }
    }
    #[cfg(not(unix))]
    let _ = (folder, prefix, own);
}

/// Flushes a folder's list of names to disk.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_there_when_it_is_finished_and_gone_when_it_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a.json");
        let mut file = NewFile::create(&target).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert!(names(folder.path()).is_empty());
        let mut file = NewFile::create(&target).unwrap();
        file.write_all(b"whole").unwrap();
        file.finish().unwrap();
        assert_eq!(names(folder.path()), ["a.json"]);
        let usual = File::create(folder.path().join("usual")).unwrap().metadata().unwrap();
        let mode = fs::metadata(&target).unwrap().permissions().mode();
        assert_eq!(mode, usual.permissions().mode(), "as readable as any new file");
    }

    #[test]
    fn left_overs_of_the_same_target_are_swept_and_what_is_being_written_stays() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("best");
        let live = NewFolder::create(folder.path(), &target).unwrap();
        fs::write(live.path().join("half"), b"").unwrap();
        let live_name = live.path().file_name().unwrap().to_str().unwrap().to_owned();
        fs::create_dir(folder.path().join(".best.aaaaaaaaaaaa.hydralora.tmp")).unwrap();
        fs::write(folder.path().join(".best.aaaaaaaaaaaa.hydralora.tmp/x"), b"").unwrap();
        fs::write(folder.path().join(".best.bbbbbbbbbbbb.hydralora.tmp"), b"").unwrap();
        let kept = [
            ".best.aaaaaaaaaaaa.tmp",
            ".bestof.aaaaaaaaaaaa.hydralora.tmp",
            "best.aaaaaaaaaaaa.hydralora.tmp",
            ".best.no-such-name.hydralora.tmp",
        ];
        for name in kept {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        let elsewhere = folder.path().join("elsewhere");
        fs::write(&elsewhere, b"kept").unwrap();
        symlink(&elsewhere, folder.path().join(".best.cccccccccccc.hydralora.tmp")).unwrap();
        NewFile::create(&target).unwrap().finish().unwrap();
        let left = names(folder.path());
        for name in kept.iter().copied().chain([live_name.as_str(), "elsewhere"]) {
            assert!(left.iter().any(|other| other == name), "{name} is gone: {left:?}");
        }
        assert!(
            !left
                .iter()
                .any(|name| name.contains("aaaaaaaaaaaa.hydralora") && name.starts_with(".best."))
        );
        assert!(!left.iter().any(|name| name.contains("bbbbbbbbbbbb")));
        assert_eq!(fs::read(&elsewhere).unwrap(), b"kept");
        assert!(live.path().join("half").exists());
    }

    #[test]
    fn long_names_and_names_of_many_bytes_have_temporary_ones() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["x".repeat(250), "字".repeat(80)] {
            let target = folder.path().join(&name);
            NewFile::create(&target).unwrap().finish().unwrap();
            assert!(target.exists());
        }
        assert!(NewFile::create(&folder.path().join("..")).is_err());
    }
}

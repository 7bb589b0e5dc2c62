//! A file that only one process holds at a time.

use crate::{folder_of, is_at, unwritable};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The lock of a folder, which lies in it. It stays there, and shows that the folder is one of ours.
pub const LOCK_FILE: &str = ".hydralora.lock";

/// Bytes of a lock file that are read to tell who holds it.
const LONGEST: u64 = 1 << 12;
/// How often a lock file is opened again because it was removed meanwhile.
const TRIES: usize = 16;

/// Who holds a lock, as the file says.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    hydralora: String,
    process: u32,
    host: String,
    /// Seconds since 1970.
    since: u64,
}

impl Holder {
    fn me() -> Self {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self {
            hydralora: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
            host: host.trim().to_owned(),
            since: seconds(),
        }
    }

    fn read(path: &Path) -> Option<Self> {
        if !fs::symlink_metadata(path).ok()?.is_file() {
            return None;
        }
        let mut text = Vec::new();
        File::open(path).ok()?.take(LONGEST).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Who holds a lock that is taken; right after that the file does not say yet.
    fn of_locked(path: &Path) -> Option<Self> {
        (0..10).find_map(|_| {
            let holder = Self::read(path);
            if holder.is_none() {
                std::thread::sleep(Duration::from_millis(20));
            }
            holder
        })
    }

    fn text(&self) -> String {
        let on = if self.host.is_empty() { String::new() } else { format!(" on {}", self.host) };
        let minutes = seconds().saturating_sub(self.since) / 60;
        let since = match minutes {
            0 => "since less than a minute".to_owned(),
            1 => "since a minute".to_owned(),
            2..=119 => format!("since {minutes} minutes"),
            _ => format!("since {} hours", minutes / 60),
        };
        format!("process {}{on}, {since}", self.process)
    }
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A lock, held until it is dropped or the process ends in whatever way.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
    /// Whether the file is removed with the lock.
    remove: bool,
}

impl Lock {
    /// Locks a folder, which is made if there is none.
    ///
    /// # Errors
    /// Of the kind [`io::ErrorKind::ResourceBusy`], saying who, if somebody holds it; whatever the
    /// file system says otherwise.
    pub fn folder(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder).map_err(|error| unwritable(&error, folder))?;
        Self::take(folder.join(LOCK_FILE), folder, false)
    }

    /// Locks a single file, by a lock file beside it that is removed in the end.
    ///
    /// # Errors
    /// As [`Lock::folder`].
    pub fn file(path: &Path) -> io::Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let beside = folder_of(path).join(format!(".{name}{LOCK_FILE}"));
        Self::take(beside, path, true)
    }

    /// Whether a folder was locked before, by whatever process: then this program wrote there.
    pub fn was_in(folder: &Path) -> bool {
        Holder::read(&folder.join(LOCK_FILE)).is_some()
    }

    fn take(path: PathBuf, of: &Path, remove: bool) -> io::Result<Self> {
        let failed = |error: io::Error| unwritable(&error, of);
        // A link or a pipe that somebody put there is not written to.
        if fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_file()) {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is no file", path.display()),
            )));
        }
        for _ in 0..TRIES {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            #[cfg(unix)]
            {
                use rustix::fs::OFlags;
                use std::os::unix::fs::OpenOptionsExt;
                options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
            }
            let mut file = options.open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) if !is_at(&file, &path) => continue,
                // Without locks on this file system there is nothing to hold on to.
                Ok(()) | Err(TryLockError::Error(_)) => {}
                Err(TryLockError::WouldBlock) => {
                    let by = Holder::of_locked(&path)
                        .map_or_else(|| "another process".to_owned(), |holder| holder.text());
                    let message = format!("{} is in use by {by}", of.display());
                    return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
                }
            }
            let text = serde_json::to_string(&Holder::me()).unwrap_or_default();
            (|| {
                file.set_len(0)?;
                file.seek(SeekFrom::Start(0))?;
                writeln!(file, "{text}")
            })()
            .map_err(failed)?;
            return Ok(Self { file, path, remove });
        }
        Err(failed(io::Error::other("it disappears as it is made")))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While the lock is held; whoever has opened the file meanwhile finds that it is gone.
        if self.remove && is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_refused_and_told_of_the_first() {
        let root = tempfile::tempdir().unwrap();
        let run = root.path().join("run");
        let lock = Lock::folder(&run).unwrap();
        let error = Lock::folder(&run).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        let me = format!("process {}", std::process::id());
        assert!(error.to_string().contains(&me), "{error}");
        drop(lock);
        drop(Lock::folder(&run).unwrap());
        assert!(Lock::was_in(&run), "a folder's lock stays as its mark");
    }

    #[test]
    fn a_files_lock_is_removed_and_what_a_killed_run_left_is_taken_over() {
        let root = tempfile::tempdir().unwrap();
        let log = root.path().join("samples.jsonl");
        fs::write(root.path().join(".samples.jsonl.hydralora.lock"), b"{ half").unwrap();
        let lock = Lock::file(&log).unwrap();
        assert!(Lock::file(&log).is_err());
        drop(lock);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn links_in_place_of_a_lock_are_not_written_through() {
        let root = tempfile::tempdir().unwrap();
        let secret = root.path().join("secret");
        fs::write(&secret, b"kept").unwrap();
        std::os::unix::fs::symlink(&secret, root.path().join(LOCK_FILE)).unwrap();
        assert!(Lock::folder(root.path()).is_err());
        assert_eq!(fs::read(&secret).unwrap(), b"kept");
        assert!(!Lock::was_in(root.path()));
    }
}

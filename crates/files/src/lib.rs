//! Writing, replacing and locking files, so that a reader or a crash never sees half of one, and
//! nothing is lost that this program did not write.
//!
//! - [`write_file`] and [`NewFile`] write a file under a temporary name beside its place, flush it
//!   to disk and rename it.
//! - [`replace_folder`] does so with a folder, and puts it in place of an older result in one step.
//!   What a result is, its [`Mark`](mark) says: a list of its files that lies in it. A folder that
//!   holds anything else is left alone.
//! - [`Lock`] keeps a second process out.
//! - [`expect_file`] refuses pipes and devices where a file is expected, [`try_place`] a place that
//!   cannot be written, both before any work is done.
//!
//! Temporary names are random and made afresh, so no link that somebody put there is followed.
//! They are locked while they are written, so what a killed run left behind is known by a lock
//! that is free; it is removed when the same file or folder is written again.

#![forbid(unsafe_code)]

mod lock;
pub mod mark;
mod open;
mod replace;
mod temporary;

pub use lock::{LOCK_FILE, Lock};
pub use mark::{Kind, Proof};
pub use open::{bytes_of, expect_file, open, read, read_to_string, text_of};
pub use replace::{
    check_replaceable, remove_folder, replace_folder, set_aside, try_place, write_file,
};
pub use temporary::{NewFile, sweep_within};

use std::io;
use std::path::Path;

/// `error`, saying that `path` could not be written.
fn unwritable(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
}

/// The folder that `path` lies in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whether an open file is still the one at `path`; true where that cannot be told.
fn is_at(file: &std::fs::File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let (Ok(open), Ok(there)) = (file.metadata(), std::fs::symlink_metadata(path)) else {
            return false;
        };
        (open.dev(), open.ino()) == (there.dev(), there.ino())
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}

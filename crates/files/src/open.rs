//! What is no file is refused before it is opened.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

/// Refuses what is neither a file nor a folder: opening a pipe may wait for ever, a device has no
/// end. A path with nothing there is left to whoever opens it.
///
/// # Errors
/// If `path` leads to a pipe, a socket or a device; the message names it.
pub fn expect_file(path: &Path) -> io::Result<()> {
    match refusal(path) {
        Some(what) => Err(refused(format!("{}: {what}", path.display()))),
        None => Ok(()),
    }
}

/// Why `path` is refused, if it is.
fn refusal(path: &Path) -> Option<String> {
    let kind = fs::metadata(path).ok()?.file_type();
    let file = kind.is_file() || kind.is_dir();
    (!file).then(|| format!("is {}; expected a file", named(kind)))
}

fn refused(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// Opens a file to be read whose path the caller's message names; refuses what [`expect_file`] does.
///
/// # Errors
/// Whatever the file system says, without the path.
pub fn open(path: &Path) -> io::Result<fs::File> {
    match refusal(path) {
        Some(what) => Err(refused(what)),
        None => fs::File::open(path),
    }
}

/// Reads a file whose path the caller's message names, as [`open`].
///
/// # Errors
/// As [`open`].
pub fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a file of text whose path the caller's message names, as [`open`].
///
/// # Errors
/// As [`open`], and if it is not valid UTF-8.
pub fn text_of(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

/// Reads a file; unlike `fs_err`'s, refuses what [`expect_file`] does.
///
/// # Errors
/// Whatever the file system says, with the path in the message.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    expect_file(path)?;
    fs_err::read(path)
}

/// Reads a file of text, as [`read`].
///
/// # Errors
/// As [`read`], and if it is not valid UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    expect_file(path)?;
    fs_err::read_to_string(path)
}

#[cfg(unix)]
fn named(kind: fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        kind if kind.is_fifo() => "a pipe",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    }
}

#[cfg(not(unix))]
fn named(_: fs::FileType) -> &'static str {
    "a device"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn pipes_and_devices_are_no_files() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("model.safetensors");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&pipe, &link).unwrap();
        for path in [pipe.as_path(), &link] {
            let error = expect_file(path).unwrap_err().to_string();
            assert!(error.contains("a pipe") && error.contains("expected a file"), "{error}");
        }
        assert!(expect_file(Path::new("/dev/zero")).unwrap_err().to_string().contains("a device"));
        assert!(expect_file(folder.path()).is_ok());
        assert!(expect_file(&folder.path().join("nothing")).is_ok());
    }
}

//! Bytes of a data file: opened, decompressed, and looked at.
//!
//! | begins with | is |
//! | --- | --- |
//! | `1f 8b` | gzip (one or several members) |
//! | `28 b5 2f fd` | zstd (one or several frames) |
//! | `PAR1` | Parquet |
//! | every other byte zero | UTF-16: refused |
//! | the marks in [`foreign`](crate::foreign) | Git LFS pointers, archives, Arrow and others: refused by name |
//! | `ef bb bf` | a byte order mark, skipped |
//!
//! What a file is follows from these bytes; its name is only asked where they do not say.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use fs_err::File;

use crate::error::{Error, Result};
use crate::foreign;

/// The most bytes of one record; more is taken for a file that is damaged or of another kind.
pub(crate) const MAX_RECORD_BYTES: usize = 16 << 20;

/// What a file may unpack to: this much, and a multiple of its own size. Text shrinks to a tenth or a
/// fiftieth; a few hundred bytes that become gigabytes were made to.
const UNPACKED_BYTES: u64 = 64 << 20;
const UNPACKED_TIMES: u64 = 200;

/// How much of a file's beginning is looked at.
const HEAD_BYTES: usize = 16 << 10;

/// An opened data file.
pub(crate) struct Input {
    /// The file, for messages.
    pub(crate) path: PathBuf,
    /// The ending of its name in lower case, that of a compression taken off.
    pub(crate) ending: String,
    /// Its first bytes after decompression, without a byte order mark.
    pub(crate) head: Vec<u8>,
    /// Whether it is compressed, and how.
    pub(crate) compression: Option<&'static str>,
    /// The decompressed bytes from the first on, without a byte order mark.
    pub(crate) reader: Box<dyn BufRead + Send>,
    /// The most bytes that its records may hold.
    pub(crate) budget: u64,
}

impl Input {
    /// Opens a file and finds out how it is compressed.
    ///
    /// # Errors
    /// When it cannot be read, its compression is damaged at once, or it is of a kind not read.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        hydralora_files::expect_file(path)?;
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let budget = UNPACKED_BYTES.saturating_add(size.saturating_mul(UNPACKED_TIMES));
        let mut file = BufReader::with_capacity(1 << 18, file);
        let magic = file.fill_buf()?;
        let magic = &magic[..magic.len().min(4)];
        let (compression, mut reader): (_, Box<dyn BufRead + Send>) =
            if magic.starts_with(b"\x1f\x8b") {
                let decoder = flate2::bufread::MultiGzDecoder::new(file);
                (Some("gzip"), Box::new(BufReader::with_capacity(1 << 18, decoder)))
            } else if magic.starts_with(b"\x28\xb5\x2f\xfd") {
                let decoder = zstd::stream::read::Decoder::with_buffer(file)?;
                (Some("zstd"), Box::new(BufReader::with_capacity(1 << 18, decoder)))
            } else {
                (None, Box::new(file))
            };
        let mut head = Vec::new();
        reader
            .by_ref()
            .take(HEAD_BYTES as u64)
            .read_to_end(&mut head)
            .map_err(|error| damaged(path, compression, 0, &error))?;
        if let Some(what) = foreign::kind(&head, &ending(path)) {
            return Err(Error::format(path, format!("the file is {what}")));
        }
        if is_unmarked_utf16(&head) {
            let what = "UTF-16 without a byte order mark, by its zero bytes; save it as UTF-8";
            return Err(Error::format(path, format!("the file is {what}")));
        }
        if head.starts_with(b"\xef\xbb\xbf") {
            head.drain(..3);
        }
        let reader = Box::new(Cursor::new(head.clone()).chain(reader));
        Ok(Self {
            path: path.to_path_buf(),
            ending: ending(path),
            head,
            compression,
            reader,
            budget,
        })
    }

    /// The first character that is not white space, if it is ASCII.
    pub(crate) fn first_char(&self) -> Option<char> {
        let text = String::from_utf8_lossy(&self.head);
        text.trim_start().chars().next()
    }

    /// What the file begins with, for a message that it is none of the kinds read.
    pub(crate) fn beginning(&self) -> String {
        let valid = match std::str::from_utf8(&self.head) {
            Ok(_) => self.head.len(),
            // The head may end inside a character.
            Err(fault) if fault.error_len().is_none() => self.head.len(),
            Err(fault) => fault.valid_up_to(),
        };
        let fault = self.head[..valid].iter().position(|&byte| byte == 0).unwrap_or(valid);
        let text = match self.first_char().filter(|first| fault > 0 && !first.is_control()) {
            None => "a file whose first bytes are no text".to_owned(),
            Some(first) if fault == self.head.len() => format!("a file that begins with `{first}`"),
            Some(_) => format!(
                "a file that is no UTF-8 text (its byte {} is 0x{:02x})",
                fault + 1,
                self.head[fault]
            ),
        };
        match self.path.extension().and_then(|name| name.to_str()) {
            Some(name @ ("gz" | "gzip" | "zst" | "zstd")) if self.compression.is_none() => {
                format!("{text}, and not compressed as its ending .{name} says")
            }
            _ => text,
        }
    }

    /// The error for bytes that could not be read, after `line` whole lines.
    pub(crate) fn damaged(&self, line: usize, error: &io::Error) -> Error {
        damaged(&self.path, self.compression, line, error)
    }

    /// Reads a line without its line feed; `false` at the end of the file.
    ///
    /// # Errors
    /// When the bytes cannot be read or the line is longer than [`MAX_RECORD_BYTES`].
    pub(crate) fn read_line(&mut self, buffer: &mut Vec<u8>, line: usize) -> Result<bool> {
        buffer.clear();
        let limit = MAX_RECORD_BYTES as u64 + 1;
        let read = self.reader.by_ref().take(limit).read_until(b'\n', buffer);
        let read = read.map_err(|error| self.damaged(line - 1, &error))?;
        if buffer.last() == Some(&b'\n') {
            buffer.pop();
        } else if buffer.len() > MAX_RECORD_BYTES {
            return Err(too_long(&self.path, line));
        }
        Ok(read > 0)
    }
}

/// Whether a text starts with ASCII characters of two bytes each, as all the layouts do in UTF-16.
fn is_unmarked_utf16(head: &[u8]) -> bool {
    let ascii = |byte: u8| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~');
    match *head {
        [0, a, 0, b, ..] | [a, 0, b, 0, ..] => ascii(a) && ascii(b),
        _ => false,
    }
}

/// A file that holds far more than its size says.
pub(crate) fn unpacks(path: &Path, budget: u64) -> Error {
    let message = format!(
        "its records hold more than {} MiB, over {UNPACKED_TIMES} times its size; expected a file \
         that was not made to fill the memory",
        budget >> 20
    );
    Error::format(path, message)
}

/// A record that is longer than any real one.
pub(crate) fn too_long(path: &Path, line: usize) -> Error {
    let message = format!(
        "line {line}: a record of more than {} MiB; expected one record a line or a list of \
         records, each much shorter",
        MAX_RECORD_BYTES >> 20
    );
    Error::format(path, message)
}

fn damaged(path: &Path, compression: Option<&str>, line: usize, error: &io::Error) -> Error {
    let what = compression.map_or("file".to_owned(), |kind| format!("{kind} stream"));
    let message = match error.kind() {
        io::ErrorKind::UnexpectedEof => "it ends too early".to_owned(),
        _ => error.to_string(),
    };
    Error::Damaged { path: path.to_path_buf(), what, line, message }
}

/// The ending of a file's name in lower case, without that of a compression.
pub(crate) fn ending(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = [".gz", ".gzip", ".zst", ".zstd"]
        .iter()
        .find_map(|compressed| name.strip_suffix(compressed))
        .unwrap_or(&name);
    name.rsplit_once('.').map_or(String::new(), |(_, ending)| ending.to_owned())
}

/// A file's name without the endings of its layout and compression.
pub(crate) fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let lower = name.to_lowercase();
    let mut end = name.len();
    for compressed in [".gz", ".gzip", ".zst", ".zstd"] {
        if lower.ends_with(compressed) {
            end -= compressed.len();
            break;
        }
    }
    let name = name.get(..end).unwrap_or(&name);
    match name.rsplit_once('.') {
        Some((stem, _)) if !stem.is_empty() => stem.to_owned(),
        _ => name.to_owned(),
    }
}

/// The text of bytes of one record, or the place of the first byte that is none.
pub(crate) fn text(path: &Path, bytes: Vec<u8>, line: usize, column: usize) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let bytes = error.as_bytes();
        let before = &bytes[..at];
        let breaks = before.iter().filter(|&&byte| byte == b'\n').count();
        let column = match before.iter().rposition(|&byte| byte == b'\n') {
            Some(line_break) => at - line_break,
            None => column + at,
        };
        let byte = bytes.get(at).copied().unwrap_or_default();
        Error::Utf8 { path: path.to_path_buf(), line: line + breaks, column, byte }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_and_stems_see_through_compression() {
        for (name, end, stem_of) in [
            ("a.jsonl", "jsonl", "a"),
            ("x/a.b.JSONL.GZ", "jsonl", "a.b"),
            ("a.csv.zst", "csv", "a"),
            ("a.gz", "", "a"),
            ("a", "", "a"),
            (".hidden", "hidden", ".hidden"),
        ] {
            assert_eq!(ending(Path::new(name)), end, "{name}");
            assert_eq!(stem(Path::new(name)), stem_of, "{name}");
        }
    }
}

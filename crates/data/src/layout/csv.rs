//! CSV and its relatives with tabs or semicolons: a header that names the fields, then rows.
//!
//! Quoting is that of RFC 4180; the separator is a tab in `.tsv` files and otherwise whichever of
//! comma, tab and semicolon the header holds most of. All values are strings.

use std::io::{self, BufRead, Read};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value};

use super::{Asked, Content, Layout, Raw, Visit};
use crate::error::{Error, Location, Result};
use crate::format::{self, Fields};
use crate::input::{self, Input, MAX_RECORD_BYTES};

/// Fields of a table; every row holds them all.
const MOST_FIELDS: usize = 4096;

pub(super) struct Csv;

impl Layout for Csv {
    fn endings(&self) -> &'static [&'static str] {
        &["csv", "tsv"]
    }

    fn recognises(&self, input: &Input, asked: &Asked<'_>) -> bool {
        if input.first_char().is_none_or(|first| first == '{' || first == '[') {
            return false;
        }
        if self.endings().contains(&input.ending.as_str()) {
            return true;
        }
        // Of another name, but with a header that names the fields a format needs.
        let line = input.head.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let Ok(line) = std::str::from_utf8(line) else { return false };
        let separator = separator(input);
        let names = line.trim_end().split(char::from(separator));
        let names = names.map(|name| (name.trim_matches('"').to_owned(), Value::Null));
        let object: Map<String, Value> = names.collect();
        let fields = Fields::new(&object, asked.fields);
        object.len() > 1
            && match asked.format {
                Some(format) => format::fits(format, &fields),
                None => format::detect(&fields).is_ok(),
            }
    }

    fn read(&self, input: Input, _: &Asked<'_>, visit: &mut Visit<'_>) -> Result<()> {
        let path = input.path.clone();
        let separator = separator(&input);
        let compression = input.compression;
        let unread = Arc::new(AtomicUsize::new(0));
        let unclosed = Arc::new(AtomicUsize::new(0));
        let escaped = Arc::new(Mutex::new(Vec::new()));
        let bounded = Bounded {
            reader: input.reader,
            unread: unread.clone(),
            quotes: Quotes { separator, at: At::Start, before: 0, line: 1, opened: 0 },
            unclosed: unclosed.clone(),
            escaped: escaped.clone(),
        };
        let mut reader = csv::ReaderBuilder::new().delimiter(separator).from_reader(bounded);
        let fault = |error: &csv::Error, line: usize| match error.kind() {
            csv::ErrorKind::Io(found) if found.get_ref().is_some_and(|e| e.is::<TooLong>()) => {
                input::too_long(&path, line)
            }
            csv::ErrorKind::Io(found) => Error::Damaged {
                path: path.clone(),
                what: compression.map_or("file".to_owned(), |kind| format!("{kind} stream")),
                line: line - 1,
                message: match found.kind() {
                    io::ErrorKind::UnexpectedEof => "it ends too early".to_owned(),
                    _ => found.to_string(),
                },
            },
            csv::ErrorKind::UnequalLengths { pos, expected_len, len } => {
                let line = pos.as_ref().map_or(line, |pos| pos.line() as usize);
                if let Some(line) = first_escape(&escaped, line..=line, false) {
                    return backslash(&path, line);
                }
                let message = format!(
                    "line {line}: expected {expected_len} fields as in the header, found {len}; \
                     fields that hold the separator or a line break need quotes"
                );
                Error::format(&path, message)
            }
            _ => Error::format(&path, format!("line {line}: {error}")),
        };
        let mut header = Vec::new();
        let names = reader.byte_headers().map_err(|error| fault(&error, 1))?.clone();
        if names.len() > MOST_FIELDS {
            let message = format!(
                "line 1: a header of {} fields; expected at most {MOST_FIELDS}",
                names.len()
            );
            return Err(Error::format(&path, message));
        }
        for name in &names {
            let name = input::text(&path, name.to_vec(), 1, 1)?;
            if header.contains(&name) {
                let message = format!("line 1: the header names the field `{name}` twice");
                return Err(Error::format(&path, message));
            }
            header.push(name);
        }
        let mut row = csv::ByteRecord::new();
        let mut number = 0;
        let mut next_line = 2;
        loop {
            unread.store(0, Relaxed);
            if !reader.read_byte_record(&mut row).map_err(|error| fault(&error, next_line))? {
                return Ok(());
            }
            let lines = next_line..=(reader.position().line() as usize);
            let open = unclosed.load(Relaxed) > 0;
            if let Some(line) = first_escape(&escaped, lines, !open) {
                return Err(backslash(&path, line));
            }
            if unclosed.load(Relaxed) > 0 {
                let line = unclosed.load(Relaxed);
                let message = format!(
                    "line {line}: a field begins with a quote that is never closed; expected one \
                     more, and two for a quote inside a quoted field"
                );
                return Err(Error::format(&path, message));
            }
            number += 1;
            let line = row.position().map_or(next_line, |position| position.line() as usize);
            next_line = reader.position().line() as usize;
            let mut object = Map::new();
            for (name, value) in header.iter().zip(&row) {
                let value = String::from_utf8(value.to_vec()).map_err(|error| {
                    let at = error.utf8_error().valid_up_to();
                    let byte = error.as_bytes().get(at).copied().unwrap_or_default();
                    let message = format!(
                        "line {line}: field `{name}`: expected UTF-8, found the byte 0x{byte:02x} \
                         at place {}; save the file as UTF-8",
                        at + 1
                    );
                    Error::format(&path, message)
                })?;
                object.insert(name.clone(), Value::String(value));
            }
            let location = Location { path: path.clone(), line, record: Some(number) };
            if !visit(Raw { location, content: Content::Object(object) })? {
                return Ok(());
            }
        }
    }
}

/// The most of these that are noted; one ends the reading in most files.
const MOST_ESCAPES: usize = 1 << 16;

/// Quotes behind a backslash in quoted fields: their lines, and whether they can be nothing but escaped.
type Escapes = Arc<Mutex<Vec<(usize, bool)>>>;

/// The first of them in these lines; of the certain ones only on request.
fn first_escape(
    escapes: &Escapes,
    lines: std::ops::RangeInclusive<usize>,
    certain: bool,
) -> Option<usize> {
    let escapes = escapes.lock().ok()?;
    let wanted = |(line, sure): &&(usize, bool)| lines.contains(line) && (*sure || !certain);
    escapes.iter().find(wanted).map(|(line, _)| *line)
}

/// The error of a quote that a backslash escapes, which would end its field.
fn backslash(path: &Path, line: usize) -> Error {
    let message = format!(
        "line {line}: a quote inside a quoted field follows a backslash; CSV has no escapes, expected the \
         quote twice (`\"\"`), as in RFC 4180"
    );
    Error::format(path, message)
}

/// What separates the fields.
fn separator(input: &Input) -> u8 {
    if input.ending == "tsv" {
        return b'\t';
    }
    let header = input.head.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let count = |separator: u8| header.iter().filter(|&&byte| byte == separator).count();
    // The first of equals counts, hence the order.
    let mut best = b',';
    for separator in *b"\t;" {
        if count(separator) > count(best) {
            best = separator;
        }
    }
    best
}

/// A reader that stops when one record takes too many bytes, and that tells the line of a quote
/// that is still open at the end of the file: it would swallow all records that follow.
struct Bounded {
    reader: Box<dyn BufRead + Send>,
    unread: Arc<AtomicUsize>,
    quotes: Quotes,
    /// The line of the open quote; 0 while there is none at the end.
    unclosed: Arc<AtomicUsize>,
    escaped: Escapes,
}

#[derive(Debug, thiserror::Error)]
#[error("a record is too long")]
struct TooLong;

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        if self.unread.fetch_add(read, Relaxed) > MAX_RECORD_BYTES {
            return Err(io::Error::other(TooLong));
        }
        for &byte in &buffer[..read] {
            if let Some(found) = self.quotes.take(byte)
                && let Ok(mut escaped) = self.escaped.lock()
                && escaped.len() < MOST_ESCAPES
            {
                escaped.push(found);
            }
        }
        if read == 0 && self.quotes.at == At::Quoted {
            self.unclosed.store(self.quotes.opened, Relaxed);
        }
        Ok(read)
    }
}

/// Where in a field the bytes have come to.
#[derive(PartialEq, Clone, Copy)]
enum At {
    Start,
    Plain,
    Quoted,
    /// After a quote in a quoted field: its end, or the first half of a quote in the text.
    Quote,
}

/// Follows the quotes as the parser does, which does not tell how a file ended.
struct Quotes {
    separator: u8,
    at: At,
    /// The byte before the last quote in a quoted field.
    before: u8,
    line: usize,
    /// The line of the last quote that began a field.
    opened: usize,
}

impl Quotes {
    /// Takes a byte; gives the line of a quote behind a backslash when what follows it is known.
    fn take(&mut self, byte: u8) -> Option<(usize, bool)> {
        let ends = byte == self.separator || byte == b'\n' || byte == b'\r';
        // Before more of the field it is escaped; before a separator it may end a text that ends in a
        // backslash, and two may be one of the text.
        let escaped = (self.at == At::Quote && self.before == b'\\')
            .then_some((self.line, !ends && byte != b'"'));
        if !(self.at == At::Quoted && byte == b'"') {
            self.before = byte;
        }
        self.at = match (self.at, byte) {
            (At::Start, b'"') => {
                self.opened = self.line;
                At::Quoted
            }
            (At::Quoted, b'"') => At::Quote,
            (At::Quote, b'"') | (At::Quoted, _) => At::Quoted,
            _ if ends => At::Start,
            _ => At::Plain,
        };
        self.line += usize::from(byte == b'\n');
        escaped
    }
}

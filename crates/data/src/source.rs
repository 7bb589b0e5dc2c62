//! Data files: JSON arrays, JSON lines and plain text, read into records.
//!
//! A file is UTF-8, with or without a byte order mark. What its first character is decides how it
//! is read: `[` begins a JSON array of objects, `{` JSON lines (one object a line, blank lines
//! allowed). Anything else is plain text, one record a line, where the format takes that.

use std::path::Path;

use serde_json::{Map, Value};

use crate::config::SourceConfig;
use crate::error::{Error, Location, Result, excerpt};
use crate::format::{self, Fields, Format};
use crate::record::{Body, Message, Record};

/// A file's records and the format they were read with.
#[derive(Debug)]
pub struct SourceRecords {
    /// The records, in file order, at most `limit`.
    pub records: Vec<Record>,
    /// The format's name; never `auto`.
    pub format: &'static str,
}

/// Reads the records of a file; `base_dir` is what a relative path is relative to.
///
/// # Errors
/// When the file cannot be read, is not UTF-8 or JSON, when a record lacks a field or holds a
/// wrong one (the first such record is named with its line), or when there is no record at all.
pub fn read_source(source: &SourceConfig, base_dir: &Path) -> Result<SourceRecords> {
    let path = base_dir.join(&source.path);
    let bytes = fs_err::read(&path)?;
    let text = decode(&path, &bytes)?;
    let mut format = if source.format == format::AUTO {
        None
    } else {
        let known = format::find(&source.format);
        Some(known.ok_or_else(|| {
            let names = format::format_names();
            Error::format(&path, crate::suggest::unknown("format", &source.format, &names))
        })?)
    };
    let limit = source.limit.unwrap_or(usize::MAX);
    let mut records = Vec::new();
    if is_plain_text(&path, text, source, format)? {
        format = Some(format::line_format());
        for (index, line) in text.lines().enumerate() {
            if records.len() == limit {
                break;
            }
            if !line.trim().is_empty() {
                records.push(Record {
                    location: Location { path: path.clone(), line: index + 1, record: None },
                    row: row(&path, records.len())?,
                    body: Body::Text(line.to_owned()),
                    domain: None,
                });
            }
        }
    } else {
        let mut visit = |raw: RawRecord<'_>| -> Result<bool> {
            if records.len() == limit {
                return Ok(false);
            }
            let row = row(&path, records.len())?;
            let format = match format {
                Some(format) => format,
                None => {
                    let fields = Fields::new(&raw.object, &source.fields);
                    let found = format::detect(&fields).map_err(|m| Error::format(&path, m))?;
                    *format.insert(found)
                }
            };
            records.push(parse(raw, row, format, source)?);
            Ok(records.len() < limit)
        };
        if text.trim_start().starts_with('[') {
            read_array(&path, text, &mut visit)?;
        } else {
            read_lines(&path, text, &mut visit)?;
        }
    }
    match format {
        Some(format) if !records.is_empty() => {
            if source.system.is_some() && !format.is_chat() {
                let message = format!(
                    "`system` is set, but the records are in format {} and have no conversation",
                    format.name()
                );
                return Err(Error::format(&path, message));
            }
            Ok(SourceRecords { records, format: format.name() })
        }
        _ => Err(Error::Empty { path }),
    }
}

/// A JSON object and where it came from.
struct RawRecord<'a> {
    location: Location,
    text: &'a str,
    object: Map<String, Value>,
}

fn row(path: &Path, count: usize) -> Result<u32> {
    u32::try_from(count).map_err(|_| Error::format(path, "more than 2^32 records; split the file"))
}

fn parse(
    raw: RawRecord<'_>,
    row: u32,
    format: &dyn Format,
    source: &SourceConfig,
) -> Result<Record> {
    let fields = Fields::new(&raw.object, &source.fields);
    let parsed = format.parse(&fields).and_then(|body| {
        let domain = match source.fields.contains_key(format::DOMAIN) {
            true => Some(fields.text(format::DOMAIN)?.to_owned()),
            false => None,
        };
        Ok((body, domain))
    });
    let (mut body, domain) = match parsed {
        Ok(parsed) => parsed,
        Err(fault) => {
            return Err(Error::Field {
                location: Box::new(raw.location),
                field: fault.field,
                expected: fault.expected,
                found: fault.found,
                excerpt: excerpt(raw.text),
            });
        }
    };
    if let (Body::Chat(messages), Some(system)) = (&mut body, &source.system)
        && messages.first().is_none_or(|first| first.role != "system")
    {
        messages.insert(0, Message::system(system));
    }
    Ok(Record { location: raw.location, row, body, domain })
}

/// The text of a file without its byte order mark.
fn decode<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str> {
    let foreign = [
        (&b"PAR1"[..], "a Parquet file; convert it to JSON lines"),
        (&b"\x1f\x8b"[..], "compressed with gzip; decompress it first"),
        (&b"\x28\xb5\x2f\xfd"[..], "compressed with zstd; decompress it first"),
        (&b"PK\x03\x04"[..], "a zip archive; unpack it first"),
        (&b"\xff\xfe"[..], "UTF-16; save it as UTF-8"),
        (&b"\xfe\xff"[..], "UTF-16; save it as UTF-8"),
    ];
    if let Some((_, what)) = foreign.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Err(Error::format(path, format!("the file is {what}")));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|error| {
        let valid = &bytes[..error.valid_up_to()];
        let line_start = valid.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        Error::Utf8 {
            path: path.to_path_buf(),
            line: valid.iter().filter(|&&byte| byte == b'\n').count() + 1,
            column: valid.len() - line_start + 1,
            byte: bytes.get(valid.len()).copied().unwrap_or_default(),
        }
    })
}

/// Whether a file is read line by line as text rather than as JSON.
fn is_plain_text(
    path: &Path,
    text: &str,
    source: &SourceConfig,
    format: Option<&dyn Format>,
) -> Result<bool> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or("");
    let ending = ending.to_ascii_lowercase();
    let json_ending = ["json", "jsonl", "ndjson"].contains(&ending.as_str());
    if format.is_some_and(Format::reads_lines) {
        return Ok(!json_ending);
    }
    let first = text.trim_start().chars().next();
    if format.is_none() && ending == "txt" && !matches!(first, Some('{' | '[')) {
        return Ok(true);
    }
    match first {
        None | Some('{' | '[') => Ok(false),
        Some(found) => Err(Error::format(
            path,
            format!(
                "expected a JSON array or JSON lines for format {}, found a file that begins with \
                 `{found}`; plain text files need `format: text`",
                source.format
            ),
        )),
    }
}

/// One JSON object a line.
fn read_lines<'a>(
    path: &Path,
    text: &'a str,
    visit: &mut dyn FnMut(RawRecord<'a>) -> Result<bool>,
) -> Result<()> {
    // Not `str::lines`: only line feeds end a line, and a carriage return before one is JSON space.
    for (index, line) in text.split('\n').enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let location = Location { path: path.to_path_buf(), line: index + 1, record: None };
        let value: Value = serde_json::from_str(line).map_err(|error| Error::Json {
            location: location.clone(),
            line: index + 1,
            column: error.column(),
            message: if error.is_eof() {
                "the line ends inside the record; JSON lines hold one whole object on each line"
                    .to_owned()
            } else {
                without_place(&error)
            },
            excerpt: excerpt(line),
        })?;
        if !visit(object(value, location, line)?)? {
            break;
        }
    }
    Ok(())
}

/// A JSON array of objects, read element by element so that each knows its line.
fn read_array<'a>(
    path: &Path,
    text: &'a str,
    visit: &mut dyn FnMut(RawRecord<'a>) -> Result<bool>,
) -> Result<()> {
    let mut cursor = Cursor { text, at: 0, line: 1, line_start: 0 };
    cursor.skip_space();
    cursor.advance(1);
    let location = |cursor: &Cursor<'_>, record: usize| Location {
        path: path.to_path_buf(),
        line: cursor.line,
        record: Some(record),
    };
    let mut record = 0;
    loop {
        cursor.skip_space();
        if record == 0 && cursor.rest().starts_with(']') {
            break;
        }
        record += 1;
        let location = location(&cursor, record);
        let rest = cursor.rest();
        let syntax = |cursor: &Cursor<'_>, message: &str, excerpt_of: &str| Error::Json {
            location: location.clone(),
            line: cursor.line,
            column: cursor.at - cursor.line_start + 1,
            message: message.to_owned(),
            excerpt: excerpt(excerpt_of),
        };
        if !rest.starts_with('{') {
            let message = match rest.chars().next() {
                None => "the file ends inside the array".to_owned(),
                Some(found) => format!("expected an object `{{…}}`, found `{found}`"),
            };
            return Err(syntax(&cursor, &message, rest));
        }
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                let line = cursor.line + error.line() - 1;
                let before = if error.line() == 1 { cursor.at - cursor.line_start } else { 0 };
                return Err(Error::Json {
                    location,
                    line,
                    column: before + error.column(),
                    message: without_place(&error),
                    excerpt: excerpt(rest),
                });
            }
            None => return Err(syntax(&cursor, "the file ends inside the array", rest)),
        };
        let length = values.byte_offset();
        let goes_on = visit(object(value, location.clone(), &rest[..length])?)?;
        if !goes_on {
            return Ok(());
        }
        cursor.advance(length);
        cursor.skip_space();
        match cursor.rest().chars().next() {
            Some(',') => cursor.advance(1),
            Some(']') => break,
            None => {
                return Err(syntax(
                    &cursor,
                    "expected `,` or `]`, found the end of the file",
                    rest,
                ));
            }
            Some(found) => {
                let message = format!("expected `,` or `]` after the record, found `{found}`");
                return Err(syntax(&cursor, &message, rest));
            }
        }
    }
    cursor.advance(1);
    cursor.skip_space();
    if cursor.rest().is_empty() {
        Ok(())
    } else {
        Err(Error::format(
            path,
            format!(
                "line {}: expected the end of the file after the array, found {}",
                cursor.line,
                excerpt(cursor.rest())
            ),
        ))
    }
}

fn object(value: Value, location: Location, text: &str) -> Result<RawRecord<'_>> {
    match value {
        Value::Object(object) => Ok(RawRecord { location, text, object }),
        other => Err(Error::Field {
            location: Box::new(location),
            field: "(the whole record)".to_owned(),
            expected: "an object".to_owned(),
            found: format::describe(&other),
            excerpt: excerpt(text),
        }),
    }
}

/// A parser's message without the place it appends, which counts from the wrong start.
fn without_place(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&place).unwrap_or(&message).to_owned()
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
    line: usize,
    line_start: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn advance(&mut self, bytes: usize) {
        let end = (self.at + bytes).min(self.text.len());
        for (index, &byte) in self.text.as_bytes()[self.at..end].iter().enumerate() {
            if byte == b'\n' {
                self.line += 1;
                self.line_start = self.at + index + 1;
            }
        }
        self.at = end;
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        let space = rest.len() - rest.trim_start_matches([' ', '\t', '\r', '\n']).len();
        self.advance(space);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: impl AsRef<[u8]>) -> Result<SourceRecords> {
        let folder = tempfile::tempdir().unwrap();
        fs_err::write(folder.path().join(name), content).unwrap();
        read_source(&SourceConfig::new(name), folder.path())
    }

    #[test]
    fn arrays_and_lines_read_alike() {
        let lines = "\u{feff}{\"text\": \"a\"}\r\n\n  {\"text\": \"b\\nc\"}";
        let array = "\u{feff} [\n{\"text\": \"a\"}\n,\n\n {\"text\": \"b\\nc\"}\n] \n";
        let from_lines = read("x.jsonl", lines).unwrap();
        let from_array = read("x.json", array).unwrap();
        let bodies = |source: &SourceRecords| -> Vec<Body> {
            source.records.iter().map(|record| record.body.clone()).collect()
        };
        assert_eq!(bodies(&from_lines), [Body::Text("a".into()), Body::Text("b\nc".into())]);
        assert_eq!(bodies(&from_lines), bodies(&from_array));
        assert_eq!((from_lines.format, from_array.format), ("text", "text"));
        let places: Vec<_> = from_array
            .records
            .iter()
            .map(|record| (record.location.line, record.location.record, record.row))
            .collect();
        assert_eq!(places, [(2, Some(1), 0), (5, Some(2), 1)]);
        assert_eq!(from_lines.records[1].location.line, 3);
    }

    #[test]
    fn text_files_hold_one_record_a_line() {
        let source = read("x.txt", "one\n\n two \r\nthree").unwrap();
        let bodies: Vec<_> = source.records.iter().map(|record| &record.body).collect();
        let text = |text: &str| Body::Text(text.into());
        assert_eq!(bodies, [&text("one"), &text(" two "), &text("three")]);
        assert_eq!(source.records[1].location.line, 3);
    }

    #[test]
    fn the_limit_stops_reading() {
        let folder = tempfile::tempdir().unwrap();
        fs_err::write(folder.path().join("x.jsonl"), "{\"text\": \"a\"}\n{broken\n").unwrap();
        let mut source = SourceConfig::new("x.jsonl");
        source.limit = Some(1);
        assert_eq!(read_source(&source, folder.path()).unwrap().records.len(), 1);
        source.limit = None;
        assert!(read_source(&source, folder.path()).is_err());
    }

    #[test]
    fn a_mapped_domain_and_a_system_prompt_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let content = r#"[{"instruction": "a", "output": "b", "category": "law"}]"#;
        fs_err::write(folder.path().join("x.json"), content).unwrap();
        let mut source = SourceConfig::new("x.json");
        source.fields.insert("domain".into(), "category".into());
        source.system = Some("Be brief.".into());
        let records = read_source(&source, folder.path()).unwrap().records;
        assert_eq!(records[0].domain.as_deref(), Some("law"));
        assert_eq!(
            records[0].body,
            Body::Chat(vec![
                Message::system("Be brief."),
                Message::user("a"),
                Message::assistant("b")
            ])
        );
    }
}

//! Data files, read into records.
//!
//! A source is a file, a folder of files (in the order of their names), or the files of a named
//! source. [`input`](crate::input) decompresses, a [`layout`](crate::layout) finds the records, a
//! [`format`](crate::format) says what their fields mean. Records are handed out in chunks, so
//! that a file of any size takes the memory of one chunk; each chunk is taken apart on all cores.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;

use crate::catalogue;
use crate::config::SourceConfig;
use crate::error::{Error, Location, Result, excerpt};
use crate::format::{self, Fields, Format};
use crate::input::Input;
use crate::layout::{self, Asked, Content, Parsed, Raw};
use crate::record::{Body, Message, Record};
use crate::splits::{self, Meant};

/// A file's records and the format they were read with.
#[derive(Debug)]
pub struct SourceRecords {
    /// The records, in file order, at most `limit`.
    pub records: Vec<Record>,
    /// The format's name; never `auto`.
    pub format: &'static str,
}

/// Most records of a chunk.
const CHUNK_RECORDS: usize = 2048;
/// Bytes of text after which a chunk is closed.
const CHUNK_BYTES: usize = 4 << 20;
/// Most bytes of a file that is one JSON object.
const DOCUMENT_BYTES: u64 = 512 << 20;

/// Reads the records of a source; `base_dir` is what a relative path is relative to.
///
/// # Errors
/// When a file cannot be read, is not UTF-8 or damaged, when a record lacks a field or holds a
/// wrong one (the first such record is named with its line), or when there is no record at all.
pub fn read_source(source: &SourceConfig, base_dir: &Path) -> Result<SourceRecords> {
    let mut records = Vec::new();
    let format = read_chunks(source, base_dir, &mut |chunk| {
        records.extend(chunk);
        Ok(())
    })?;
    Ok(SourceRecords { records, format })
}

/// Hands out the records of a source in chunks and returns the format's name.
///
/// # Errors
/// As [`read_source`], and whatever `handle` returns.
pub(crate) fn read_chunks(
    source: &SourceConfig,
    base_dir: &Path,
    handle: &mut dyn FnMut(Vec<Record>) -> Result<()>,
) -> Result<&'static str> {
    let files = source.files(base_dir)?;
    let first = files.first().cloned().unwrap_or_default();
    let format = if source.format == format::AUTO {
        None
    } else {
        let known = format::find(&source.format);
        Some(known.ok_or_else(|| {
            let names = format::format_names();
            Error::format(&first, crate::suggest::unknown("format", &source.format, &names))
        })?)
    };
    let mut reading = Reading {
        source,
        format,
        fields: source.fields.clone(),
        limit: source.limit.unwrap_or(usize::MAX),
        count: 0,
        chunk: Vec::new(),
        bytes: 0,
        handle,
    };
    for file in &files {
        if reading.count == reading.limit {
            break;
        }
        reading.file(file)?;
    }
    match reading.format {
        Some(format) if reading.count > 0 => {
            if source.system.is_some() && !format.is_chat() {
                let message = format!(
                    "`system` is set, but the records are in format {} and have no conversation",
                    format.name()
                );
                return Err(Error::format(&first, message));
            }
            Ok(format.name())
        }
        _ => Err(Error::Empty { path: base_dir.join(source.label()) }),
    }
}

/// A source while it is read.
struct Reading<'a> {
    source: &'a SourceConfig,
    format: Option<&'static dyn Format>,
    fields: BTreeMap<String, String>,
    limit: usize,
    /// Records found so far.
    count: usize,
    chunk: Vec<Raw>,
    bytes: usize,
    handle: &'a mut dyn FnMut(Vec<Record>) -> Result<()>,
}

impl Reading<'_> {
    fn file(&mut self, path: &Path) -> Result<()> {
        let input = Input::open(path)?;
        let read = match self.document_format(&input) {
            Some(format) => self.document(input, format),
            None => {
                let (format, fields) = (self.format, self.fields.clone());
                let asked = Asked { format, fields: &fields };
                layout::read(input, &asked, &mut |raw| self.take(raw))
            }
        };
        // What stands before a fault is taken apart first: it may hold an earlier one.
        self.flush()?;
        read
    }

    /// The format that takes a file for one JSON object with many records, where one does.
    fn document_format(&self, input: &Input) -> Option<&'static dyn Format> {
        if !is_object(input) {
            return None;
        }
        let shapes = self.source.named().into_iter().flat_map(|named| named.shapes);
        let named = shapes.filter_map(|shape| format::find(shape.format));
        let head = String::from_utf8_lossy(&input.head);
        self.format.into_iter().chain(named).find(|format| format.is_document(&head))
    }

    /// Reads a file that is one JSON object with many records.
    fn document(&mut self, mut input: Input, format: &'static dyn Format) -> Result<()> {
        if self.format.is_none() {
            self.format = Some(format);
            let shapes = self.source.named().into_iter().flat_map(|named| named.shapes);
            let shape = shapes.into_iter().find(|shape| shape.format == format.name());
            if let Some(shape) = shape.filter(|_| self.leaves_fields_to_the_name()) {
                self.add_fields(shape.fields());
            }
        }
        let path = input.path.clone();
        let mut bytes = Vec::new();
        let read = input.reader.by_ref().take(DOCUMENT_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|error| input.damaged(0, &error))?;
        if bytes.len() as u64 > DOCUMENT_BYTES {
            let most = DOCUMENT_BYTES >> 20;
            return Err(Error::format(&path, format!("one JSON object of more than {most} MiB")));
        }
        let text = crate::input::text(&path, bytes, 1, 1)?;
        let location = Location { path: path.clone(), line: 1, record: None };
        let content = Content::Json { text, column: 0, line: false };
        let (object, shown) = content.object(&location)?;
        let rows = format.rows(&path, object).map_err(|fault| Error::Field {
            location: Box::new(location),
            field: fault.field,
            expected: fault.expected,
            found: fault.found,
            excerpt: shown,
        })?;
        for (index, row) in rows.into_iter().enumerate() {
            let location = Location { path: path.clone(), line: 1, record: Some(index + 1) };
            if !self.take(Raw { location, content: Content::Object(row) })? {
                break;
            }
        }
        Ok(())
    }

    /// Takes one record; `false` when no more are wanted.
    fn take(&mut self, raw: Raw) -> Result<bool> {
        if self.count == self.limit {
            return Ok(false);
        }
        if self.count == u32::MAX as usize {
            return Err(Error::format(
                &raw.location.path,
                "more than 2^32 records; split the source",
            ));
        }
        if self.format.is_none() {
            self.detect(&raw)?;
        }
        self.bytes += match &raw.content {
            Content::Json { text, .. } | Content::Text(text) => text.len(),
            Content::Object(object) => {
                object.values().map(|value| value.as_str().map_or(64, str::len)).sum()
            }
        };
        self.count += 1;
        self.chunk.push(raw);
        if self.chunk.len() == CHUNK_RECORDS || self.bytes >= CHUNK_BYTES {
            self.flush()?;
        }
        Ok(self.count < self.limit)
    }

    /// Whether a named source's own field names hold: a domain of one's own changes none of them.
    fn leaves_fields_to_the_name(&self) -> bool {
        self.fields.keys().all(|field| field == format::DOMAIN)
    }

    /// Takes over a named source's field names, beside one's own.
    fn add_fields(&mut self, names: BTreeMap<String, String>) {
        for (field, name) in names {
            self.fields.entry(field).or_insert(name);
        }
    }

    /// Finds the format from the first record.
    fn detect(&mut self, raw: &Raw) -> Result<()> {
        if matches!(raw.content, Content::Text(_)) {
            self.format = Some(format::line_format());
            return Ok(());
        }
        let (object, _) = raw.content.clone().object(&raw.location)?;
        if let Some(named) = self.source.named().filter(|_| self.leaves_fields_to_the_name()) {
            for shape in named.shapes {
                let fields = shape.fields();
                let fits = |format: &&'static dyn Format| {
                    format::fits(*format, &Fields::new(&object, &fields))
                        && fields.values().all(|name| object.contains_key(name))
                };
                if let Some(format) = format::find(shape.format).filter(fits) {
                    self.format = Some(format);
                    self.add_fields(fields);
                    return Ok(());
                }
            }
        }
        let found = format::detect(&Fields::new(&object, &self.fields));
        self.format = Some(found.map_err(|m| Error::format(&raw.location.path, m))?);
        Ok(())
    }

    /// Takes the chunk's records apart and hands them out.
    fn flush(&mut self) -> Result<()> {
        let chunk = std::mem::take(&mut self.chunk);
        self.bytes = 0;
        let Some(format) = self.format.filter(|_| !chunk.is_empty()) else { return Ok(()) };
        let first = self.count - chunk.len();
        let (fields, system) = (&self.fields, &self.source.system);
        let records: Vec<Result<Record>> = chunk
            .into_par_iter()
            .enumerate()
            .map(|(index, raw)| {
                let Parsed { location, mut body, domain, variables, unread } =
                    layout::parse(raw, format, fields)?;
                if let (Body::Chat(messages), Some(system)) = (&mut body, system)
                    && messages.first().is_none_or(|first| first.role != "system")
                {
                    messages.insert(0, Message::system(system));
                }
                let row = (first + index) as u32;
                Ok(Record { location, row, body, domain, variables, unread })
            })
            .collect();
        (self.handle)(records.into_iter().collect::<Result<_>>()?)
    }
}

/// Whether a file may be one JSON object rather than one a line.
fn is_object(input: &Input) -> bool {
    input.ending == "json" && input.first_char() == Some('{')
}

impl SourceConfig {
    /// The files of the source, in the order in which they are read.
    ///
    /// # Errors
    /// When a folder cannot be read or holds no data file, or a named source was not located.
    pub fn files(&self, base_dir: &Path) -> Result<Vec<PathBuf>> {
        Ok(self.meant_files(base_dir)?.files)
    }

    /// The files of the source, and those of its folder that by their names are of other splits.
    pub(crate) fn meant_files(&self, base_dir: &Path) -> Result<Meant> {
        let files = self.all_files(base_dir)?;
        let of_folder = self.named().is_none() && base_dir.join(&self.path).is_dir();
        Ok(match of_folder {
            true => splits::meant(files, self.held_out),
            false => Meant { files, others: Vec::new(), held_out_alone: false },
        })
    }

    fn all_files(&self, base_dir: &Path) -> Result<Vec<PathBuf>> {
        if !self.located.is_empty() {
            return Ok(self.located.clone());
        }
        if self.path.as_os_str().is_empty() {
            let name = self.source.clone().unwrap_or_default();
            let tried = vec!["its files have not been located".to_owned()];
            return Err(Error::Unavailable { name, tried });
        }
        let path = base_dir.join(&self.path);
        if !path.is_dir() {
            return Ok(vec![path]);
        }
        let files = match self.named() {
            Some(named) => catalogue::files_below(named, &path)?,
            None => data_files(&path)?,
        };
        if files.is_empty() {
            let endings: Vec<&str> = layout::endings().collect();
            let message = format!(
                "the folder holds no data file; expected names that end in {}",
                endings.join(", ")
            );
            return Err(Error::format(&path, message));
        }
        Ok(files)
    }
}

/// What libraries write beside data: it says what the data are, and is none.
const ABOUT_DATA: [&str; 5] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
];

/// The files of a folder that are data by their names.
///
/// # Errors
/// When it cannot be read, or is what the `datasets` library saves with `save_to_disk`.
fn data_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let holds = |name: &str| folder.join(name).is_file();
    if holds("dataset_dict.json") || holds("state.json") && holds("dataset_info.json") {
        let message = "the folder was saved by `save_to_disk` of the `datasets` library, in Arrow's format; expected \
                       Parquet (`to_parquet`) or JSON lines (`to_json`)";
        return Err(Error::format(folder, message.to_owned()));
    }
    let mut files = Vec::new();
    for entry in fs_err::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if ABOUT_DATA.contains(&&*name) {
            continue;
        }
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        let ending = crate::input::ending(&path);
        if !hidden && path.is_file() && layout::endings().any(|known| known == ending) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Hands out every string of each row of a file, joined by line breaks: what a benchmark's
/// questions say, whatever their fields are called.
///
/// # Errors
/// When the file cannot be read.
pub(crate) fn read_texts(path: &Path, handle: &mut dyn FnMut(&Location, &str)) -> Result<()> {
    let input = Input::open(path)?;
    if is_object(&input) && !serde_json_lines(&input) {
        return document_texts(input, handle);
    }
    let fields = BTreeMap::new();
    let format = (input.ending == "txt").then(format::line_format);
    let asked = Asked { format, fields: &fields };
    layout::read(input, &asked, &mut |raw| {
        let (object, _) = raw.content.object(&raw.location)?;
        let mut text = String::new();
        object.values().for_each(|value| gather(value, &mut text));
        handle(&raw.location, &text);
        Ok(true)
    })
}

/// Whether the first line of a file holds a whole object.
fn serde_json_lines(input: &Input) -> bool {
    let first = input.head.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let whole = serde_json::from_slice::<Value>(first).is_ok();
    whole && input.head.len() > first.len() + 1
}

/// The rows of a file that is one object: those of the first list of objects in it.
fn document_texts(mut input: Input, handle: &mut dyn FnMut(&Location, &str)) -> Result<()> {
    let path = input.path.clone();
    let mut bytes = Vec::new();
    let read = input.reader.by_ref().take(DOCUMENT_BYTES).read_to_end(&mut bytes);
    read.map_err(|error| input.damaged(0, &error))?;
    let text = crate::input::text(&path, bytes, 1, 1)?;
    let location = Location { path: path.clone(), line: 1, record: None };
    let (object, _) = Content::Json { text, column: 0, line: false }.object(&location)?;
    let lists = object.values().filter_map(Value::as_array);
    let rows = lists.into_iter().find(|list| list.iter().any(Value::is_object));
    let Some(rows) = rows else {
        let shown = excerpt(&Value::Object(object).to_string());
        return Err(Error::format(&path, format!("expected a list of objects in {shown}")));
    };
    for (index, row) in rows.iter().enumerate() {
        let mut text = String::new();
        gather(row, &mut text);
        let location = Location { path: path.clone(), line: 1, record: Some(index + 1) };
        handle(&location, &text);
    }
    Ok(())
}

fn gather(value: &Value, text: &mut String) {
    match value {
        Value::String(found) => {
            text.push_str(found);
            text.push('\n');
        }
        Value::Array(list) => list.iter().for_each(|value| gather(value, text)),
        Value::Object(object) => object.values().for_each(|value| gather(value, text)),
        _ => {}
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

    #[test]
    fn a_folder_is_read_file_by_file() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("shards");
        fs_err::create_dir(&data).unwrap();
        fs_err::write(data.join("b.csv"), "text,id\nthree,3\n\"four, five\",4\n").unwrap();
        fs_err::write(data.join("a.jsonl"), "{\"text\": \"one\"}\n{\"text\": \"two\"}\n").unwrap();
        fs_err::write(data.join("README.md"), "not data").unwrap();
        let records = read_source(&SourceConfig::new("shards"), folder.path()).unwrap().records;
        let found: Vec<(u32, &Body)> = records.iter().map(|r| (r.row, &r.body)).collect();
        let text = |text: &str| Body::Text(text.into());
        assert_eq!(
            found,
            [(0, &text("one")), (1, &text("two")), (2, &text("three")), (3, &text("four, five"))]
        );
        let limited = SourceConfig { limit: Some(3), ..SourceConfig::new("shards") };
        assert_eq!(read_source(&limited, folder.path()).unwrap().records.len(), 3);
    }
}

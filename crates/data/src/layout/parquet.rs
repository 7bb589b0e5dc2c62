//! Parquet: row groups of columns, read back row by row.
//!
//! Texts, numbers, booleans, lists, maps and groups become their JSON relatives; dates and
//! decimals become the strings that people write for them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::basic::Compression;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};

use super::{Asked, Content, Layout, Raw, Visit};
use crate::error::{Error, Location, Result};
use crate::input::{self, Input};

pub(super) struct Parquet;

impl Layout for Parquet {
    fn endings(&self) -> &'static [&'static str] {
        &["parquet"]
    }

    fn recognises(&self, input: &Input, _: &Asked<'_>) -> bool {
        input.head.starts_with(b"PAR1")
    }

    fn read(&self, input: Input, _: &Asked<'_>, visit: &mut Visit<'_>) -> Result<()> {
        let path = input.path.clone();
        if let Some(compression) = input.compression {
            let message = format!(
                "a Parquet file inside a {compression} stream; its end has to be read first, so \
                 decompress it (Parquet compresses its columns itself)"
            );
            return Err(Error::format(&path, message));
        }
        let damaged = |row: usize, message: String| Error::DamagedParquet {
            path: path.clone(),
            row,
            message,
        };
        hydralora_files::expect_file(&path)?;
        let file = fs_err::File::open(&path)?;
        // The library checks what it reads, but not everything: foreign bytes have made it panic.
        let guarded =
            |row: usize, action: &mut dyn FnMut() -> parquet::errors::Result<Option<Row>>| {
                match catch_unwind(AssertUnwindSafe(action)) {
                    Ok(result) => result.map_err(|error| damaged(row, plain(&error))),
                    Err(_) => Err(damaged(row, "its structure contradicts itself".to_owned())),
                }
            };
        let mut opened = None;
        let file: std::fs::File = file.into_parts().0;
        let mut file = Some(file);
        guarded(0, &mut || {
            if let Some(file) = file.take() {
                opened = Some(SerializedFileReader::new(file)?);
            }
            Ok(None)
        })?;
        let Some(reader) = opened else {
            return Err(damaged(0, "it cannot be opened".to_owned()));
        };
        if let Some(codec) = unread_codec(&reader) {
            let message = format!(
                "a Parquet file whose columns are compressed with {codec}, which is not read; write it with \
                 zstd, Snappy, gzip or LZ4"
            );
            return Err(Error::format(&path, message));
        }
        // What the columns say of themselves, before the library makes room for it.
        let said = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
        let said = said.map(|column| u64::try_from(column.uncompressed_size()).unwrap_or(0));
        if said.fold(0, u64::saturating_add) > input.budget {
            return Err(input::unpacks(&path, input.budget));
        }
        let mut rows = None;
        guarded(0, &mut || {
            rows = Some(reader.get_row_iter(None)?);
            Ok(None)
        })?;
        let Some(mut rows) = rows else {
            return Err(damaged(0, "it has no rows to read".to_owned()));
        };
        let mut number = 0;
        while let Some(row) = guarded(number, &mut || rows.next().transpose())? {
            number += 1;
            let location = Location { path: path.clone(), line: 0, record: Some(number) };
            let columns = row.into_columns().into_iter();
            let object: Map<String, Value> =
                columns.map(|(name, field)| (name, value(field))).collect();
            if !visit(Raw { location, content: Content::Object(object) })? {
                break;
            }
        }
        Ok(())
    }
}

/// A compression of the file's columns that the library is built without.
fn unread_codec(reader: &SerializedFileReader<std::fs::File>) -> Option<&'static str> {
    let groups = reader.metadata().row_groups().iter();
    groups.flat_map(|group| group.columns()).find_map(|column| match column.compression() {
        Compression::BROTLI(_) => Some("Brotli"),
        Compression::LZO => Some("LZO"),
        _ => None,
    })
}

/// The library's message without the word it begins with.
fn plain(error: &parquet::errors::ParquetError) -> String {
    let message = error.to_string();
    let message = message.strip_prefix("Parquet error: ").unwrap_or(&message);
    message.strip_prefix("EOF: ").unwrap_or(message).to_owned()
}

fn value(field: Field) -> Value {
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    match field {
        Field::Null => Value::Null,
        Field::Bool(found) => Value::Bool(found),
        Field::Byte(found) => found.into(),
        Field::Short(found) => found.into(),
        Field::Int(found) => found.into(),
        Field::Long(found) => found.into(),
        Field::UByte(found) => found.into(),
        Field::UShort(found) => found.into(),
        Field::UInt(found) => found.into(),
        Field::ULong(found) => found.into(),
        Field::Float(found) => float(f64::from(found)),
        Field::Double(found) => float(found),
        Field::Str(text) => Value::String(text),
        // Writers without a logical type leave texts as bytes.
        Field::Bytes(bytes) => match String::from_utf8(bytes.data().to_vec()) {
            Ok(text) => Value::String(text),
            Err(_) => Value::Array(bytes.data().iter().map(|&byte| byte.into()).collect()),
        },
        Field::Group(row) => {
            let columns = row.into_columns().into_iter();
            Value::Object(columns.map(|(name, field)| (name, value(field))).collect())
        }
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().cloned().map(value).collect())
        }
        Field::MapInternal(map) => {
            let entries = map.entries().iter().cloned();
            let name = |field: Field| match value(field) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Value::Object(entries.map(|(key, field)| (name(key), value(field))).collect())
        }
        other => Value::String(other.to_string()),
    }
}

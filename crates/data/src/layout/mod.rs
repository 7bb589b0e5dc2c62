//! How records lie in a file: one file each, one line each in [`LAYOUTS`].
//!
//! A layout gives objects; what their fields mean is the business of a
//! [`Format`](crate::format::Format).

mod csv;
mod json_array;
mod json_lines;
mod lines;
#[cfg(feature = "parquet")]
mod parquet;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::error::{Error, Location, Result, excerpt};
use crate::format::{self, Fields, Format};
use crate::input::{self, Input, MAX_RECORD_BYTES};
use crate::record::Body;

/// Every layout, in the order in which they are asked.
static LAYOUTS: &[&dyn Layout] = &[
    #[cfg(feature = "parquet")]
    &parquet::Parquet,
    &lines::Lines,
    &json_array::JsonArray,
    &json_lines::JsonLines,
    &csv::Csv,
];

/// One record, as its layout gives it.
pub(crate) struct Raw {
    /// Where it stands.
    pub(crate) location: Location,
    /// What stands there.
    pub(crate) content: Content,
}

/// A record before it is taken apart.
#[derive(Clone)]
pub(crate) enum Content {
    /// JSON text; `column` is where it starts in its first line, from 0.
    Json {
        /// The text of one value.
        text: String,
        /// Bytes before it in its line.
        column: usize,
        /// Whether it must end with its line.
        line: bool,
    },
    /// An object that the layout has made.
    Object(Map<String, Value>),
    /// A line of plain text.
    Text(String),
}

/// Gets each record; `false` ends the reading.
pub(crate) type Visit<'a> = dyn FnMut(Raw) -> Result<bool> + 'a;

/// What a layout may ask when it is to recognise a file.
pub(crate) struct Asked<'a> {
    /// The format, where it is known.
    pub(crate) format: Option<&'static dyn Format>,
    /// From the format's field names to those of the file.
    pub(crate) fields: &'a BTreeMap<String, String>,
}

/// How records lie in a file.
pub(crate) trait Layout: Sync {
    /// Endings of file names, that of a compression taken off.
    fn endings(&self) -> &'static [&'static str];
    /// Whether a file is laid out so, by its first bytes before its name.
    fn recognises(&self, input: &Input, asked: &Asked<'_>) -> bool;
    /// Hands out the records of a file in their order.
    fn read(&self, input: Input, asked: &Asked<'_>, visit: &mut Visit<'_>) -> Result<()>;
}

/// The endings of the names of files that a folder is searched for.
pub(crate) fn endings() -> impl Iterator<Item = &'static str> {
    LAYOUTS.iter().flat_map(|layout| layout.endings()).copied().filter(|ending| *ending != "txt")
}

/// Hands out the records of `input` as the layout it has been recognised as does.
///
/// # Errors
/// When no layout fits, and whatever the layout and `visit` find wrong.
pub(crate) fn read(input: Input, asked: &Asked<'_>, visit: &mut Visit<'_>) -> Result<()> {
    if !cfg!(feature = "parquet") && input.head.starts_with(b"PAR1") {
        let message = "a Parquet file, and this program was built without the feature `parquet`";
        return Err(Error::format(&input.path, message));
    }
    match LAYOUTS.iter().find(|layout| layout.recognises(&input, asked)) {
        Some(layout) => {
            let (path, budget) = (input.path.clone(), input.budget);
            let mut held = 0_u64;
            layout.read(input, asked, &mut |raw| {
                let bytes = raw.content.bytes();
                if bytes > MAX_RECORD_BYTES {
                    let Location { line, record, .. } = raw.location;
                    return Err(input::too_long(&path, line.max(record.unwrap_or(0))));
                }
                held += bytes as u64;
                if held > budget {
                    return Err(input::unpacks(&path, budget));
                }
                visit(raw)
            })
        }
        // Nothing but white space.
        None if input.first_char().is_none() => Ok(()),
        None => {
            let begins = input.beginning();
            Err(Error::format(
                &input.path,
                format!(
                    "expected JSON lines, a JSON array, CSV with a header that names the fields, \
                     or Parquet for format {}, found {begins}; plain text files need \
                     `format: text`",
                    asked.format.map_or(format::AUTO, Format::name)
                ),
            ))
        }
    }
}

/// About the bytes of memory that a value takes.
fn size(value: &Value) -> usize {
    let own = size_of::<Value>();
    match value {
        Value::String(text) => own + text.len(),
        Value::Array(items) => items.iter().map(size).fold(own, usize::saturating_add),
        Value::Object(object) => own + object_size(object),
        _ => own,
    }
}

fn object_size(object: &Map<String, Value>) -> usize {
    let entries = object.iter().map(|(name, value)| name.len() + size(value));
    entries.fold(0, usize::saturating_add)
}

impl Content {
    /// About the bytes that it takes.
    fn bytes(&self) -> usize {
        match self {
            Self::Json { text, .. } | Self::Text(text) => text.len(),
            Self::Object(object) => object_size(object),
        }
    }

    /// The object, and the text to show in messages about it.
    ///
    /// # Errors
    /// When it is not JSON, or no object.
    pub(crate) fn object(self, location: &Location) -> Result<(Map<String, Value>, String)> {
        let (text, column, line) = match self {
            Self::Object(object) => return Ok((object, String::new())),
            Self::Text(text) => {
                let shown = excerpt(&text);
                let object = Map::from_iter([("text".to_owned(), Value::String(text))]);
                return Ok((object, shown));
            }
            Self::Json { text, column, line } => (text, column, line),
        };
        let value: Value = serde_json::from_str(&text).map_err(|error| {
            let before = if error.line() == 1 { column } else { 0 };
            Error::Json {
                location: location.clone(),
                line: location.line + error.line().max(1) - 1,
                column: before + error.column(),
                message: if line && error.is_eof() {
                    "the line ends inside the record; JSON lines hold one whole object on each \
                     line"
                        .to_owned()
                } else if error.is_eof() {
                    "the file ends inside the record".to_owned()
                } else {
                    without_place(&error)
                },
                excerpt: excerpt(&text),
            }
        })?;
        let shown = excerpt(&text);
        match value {
            Value::Object(object) => Ok((object, shown)),
            other => Err(Error::Field {
                location: Box::new(location.clone()),
                field: "(the whole record)".to_owned(),
                expected: "an object".to_owned(),
                found: format::describe(&other),
                excerpt: shown,
            }),
        }
    }
}

/// A record that has been taken apart.
pub(crate) struct Parsed {
    pub(crate) location: Location,
    pub(crate) body: Body,
    pub(crate) domain: Option<String>,
    pub(crate) variables: Map<String, Value>,
    pub(crate) unread: Vec<String>,
}

/// What a record says, with its own domain if a field for it is mapped.
///
/// # Errors
/// When a field is missing or wrong.
pub(crate) fn parse(
    raw: Raw,
    format: &dyn Format,
    names: &BTreeMap<String, String>,
) -> Result<Parsed> {
    let Raw { location, content } = raw;
    let (object, shown) = content.object(&location)?;
    let fields = Fields::new(&object, names);
    let parsed = format.parse(&fields).and_then(|body| {
        let domain = match names.contains_key(format::DOMAIN) {
            true => Some(fields.text(format::DOMAIN)?.to_owned()),
            false => None,
        };
        let variables = match body {
            Body::Chat(_) => fields.variables()?,
            _ => Map::new(),
        };
        let unread = format::known::unread(&fields, format)?;
        Ok((body, domain, variables, unread))
    });
    match parsed {
        Ok((body, domain, variables, unread)) => {
            Ok(Parsed { location, body, domain, variables, unread })
        }
        Err(fault) => Err(Error::Field {
            location: Box::new(location),
            field: fault.field,
            expected: fault.expected,
            found: fault.found,
            excerpt: if shown.is_empty() {
                excerpt(&Value::Object(object).to_string())
            } else {
                shown
            },
        }),
    }
}

/// A parser's message without the place it appends, which counts from the wrong start.
fn without_place(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&place).unwrap_or(&message).to_owned()
}

//! Plain text: each line that is not blank is a record.

use super::{Asked, Content, Layout, Raw, Visit};
use crate::error::{Location, Result};
use crate::format::Format;
use crate::input::{self, Input};

pub(super) struct Lines;

impl Layout for Lines {
    fn endings(&self) -> &'static [&'static str] {
        &["txt"]
    }

    fn recognises(&self, input: &Input, asked: &Asked<'_>) -> bool {
        if asked.format.is_some_and(Format::reads_lines) {
            let elsewhere = ["json", "jsonl", "ndjson", "csv", "tsv"];
            return !elsewhere.contains(&input.ending.as_str());
        }
        asked.format.is_none()
            && input.ending == "txt"
            && input.first_char().is_some_and(|first| first != '{' && first != '[')
    }

    fn read(&self, mut input: Input, _: &Asked<'_>, visit: &mut Visit<'_>) -> Result<()> {
        let mut buffer = Vec::new();
        let mut line = 1;
        while input.read_line(&mut buffer, line)? {
            if buffer.last() == Some(&b'\r') {
                buffer.pop();
            }
            let text = input::text(&input.path, std::mem::take(&mut buffer), line, 1)?;
            if !text.trim().is_empty() {
                let location = Location { path: input.path.clone(), line, record: None };
                if !visit(Raw { location, content: Content::Text(text) })? {
                    break;
                }
            }
            line += 1;
        }
        Ok(())
    }
}

//! JSON lines: one whole object a line, blank lines allowed.

use super::{Asked, Content, Layout, Raw, Visit};
use crate::error::{Location, Result};
use crate::input::{self, Input};

pub(super) struct JsonLines;

impl Layout for JsonLines {
    fn endings(&self) -> &'static [&'static str] {
        &["jsonl", "ndjson"]
    }

    fn recognises(&self, input: &Input, _: &Asked<'_>) -> bool {
        input.first_char() == Some('{')
    }

    fn read(&self, mut input: Input, _: &Asked<'_>, visit: &mut Visit<'_>) -> Result<()> {
        let mut buffer = Vec::new();
        let mut line = 1;
        // Only line feeds end a line; a carriage return before one is JSON's white space.
        while input.read_line(&mut buffer, line)? {
            let text = input::text(&input.path, std::mem::take(&mut buffer), line, 1)?;
            if !text.trim().is_empty() {
                let location = Location { path: input.path.clone(), line, record: None };
                let content = Content::Json { text, column: 0, line: true };
                if !visit(Raw { location, content })? {
                    break;
                }
            }
            line += 1;
        }
        Ok(())
    }
}

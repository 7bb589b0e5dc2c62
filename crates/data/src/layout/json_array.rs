//! A JSON array of objects, handed out object by object so that no more than one is held.
//!
//! The extent of an object is found by counting brackets outside strings; whether what lies
//! between is JSON is decided when the object is taken apart.

use std::io::BufRead;

use super::{Asked, Content, Layout, Raw, Visit};
use crate::error::{Error, Location, Result, excerpt};
use crate::input::{self, Input, MAX_RECORD_BYTES};

pub(super) struct JsonArray;

impl Layout for JsonArray {
    fn endings(&self) -> &'static [&'static str] {
        &["json"]
    }

    fn recognises(&self, input: &Input, _: &Asked<'_>) -> bool {
        input.first_char() == Some('[')
    }

    fn read(&self, input: Input, _: &Asked<'_>, visit: &mut Visit<'_>) -> Result<()> {
        let mut cursor = Cursor { input, line: 1, column: 0 };
        cursor.skip_space()?;
        cursor.advance(1)?;
        let mut record = 0;
        loop {
            cursor.skip_space()?;
            if record == 0 && cursor.peek()? == Some(b']') {
                break;
            }
            record += 1;
            let path = cursor.input.path.clone();
            let location = Location { path, line: cursor.line, record: Some(record) };
            let syntax = |cursor: &Cursor, message: String, shown: &str| Error::Json {
                location: location.clone(),
                line: cursor.line,
                column: cursor.column + 1,
                message,
                excerpt: excerpt(shown),
            };
            match cursor.peek()? {
                Some(b'{') => {}
                None => {
                    let message = "the file ends inside the array".to_owned();
                    return Err(syntax(&cursor, message, ""));
                }
                Some(_) => {
                    let rest = cursor.rest()?;
                    let found = rest.chars().next().unwrap_or(char::REPLACEMENT_CHARACTER);
                    let message = format!("expected an object `{{…}}`, found `{found}`");
                    return Err(syntax(&cursor, message, &rest));
                }
            }
            let column = cursor.column;
            let bytes = cursor.object(location.line)?;
            let text = input::text(&location.path, bytes, location.line, column + 1)?;
            let shown: String = text.chars().take(200).collect();
            let content = Content::Json { text, column, line: false };
            if !visit(Raw { location: location.clone(), content })? {
                return Ok(());
            }
            cursor.skip_space()?;
            match cursor.peek()? {
                Some(b',') => cursor.advance(1)?,
                Some(b']') => break,
                None => {
                    let message = "expected `,` or `]`, found the end of the file".to_owned();
                    return Err(syntax(&cursor, message, &shown));
                }
                Some(_) => {
                    let rest = cursor.rest()?;
                    let found = rest.chars().next().unwrap_or(char::REPLACEMENT_CHARACTER);
                    let message = format!("expected `,` or `]` after the record, found `{found}`");
                    return Err(syntax(&cursor, message, &shown));
                }
            }
        }
        cursor.advance(1)?;
        cursor.skip_space()?;
        if cursor.peek()?.is_none() {
            return Ok(());
        }
        let found = excerpt(&cursor.rest()?);
        let message = format!(
            "line {}: expected the end of the file after the array, found {found}",
            cursor.line
        );
        Err(Error::format(&cursor.input.path, message))
    }
}

struct Cursor {
    input: Input,
    /// The line of the next byte, from 1.
    line: usize,
    /// Bytes before it in that line.
    column: usize,
}

impl Cursor {
    fn buffer(&mut self) -> Result<&[u8]> {
        // Two steps, because the borrow checker does not let go of a buffer returned early.
        if let Err(error) = self.input.reader.fill_buf() {
            return Err(self.input.damaged(self.line - 1, &error));
        }
        Ok(self.input.reader.fill_buf()?)
    }

    fn peek(&mut self) -> Result<Option<u8>> {
        Ok(self.buffer()?.first().copied())
    }

    /// What follows, as far as it is at hand.
    fn rest(&mut self) -> Result<String> {
        let buffer = self.buffer()?;
        let end = buffer.len().min(400);
        Ok(String::from_utf8_lossy(&buffer[..end]).into_owned())
    }

    fn advance(&mut self, bytes: usize) -> Result<()> {
        let buffer = self.buffer()?;
        let bytes = bytes.min(buffer.len());
        let skipped = &buffer[..bytes];
        let breaks = skipped.iter().filter(|&&byte| byte == b'\n').count();
        let last = skipped.iter().rposition(|&byte| byte == b'\n');
        self.line += breaks;
        self.column = match last {
            Some(at) => bytes - at - 1,
            None => self.column + bytes,
        };
        self.input.reader.consume(bytes);
        Ok(())
    }

    fn skip_space(&mut self) -> Result<()> {
        loop {
            let buffer = self.buffer()?;
            let space = buffer.iter().take_while(|byte| b" \t\r\n".contains(byte)).count();
            if space == 0 {
                return Ok(());
            }
            self.advance(space)?;
        }
    }

    /// The bytes of the object that begins here, up to the end of the file where it does not end.
    fn object(&mut self, start_line: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
        loop {
            let buffer = self.buffer()?;
            if buffer.is_empty() {
                return Ok(bytes);
            }
            let mut end = None;
            for (at, &byte) in buffer.iter().enumerate() {
                if in_string {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => in_string = false,
                        _ => {}
                    }
                    continue;
                }
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => {
                        depth -= 1;
                        if depth == 0 {
                            end = Some(at + 1);
                            break;
                        }
                    }
                    _ => {}
                }
            }
            let taken = end.unwrap_or(buffer.len());
            bytes.extend_from_slice(&buffer[..taken]);
            self.advance(taken)?;
            if end.is_some() {
                return Ok(bytes);
            }
            if bytes.len() > MAX_RECORD_BYTES {
                return Err(input::too_long(&self.input.path, start_line));
            }
        }
    }
}

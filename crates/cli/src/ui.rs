//! What people see. It goes to stderr; results go to stdout.

use crate::args::Global;
use hydralora_data::shown;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};

/// Prints a line for people.
pub(crate) fn say(global: &Global, line: impl AsRef<str>) {
    if !global.quiet {
        tell(line);
    }
}

/// Prints a line for people, `--quiet` or not. A terminal that is gone or a disk that is full ends
/// no work: what cannot be told is not.
pub(crate) fn tell(line: impl AsRef<str>) {
    ask(format!("{}\n", line.as_ref()));
}

/// The same without a line's end.
pub(crate) fn ask(text: impl AsRef<str>) {
    let mut err = std::io::stderr().lock();
    let text = shown(text.as_ref());
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

/// Prints the result: `json` as one document under `--json`, `text` otherwise.
pub(crate) fn result(global: &Global, json: &impl Serialize, text: &str) -> anyhow::Result<()> {
    let text =
        if global.json { serde_json::to_string_pretty(json)? } else { shown(text).into_owned() };
    print(&format!("{text}\n"))?;
    Ok(())
}

/// Prints a part of the result; false when nobody reads any more (`| head`), which is no failure. A
/// terminal gets it without what would speak to it.
pub(crate) fn print(text: &str) -> anyhow::Result<bool> {
    let mut out = std::io::stdout().lock();
    let text = if out.is_terminal() { shown(text) } else { text.into() };
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to stdout")),
    }
}

/// Writes bytes as the whole megabytes that hold them.
pub(crate) fn megabytes(bytes: usize) -> String {
    format!("{} MB", thousands(bytes.div_ceil(1 << 20)))
}

/// Whole thousands apart, as `9,289,728`.
pub(crate) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A table with left-aligned first column and right-aligned others.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            if column == 0 {
                let _ = write!(line, "{cell:<width$}");
            } else {
                let _ = write!(line, "  {cell:>width$}");
            }
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out.pop();
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(9_289_728), "9,289,728");
        assert_eq!(megabytes(1), "1 MB");
        assert_eq!(megabytes(3 << 30), "3,072 MB");
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["bcd".to_owned(), "22".to_owned()]];
        assert_eq!(table(&rows), "a     1\nbcd  22");
    }
}

//! Values as text: as Python prints them and as its `json` module writes them.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Tuple, Value, ValueKind};
use minijinja::{ErrorKind, State};

use super::{MOST_NESTED, STEP_BYTES_WALKED};

/// The text of a list or map, paid for before it grows. The engine counts it only afterwards, and a
/// few lists that hold each other twice can be written without end.
pub(super) struct Paid<'a, 's, 'e> {
    state: &'a State<'s, 'e>,
    pub(super) text: String,
    owed: u64,
}

impl<'a, 's, 'e> Paid<'a, 's, 'e> {
    pub(super) fn new(state: &'a State<'s, 'e>) -> Self {
        Self { state, text: String::new(), owed: 0 }
    }

    fn pay(&mut self, bytes: usize) -> std::result::Result<(), minijinja::Error> {
        self.owed = self.owed.saturating_add(bytes as u64);
        let steps = self.owed / STEP_BYTES_WALKED;
        self.owed %= STEP_BYTES_WALKED;
        self.state.consume_fuel(steps)
    }

    fn push(&mut self, text: &str) -> std::result::Result<(), minijinja::Error> {
        self.pay(text.len())?;
        self.text.push_str(text);
        Ok(())
    }
}

/// What Python's `str(value)` gives.
pub(super) fn python_str(
    state: &State<'_, '_>,
    value: &Value,
) -> std::result::Result<String, minijinja::Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_owned()),
        ValueKind::Undefined => Ok(String::new()),
        _ => {
            let mut paid = Paid::new(state);
            python_repr(&mut paid, value, 0)?;
            Ok(paid.text)
        }
    }
}

/// What Python's `repr(value)` gives.
fn python_repr(
    out: &mut Paid<'_, '_, '_>,
    value: &Value,
    depth: usize,
) -> std::result::Result<(), minijinja::Error> {
    if depth > MOST_NESTED {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("cannot write more than {MOST_NESTED} lists or maps in each other"),
        ));
    }
    match value.kind() {
        ValueKind::None => out.push("None"),
        ValueKind::Undefined => out.push("Undefined"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push(&python_number(value, ["inf", "nan"])),
        ValueKind::String => {
            let text = quoted(value.as_str().unwrap_or_default());
            out.push(&text)
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.downcast_object_ref::<Tuple>().is_some();
            out.push(if tuple { "(" } else { "[" })?;
            let mut items = 0;
            for item in value.try_iter()? {
                if items > 0 {
                    out.push(", ")?;
                }
                python_repr(out, &item, depth + 1)?;
                items += 1;
            }
            if tuple && items == 1 {
                out.push(",")?;
            }
            out.push(if tuple { ")" } else { "]" })
        }
        ValueKind::Map => {
            out.push("{")?;
            let mut first = true;
            for key in value.try_iter()? {
                if !first {
                    out.push(", ")?;
                }
                first = false;
                python_repr(out, &key, depth + 1)?;
                out.push(": ")?;
                python_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push("}")
        }
        _ => {
            let mut other = Walked { out, failed: None };
            let written = write!(other, "{value}");
            match other.failed {
                Some(error) => Err(error),
                None => written.map_err(|_| minijinja::Error::from(ErrorKind::OutOfFuel)),
            }
        }
    }
}

/// Lets the engine write a value of its own, and stops it where the steps are used up.
struct Walked<'o, 'a, 's, 'e> {
    out: &'o mut Paid<'a, 's, 'e>,
    failed: Option<minijinja::Error>,
}

impl std::fmt::Write for Walked<'_, '_, '_, '_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.out.push(text).map_err(|error| {
            self.failed = Some(error);
            std::fmt::Error
        })
    }
}

/// A text in the quotes that Python would choose, with its escapes.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c => {
                let code = u32::from(c);
                out.push_str(&match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
        }
    }
    out.push(quote);
    out
}

/// Whether Python shows a character as it is: no control or format character, no space but the
/// plain one, nothing private. Unassigned characters, which depend on its version, are shown.
fn is_printable(c: char) -> bool {
    let hidden = matches!(
        u32::from(c),
        0xad
            | 0x600..=0x605
            | 0x61c
            | 0x6dd
            | 0x70f
            | 0x180e
            | 0x200b..=0x200f
            | 0x2028..=0x202e
            | 0x2060..=0x206f
            | 0xe000..=0xf8ff
            | 0xfeff
            | 0xfff9..=0xfffb
            | 0xe0001..=0xe007f
            | 0xf0000..
    );
    !hidden && !c.is_control() && (c == ' ' || !c.is_whitespace())
}

/// A number as Python writes it; the words are those for infinity and for no number.
fn python_number(value: &Value, [infinity, none]: [&str; 2]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(number) = f64::try_from(value.clone()) else { return value.to_string() };
    if number.is_nan() {
        return none.to_owned();
    }
    if number.is_infinite() {
        return [if number < 0.0 { "-" } else { "" }, infinity].concat();
    }
    // Python changes to powers of ten below 1e-4 and from 1e16 on; the digits are the fewest that
    // tell the number from its neighbours, in both languages.
    let scientific = format!("{number:e}");
    let Some((digits, power)) = scientific.split_once('e') else { return scientific };
    let power: i32 = power.parse().unwrap_or(0);
    if (-4..16).contains(&power) {
        let plain = format!("{number}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if power < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", power.abs())
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
pub(super) fn to_json(
    state: &State<'_, '_>,
    value: &Value,
    options: Kwargs,
) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        // With line breaks between items, Python leaves the space after the comma out.
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let mut writer = JsonWriter {
        out: Paid::new(state),
        indent,
        item,
        key,
        sort_keys: sort_keys.unwrap_or(false),
        ascii: ascii.unwrap_or(false),
    };
    writer.write(value, 0)?;
    Ok(Value::from(writer.out.text))
}

struct JsonWriter<'a, 's, 'e> {
    out: Paid<'a, 's, 'e>,
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
    ascii: bool,
}

impl JsonWriter<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> std::result::Result<(), minijinja::Error> {
        if depth > MOST_NESTED {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson cannot write more than {MOST_NESTED} lists or maps in each other"),
            ));
        }
        match value.kind() {
            ValueKind::None => self.out.push("null"),
            ValueKind::Bool => self.out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push(&python_number(value, ["Infinity", "NaN"])),
            ValueKind::String => self.string(value.as_str().unwrap_or("")),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push("[")?;
                let mut empty = true;
                for item in value.try_iter()? {
                    self.separate(empty, depth + 1)?;
                    self.write(&item, depth + 1)?;
                    empty = false;
                }
                self.close("]", empty, depth)
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push("{")?;
                for (index, key) in keys.iter().enumerate() {
                    self.separate(index == 0, depth + 1)?;
                    self.string(&key.to_string())?;
                    self.out.push(&self.key)?;
                    self.write(&value.get_item(key)?, depth + 1)?;
                }
                self.close("}", keys.is_empty(), depth)
            }
            other => Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson cannot write a value of kind {other}"),
            )),
        }
    }

    fn separate(&mut self, first: bool, depth: usize) -> std::result::Result<(), minijinja::Error> {
        if !first {
            self.out.push(&self.item)?;
        }
        self.new_line(depth)
    }

    fn close(
        &mut self,
        bracket: &str,
        empty: bool,
        depth: usize,
    ) -> std::result::Result<(), minijinja::Error> {
        if !empty {
            self.new_line(depth)?;
        }
        self.out.push(bracket)
    }

    fn new_line(&mut self, depth: usize) -> std::result::Result<(), minijinja::Error> {
        if let Some(indent) = self.indent {
            let spaces = indent.saturating_mul(depth);
            self.out.pay(spaces)?;
            self.out.text.push('\n');
            self.out.text.extend(std::iter::repeat_n(' ', spaces));
        }
        Ok(())
    }

    fn string(&mut self, text: &str) -> std::result::Result<(), minijinja::Error> {
        self.out.pay(text.len() + 2)?;
        let out = &mut self.out.text;
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && !c.is_ascii()) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
        Ok(())
    }
}

//! Python's methods of texts, lists and maps, as far as the engine's own lack them or differ.

use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::STEP_BYTES;
use super::text::python_str;

/// Characters that `str.strip` and `str.split` take for white space: Unicode's, and the four
/// separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// Characters at which `str.splitlines` cuts.
fn is_line_end(c: char) -> bool {
    matches!(
        c,
        '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// The callback for methods that values of the engine do not have.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if method == "format"
        && let Some(text) = value.as_str()
    {
        pay_for_format(state, text, '{', args)?;
    }
    let found = match value.kind() {
        ValueKind::String => text(state, value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Map if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        ValueKind::Map => {
            refused("dict", method, &["pop", "popitem", "update", "setdefault", "clear"])?
        }
        ValueKind::Seq => sequence(value, method, args)?,
        _ => None,
    };
    match found {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// The sandbox of `transformers` lets no template change a value.
fn refused(kind: &str, method: &str, changing: &[&str]) -> Result<Option<Value>, Error> {
    if !changing.contains(&method) {
        return Ok(None);
    }
    let message = format!("`{method}` changes a {kind}; a chat template may not, use `namespace`");
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn sequence(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            let missing = || Error::new(ErrorKind::InvalidOperation, "the list has no such item");
            at.map(|at| Some(Value::from(at))).ok_or_else(missing)
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        _ => refused(
            "list",
            method,
            &["append", "extend", "insert", "pop", "remove", "reverse", "sort", "clear"],
        ),
    }
}

fn text(
    state: &State<'_, '_>,
    text: &str,
    method: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let result = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, characters, method != "rstrip", method != "lstrip"))
        }
        "split" => {
            let (separator, most) = splitting(args)?;
            pieces(split(text, separator.as_deref(), most)?)
        }
        "rsplit" => {
            let (separator, most) = splitting(args)?;
            pieces(rsplit(text, separator.as_deref(), most)?)
        }
        "splitlines" => {
            let (ends,): (Option<bool>,) = from_args(args)?;
            pieces(lines(text, ends.unwrap_or(false)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
            }
            let first = method == "partition";
            let cut = if first { text.split_once(separator) } else { text.rsplit_once(separator) };
            let [a, b, c] = match cut {
                Some((before, after)) => [before, separator, after],
                None if first => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from([Value::from(a), Value::from(b), Value::from(c)]))
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let (skipped, part) = slice(text, start, end);
            let last = method.starts_with('r');
            let at = if last { part.rfind(wanted) } else { part.find(wanted) };
            match at {
                Some(at) => Value::from(skipped + part[..at].chars().count()),
                None if method.ends_with("find") => Value::from(-1),
                None => {
                    return Err(Error::new(ErrorKind::InvalidOperation, "substring not found"));
                }
            }
        }
        "startswith" | "endswith" if args.len() > 1 => {
            let (wanted, start, end): (Value, Option<i64>, Option<i64>) = from_args(args)?;
            let (_, part) = slice(text, start, end);
            let fits = |wanted: &str| match method {
                "startswith" => part.starts_with(wanted),
                _ => part.ends_with(wanted),
            };
            match wanted.as_str() {
                Some(wanted) => Value::from(fits(wanted)),
                None => Value::from(wanted.try_iter()?.any(|one| one.as_str().is_some_and(fits))),
            }
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let mut joined = String::new();
            for (index, item) in items.try_iter()?.enumerate() {
                let Some(item) = item.as_str() else {
                    let message = format!("item {index} to join is no string but {}", item.kind());
                    return Err(Error::new(ErrorKind::InvalidOperation, message));
                };
                if index > 0 {
                    joined.push_str(text);
                }
                joined.push_str(item);
                state.consume_fuel(((text.len() + item.len()) / 64) as u64)?;
            }
            Value::from(joined)
        }
        "title" => {
            let () = from_args(args)?;
            Value::from(title(text))
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swapped = text.chars().map(|c| match c.is_uppercase() {
                true => c.to_lowercase().to_string(),
                false => c.to_uppercase().to_string(),
            });
            Value::from(swapped.collect::<String>())
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase().replace('ß', "ss"))
        }
        "zfill" | "center" | "ljust" | "rjust" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let missing = width.saturating_sub(text.chars().count());
            state.consume_fuel((missing / 64) as u64)?;
            Value::from(padded(text, method, missing, fill.unwrap_or(" ")))
        }
        "isdecimal" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(char::is_numeric))
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

fn pieces(parts: Vec<&str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

/// Python's `str.strip(characters)` at either end.
pub(super) fn strip<'t>(
    mut text: &'t str,
    characters: Option<&str>,
    start: bool,
    end: bool,
) -> &'t str {
    let dropped = |c: char| match characters {
        Some(characters) => characters.contains(c),
        None => is_space(c),
    };
    if start {
        text = text.trim_start_matches(dropped);
    }
    if end {
        text = text.trim_end_matches(dropped);
    }
    text
}

/// Separator and the most cuts of a call of `split` or `rsplit`.
fn splitting(args: &[Value]) -> Result<(Option<String>, usize), Error> {
    let (separator, most, named): (Option<String>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match named.has("sep") {
        true => named.get("sep")?,
        false => separator,
    };
    let most = match named.has("maxsplit") {
        true => Some(named.get::<i64>("maxsplit")?),
        false => most,
    };
    named.assert_all_used()?;
    Ok((separator, most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX)))
}

fn empty_separator() -> Error {
    Error::new(ErrorKind::InvalidOperation, "empty separator")
}

fn split<'t>(text: &'t str, separator: Option<&str>, most: usize) -> Result<Vec<&'t str>, Error> {
    if let Some(separator) = separator {
        if separator.is_empty() {
            return Err(empty_separator());
        }
        return Ok(text.splitn(most.saturating_add(1), separator).collect());
    }
    let mut parts = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let cut = rest.find(is_space).filter(|_| parts.len() < most);
        let Some(cut) = cut else {
            // The last piece keeps the white space at its end where cuts ran out.
            let whole = if parts.len() < most { rest.trim_end_matches(is_space) } else { rest };
            parts.push(whole);
            break;
        };
        parts.push(&rest[..cut]);
        rest = rest[cut..].trim_start_matches(is_space);
    }
    Ok(parts)
}

fn rsplit<'t>(text: &'t str, separator: Option<&str>, most: usize) -> Result<Vec<&'t str>, Error> {
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(empty_separator()),
        Some(separator) => text.rsplitn(most.saturating_add(1), separator).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() {
                let cut = rest.char_indices().rev().find(|(_, c)| is_space(*c));
                let Some((cut, space)) = cut.filter(|_| parts.len() < most) else {
                    parts.push(rest);
                    break;
                };
                parts.push(&rest[cut + space.len_utf8()..]);
                rest = rest[..cut].trim_end_matches(is_space);
            }
            parts
        }
    };
    parts.reverse();
    Ok(parts)
}

pub(super) fn lines(text: &str, ends: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(is_line_end) else {
            parts.push(rest);
            break;
        };
        let pair = rest[at..].starts_with("\r\n");
        let one = rest[at..].chars().next().map_or(1, char::len_utf8);
        let next = at + if pair { 2 } else { one };
        parts.push(&rest[..if ends { next } else { at }]);
        rest = &rest[next..];
    }
    parts
}

/// The part between two indices of characters, counted from the end where they are negative, and
/// how many characters stand before it.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> (usize, &str) {
    let count = text.chars().count() as i64;
    let place = |index: i64| if index < 0 { (count + index).max(0) } else { index.min(count) };
    let start = place(start.unwrap_or(0));
    let end = place(end.unwrap_or(count)).max(start);
    let byte = |index: i64| {
        let found = text.char_indices().nth(usize::try_from(index).unwrap_or(usize::MAX));
        found.map_or(text.len(), |(at, _)| at)
    };
    (usize::try_from(start).unwrap_or(0), &text[byte(start)..byte(end)])
}

/// Every letter after a letter in lower case, every other in upper case.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

fn padded(text: &str, method: &str, missing: usize, fill: &str) -> String {
    match method {
        "ljust" => [text, &fill.repeat(missing)].concat(),
        "rjust" => [&fill.repeat(missing), text].concat(),
        "zfill" => {
            let sign = if text.starts_with(['+', '-']) { &text[..1] } else { "" };
            [sign, &"0".repeat(missing), &text[sign.len()..]].concat()
        }
        _ => {
            // Python puts the odd one to the left where the width is odd.
            let width = missing + text.chars().count();
            let left = missing / 2 + (missing & width & 1);
            [&fill.repeat(left), text, &fill.repeat(missing - left)].concat()
        }
    }
}

/// Pays for the most that a format can make before it is made: every field may be as wide as a number
/// in it, and hold the longest value.
fn pay_for_format(
    state: &State<'_, '_>,
    format: &str,
    mark: char,
    values: &[Value],
) -> Result<(), Error> {
    let digits = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let width = |digits: &str| digits.parse::<u64>().unwrap_or(u64::MAX);
    let widths = digits.map(width).fold(0, u64::saturating_add);
    let mut longest = 0;
    for value in values {
        longest = longest.max(match value.as_str() {
            Some(text) => text.len(),
            None => python_str(state, value)?.len(),
        });
    }
    let fields = format.matches(mark).count() as u64;
    let bytes = fields.saturating_mul(longest as u64).saturating_add(widths);
    state.consume_fuel(bytes / STEP_BYTES)
}

/// `text % values`.
pub(super) fn percent(state: &State<'_, '_>, text: &str, values: &Value) -> Result<String, Error> {
    let values: Vec<Value> = match values.downcast_object_ref::<Tuple>() {
        Some(_) => values.try_iter()?.collect(),
        None => vec![values.clone()],
    };
    let plain = |value: Value| match value.kind() {
        ValueKind::Number | ValueKind::String | ValueKind::Map => Ok(value),
        _ => python_str(state, &value).map(Value::from),
    };
    let values: Vec<Value> = values.into_iter().map(plain).collect::<Result<_, Error>>()?;
    pay_for_format(state, text, '%', &values)?;
    minijinja::formatting::format(minijinja::formatting::FormatStyle::Printf, text, &values)
}

/// The filter `join`: texts of values with a separator between.
pub(super) fn join(
    state: &State<'_, '_>,
    items: &Value,
    separator: Option<String>,
    attribute: Option<String>,
    named: Kwargs,
) -> Result<String, Error> {
    let separator = named.get::<Option<String>>("d")?.or(separator).unwrap_or_default();
    let attribute = named.get::<Option<String>>("attribute")?.or(attribute);
    named.assert_all_used()?;
    let mut out = String::new();
    if items.is_undefined() {
        return Ok(out);
    }
    for (index, item) in items.try_iter()?.enumerate() {
        if index > 0 {
            out.push_str(&separator);
        }
        let item = match &attribute {
            Some(name) => item.get_attr(name)?,
            None => item,
        };
        let text = python_str(state, &item)?;
        state.consume_fuel(((text.len() + separator.len()) / 64) as u64)?;
        out.push_str(&text);
    }
    Ok(out)
}

/// The filter `default`.
pub(super) fn default(
    value: &Value,
    other: Option<Value>,
    falsy: Option<bool>,
    named: Kwargs,
) -> Result<Value, Error> {
    let other = named.get::<Option<Value>>("default_value")?.or(other);
    let falsy = named.get::<Option<bool>>("boolean")?.or(falsy).unwrap_or(false);
    named.assert_all_used()?;
    let missing = value.is_undefined() || (falsy && !value.is_true());
    Ok(if missing { other.unwrap_or_else(|| Value::from("")) } else { value.clone() })
}

/// The filter `escape`.
pub(super) fn escape(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    let mut out = String::new();
    for c in python_str(state, value)?.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    Ok(Value::from(out))
}

/// The filter `int`: what is no number is `default`, 0 where there is none.
pub(super) fn int(
    state: &State<'_, '_>,
    value: Value,
    default: Option<Value>,
    base: Option<u32>,
    named: Kwargs,
) -> Result<Value, Error> {
    let given = default.is_some() || named.has("default");
    let default = if given { default } else { Some(Value::from(0)) };
    minijinja::filters::int(state, &value, default, base, named)
}

/// What a loop goes over: the characters of a text; nothing goes over `none`.
pub(super) fn iterated(value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::None => Err(Error::new(ErrorKind::InvalidOperation, "none is not iterable")),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            Ok(text.chars().map(Value::from).collect())
        }
        _ => Ok(value.clone()),
    }
}

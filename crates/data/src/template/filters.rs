//! Filters and tests of which the engine's own give something else than Python's.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::STEP_BYTES;
use super::methods::lines;
use super::text::python_str;

/// Puts them in the place of the engine's.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("float", float);
    environment.add_filter("indent", indent);
    environment.add_filter("abs", absolute);
    environment.add_filter("wordcount", |state: &State<'_, '_>, value: &Value| {
        python_str(state, value).map(|text| {
            let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
            words.filter(|word| !word.is_empty()).count()
        })
    });
    for (name, upper) in [("lower", false), ("upper", true)] {
        environment.add_test(name, move |state: &State<'_, '_>, value: &Value| {
            python_str(state, value).map(|text| is_cased(&text, upper))
        });
    }
}

/// Whether a text has letters of this case and none of the other.
fn is_cased(text: &str, upper: bool) -> bool {
    let has =
        |upper: bool| text.chars().any(|c| if upper { c.is_uppercase() } else { c.is_lowercase() });
    has(upper) && !has(!upper)
}

/// The number a value stands for; what is none gives the default.
fn float(value: &Value, default: Option<f64>) -> f64 {
    let parsed = match value.kind() {
        ValueKind::Bool => Some(if value.is_true() { 1.0 } else { 0.0 }),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        _ => value.as_str().and_then(|text| text.trim().parse().ok()),
    };
    parsed.unwrap_or(default.unwrap_or(0.0))
}

/// The absolute value; yes and no are numbers too.
fn absolute(value: &Value) -> Result<Value, Error> {
    let refused = || Error::new(ErrorKind::InvalidOperation, "cannot get absolute value");
    match value.kind() {
        ValueKind::Bool => Ok(Value::from(i64::from(value.is_true()))),
        ValueKind::Number => match value.as_i64().filter(|_| value.is_integer()) {
            Some(number) => number.checked_abs().map(Value::from).ok_or_else(refused),
            None => Ok(Value::from(f64::try_from(value.clone()).map_err(|_| refused())?.abs())),
        },
        _ => Err(refused()),
    }
}

/// Lines behind the first moved in, by a number of spaces or a text; what that makes is paid for before
/// it is made.
fn indent(state: &State<'_, '_>, arguments: Rest<Value>) -> Result<String, Error> {
    type Arguments<'a> = (&'a str, Option<&'a Value>, Option<bool>, Option<bool>, Kwargs);
    let (text, width, first, blank, options) = from_args::<Arguments<'_>>(&arguments)?;
    let own = options.get::<Option<Value>>("width")?;
    let first = options.get::<Option<bool>>("first")?.or(first).unwrap_or(false);
    let blank = options.get::<Option<bool>>("blank")?.or(blank).unwrap_or(false);
    options.assert_all_used()?;
    const WIDEST: i64 = 1 << 16;
    let before = match own.as_ref().or(width) {
        None => " ".repeat(4),
        Some(width) => match (width.as_str(), width.as_i64()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(width)) if width <= WIDEST => " ".repeat(width.max(0) as usize),
            _ => {
                let message = format!("indent takes a width of at most {WIDEST}, or a text");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        },
    };
    let with_end = format!("{text}\n");
    let lines = lines(&with_end, false);
    let most = lines.len().saturating_mul(before.len()).saturating_add(text.len());
    state.consume_fuel(most as u64 / STEP_BYTES)?;
    let mut out = if first { before.clone() } else { String::new() };
    for (number, line) in lines.into_iter().enumerate() {
        if number > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(&before);
            }
        }
        out.push_str(line);
    }
    Ok(out)
}

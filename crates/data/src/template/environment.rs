//! The engine, set to what `transformers` makes of jinja.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, escape_formatter};

use super::counted::{BOUNDED, COUNTED, KEPT};
use super::text::{python_str, to_json};
use super::{ITERATED, MOST_STEPS, PERCENT};
use super::{methods, walk};
use crate::strftime::strftime;

/// How templates are read: line breaks behind tags and white space before them go.
pub(super) fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// The engine for templates that have been [written anew](super::counted::rewrite), whose white space
/// is as it has to be; `now` is what `strftime_now` gives, in seconds since 1970-01-01T00:00:00Z.
pub(super) fn build(now: i64) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    // Without it a fault names the value at fault only in builds with debug assertions.
    environment.set_debug(true);
    environment.set_fuel(Some(MOST_STEPS));
    environment.set_syntax(SyntaxConfig::builder().keep_trailing_newline(true).build()?);
    // It writes everything there is, values of any depth.
    environment.remove_global("debug");
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Undefined | ValueKind::String => escape_formatter(out, state, value),
        _ => {
            let text = Value::from(python_str(state, value)?);
            escape_formatter(out, state, &text)
        }
    });
    environment.add_filter("tojson", to_json);
    environment.add_filter("join", methods::join);
    environment.add_filter(PERCENT, methods::percent);
    environment.add_filter(ITERATED, methods::iterated);
    environment.add_filter(COUNTED, walk::counted);
    environment.add_filter(BOUNDED, walk::bounded);
    environment.add_filter(KEPT, walk::kept);
    for name in ["default", "d"] {
        environment.add_filter(name, methods::default);
    }
    for name in ["escape", "e"] {
        environment.add_filter(name, methods::escape);
    }
    environment.add_filter("int", methods::int);
    super::filters::add(&mut environment);
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment
        .add_filter("string", |state: &State<'_, '_>, value: &Value| python_str(state, value));
    environment.add_filter(
        "trim",
        |state: &State<'_, '_>, value: &Value, characters: Option<&str>| -> Result<String, Error> {
            Ok(methods::strip(&python_str(state, value)?, characters, true, true).to_owned())
        },
    );
    add_tests(&mut environment);
    environment.add_function(
        "raise_exception",
        |state: &State<'_, '_>, text: &Value| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, python_str(state, text)?))
        },
    );
    // No `String`, which the engine would make of a value of any kind and size.
    environment.add_function("strftime_now", move |format: &str| {
        strftime(format, now).map_err(|text| Error::new(ErrorKind::InvalidOperation, text))
    });
    Ok(environment)
}

/// The tests whose answers differ between the engine and Python.
fn add_tests(environment: &mut Environment<'static>) {
    let kind = |value: &Value| value.kind();
    environment.add_test("iterable", move |value: &Value| {
        !matches!(kind(value), ValueKind::None | ValueKind::Bool | ValueKind::Number)
            && (value.is_undefined() || value.try_iter().is_ok())
    });
    environment.add_test("sequence", move |value: &Value| {
        matches!(
            kind(value),
            ValueKind::Undefined
                | ValueKind::String
                | ValueKind::Seq
                | ValueKind::Map
                // A list from its end.
                | ValueKind::Iterable
        )
    });
    environment.add_test("number", move |value: &Value| {
        matches!(kind(value), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("callable", |value: &Value| {
        // What is undefined can be called, and refuses then.
        value.is_undefined() || value.as_object().is_some() && value.kind() == ValueKind::Plain
    });
}

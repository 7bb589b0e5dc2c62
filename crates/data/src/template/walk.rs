//! Walking a value at a price, and what a template may not build.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::{MOST_NESTED, STEP_BYTES};

/// Items of one list; the engine joins and repeats lists without making them.
const MOST_ITEMS: usize = 4 << 20;

/// The value itself, once all of it has been paid for: the engine may then walk it.
pub(super) fn counted(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    if is_container(&value) {
        let mut walk = Walk { state, owed: 0 };
        walk.visit(&value, 0)?;
        state.consume_fuel(walk.owed / STEP_BYTES)?;
    }
    Ok(value)
}

/// The value itself, unless it is a list of more items than any conversation has.
pub(super) fn bounded(value: Value) -> Result<Value, Error> {
    if is_container(&value) && value.len().is_some_and(|len| len > MOST_ITEMS) {
        return Err(Error::from(ErrorKind::OutOfFuel));
    }
    Ok(value)
}

/// The value itself, unless it is a namespace: one that held itself would have no end.
pub(super) fn kept(value: Value) -> Result<Value, Error> {
    match is_namespace(&value) {
        true => Err(Error::new(ErrorKind::InvalidOperation, "a namespace cannot hold a namespace")),
        false => Ok(value),
    }
}

fn is_container(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

struct Walk<'a, 's, 'e> {
    state: &'a State<'s, 'e>,
    /// What is not paid yet, in bytes: an item counts as [`STEP_BYTES`].
    owed: u64,
}

impl Walk<'_, '_, '_> {
    fn visit(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let text = value.as_str().map_or(0, str::len) as u64;
        self.owed += STEP_BYTES + text;
        if self.owed >= 64 * STEP_BYTES {
            self.state.consume_fuel(self.owed / STEP_BYTES)?;
            self.owed %= STEP_BYTES;
        }
        if !is_container(value) {
            return Ok(());
        }
        if depth > MOST_NESTED {
            let message = format!("more than {MOST_NESTED} lists or maps in each other");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        let pairs = value.kind() == ValueKind::Map;
        for item in value.try_iter()? {
            self.visit(&item, depth + 1)?;
            if pairs {
                self.visit(&value.get_item(&item)?, depth + 1)?;
            }
        }
        Ok(())
    }
}

//! The domain of a text, for adapters that do something else in each.

use crate::failure::bad_input;
use hydralora_peft::Tuned;

/// Makes `tuned` treat texts as of the domain that `--domain` names.
///
/// # Errors
/// If it is needed and missing, not known, or means nothing to the adapter.
pub(crate) fn choose(tuned: &mut dyn Tuned, asked: Option<&str>) -> anyhow::Result<()> {
    let known = tuned.domains().join(", ");
    match asked {
        Some(name) if known.is_empty() => Err(bad_input(format!(
            "--domain {name}: the adapter treats all domains alike; leave the option out"
        ))),
        Some(name) => {
            tuned.choose_domain(name).map_err(|error| bad_input(format!("--domain: {error}")))
        }
        None if known.is_empty() => Ok(()),
        None => Err(bad_input(format!(
            "--domain: the adapter has an update of its own for every domain; expected one of {known}"
        ))),
    }
}

//! The domain of a text, for adapters that do something else in each.

use crate::failure::bad_input;
use hydralora_peft::Tuned;

/// Makes `tuned` treat texts as of the domain that `--domain` names.
///
/// # Errors
/// If it is needed and missing, not known, or means nothing to the adapter.
pub(crate) fn choose(tuned: &mut dyn Tuned, asked: Option<&str>) -> anyhow::Result<()> {
    match (asked, tuned.as_domain_aware_mut()) {
        (Some(name), Some(domains)) => {
            domains.choose_domain(name).map_err(|error| bad_input(format!("--domain: {error}")))
        }
        (Some(name), None) => Err(bad_input(format!(
            "--domain {name}: the adapter treats all domains alike; leave the option out"
        ))),
        (None, Some(domains)) => Err(bad_input(format!(
            "--domain: the adapter has an update of its own for every domain; expected one of {}",
            domains.domains().join(", ")
        ))),
        (None, None) => Ok(()),
    }
}

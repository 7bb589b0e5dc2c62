//! What must hold between cells: equal parameters, equal scale.

use crate::error::{Error, Result};
use crate::host::Recipes;
use crate::spec::{EqualParameters, EqualScale};
use serde_json::{Value, json};
use std::path::Path;

/// Largest value that is tried.
const MOST: u64 = 1 << 16;
/// Counts that an error lists on each side.
const SHOWN: u64 = 3;

/// The integer at `key` of a recipe that makes its parameters equal to `wanted`, put in its place.
pub(crate) fn solve_parameters(
    recipes: &dyn Recipes,
    constraint: &EqualParameters,
    label: &str,
    recipe: &mut Value,
    folder: &Path,
    wanted: u64,
) -> Result<u64> {
    let key = &constraint.solve;
    let count = |value: u64| -> Result<u64> {
        let mut tried = recipe.clone();
        recipes.set(&mut tried, key, &json!(value))?;
        let resolved = recipes.resolve(&tried, folder).map_err(|error| {
            Error::bad(format!(
                "constraints.equal_parameters: `{label}` with {key} = {value}: {error}"
            ))
        })?;
        recipes.parameters(&resolved.recipe)?.ok_or_else(|| unknown(label))
    };
    // Counts grow with the value: find the first one that reaches what is wanted.
    let mut above = 1;
    while count(above)? < wanted && above < MOST {
        above *= 2;
    }
    let mut below = above / 2;
    while above - below > 1 {
        let middle = below.midpoint(above);
        if middle > 0 && count(middle)? < wanted {
            below = middle;
        } else {
            above = middle;
        }
    }
    let off = |found: u64| found.abs_diff(wanted) as f64 / wanted.max(1) as f64;
    let mut best = (above, count(above)?);
    if above > 1 {
        let under = count(above - 1)?;
        if off(under) < off(best.1) {
            best = (above - 1, under);
        }
    }
    if off(best.1) > constraint.tolerance {
        let mut possible = Vec::new();
        for value in above.saturating_sub(SHOWN).max(1)..above + SHOWN {
            possible.push(format!("{value} gives {}", count(value)?));
        }
        return Err(Error::bad(format!(
            "constraints.equal_parameters: no {key} gives `{label}` {wanted} parameters within {} %, as many \
             as `{}` has; {key} = {}",
            100.0 * constraint.tolerance,
            constraint.reference,
            possible.join(", ")
        )));
    }
    recipes.set(recipe, key, &json!(best.0))?;
    Ok(best.1)
}

pub(crate) fn unknown(label: &str) -> Error {
    Error::bad(format!(
        "constraints.equal_parameters: how many parameters `{label}` has is known only when it runs; give \
         numbers in place of `auto`"
    ))
}

/// Gives a recipe the scale `wanted`, or makes sure that it has it. `label` is for errors.
pub(crate) fn meet_scale(
    recipes: &dyn Recipes,
    constraint: &EqualScale,
    label: &str,
    recipe: &mut Value,
    folder: &Path,
    wanted: f64,
) -> Result<()> {
    let scale_of = |recipe: &Value| -> Result<Option<f64>> {
        Ok(recipes.scale(&recipes.resolve(recipe, folder)?.recipe))
    };
    let named = constraint.labels.as_ref().is_some_and(|labels| labels.iter().any(|l| l == label));
    let Some(found) = scale_of(recipe)? else {
        let none =
            format!("constraints.equal_scale: `{label}` has no scale; leave it out of `for`");
        return if named { Err(Error::bad(none)) } else { Ok(()) };
    };
    let equal = |found: f64| (found - wanted).abs() <= 1e-9 * wanted.abs();
    if equal(found) {
        return Ok(());
    }
    let Some(key) = &constraint.solve else {
        return Err(Error::bad(format!(
            "constraints.equal_scale: `{label}` scales its update by {found}, `{}` by {wanted}; change alpha, \
             or let `solve: method.alpha` do it",
            constraint.reference
        )));
    };
    // The scale is proportional to alpha.
    recipes.set(recipe, key, &json!(1.0))?;
    let one = scale_of(recipe)?.unwrap_or_default();
    let value = wanted / one;
    // A whole number is written as one.
    let written = if value.fract() == 0.0 { json!(value as i64) } else { json!(value) };
    recipes.set(recipe, key, &written)?;
    match scale_of(recipe)? {
        Some(found) if equal(found) => Ok(()),
        found => Err(Error::bad(format!(
            "constraints.equal_scale: with {key} = {value}, `{label}` scales its update by {found:?} instead of \
             {wanted}; `solve` has to name the numerator of the scale"
        ))),
    }
}

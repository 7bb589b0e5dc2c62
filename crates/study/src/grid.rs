//! From axes to points: every combination of one variant of each axis.

use crate::error::{Error, Result};
use crate::spec::{Combine, EvalOptions, Spec, Variant};
use serde_json::{Map, Value};

/// An axis of the grid.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) name: String,
    pub(crate) variants: Vec<Variant>,
}

/// One combination, without a seed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Point {
    /// Axis and label, in the order of the axes. An axis that means nothing for what is not trained is
    /// left out.
    pub(crate) labels: Vec<(String, String)>,
    /// Recipe keys and their values, in the order in which they are set.
    pub(crate) set: Vec<(String, Value)>,
    pub(crate) tasks: Vec<String>,
    pub(crate) eval: EvalOptions,
    pub(crate) untrained: bool,
    pub(crate) combine: Option<Combine>,
}

/// The label of a plain value: `1e-4`, `16`, `qv`, `[q_proj, v_proj]`.
pub(crate) fn label_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_f64() {
            Some(float)
                if number.is_f64() && float != 0.0 && !(0.01..1e4).contains(&float.abs()) =>
            {
                format!("{float:e}")
            }
            _ => number.to_string(),
        },
        Value::Array(items) => {
            format!("[{}]", items.iter().map(label_of).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// Reads the axes of a grid.
pub(crate) fn axes(grid: &Map<String, Value>) -> Result<Vec<Axis>> {
    grid.iter().map(|(name, items)| axis(name, items)).collect()
}

fn axis(name: &str, items: &Value) -> Result<Axis> {
    let fault = |message: String| Error::bad(format!("grid.{name}: {message}"));
    let Value::Array(items) = items else {
        return Err(fault(format!("is `{items}`; expected a list of values or of variants")));
    };
    if items.is_empty() {
        return Err(fault("is empty; expected at least one value".to_owned()));
    }
    let named = |item: &Value| item.get("label").is_some();
    let variants: Vec<Variant> = if items.iter().any(named) {
        let read = |(index, item): (usize, &Value)| {
            serde_path_to_error::deserialize(item)
                .map_err(|error| fault(format!("[{index}]: {}: {}", error.path(), error.inner())))
        };
        items.iter().enumerate().map(read).collect::<Result<_>>()?
    } else {
        let plain = |value: &Value| Variant {
            label: label_of(value),
            set: Map::from_iter([(name.to_owned(), value.clone())]),
            ..Variant::default()
        };
        items.iter().map(plain).collect()
    };
    for (index, variant) in variants.iter().enumerate() {
        if variant.label.is_empty() {
            return Err(fault(format!("[{index}].label: is empty")));
        }
        if variants[..index].iter().any(|other| other.label == variant.label) {
            return Err(fault(format!("`{}` stands there twice", variant.label)));
        }
        if variant.untrained && variant.combine.is_some() {
            let label = &variant.label;
            return Err(fault(format!(
                "`{label}`: is `untrained` and has `combine`; expected one"
            )));
        }
    }
    Ok(Axis { name: name.to_owned(), variants })
}

/// Every combination of the axes.
pub(crate) fn points(axes: &[Axis], tune: Option<&str>) -> Result<Vec<Point>> {
    let mut found = Vec::new();
    extend(axes, tune, &Map::new(), &Point::default(), &mut found)?;
    Ok(found)
}

fn extend(
    axes: &[Axis],
    tune: Option<&str>,
    overridden: &Map<String, Value>,
    so_far: &Point,
    found: &mut Vec<Point>,
) -> Result<()> {
    let Some((first, rest)) = axes.split_first() else {
        found.push(so_far.clone());
        return Ok(());
    };
    let own;
    let chosen = match overridden.get(&first.name) {
        Some(items) => {
            own = axis(&first.name, items)?;
            &own
        }
        None => first,
    };
    let untrained = so_far.untrained || so_far.combine.is_some();
    if untrained && tune == Some(&first.name) {
        return extend(rest, tune, overridden, so_far, found);
    }
    for variant in &chosen.variants {
        let mut point = so_far.clone();
        let mut overridden = overridden.clone();
        for (name, items) in &variant.grid {
            if !rest.iter().any(|axis| axis.name == *name) {
                return Err(Error::bad(format!(
                    "grid.{}: `{}`.grid.{name}: there is no axis `{name}` after `{}`",
                    first.name, variant.label, first.name
                )));
            }
            overridden.insert(name.clone(), items.clone());
        }
        point.labels.push((first.name.clone(), variant.label.clone()));
        point.set.extend(variant.set.iter().map(|(key, value)| (key.clone(), value.clone())));
        point.tasks.extend(variant.tasks.iter().cloned());
        point.eval = point.eval.with(&variant.eval);
        point.untrained |= variant.untrained;
        if let Some(combine) = &variant.combine {
            point.combine = Some(combine.clone());
        }
        extend(rest, tune, &overridden, &point, found)?;
    }
    Ok(())
}

/// The compared axis: the one that is named, or `method`, or the first that is not tuned.
pub(crate) fn compared(spec: &Spec, axes: &[Axis]) -> Result<String> {
    let names = || axes.iter().map(|axis| axis.name.as_str());
    let exists = |key: &str, name: &str| {
        if names().any(|known| known == name) {
            return Ok(());
        }
        let known = names().collect::<Vec<_>>().join(", ");
        Err(Error::bad(format!("{key}: there is no axis `{name}`; expected one of {known}")))
    };
    if let Some(tune) = &spec.tune {
        exists("tune", tune)?;
    }
    let untuned = || names().filter(|name| spec.tune.as_deref() != Some(name));
    let compare = match &spec.compare {
        Some(name) => {
            exists("compare", name)?;
            if spec.tune.as_ref() == Some(name) {
                return Err(Error::bad(format!(
                    "compare: `{name}` is tuned; expected another axis"
                )));
            }
            name.clone()
        }
        None => untuned()
            .find(|name| *name == "method")
            .or_else(|| untuned().next())
            .or_else(|| names().next())
            .unwrap_or_default()
            .to_owned(),
    };
    if let Some(reference) = &spec.reference {
        label_exists("reference", reference, &compare, axes)?;
    }
    Ok(compare)
}

/// Makes sure that the compared axis has a label.
pub(crate) fn label_exists(key: &str, label: &str, compare: &str, axes: &[Axis]) -> Result<()> {
    let axis = axes.iter().find(|axis| axis.name == compare);
    let labels: Vec<&str> = axis
        .map(|axis| axis.variants.iter().map(|variant| variant.label.as_str()).collect())
        .unwrap_or_default();
    if labels.contains(&label) {
        return Ok(());
    }
    let known = labels.join(", ");
    Err(Error::bad(format!("{key}: `{compare}` has no label `{label}`; expected one of {known}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn grid(value: Value) -> Vec<Axis> {
        axes(value.as_object().unwrap()).unwrap()
    }

    fn labels(points: &[Point]) -> Vec<String> {
        let of = |point: &Point| {
            point.labels.iter().map(|(_, label)| label.as_str()).collect::<Vec<_>>().join(" ")
        };
        points.iter().map(of).collect()
    }

    #[test]
    fn variants_override_later_axes_and_what_is_untrained_is_not_tuned() {
        let axes = grid(json!({
            "method": [
                {"label": "base", "untrained": true},
                {"label": "lora"},
                {"label": "full", "grid": {"train.learning_rate": [1e-5]}},
            ],
            "train.learning_rate": [1e-4, 1e-3],
        }));
        let points = points(&axes, Some("train.learning_rate")).unwrap();
        assert_eq!(labels(&points), ["base", "lora 1e-4", "lora 1e-3", "full 1e-5"]);
        assert_eq!(points[3].set, [("train.learning_rate".to_owned(), json!(1e-5))]);
    }

    #[test]
    fn faults_name_the_axis() {
        let fails = |value: Value, expected: &str| {
            let error = axes(value.as_object().unwrap()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        fails(json!({"a": []}), "grid.a: is empty");
        fails(json!({"a": 3}), "grid.a: is `3`; expected a list");
        fails(json!({"a": [1, 1]}), "grid.a: `1` stands there twice");
        fails(
            json!({"a": [{"label": "x", "sett": {}}]}),
            "grid.a: [0]: sett: unknown field `sett`",
        );
        fails(json!({"a": [{"label": "x"}, {"set": {}}]}), "grid.a: [1]: ");
        let other = grid(json!({"b": [1], "a": [{"label": "x", "grid": {"b": [2]}}]}));
        let error = points(&other, None).unwrap_err().to_string();
        assert!(error.contains("there is no axis `b` after `a`"), "{error}");
    }

    #[test]
    fn labels_are_short() {
        for (value, label) in [
            (json!(1e-4), "1e-4"),
            (json!(0.05), "0.05"),
            (json!(16), "16"),
            (json!(20000.0), "2e4"),
            (json!(["a", 1]), "[a, 1]"),
            (json!(null), "null"),
        ] {
            assert_eq!(label_of(&value), label);
        }
    }
}

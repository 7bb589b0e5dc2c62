//! Where a recipe's value comes from: a line of the file, or an argument.

use crate::failure::bad_input;
use hydralora_peft::Fault;
use serde_json::{Value, json};
use std::path::PathBuf;

/// A recipe's file and the changes that were asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origin {
    /// The file as it was named, and its text; none for a recipe made by the program.
    file: Option<(PathBuf, String)>,
    /// The `--set` arguments, each with the field it sets.
    changes: Vec<(String, String)>,
}

impl Origin {
    /// That of a file without changes.
    pub(super) fn of_file(path: PathBuf, text: String) -> Self {
        Self { file: Some((path, text)), changes: Vec::new() }
    }

    /// Applies `--set` arguments to a recipe.
    ///
    /// # Errors
    /// With everything that is wrong with them.
    pub(super) fn apply(&mut self, recipe: &mut Value, changes: &[String]) -> anyhow::Result<()> {
        let mut faults = Vec::new();
        for change in changes {
            match apply(recipe, change) {
                Ok(field) => self.changes.push((field, change.clone())),
                Err(message) => faults.push(format!("--set {change}: {message}")),
            }
        }
        if faults.is_empty() { Ok(()) } else { Err(bad_input(faults.join("\n"))) }
    }

    /// Whether an argument set this field, or one that holds it.
    pub(super) fn sets(&self, field: &str) -> bool {
        self.changes.iter().any(|(set, _)| inside(set, field))
    }

    /// Faults of the recipe as one error, each with where it comes from.
    pub(crate) fn error(&self, faults: &[Fault]) -> anyhow::Error {
        // In the order of the file, those of arguments first.
        let mut faults: Vec<&Fault> = faults.iter().collect();
        faults.sort_by_key(|fault| self.line(&fault.field));
        let lines: Vec<String> =
            faults.iter().map(|fault| format!("  {}{fault}", self.place(&fault.field))).collect();
        let count = match faults.len() {
            1 => "1 fault".to_owned(),
            n => format!("{n} faults"),
        };
        bad_input(format!("the recipe has {count}:\n{}", lines.join("\n")))
    }

    /// The line of the file on which a field stands, if it comes from there.
    fn line(&self, field: &str) -> Option<usize> {
        let (_, text) = self.file.as_ref().filter(|_| !self.sets(field))?;
        line_of(text, field)
    }

    /// What stands before a fault of `field`.
    fn place(&self, field: &str) -> String {
        // The last change of a field is the one that counts.
        let change = self.changes.iter().rev().find(|(set, _)| inside(set, field));
        if let Some((_, change)) = change {
            return format!("--set {change}: ");
        }
        let Some((path, _)) = &self.file else { return String::new() };
        match self.line(field) {
            Some(line) => format!("{}:{line}: ", path.display()),
            None => format!("{}: ", path.display()),
        }
    }
}

/// Whether `field` is `set` or something in it.
fn inside(set: &str, field: &str) -> bool {
    field.strip_prefix(set).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// Applies `a.b=c` and returns the field as [`set`] does.
fn apply(recipe: &mut Value, change: &str) -> Result<String, String> {
    let (path, value) = change_of(change)?;
    set(recipe, path, value)
}

/// The key and the value of `a.b=c`, which is read as YAML.
pub(crate) fn change_of(change: &str) -> Result<(&str, Value), String> {
    let (path, value) = change.split_once('=').ok_or("expected KEY=VALUE, as train.seed=7")?;
    let value = serde_saphyr::from_str(value).map_err(|error| error.to_string())?;
    Ok((path, value))
}

/// Puts `value` at the dotted key `path`, making the mappings on the way to it, and returns the field
/// as faults call it, `a.b[0].c`.
pub(crate) fn set(recipe: &mut Value, path: &str, value: Value) -> Result<String, String> {
    let mut place = recipe;
    let mut field = String::new();
    for part in path.split('.') {
        if part.is_empty() {
            return Err("expected KEY=VALUE, as train.seed=7".to_owned());
        }
        place = match place {
            Value::Array(list) => {
                let len = list.len();
                field.push_str(&format!("[{part}]"));
                part.parse::<usize>()
                    .ok()
                    .and_then(|index| list.get_mut(index))
                    .ok_or_else(|| format!("`{part}` is not an index below {len}"))?
            }
            other => {
                if !other.is_object() {
                    *other = json!({});
                }
                let separator = if field.is_empty() { "" } else { "." };
                field.push_str(&format!("{separator}{part}"));
                match other {
                    Value::Object(map) => map.entry(part).or_insert(Value::Null),
                    _ => unreachable!("made an object above"),
                }
            }
        };
    }
    *place = value;
    Ok(field)
}

/// The line of a recipe on which `field` (as `data.train[1].weight`) stands, or the nearest key
/// above it that can be found. Follows keys by their indentation; a flow mapping counts as its line.
fn line_of(text: &str, field: &str) -> Option<usize> {
    let mut found = None;
    let (mut from, mut deeper_than) = (0, None);
    for part in field.split('.') {
        let (key, index) = match part.split_once('[') {
            Some((key, index)) => (key, index.trim_end_matches(']').parse::<usize>().ok()),
            None => (part, None),
        };
        let lines = || text.lines().enumerate().skip(from);
        let indent = |line: &str| line.len() - line.trim_start_matches([' ', '-']).len();
        let names_key = |line: &str| {
            let line = line.trim_start_matches([' ', '-', '{']);
            line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with(':'))
        };
        let Some((at, line)) = lines().find(|(_, line)| {
            names_key(line) && deeper_than.map_or(indent(line) == 0, |depth| indent(line) > depth)
        }) else {
            // The key may stand inside a flow mapping on the line found last.
            return found;
        };
        found = Some(at + 1);
        deeper_than = Some(indent(line));
        from = at;
        if let Some(index) = index {
            let item = text
                .lines()
                .enumerate()
                .skip(at + 1)
                .filter(|(_, line)| line.trim_start().starts_with("- "))
                .nth(index);
            if let Some((at, line)) = item {
                found = Some(at + 1);
                deeper_than = Some(line.len() - line.trim_start().len());
                from = at;
            }
        } else {
            from = at + usize::from(!line.contains('{'));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
model: {path: m}
data:
  train:
    - {path: a.jsonl}
    - path: b.jsonl
      weight: -1
  max_seq_len: 0
method: {name: lora, rnk: 3}
train:
  seed: x
";

    #[test]
    fn lines_are_found() {
        for (field, line) in [
            ("data.train[1].weight", 6),
            ("data.train[0].path", 4),
            ("data.max_seq_len", 7),
            ("method.rnk", 8),
            ("train.seed", 10),
            ("train.epochs", 9),
        ] {
            assert_eq!(line_of(TEXT, field), Some(line), "{field}");
        }
        assert_eq!(line_of(TEXT, "output"), None);
    }

    #[test]
    fn changes_reach_any_depth() {
        let mut value = json!({"train": {"seed": 1}, "data": {"train": [{"path": "a"}]}});
        for (change, field) in [
            ("train.learning_rate=1e-4", "train.learning_rate"),
            ("data.train.0.weight=2", "data.train[0].weight"),
            ("method.targets=[q_proj, v_proj]", "method.targets"),
        ] {
            assert_eq!(apply(&mut value, change).unwrap(), field);
        }
        assert_eq!(value["train"]["learning_rate"], json!(1e-4));
        assert_eq!(value["data"]["train"][0]["weight"], json!(2));
        assert_eq!(value["method"]["targets"], json!(["q_proj", "v_proj"]));
        for wrong in ["train", "data.train.7.weight=2", "=3", "train..x=3"] {
            assert!(apply(&mut value, wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_fault_of_a_change_is_said_of_the_change() {
        let mut value = json!({"train": {}});
        let mut origin = Origin::of_file("r.yaml".into(), TEXT.to_owned());
        let changes = ["train.lr=1", "data.train=[{path: x}]"].map(str::to_owned);
        origin.apply(&mut value, &changes).unwrap();
        let place = |field: &str| origin.place(field);
        assert_eq!(place("train.lr"), "--set train.lr=1: ");
        assert_eq!(place("data.train[0].path"), "--set data.train=[{path: x}]: ");
        assert_eq!(place("train.lrx"), "r.yaml:9: ");
        assert_eq!(place("data.max_seq_len"), "r.yaml:7: ");
    }
}

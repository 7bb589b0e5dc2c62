//! `metrics.csv`: the numbers of `metrics.jsonl` as a table.
//!
//! One row for an event; what the event does not say is empty. The columns of a run follow from its data
//! alone, so that every row of a file has the same: those of [`COLUMNS`], then the held-out loss of each
//! domain and of each evaluation set.

use serde_json::Value;
use std::borrow::Cow;

/// The columns that every run has.
pub const COLUMNS: [&str; 23] = [
    "event",
    "step",
    "epoch",
    "elapsed_s",
    "loss",
    "aux_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "label_tokens",
    "tokens_per_s",
    "peak_rss_mb",
    "energy_j",
    "valid_loss",
    "valid_label_tokens",
    "best",
    "gate_entropy",
    "gate_spread",
    "router_movement",
    "head_cosine",
    "head_rank",
    "difference_share",
    "dead_heads",
];

/// Columns that are entries of `heads` under another name.
const OF_HEADS: [(&str, &str); 4] = [
    ("head_cosine", "cosine"),
    ("head_rank", "rank"),
    ("difference_share", "difference_share"),
    ("dead_heads", "dead_heads"),
];

/// The columns of a run's table.
#[derive(Clone, Debug, Default)]
pub struct Columns {
    /// Domains, in the order of their columns.
    pub domains: Vec<String>,
    /// Evaluation sets, likewise.
    pub sets: Vec<String>,
}

impl Columns {
    /// The line with the columns' names.
    pub(super) fn head(&self) -> String {
        let own = COLUMNS.iter().map(|name| Cow::Borrowed(*name));
        let domains = self.domains.iter().map(|name| Cow::Owned(format!("domain_loss:{name}")));
        let sets = self.sets.iter().map(|name| Cow::Owned(format!("set_loss:{name}")));
        line(own.chain(domains).chain(sets))
    }

    /// The line of an event, by its row of `metrics.jsonl`.
    pub(super) fn row(&self, row: &Value) -> String {
        let own = COLUMNS.iter().map(|column| cell(row, column));
        let loss = |list: &str, key: &str, name: &String| {
            let entries = row[list].as_array().into_iter().flatten();
            let mut found = entries.filter(|entry| entry[key] == name.as_str());
            found.next().map_or_else(String::new, |entry| number(&entry["loss"]))
        };
        let domains = self.domains.iter().map(|name| loss("domains", "domain", name));
        let sets = self.sets.iter().map(|name| loss("sets", "set", name));
        line(own.chain(domains).chain(sets).map(Cow::Owned))
    }
}

/// What stands in a column of [`COLUMNS`].
fn cell(row: &Value, column: &str) -> String {
    if column == "event" {
        let evaluated = row.get("valid_loss").is_some();
        return if evaluated { "evaluation" } else { "step" }.to_owned();
    }
    // Those of routers stand in a mapping of their own in the rows of steps.
    let of_routers = |key: &str| match &row[key] {
        Value::Null => &row["routers"][key],
        found => found,
    };
    match OF_HEADS.iter().find(|(name, _)| *name == column) {
        Some((_, key)) => number(&of_routers("heads")[*key]),
        None => number(of_routers(column)),
    }
}

/// A number as it is written; nothing for what is none.
fn number(value: &Value) -> String {
    match value {
        Value::Number(number) => number.to_string(),
        Value::Bool(value) => u8::from(*value).to_string(),
        _ => String::new(),
    }
}

/// The cells with commas between them (RFC 4180), and the line's end.
fn line<'a>(cells: impl Iterator<Item = Cow<'a, str>>) -> String {
    let quoted = |cell: Cow<'a, str>| match cell.contains([',', '"', '\n', '\r']) {
        true => Cow::Owned(format!("\"{}\"", cell.replace('"', "\"\""))),
        false => cell,
    };
    let cells: Vec<Cow<'_, str>> = cells.map(quoted).collect();
    cells.join(",") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cells(line: &str) -> Vec<&str> {
        line.trim_end_matches('\n').split(',').collect()
    }

    #[test]
    fn every_row_has_the_columns_of_the_run() {
        let columns =
            Columns { domains: vec!["law".into(), "code".into()], sets: vec!["law".into()] };
        let head = columns.head();
        let names = cells(&head);
        assert_eq!(names.len(), COLUMNS.len() + 3);
        assert_eq!(names[COLUMNS.len()..], ["domain_loss:law", "domain_loss:code", "set_loss:law"]);
        let step = json!({
            "step": 10, "epoch": 0.5, "loss": 2.25, "learning_rate": 1e-8, "energy_j": null,
            "energy_source": "estimate: 65 W x wall time",
            "routers": {"gate_spread": 0.25, "heads": {"cosine": 0.5, "dead_heads": 2}},
        });
        let evaluation = json!({
            "step": 10, "valid_loss": 2.5, "best": true, "gate_spread": 0.125,
            "domains": [{"domain": "code", "loss": 3.0}], "sets": [{"set": "law", "loss": 2.0}],
            "heads": {"cosine": 0.75},
        });
        for (row, wanted) in [
            (
                step,
                &[
                    ("event", "step"),
                    ("step", "10"),
                    ("epoch", "0.5"),
                    ("loss", "2.25"),
                    ("learning_rate", "1e-8"),
                    ("gate_spread", "0.25"),
                    ("head_cosine", "0.5"),
                    ("dead_heads", "2"),
                ][..],
            ),
            (
                evaluation,
                &[
                    ("event", "evaluation"),
                    ("step", "10"),
                    ("valid_loss", "2.5"),
                    ("best", "1"),
                    ("gate_spread", "0.125"),
                    ("head_cosine", "0.75"),
                    ("domain_loss:code", "3.0"),
                    ("set_loss:law", "2.0"),
                ],
            ),
        ] {
            let line = columns.row(&row);
            let found = cells(&line);
            assert_eq!(found.len(), names.len());
            let found = names.iter().copied().zip(found).filter(|(_, cell)| !cell.is_empty());
            assert_eq!(found.collect::<Vec<_>>(), wanted);
        }
    }

    #[test]
    fn names_with_commas_are_one_cell() {
        let columns = Columns { domains: vec!["a, \"b\"".into()], sets: Vec::new() };
        assert!(columns.head().ends_with(",\"domain_loss:a, \"\"b\"\"\"\n"), "{}", columns.head());
    }
}

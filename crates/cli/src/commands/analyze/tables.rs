//! The report as tables, for the page and as CSV.

use super::report::{Compared, Report};
use hydralora_peft::analysis::Likeness;

/// A table of texts. All columns but the first `named` hold numbers.
pub(super) struct Table {
    pub(super) header: Vec<String>,
    pub(super) named: usize,
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(named: usize, header: &[&str]) -> Self {
        let header = header.iter().map(|&name| name.to_owned()).collect();
        Self { header, named, rows: Vec::new() }
    }

    pub(super) fn csv(&self) -> anyhow::Result<Vec<u8>> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(&self.header)?;
        for row in &self.rows {
            writer.write_record(row)?;
        }
        Ok(writer.into_inner().map_err(|error| error.into_error())?)
    }
}

/// A number with the digits that mean something; empty where there is none.
pub(super) fn number(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(0.0) => "0".to_owned(),
        Some(value) if value.abs() >= 1e-3 && value.abs() < 1e5 => {
            let digits = if value.abs() >= 100.0 { 1 } else { 3 };
            format!("{value:.digits$}")
        }
        Some(value) => format!("{value:.1e}"),
    }
}

/// A number with all its digits.
fn exact(value: Option<f64>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

const MEASURES: [&str; 5] = ["cosine", "cka", "angle_cosine", "largest_angle", "chance"];

fn measures(likeness: &Likeness) -> [Option<f64>; 5] {
    let Likeness { cosine, cka, angle_cosine, largest_angle, chance } = *likeness;
    [cosine, cka, angle_cosine, largest_angle, chance]
}

/// The tables of all numbers, with the names of their files.
pub(super) fn files(report: &Report) -> Vec<(&'static str, Table)> {
    vec![
        ("pairs", pairs(report)),
        ("layers", layers(report)),
        ("gates", gates(report)),
        ("map", map(report)),
    ]
}

fn pairs(report: &Report) -> Table {
    let mut table = Table::new(6, &["first", "second", "site", "layer", "projection", "part"]);
    table.header.extend(MEASURES.map(str::to_owned));
    for pair in &report.pairs {
        for site in &pair.sites {
            for (part, likeness) in site.compared.parts() {
                let mut row = [&pair.first, &pair.second, &site.site].map(Clone::clone).to_vec();
                row.extend([site.layer.to_string(), site.projection.clone(), part.to_owned()]);
                row.extend(measures(&likeness).map(exact));
                table.rows.push(row);
            }
        }
    }
    table
}

fn layers(report: &Report) -> Table {
    let header = [
        "adapter",
        "site",
        "layer",
        "projection",
        "effective_rank",
        "update_norm",
        "difference_share",
        "head_cosine",
        "head_cka",
        "head_angle_cosine",
        "head_update_cosine",
        "gate_entropy",
        "gate_distance",
        "a_change",
        "singular_values",
    ];
    let mut table = Table::new(4, &header);
    for adapter in &report.adapters {
        for site in &adapter.sites {
            let (update, heads) = (site.update.as_ref(), site.heads.as_ref());
            let gates = site.gates.as_ref();
            let mut row = vec![
                adapter.name.clone(),
                site.site.clone(),
                site.layer.to_string(),
                site.projection.clone(),
            ];
            let numbers = [
                update.and_then(|update| update.effective_rank),
                update.map(|update| update.norm),
                heads.and_then(|heads| heads.difference_share),
                heads.and_then(|heads| heads.b.cosine),
                heads.and_then(|heads| heads.b.cka),
                heads.and_then(|heads| heads.b.angle_cosine),
                heads.and_then(|heads| heads.update_cosine),
                gates.and_then(|gates| gates.entropy),
                gates.and_then(|gates| gates.distance),
                site.a_change,
            ];
            row.extend(numbers.map(exact));
            let values = update.map(|update| &update.singular_values);
            let values = values.into_iter().flatten().map(f64::to_string);
            row.push(values.collect::<Vec<_>>().join(" "));
            table.rows.push(row);
        }
    }
    table
}

fn gates(report: &Report) -> Table {
    let mut table =
        Table::new(6, &["adapter", "site", "layer", "projection", "first", "second", "distance"]);
    for adapter in &report.adapters {
        for site in &adapter.sites {
            for found in site.gates.iter().flat_map(|gates| &gates.distances) {
                table.rows.push(vec![
                    adapter.name.clone(),
                    site.site.clone(),
                    site.layer.to_string(),
                    site.projection.clone(),
                    found.first.clone(),
                    found.second.clone(),
                    found.distance.to_string(),
                ]);
            }
        }
    }
    table
}

fn map(report: &Report) -> Table {
    let mut table = Table::new(4, &["adapter", "site", "part", "number", "x", "y"]);
    for point in &report.map {
        table.rows.push(vec![
            report.adapters[point.adapter].name.clone(),
            point.site.clone(),
            point.part.to_owned(),
            point.number.to_string(),
            point.x.to_string(),
            point.y.to_string(),
        ]);
    }
    table
}

/// A row for each of A, B and the change of A.
fn compared(table: &mut Table, names: &[String], compared: &Compared) {
    for (part, likeness) in compared.parts() {
        let mut row = names.to_vec();
        row.push(part.to_owned());
        let [cosine, cka, angle_cosine, largest_angle, chance] = measures(&likeness);
        row.extend([cosine, cka, angle_cosine, chance].map(number));
        row.push(largest_angle.map_or_else(String::new, |angle| format!("{angle:.1}°")));
        table.rows.push(row);
    }
}

const SHOWN: [&str; 6] = ["", "cosine", "CKA", "cos of angles", "by chance", "largest angle"];

/// Means of every pair, for people.
pub(super) fn pairs_shown(report: &Report) -> Table {
    let mut table = Table::new(4, &["adapters", "A began", "layers"]);
    table.header.extend(SHOWN.map(str::to_owned));
    for pair in &report.pairs {
        let names = [
            format!("{} – {}", pair.first, pair.second),
            began(pair.began_equal).to_owned(),
            pair.layers.to_string(),
        ];
        compared(&mut table, &names, &pair.overall);
    }
    table
}

/// How two `A` began, in a word.
pub(super) fn began(equal: Option<bool>) -> &'static str {
    match equal {
        Some(true) => "equal",
        Some(false) => "apart",
        None => "not known",
    }
}

/// Means of groups of pairs, for people.
pub(super) fn groups_shown(report: &Report) -> Table {
    let mut table = Table::new(3, &["A began", "pairs"]);
    table.header.extend(SHOWN.map(str::to_owned));
    for group in &report.groups {
        let names = [began(group.began_equal).to_owned(), group.pairs.to_string()];
        compared(&mut table, &names, &group.mean);
    }
    table
}

/// Means of every projection over all pairs, for people.
pub(super) fn projections_shown(report: &Report) -> Table {
    let mut table = Table::new(2, &["projection"]);
    table.header.extend(SHOWN.map(str::to_owned));
    let names: std::collections::BTreeSet<&String> =
        report.pairs.iter().flat_map(|pair| pair.by_projection.keys()).collect();
    for name in names {
        let all = report.pairs.iter().filter_map(|pair| pair.by_projection.get(name));
        compared(&mut table, std::slice::from_ref(name), &Compared::mean(all));
    }
    table
}

/// What each adapter consists of, by projection, for people.
pub(super) fn adapters_shown(report: &Report) -> Table {
    let header = ["adapter", "projection", "effective rank", "norm of the update", "change of A"];
    let mut table = Table::new(2, &header);
    for adapter in &report.adapters {
        let all = [("all".to_owned(), &adapter.overall)];
        let each = adapter.by_projection.iter().map(|(name, summary)| (name.clone(), summary));
        for (projection, summary) in all.into_iter().chain(each) {
            let numbers = [summary.effective_rank, summary.update_norm, summary.a_change];
            let mut row = vec![adapter.name.clone(), projection];
            row.extend(numbers.map(number));
            table.rows.push(row);
        }
    }
    table
}

/// What the heads of each adapter do together and apart, for people.
pub(super) fn heads_shown(report: &Report) -> Table {
    let header = [
        "adapter",
        "projection",
        "share of differences",
        "cosine of updates",
        "cosine of B",
        "CKA of B",
        "cos of angles of B",
    ];
    let mut table = Table::new(2, &header);
    for adapter in report.adapters.iter().filter(|adapter| adapter.num_b > 1) {
        let all = [("all".to_owned(), &adapter.overall)];
        let each = adapter.by_projection.iter().map(|(name, summary)| (name.clone(), summary));
        for (projection, summary) in all.into_iter().chain(each) {
            let mut row = vec![adapter.name.clone(), projection];
            let numbers = [
                summary.difference_share,
                summary.head_update_cosine,
                summary.head_cosine,
                summary.head_cka,
                summary.head_angle_cosine,
            ];
            row.extend(numbers.map(number));
            table.rows.push(row);
        }
    }
    table
}

/// What the routers of each adapter do, for people.
pub(super) fn gates_shown(report: &Report) -> Table {
    let mut table = Table::new(3, &["adapter", "projection", "domains", "entropy", "distance"]);
    for adapter in &report.adapters {
        let of_projections = adapter.by_projection.iter();
        for (projection, summary) in of_projections {
            if summary.gate_entropy.is_some() || summary.gate_distance.is_some() {
                table.rows.push(vec![
                    adapter.name.clone(),
                    projection.clone(),
                    "all".to_owned(),
                    number(summary.gate_entropy),
                    number(summary.gate_distance),
                ]);
            }
        }
        let mut domains: std::collections::BTreeMap<(&str, &str), Vec<Option<f64>>> =
            std::collections::BTreeMap::new();
        for gates in adapter.sites.iter().filter_map(|site| site.gates.as_ref()) {
            for found in &gates.distances {
                let pair = (found.first.as_str(), found.second.as_str());
                domains.entry(pair).or_default().push(Some(found.distance));
            }
        }
        for ((first, second), distances) in domains {
            table.rows.push(vec![
                adapter.name.clone(),
                "all".to_owned(),
                format!("{first} – {second}"),
                String::new(),
                number(super::report::mean(distances)),
            ]);
        }
    }
    table
}

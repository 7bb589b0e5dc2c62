//! The pictures of a study, each with the table it is drawn from.

use super::analysis::{Analysis, Comparison};
use super::chart::{Axis, Bar, Drawing, Mark, Matrix, Series, forest, matrix, number, plane};
use super::weights::Weights;
use super::words::{name_in, p_value};
use crate::result::{CellResult, EvaluationPoint};
use crate::stats::summarise;
use std::collections::{BTreeMap, BTreeSet};

/// Pictures of gates that a report shows at most.
const MOST_GATES: usize = 8;
/// Slices that get pictures of their own at most.
const MOST_SLICES: usize = 12;

/// A table of texts.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Table {
    pub(crate) header: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self { header: header.iter().map(|&name| name.to_owned()).collect(), rows: Vec::new() }
    }

    /// The numbers of a matrix, with `corner` above the names of its rows.
    pub(crate) fn of_matrix(
        corner: &str,
        rows: &[String],
        columns: &[String],
        values: &[Vec<Option<f64>>],
    ) -> Self {
        let mut table = Self::new(&[corner]);
        table.header.extend(columns.iter().cloned());
        for (row, values) in rows.iter().zip(values) {
            let mut cells = vec![row.clone()];
            cells.extend(values.iter().map(|value| value.map_or(String::new(), number)));
            table.rows.push(cells);
        }
        table
    }
}

/// A picture with its table.
pub(crate) struct Figure {
    /// Name of its files.
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) caption: String,
    pub(crate) drawing: Drawing,
    pub(crate) table: Table,
}

/// Every picture that the results allow.
pub(crate) fn figures(analysis: &Analysis) -> Vec<Figure> {
    let mut found = Vec::new();
    let slices = analysis.slices.len().min(MOST_SLICES);
    for slice in 0..slices {
        found.extend(tuning(analysis, slice));
    }
    for metric in analysis.metrics.iter().take(3) {
        found.extend(along_axis(analysis, metric));
        found.extend(against(analysis, metric, "parameters", "parameters"));
        found.extend(against(analysis, metric, "wall_s", "time"));
        found.extend(differences(analysis, metric));
    }
    found.extend(domains(analysis));
    found.extend(gates(analysis));
    found.extend(analysis.weights.iter().flat_map(Weights::figures));
    for slice in 0..slices {
        let entropy: Pick = |point| point.gate_entropy;
        let movement: Pick = |point| point.router_movement;
        let what = "entropy of the gates over that of equal gates";
        found.extend(by_step(analysis, slice, "entropy", what, entropy));
        let what = "distance of the routers' weights from their start over its norm";
        found.extend(by_step(analysis, slice, "movement", what, movement));
    }
    found
}

fn of_slice(analysis: &Analysis, slice: usize) -> String {
    match analysis.slice_name(slice) {
        name if name.is_empty() => String::new(),
        name => format!(" on {name}"),
    }
}

/// A part of a file's name.
fn file_part(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let text: String = text.chars().map(plain).collect();
    text.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

fn named(parts: &[&str]) -> String {
    parts
        .iter()
        .map(|part| file_part(part))
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("-")
}

fn interval_text(interval: Option<[f64; 2]>) -> String {
    interval.map_or(String::new(), |[low, high]| format!("{} to {}", number(low), number(high)))
}

/// Validation loss against the tuned value, a curve a label: the U.
fn tuning(analysis: &Analysis, slice: usize) -> Option<Figure> {
    let plan = &analysis.plan;
    let tune = plan.tune.as_ref()?;
    let mut table =
        Table::new(&[&plan.compare, tune, "mean", "95 % interval", "seeds", "failed", "chosen"]);
    let mut series = Vec::new();
    let mut ticks = BTreeSet::new();
    for label in &analysis.labels {
        let Some(choice) = analysis.choice(label, slice) else { continue };
        let mut marks = Vec::new();
        for (at, tried) in choice.tried.iter().enumerate() {
            let values: Vec<f64> = tried
                .cells
                .iter()
                .filter_map(|cell| {
                    analysis.results.get(&plan.cells[*cell].id)?.metric(&plan.select)
                })
                .collect();
            let summary = summarise(&values);
            let chosen = choice.best == Some(at) && summary.is_some();
            table.rows.push(vec![
                label.clone(),
                tried.value.clone(),
                summary.map_or(String::new(), |s| number(s.mean)),
                interval_text(summary.and_then(|s| s.interval)),
                tried.done.to_string(),
                tried.failed.to_string(),
                if chosen { "yes" } else { "" }.to_owned(),
            ]);
            let (Some(summary), Ok(x)) = (summary, tried.value.parse::<f64>()) else { continue };
            ticks.insert(tried.value.clone());
            marks.push(Mark {
                x,
                y: summary.mean,
                interval: summary.interval,
                tip: format!(
                    "{label}, {tune} {}: {} {} ({} seeds){}",
                    tried.value,
                    number(summary.mean),
                    interval_text(summary.interval),
                    tried.done,
                    if chosen { ", chosen" } else { "" }
                ),
            });
        }
        if !marks.is_empty() {
            series.push(Series { name: label.clone(), marks, joined: true });
        }
    }
    let mut ticks: Vec<f64> = ticks.iter().filter_map(|tick| tick.parse().ok()).collect();
    ticks.sort_by(f64::total_cmp);
    let spread = ticks.last().zip(ticks.first()).is_some_and(|(last, first)| last / first > 5.0);
    let x = Axis { title: tune, logarithmic: spread, ticks };
    let name = name_in(analysis, &plan.select);
    let drawing =
        plane(&series, &x, &Axis { title: &name, logarithmic: false, ticks: Vec::new() })?;
    let place = of_slice(analysis, slice);
    Some(Figure {
        name: named(&["tuning", &analysis.slice_name(slice)]),
        title: format!("{name} by {tune}{place}"),
        caption:
            "Means over seeds with 95 % intervals; each curve's lowest point is what is chosen and \
                  scored. What lies far above the others is drawn at the upper edge."
                .to_owned(),
        drawing,
        table,
    })
}

/// A metric of the chosen cells against another, one point a label and slice.
fn against(analysis: &Analysis, metric: &str, other: &str, short: &str) -> Option<Figure> {
    let name = name_in(analysis, metric);
    let other_name = name_in(analysis, other);
    let mut table =
        Table::new(&[&analysis.plan.compare, "part", &other_name, &name, "95 % interval", "seeds"]);
    let mut series = Vec::new();
    for label in &analysis.labels {
        let mut marks = Vec::new();
        for slice in 0..analysis.slices.len() {
            let (Some(y), Some(x)) =
                (analysis.summary(label, slice, metric), analysis.summary(label, slice, other))
            else {
                continue;
            };
            let part = analysis.slice_name(slice);
            table.rows.push(vec![
                label.clone(),
                part.clone(),
                number(x.mean),
                number(y.mean),
                interval_text(y.interval),
                y.n.to_string(),
            ]);
            let place = if part.is_empty() { String::new() } else { format!(" on {part}") };
            marks.push(Mark {
                x: x.mean,
                y: y.mean,
                interval: y.interval,
                tip: format!(
                    "{label}{place}: {name} {}, {other_name} {}",
                    number(y.mean),
                    number(x.mean)
                ),
            });
        }
        if !marks.is_empty() {
            series.push(Series { name: label.clone(), marks, joined: false });
        }
    }
    let xs = || series.iter().flat_map(|series| &series.marks).map(|mark| mark.x);
    let (low, high) = (xs().fold(f64::INFINITY, f64::min), xs().fold(0.0, f64::max));
    let logarithmic = low > 0.0 && high / low > 20.0;
    let x = Axis { title: &other_name, logarithmic, ticks: Vec::new() };
    let drawing =
        plane(&series, &x, &Axis { title: &name, logarithmic: false, ticks: Vec::new() })?;
    Some(Figure {
        name: named(&[metric, "by", short]),
        title: format!("{name} against {other_name}"),
        caption:
            "Each label at its own best value, with 95 % intervals over seeds; one mark a part."
                .to_owned(),
        drawing,
        table,
    })
}

/// A metric along the compared axis, where its labels are numbers.
fn along_axis(analysis: &Analysis, metric: &str) -> Option<Figure> {
    let numbers: Vec<(f64, &String)> =
        analysis.labels.iter().filter_map(|label| Some((label.parse().ok()?, label))).collect();
    // Labels that are no numbers (`auto`) stand in the tables.
    if numbers.len() < 3 || 2 * numbers.len() <= analysis.labels.len() {
        return None;
    }
    let (name, compare) = (name_in(analysis, metric), &analysis.plan.compare);
    let mut table = Table::new(&["part", compare, &name, "95 % interval", "seeds"]);
    let mut series = Vec::new();
    for slice in 0..analysis.slices.len().min(MOST_SLICES) {
        let part = analysis.slice_name(slice);
        let mut marks = Vec::new();
        for (x, label) in &numbers {
            let Some(y) = analysis.summary(label, slice, metric) else { continue };
            let (mean, interval) = (number(y.mean), interval_text(y.interval));
            table.rows.push(vec![
                part.clone(),
                (*label).clone(),
                mean.clone(),
                interval.clone(),
                y.n.to_string(),
            ]);
            let tip = format!("{compare} {label} {part}: {mean} {interval} ({} seeds)", y.n);
            marks.push(Mark { x: *x, y: y.mean, interval: y.interval, tip });
        }
        let name = if part.is_empty() { name.clone() } else { part };
        series.push(Series { name, marks, joined: true });
    }
    let ticks = numbers.iter().map(|(x, _)| *x).collect();
    let x = Axis { title: compare, logarithmic: false, ticks };
    let drawing =
        plane(&series, &x, &Axis { title: &name, logarithmic: false, ticks: Vec::new() })?;
    Some(Figure {
        name: named(&[metric, "by", compare]),
        title: format!("{name} by {compare}"),
        caption: "Means over seeds with 95 % intervals.".to_owned(),
        drawing,
        table,
    })
}

/// The columns of comparisons.
pub(crate) fn comparison_table(analysis: &Analysis, metric: &str) -> Table {
    let mut table = Table::new(&[
        "compared",
        "part",
        "difference",
        "95 % interval",
        "seeds",
        "p (t)",
        "p corrected",
        "p (Wilcoxon)",
        "d_z",
        "power",
        "seeds needed",
    ]);
    for comparison in analysis.comparisons.iter().filter(|c| c.metric == metric) {
        let paired = &comparison.paired;
        let p = |p: Option<f64>| p.map_or("–".to_owned(), p_value);
        table.rows.push(vec![
            comparison.label.clone(),
            comparison.slice.map_or("all".to_owned(), |slice| analysis.slice_name(slice)),
            number(paired.difference.mean),
            interval_text(paired.difference.interval),
            comparison.pairs.len().to_string(),
            p(paired.t_p),
            p(comparison.corrected_p),
            p(paired.wilcoxon_p),
            paired.effect.map_or("–".to_owned(), |effect| format!("{effect:.2}")),
            paired.power.map_or("–".to_owned(), |power| format!("{power:.2}")),
            paired.pairs_needed.map_or("–".to_owned(), |needed| needed.to_string()),
        ]);
    }
    table
}

/// Paired differences with the reference.
fn differences(analysis: &Analysis, metric: &str) -> Option<Figure> {
    let reference = analysis.plan.reference.as_ref()?;
    let name = name_in(analysis, metric);
    let bar = |comparison: &Comparison| {
        let part = match comparison.slice {
            None => "all".to_owned(),
            Some(slice) => analysis.slice_name(slice),
        };
        let label = &comparison.label;
        Bar {
            name: if part.is_empty() { label.clone() } else { format!("{label}, {part}") },
            mean: comparison.paired.difference.mean,
            interval: comparison.paired.difference.interval,
            found: comparison.found(),
            tip: super::words::sentence(analysis, comparison),
        }
    };
    let all = analysis.comparisons.iter().filter(|c| c.metric == metric);
    let bars: Vec<Bar> = all.map(bar).collect();
    let direction =
        if analysis.higher_is_better(metric) { "right is better" } else { "left is better" };
    let drawing = forest(&bars, &format!("{name} minus that of {reference} ({direction})"))?;
    Some(Figure {
        name: named(&["differences", metric]),
        title: format!("{name}: differences from {reference}"),
        caption:
            "Paired by seed, each at its own best value, with 95 % intervals. Orange squares are \
                  differences that hold after Holm's correction."
                .to_owned(),
        drawing,
        table: comparison_table(analysis, metric),
    })
}

/// Loss by label and domain.
fn domains(analysis: &Analysis) -> Option<Figure> {
    // The test split's where it is scored, the validation split's until then.
    let mut keys = domain_keys(analysis, "loss");
    let mut what = "test loss";
    if keys.is_empty() {
        keys = domain_keys(analysis, "valid_loss");
        what = "validation loss";
    }
    if keys.len() < 2 {
        return None;
    }
    let columns: Vec<String> = keys
        .iter()
        .map(|key| key.split_once('/').map_or("", |(_, domain)| domain).to_owned())
        .collect();
    let mut rows = Vec::new();
    let mut values: Vec<Vec<Option<f64>>> = Vec::new();
    for label in &analysis.labels {
        for slice in 0..analysis.slices.len() {
            let found: Vec<Option<f64>> = keys
                .iter()
                .map(|key| analysis.summary(label, slice, key).map(|summary| summary.mean))
                .collect();
            if found.iter().any(Option::is_some) {
                let part = analysis.slice_name(slice);
                rows.push(if part.is_empty() { label.clone() } else { format!("{label}, {part}") });
                values.push(found);
            }
        }
    }
    let table = Table::of_matrix("", &rows, &columns, &values);
    let drawing = matrix(&Matrix {
        rows: &rows,
        columns: &columns,
        values: &values,
        by_column: true,
        less_is_more: true,
        row_title: &analysis.plan.compare,
        column_title: "domain",
    })?;
    Some(Figure {
        name: "domains".to_owned(),
        title: format!("{what} by domain"),
        caption:
            "Means over seeds, each label at its own best value. Within a column, darker is lower, \
                  which is better."
                .to_owned(),
        drawing,
        table,
    })
}

fn domain_keys(analysis: &Analysis, head: &str) -> Vec<String> {
    let mut keys = BTreeSet::new();
    for result in analysis.results.values() {
        if head == "loss" {
            keys.extend(result.test_metrics().into_keys().filter(|key| key.starts_with("loss/")));
        } else if let Some(valid) = result.trained.as_ref().and_then(|t| t.valid.as_ref()) {
            keys.extend(valid.domains.keys().map(|domain| format!("{head}/{domain}")));
        }
    }
    keys.into_iter().collect()
}

/// Gates by layer, domain and expert, the mean over the chosen cells' seeds.
fn gates(analysis: &Analysis) -> Vec<Figure> {
    let mut found = Vec::new();
    for label in &analysis.labels {
        for slice in 0..analysis.slices.len() {
            if found.len() == MOST_GATES {
                return found;
            }
            found.extend(gates_of(analysis, label, slice));
        }
    }
    found
}

fn gates_of(analysis: &Analysis, label: &str, slice: usize) -> Option<Figure> {
    let chosen = analysis.chosen(label, slice);
    let of = |result: &CellResult| result.trained.as_ref().and_then(|t| t.gates.clone());
    let all: Vec<_> = chosen.iter().filter_map(|(_, result)| of(result)).collect();
    let first = all.first()?;
    let shape = |gates: &crate::result::Gates| {
        let domain = gates.layers.first().and_then(|layer| layer.first());
        (gates.layers.len(), gates.domains.len(), domain.map_or(0, Vec::len))
    };
    let (layers, domain_count, experts) = shape(first);
    let alike: Vec<&crate::result::Gates> =
        all.iter().filter(|gates| shape(gates) == shape(first)).collect();
    let mut columns = Vec::new();
    for domain in &first.domains {
        columns.extend((0..experts).map(|expert| format!("{domain} {}", expert + 1)));
    }
    let rows: Vec<String> = (0..layers).map(|layer| layer.to_string()).collect();
    let mut values = vec![Vec::new(); layers];
    for (layer, row) in values.iter_mut().enumerate() {
        for domain in 0..domain_count {
            for expert in 0..experts {
                let gate = |gates: &&crate::result::Gates| {
                    gates.layers.get(layer)?.get(domain)?.get(expert).copied()
                };
                row.push(crate::stats::mean(&alike.iter().filter_map(gate).collect::<Vec<_>>()));
            }
        }
    }
    let table = Table::of_matrix("layer", &rows, &columns, &values);
    let drawing = matrix(&Matrix {
        rows: &rows,
        columns: &columns,
        values: &values,
        by_column: false,
        less_is_more: false,
        row_title: "layer",
        column_title: "domain and expert",
    })?;
    let place = of_slice(analysis, slice);
    Some(Figure {
        name: named(&["gates", label, &analysis.slice_name(slice)]),
        title: format!("Gates of {label}{place}"),
        caption: format!(
            "Mean gate of each expert by decoder layer and domain, over the layer's routed projections and {} \
             seeds; equal gates would be {}. Experts of different runs have no common order, so a mean over seeds \
             flattens what single runs show.",
            alike.len(),
            number(1.0 / experts.max(1) as f64)
        ),
        drawing,
        table,
    })
}

type Pick = fn(&EvaluationPoint) -> Option<f64>;

/// What routers do while they are trained.
fn by_step(
    analysis: &Analysis,
    slice: usize,
    short: &str,
    what: &str,
    pick: Pick,
) -> Option<Figure> {
    let mut table = Table::new(&[&analysis.plan.compare, "step", what, "seeds"]);
    let mut series = Vec::new();
    for label in &analysis.labels {
        let mut by_step: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for (_, result) in analysis.chosen(label, slice) {
            for point in result.trained.iter().flat_map(|trained| &trained.evaluations) {
                by_step.entry(point.step).or_default().extend(pick(point));
            }
        }
        let mut marks = Vec::new();
        for (step, values) in by_step {
            let Some(summary) = summarise(&values) else { continue };
            let mean = number(summary.mean);
            table.rows.push(vec![
                label.clone(),
                step.to_string(),
                mean.clone(),
                values.len().to_string(),
            ]);
            let tip = format!("{label}, step {step}: {mean}");
            marks.push(Mark { x: step as f64, y: summary.mean, interval: summary.interval, tip });
        }
        if !marks.is_empty() {
            series.push(Series { name: label.clone(), marks, joined: true });
        }
    }
    let x = Axis { title: "step", logarithmic: false, ticks: Vec::new() };
    let y = Axis { title: short, logarithmic: false, ticks: Vec::new() };
    let drawing = plane(&series, &x, &y)?;
    let place = of_slice(analysis, slice);
    Some(Figure {
        name: named(&["router", short, &analysis.slice_name(slice)]),
        title: format!("Routers: {short} by step{place}"),
        caption: format!("The {what}, mean over seeds of the chosen cells, with 95 % intervals."),
        drawing,
        table,
    })
}

/// The main table: every label with its metrics, and the paper's numbers in columns of their own.
pub(crate) fn main_table(analysis: &Analysis) -> Table {
    let plan = &analysis.plan;
    let mut table = Table::new(&[&plan.compare]);
    let parts = analysis.slices.len() > 1;
    if parts {
        table.header.push("part".to_owned());
    }
    if let Some(tune) = &plan.tune {
        table.header.push(format!("best {tune}"));
    }
    table.header.push("parameters".to_owned());
    table.header.push("seeds".to_owned());
    table.header.extend(analysis.metrics.iter().map(|metric| name_in(analysis, metric)));
    for label in &analysis.labels {
        for slice in 0..analysis.slices.len() {
            let Some(choice) = analysis.choice(label, slice) else { continue };
            let mut row = vec![label.clone()];
            if parts {
                row.push(analysis.slice_name(slice));
            }
            if plan.tune.is_some() {
                let mark = if choice.complete { "" } else { " (so far)" };
                row.push(choice.chosen().map_or(String::new(), |t| format!("{}{mark}", t.value)));
            }
            let parameters = analysis.summary(label, slice, "parameters").map(|s| s.mean as u64);
            row.push(parameters.map_or("–".to_owned(), thousands));
            row.push(analysis.chosen(label, slice).len().to_string());
            for metric in &analysis.metrics {
                row.push(match analysis.summary(label, slice, metric) {
                    Some(summary) => match summary.interval {
                        Some([low, high]) => {
                            format!("{:.4} ± {:.4}", summary.mean, (high - low) / 2.0)
                        }
                        None => format!("{:.4}", summary.mean),
                    },
                    None => "–".to_owned(),
                });
            }
            table.rows.push(row);
        }
    }
    table
}

/// The paper's rows, in the order of the labels; rows of labels that are none of ours come last.
pub(crate) fn paper_table(analysis: &Analysis) -> Option<Table> {
    let paper = analysis.plan.paper.as_ref()?;
    let mut columns: Vec<&String> = Vec::new();
    for row in paper.rows.values() {
        columns.extend(row.keys().filter(|key| !columns.contains(key)).collect::<Vec<_>>());
    }
    let mut table = Table::new(&[&analysis.plan.compare]);
    table.header.extend(columns.iter().map(|&column| column.clone()));
    let known = analysis.labels.iter().filter(|label| paper.rows.contains_key(*label));
    let others = paper.rows.keys().filter(|label| !analysis.labels.contains(label));
    for label in known.chain(others) {
        let mut row = vec![label.clone()];
        row.extend(columns.iter().map(|&column| match paper.rows[label].get(column) {
            Some(value) => crate::grid::label_of(value),
            None => "–".to_owned(),
        }));
        table.rows.push(row);
    }
    Some(table)
}

/// Whole thousands apart.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

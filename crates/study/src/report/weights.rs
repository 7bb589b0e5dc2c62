//! How alike the adapters of a study are, as `hydralora analyze --study` leaves it, and what each consists
//! of.

use super::analysis::Analysis;
use super::chart::{Axis, Mark, Matrix, Series, matrix, number, plane};
use super::figures::{Figure, Table};
use crate::disk::read_json;
use crate::error::{Error, Result};
use crate::result::ANALYSIS;
use crate::stats::mean;
use crate::store::Store;
use serde::Deserialize;

/// Where the comparison lies in a study's folder.
pub const FILE: &str = "report/analysis.json";
/// Version of that file.
const FORMAT: u32 = 1;
/// Rows and columns of a picture of pairs.
const MOST_ADAPTERS: usize = 24;

/// The measures of single adapters, with their names for people.
const MEASURES: [(&str, &str); 8] = [
    ("effective_rank", "effective rank"),
    ("update_norm", "norm of the update"),
    ("a_change", "change of A"),
    ("difference_share", "share of differences"),
    ("head_update_cosine", "cosine of heads' updates"),
    ("head_angle_cosine", "cos of angles of heads' B"),
    ("gate_entropy", "entropy of gates"),
    ("gate_distance", "distance of domains' gates"),
];

/// The comparison of a study's adapters.
#[derive(Clone, Debug, Deserialize)]
pub struct Weights {
    format: u32,
    axis: String,
    adapters: Vec<Adapter>,
    pairs: Vec<Pair>,
    groups: Vec<Group>,
    notes: Vec<String>,
    map: Vec<Point>,
}

#[derive(Clone, Debug, Deserialize)]
struct Adapter {
    name: String,
    #[serde(default)]
    label: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Pair {
    first: String,
    second: String,
    a: Likeness,
    b: Likeness,
    a_change: Option<Likeness>,
}

#[derive(Clone, Debug, Deserialize)]
struct Group {
    began_equal: Option<bool>,
    same_label: Option<bool>,
    pairs: usize,
    a: Likeness,
    b: Likeness,
    a_change: Option<Likeness>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Likeness {
    cosine: Option<f64>,
    cka: Option<f64>,
    angle_cosine: Option<f64>,
    chance: Option<f64>,
}

#[derive(Clone, Debug, Deserialize)]
struct Point {
    adapter: usize,
    part: String,
    site: String,
    x: f64,
    y: f64,
}

impl Weights {
    /// Reads the comparison of a study; none if there is none.
    ///
    /// # Errors
    /// If the file is damaged or of another version.
    pub fn read(store: &Store) -> Result<Option<Self>> {
        let path = store.root().join(FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let found: Self = read_json(&path)?;
        if found.format != FORMAT {
            let message = format!("is of format {}; expected {FORMAT}", found.format);
            return Err(Error::file(&path, message));
        }
        let known = |point: &Point| point.adapter < found.adapters.len();
        if !found.map.iter().all(known) {
            return Err(Error::file(&path, "map: a point is of no adapter in the file".to_owned()));
        }
        Ok(Some(found))
    }

    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Means over the pairs that are alike in how A began and in their labels.
    pub(crate) fn groups(&self) -> Table {
        let header =
            ["A began", &self.axis, "pairs", "", "cosine", "CKA", "cos of angles", "by chance"];
        let mut table = Table::new(&header);
        for group in &self.groups {
            let began = match group.began_equal {
                Some(true) => "equal",
                Some(false) => "apart",
                None => "not known",
            };
            let label = match group.same_label {
                Some(true) => "the same",
                Some(false) => "another",
                None => "",
            };
            let parts =
                [("A", Some(group.a)), ("B", Some(group.b)), ("change of A", group.a_change)];
            for (part, likeness) in parts {
                let Some(Likeness { cosine, cka, angle_cosine, chance }) = likeness else {
                    continue;
                };
                let mut row = [began, label].map(str::to_owned).to_vec();
                row.extend([group.pairs.to_string(), part.to_owned()]);
                let shown = |value: Option<f64>| value.map_or(String::new(), number);
                row.extend([cosine, cka, angle_cosine, chance].map(shown));
                table.rows.push(row);
            }
        }
        table
    }

    /// The matrices of A and B, and their map.
    pub(crate) fn figures(&self) -> Vec<Figure> {
        let parts: [(&str, &str, Pick); 3] = [
            ("weights-a", "Likeness of A", |pair| Some(pair.a)),
            ("weights-b", "Likeness of B", |pair| Some(pair.b)),
            ("weights-change-of-a", "Likeness of the change of A", |pair| pair.a_change),
        ];
        let matrices =
            parts.into_iter().filter_map(|(name, title, pick)| self.matrix(name, title, pick));
        let maps = ["A", "B"].into_iter().filter_map(|part| self.map(part));
        matrices.chain(maps).collect()
    }

    fn matrix(&self, name: &str, title: &str, pick: Pick) -> Option<Figure> {
        let names: Vec<String> =
            self.adapters.iter().take(MOST_ADAPTERS).map(|adapter| adapter.name.clone()).collect();
        let value = |first: &String, second: &String| {
            let of = |pair: &&Pair| {
                (&pair.first, &pair.second) == (first, second)
                    || (&pair.first, &pair.second) == (second, first)
            };
            pick(self.pairs.iter().find(of)?)?.angle_cosine
        };
        let values: Vec<Vec<Option<f64>>> = names
            .iter()
            .map(|first| names.iter().map(|second| value(first, second)).collect())
            .collect();
        let drawing = matrix(&Matrix {
            rows: &names,
            columns: &names,
            values: &values,
            by_column: false,
            less_is_more: false,
            row_title: "",
            column_title: "",
        })?;
        Some(Figure {
            name: name.to_owned(),
            title: title.to_owned(),
            caption: "Mean cosine of the principal angles between the spaces of two adapters' matrices, on the \
                      mean over layers: 1 for the same space."
                .to_owned(),
            table: Table::of_matrix("", &names, &names, &values),
            drawing,
        })
    }

    /// The A or the B as points in the colours of their labels.
    fn map(&self, part: &str) -> Option<Figure> {
        let label = |adapter: &Adapter| adapter.label.clone().unwrap_or(adapter.name.clone());
        let mut series: Vec<Series> = Vec::new();
        let mut table = Table::new(&["adapter", "layer", "x", "y"]);
        for point in self.map.iter().filter(|point| point.part == part) {
            let adapter = &self.adapters[point.adapter];
            let tip = format!("{}, {}", adapter.name, point.site);
            let mark = Mark { x: point.x, y: point.y, interval: None, tip };
            let name = label(adapter);
            match series.iter_mut().find(|series| series.name == name) {
                Some(series) => series.marks.push(mark),
                None => series.push(Series { name, marks: vec![mark], joined: false }),
            }
            let place = [number(point.x), number(point.y)];
            let mut row = vec![adapter.name.clone(), point.site.clone()];
            row.extend(place);
            table.rows.push(row);
        }
        let axis = Axis { title: "", logarithmic: false, ticks: Vec::new() };
        let drawing = plane(&series, &axis, &axis)?;
        Some(Figure {
            name: format!("weights-map-{}", part.to_lowercase()),
            title: format!("Map of {part}"),
            caption: format!(
                "t-SNE of the flattened {part} of every layer and adapter, each scaled to length 1, coloured by \
                 {}; A and B were placed together.",
                self.axis
            ),
            drawing,
            table,
        })
    }
}

type Pick = fn(&Pair) -> Option<Likeness>;

/// What the adapters of every label consist of, the mean over the seeds of its chosen cells; none if no
/// cell was looked at.
pub(crate) fn own(analysis: &Analysis) -> Option<Table> {
    let mut rows: Vec<(String, Vec<Option<f64>>)> = Vec::new();
    for slice in 0..analysis.slices.len() {
        for label in &analysis.labels {
            let chosen = analysis.chosen(label, slice);
            let of = |measure: &str| {
                let key = format!("{ANALYSIS}/{measure}");
                let found: Vec<f64> =
                    chosen.iter().filter_map(|(_, result)| result.metric(&key)).collect();
                mean(&found)
            };
            let values: Vec<Option<f64>> =
                MEASURES.iter().map(|(measure, _)| of(measure)).collect();
            if values.iter().any(Option::is_some) {
                let slice = analysis.slice_name(slice);
                let name =
                    if slice.is_empty() { label.clone() } else { format!("{label}, {slice}") };
                rows.push((name, values));
            }
        }
    }
    let kept: Vec<usize> = (0..MEASURES.len())
        .filter(|&at| rows.iter().any(|(_, values)| values[at].is_some()))
        .collect();
    if kept.is_empty() {
        return None;
    }
    let mut table = Table::new(&[&analysis.plan.compare]);
    table.header.extend(kept.iter().map(|&at| MEASURES[at].1.to_owned()));
    for (name, values) in rows {
        let mut row = vec![name];
        row.extend(kept.iter().map(|&at| values[at].map_or(String::new(), number)));
        table.rows.push(row);
    }
    Some(table)
}

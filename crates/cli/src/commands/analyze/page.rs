//! The report as a page and as text.

use super::pictures::{Picture, pictures};
use super::report::Report;
use super::tables::{
    Table, adapters_shown, began, gates_shown, groups_shown, heads_shown, number, pairs_shown,
    projections_shown,
};
use crate::ui::table;
use hydralora_data::escape_markup as escape;
use hydralora_data::picture::page_start;
use std::fmt::Write;
use std::path::Path;

/// Rows of a table that the page shows.
const MOST_ROWS: usize = 300;
/// Pairs that the terminal gets.
const MOST_PAIRS: usize = 12;

/// The page.
pub(super) fn html(report: &Report) -> String {
    let title = match report.adapters.as_slice() {
        [one] => format!("What {} consists of", one.name),
        all => format!("What {} adapters have in common", all.len()),
    };
    let mut page = page_start(&title);
    let _ = write!(page, "<h1>{}</h1>", escape(&title));
    put(&mut page, &origins(report));
    let all = pictures(report);
    let picture = |page: &mut String, name: &str| {
        if let Some(Picture { caption, svg, .. }) = all.iter().find(|found| found.name == name) {
            let _ = write!(
                page,
                "<figure style=\"margin:1rem 0\"><div class=\"scroll\">{svg}</div><figcaption \
                 class=\"soft\">{}</figcaption></figure>",
                escape(caption)
            );
        }
    };
    if !report.notes.is_empty() {
        page.push_str("<ul>");
        for note in &report.notes {
            let _ = write!(page, "<li>{}</li>", escape(note));
        }
        page.push_str("</ul>");
    }
    if !report.pairs.is_empty() {
        page.push_str("<h2>Between adapters</h2>");
        for sentence in beginnings(report) {
            let _ = write!(page, "<p><strong>{}</strong></p>", escape(&sentence));
        }
        picture(&mut page, "similarity");
        put(&mut page, &pairs_shown(report));
        page.push_str("<p class=\"soft\">Means over layers. Where an adapter has several A or B in a layer, all pairs of one of this and one of that count alike. By chance: the root mean square cosine of random spaces of these dimensions.</p>");
        if report.groups.len() > 1 {
            page.push_str("<h2>By how A began</h2>");
            put(&mut page, &groups_shown(report));
        }
        page.push_str("<h2>By projection</h2>");
        put(&mut page, &projections_shown(report));
    }
    if !report.map.is_empty() {
        page.push_str("<h2>Map</h2>");
        picture(&mut page, "map");
        page.push_str("<p class=\"soft\">The places are in <code>map.csv</code>.</p>");
    }
    page.push_str("<h2>Updates</h2>");
    picture(&mut page, "rank");
    put(&mut page, &adapters_shown(report));
    page.push_str("<p class=\"soft\">Effective rank: the exponential of the entropy of the singular values over their sum. Change of A: its distance from the start over the start's norm.</p>");
    let heads = heads_shown(report);
    if !heads.rows.is_empty() {
        page.push_str("<h2>Heads</h2>");
        picture(&mut page, "heads");
        put(&mut page, &heads);
    }
    let gates = gates_shown(report);
    if !gates.rows.is_empty() {
        page.push_str("<h2>Gates</h2>");
        picture(&mut page, "gates");
        put(&mut page, &gates);
        page.push_str("<p class=\"soft\">Entropy: that of a token’s gates over that of even ones. Both are taken within a layer and then averaged: the numbers of heads mean nothing beyond their layer, so mean gates over layers would come out even whatever the routers do.</p>");
    }
    let missing: Vec<String> = report
        .adapters
        .iter()
        .flat_map(|adapter| {
            let name = &adapter.name;
            adapter.missing.iter().map(move |(what, why)| format!("{name}, {what}: {why}"))
        })
        .collect();
    if !missing.is_empty() {
        page.push_str("<h2>Not measured</h2><ul>");
        for line in missing {
            let _ = write!(page, "<li>{}</li>", escape(&line));
        }
        page.push_str("</ul>");
    }
    page.push_str("</html>\n");
    page
}

/// What to know of the likeness of A, beside it.
fn beginnings(report: &Report) -> Vec<String> {
    let equal: Vec<String> = report
        .pairs
        .iter()
        .filter(|pair| pair.began_equal == Some(true))
        .map(|pair| format!("{} – {}", pair.first, pair.second))
        .collect();
    match (report.pairs.len(), equal.len()) {
        (_, 0) => Vec::new(),
        (1, _) => vec!["A of both began equal: similarity of A is expected.".to_owned()],
        (all, n) if all == n => {
            vec!["A of all adapters began equal: similarity of A is expected.".to_owned()]
        }
        (_, n) if n <= 6 => vec![format!(
            "A began equal in {}: there similarity of A is expected.",
            equal.join(", ")
        )],
        (all, n) => {
            vec![format!("A began equal in {n} of {all} pairs: there similarity of A is expected.")]
        }
    }
}

fn origins(report: &Report) -> Table {
    let mut table = Table::new(3, &["adapter", "method", "base model", "layers", "A", "B", "seed"]);
    for adapter in &report.adapters {
        table.rows.push(vec![
            adapter.name.clone(),
            adapter.method.clone(),
            last_part(&adapter.base_model).to_owned(),
            adapter.layers.to_string(),
            adapter.num_a.to_string(),
            adapter.num_b.to_string(),
            adapter.seed.map_or_else(|| "not known".to_owned(), |seed| seed.to_string()),
        ]);
    }
    table
}

/// The name of a model's folder without the way to it; an id of the hub as it is.
fn last_part(model: &str) -> &str {
    let path = Path::new(model);
    let name = path.file_name().and_then(|name| name.to_str());
    name.filter(|_| path.is_absolute()).unwrap_or(model)
}

fn put(page: &mut String, table: &Table) {
    let class = |column: usize| if column < table.named { " class=\"k\"" } else { " class=\"n\"" };
    page.push_str("<div class=\"scroll\"><table><tr>");
    for (column, name) in table.header.iter().enumerate() {
        let _ = write!(page, "<th{}>{}</th>", class(column), escape(name));
    }
    page.push_str("</tr>");
    for row in table.rows.iter().take(MOST_ROWS) {
        page.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let _ = write!(page, "<td{}>{}</td>", class(column), escape(cell));
        }
        page.push_str("</tr>");
    }
    page.push_str("</table></div>");
    if table.rows.len() > MOST_ROWS {
        let more = table.rows.len() - MOST_ROWS;
        let _ = write!(page, "<p class=\"soft\">{more} more rows are in the CSV files.</p>");
    }
}

/// The report for the terminal.
pub(super) fn text(report: &Report, out: Option<&Path>) -> String {
    let header = [
        "adapter",
        "method",
        "effective rank",
        "change of A",
        "heads differ",
        "gate entropy",
        "gate distance",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for adapter in &report.adapters {
        let own = &adapter.overall;
        let mut row = vec![adapter.name.clone(), adapter.method.clone()];
        let numbers = [
            own.effective_rank,
            own.a_change,
            own.difference_share,
            own.gate_entropy,
            own.gate_distance,
        ];
        row.extend(numbers.map(|value| match number(value) {
            text if text.is_empty() => "–".to_owned(),
            text => text,
        }));
        rows.push(row);
    }
    let mut lines = vec![table(&rows)];
    if !report.pairs.is_empty() {
        let header =
            ["pair", "A began", "", "cosine", "CKA", "cos of angles", "by chance", "largest angle"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        for pair in report.pairs.iter().take(MOST_PAIRS) {
            for (part, likeness) in pair.overall.parts() {
                let mut row = vec![format!("{} – {}", pair.first, pair.second)];
                row.extend([began(pair.began_equal).to_owned(), part.to_owned()]);
                let numbers =
                    [likeness.cosine, likeness.cka, likeness.angle_cosine, likeness.chance];
                row.extend(numbers.map(number));
                row.push(likeness.largest_angle.map_or_else(String::new, |a| format!("{a:.1}°")));
                rows.push(row);
            }
        }
        lines.push(table(&rows));
        if report.pairs.len() > MOST_PAIRS {
            lines.push(format!("{} more pairs", report.pairs.len() - MOST_PAIRS));
        }
    }
    if let Some(out) = out {
        lines.push(format!("report   {}", out.join("analysis.html").display()));
    }
    lines.join("\n")
}

//! The report as a page that needs no other file and no network, and as Markdown.

use super::analysis::{Analysis, Counts};
use super::chart::{escape, style};
use super::figures::{Figure, Table, comparison_table, main_table, paper_table};
use super::weights::own;
use super::words::{cautions, findings, method, name_in};
use std::fmt::Write;

/// Rows of a table that a page shows.
const MOST_ROWS: usize = 400;

const STYLE: &str = "\
:root{--back:#fff;--panel:#f6f8fb;--accent:#0072B2}
@media (prefers-color-scheme:dark){:root{--back:#14181f;--panel:#1b212b;--accent:#5AB4E8}}
@media print{:root{--back:#fff;--panel:#fff}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif;color:var(--ink);background:var(--back);max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.35rem;margin:2.5rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
h3{font-size:1.05rem;margin:1.8rem 0 .4rem}p{margin:.5rem 0;max-width:48rem}.soft{color:var(--soft)}
nav a{margin-right:1rem}a{color:var(--accent)}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem;margin:.4rem 0}
th,td{padding:.28rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{border-bottom:2px solid var(--line);font-weight:600}td:first-child,th:first-child{text-align:left;padding-left:0}
figure{margin:1.4rem 0 2rem;break-inside:avoid}figure .wide svg{display:block;width:100%;min-width:34rem;height:auto}
figcaption{font-size:.9rem;color:var(--soft);max-width:48rem}details{margin:.3rem 0}summary{cursor:pointer;color:var(--accent);font-size:.9rem}
ul{padding-left:1.2rem;max-width:48rem}li{margin:.3rem 0}
.note{background:var(--panel);border-left:4px solid var(--accent);padding:.6rem 1rem;margin:1rem 0;max-width:48rem}
@media print{body{font-size:11pt;max-width:none;padding:0}details::details-content{content-visibility:visible;display:block}nav{display:none}.wide{overflow:visible}figure .wide svg{min-width:0;max-width:17cm}table{font-size:8.5pt}th,td{padding:.15rem .4rem;white-space:normal}h2{break-after:avoid}h3{break-after:avoid}}";

/// A study's part of a report.
pub(crate) struct Part<'a> {
    pub(crate) analysis: &'a Analysis,
    pub(crate) figures: &'a [Figure],
    /// Where the pictures' files are, seen from the report.
    pub(crate) folder: &'a str,
    /// Which pictures also lie there as PNG.
    pub(crate) pngs: bool,
}

/// How far a study is, in a line.
pub(crate) fn progress(analysis: &Analysis) -> String {
    let Counts { cells, trained, scored, failed, open, unscored, seconds } = analysis.counts();
    let mut line = format!("{cells} cells: {trained} trained, {scored} scored on the test split");
    if failed > 0 {
        let _ = write!(line, ", {failed} failed");
    }
    if open + unscored > 0 {
        let _ = write!(line, ", {} to do", open + unscored);
    }
    let hours = seconds / 3600.0;
    let time =
        if hours >= 1.0 { format!("{hours:.1} h") } else { format!("{:.1} min", seconds / 60.0) };
    let _ = write!(line, "; {time} of training and scoring");
    let mut machines: Vec<String> = Vec::new();
    for result in analysis.results.values() {
        let machine = &result.machine;
        let Some(processor) = &machine.processor else { continue };
        let name = format!("{processor}, {} threads, {}", machine.threads, machine.system);
        if !machines.contains(&name) {
            machines.push(name);
        }
    }
    machines.sort();
    match machines.len() {
        0 => {}
        1..=3 => {
            let _ = write!(line, " on {}", machines.join("; "));
        }
        n => {
            let _ = write!(line, " on {n} kinds of machines");
        }
    }
    line.push('.');
    line
}

/// The page.
pub(crate) fn html(title: &str, parts: &[Part<'_>]) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{0}</title><style>{1}{STYLE}</style></head><body>\
         <h1>{0}</h1>",
        escape(title),
        style(":root")
    );
    if parts.len() > 1 {
        page.push_str("<nav>");
        for (index, part) in parts.iter().enumerate() {
            let name = escape(&part.analysis.plan.title);
            let _ = write!(page, "<a href=\"#s{index}\">{name}</a> ");
        }
        page.push_str("</nav>");
    }
    for (index, part) in parts.iter().enumerate() {
        section(&mut page, part, index, parts.len() > 1);
    }
    page.push_str("</body></html>\n");
    page
}

fn section(page: &mut String, part: &Part<'_>, index: usize, several: bool) {
    let analysis = part.analysis;
    let plan = &analysis.plan;
    if several {
        let _ = write!(page, "<h2 id=\"s{index}\">{}</h2>", escape(&plan.title));
    }
    if let Some(question) = &plan.question {
        let _ = write!(page, "<p>{}</p>", escape(question.trim()));
    }
    let _ = write!(page, "<p class=\"soft\">{}</p>", escape(&progress(analysis)));
    page.push_str("<h3>What was found</h3>");
    let found = findings(analysis);
    if let Some((first, rest)) = found.split_first() {
        let _ = write!(page, "<p><strong>{}</strong></p>", escape(first));
        list(page, rest);
    }
    let cautions = cautions(analysis);
    if !cautions.is_empty() {
        page.push_str("<div class=\"note\"><strong>Mind</strong>");
        list(page, &cautions);
        page.push_str("</div>");
    }
    page.push_str("<h3>Results</h3>");
    table(page, &main_table(analysis));
    page.push_str(
        "<p class=\"soft\">Means over seeds ± half a 95 % interval, at each one's best value by the validation \
         split.</p>",
    );
    if let (Some(paper), Some(rows)) = (&plan.paper, paper_table(analysis)) {
        let _ = write!(
            page,
            "<h3>The paper's numbers</h3><p class=\"soft\">{}</p>",
            escape(&paper.source)
        );
        table(page, &rows);
        page.push_str(
            "<p class=\"soft\">Another model on other data: to compare orders and signs, not numbers.</p>",
        );
        if let Some(note) = &paper.note {
            let _ = write!(page, "<p class=\"soft\">{}</p>", escape(note.trim()));
        }
    }
    weights_section(page, analysis);
    for figure in part.figures {
        let _ = write!(
            page,
            "<figure><h3>{}</h3><div class=\"wide\">{}</div><figcaption>{}</figcaption><details><summary>The \
             numbers</summary>",
            escape(&figure.title),
            figure.drawing.inline(&figure.title),
            escape(&figure.caption)
        );
        table(page, &figure.table);
        page.push_str("</details></figure>");
    }
    for metric in analysis.metrics.iter().skip(3) {
        let rows = comparison_table(analysis, metric);
        if !rows.rows.is_empty() {
            let _ = write!(page, "<h3>{}: differences</h3>", escape(&name_in(analysis, metric)));
            table(page, &rows);
        }
    }
    let _ = write!(page, "<h3>How</h3><p class=\"soft\">{}</p>", escape(&method(analysis)));
}

/// What is in the table of single adapters.
const OWN: &str =
    "Means over layers and seeds of the chosen cells' adapters, as `hydralora analyze` finds them.";
/// What is in the table of pairs.
const PAIRS: &str = "Means over pairs of adapters and over layers. A that began equal, drawn from the same seed, are \
                     alike before any training; by chance is the root mean square cosine of random spaces.";

fn weights_section(page: &mut String, analysis: &Analysis) {
    let own = own(analysis);
    if own.is_none() && analysis.weights.is_none() {
        return;
    }
    page.push_str("<h3>The weights</h3>");
    if let Some(own) = own {
        table(page, &own);
        let _ = write!(page, "<p class=\"soft\">{}</p>", escape(OWN));
    }
    if let Some(weights) = &analysis.weights {
        table(page, &weights.groups());
        let _ = write!(page, "<p class=\"soft\">{}</p>", escape(PAIRS));
        list(page, weights.notes());
    }
}

fn list(page: &mut String, lines: &[String]) {
    page.push_str("<ul>");
    for line in lines {
        let _ = write!(page, "<li>{}</li>", escape(line));
    }
    page.push_str("</ul>");
}

fn table(page: &mut String, table: &Table) {
    page.push_str("<div class=\"wide\"><table><thead><tr>");
    for name in &table.header {
        let _ = write!(page, "<th>{}</th>", escape(name));
    }
    page.push_str("</tr></thead><tbody>");
    for row in table.rows.iter().take(MOST_ROWS) {
        page.push_str("<tr>");
        for cell in row {
            let _ = write!(page, "<td>{}</td>", escape(cell));
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div>");
    if table.rows.len() > MOST_ROWS {
        let more = table.rows.len() - MOST_ROWS;
        let _ = write!(page, "<p class=\"soft\">{more} more rows are in the CSV file.</p>");
    }
}

/// The same in Markdown, with the pictures as files.
pub(crate) fn markdown(title: &str, parts: &[Part<'_>]) -> String {
    let mut text = format!("# {title}\n");
    for part in parts {
        let analysis = part.analysis;
        let plan = &analysis.plan;
        if parts.len() > 1 {
            let _ = write!(text, "\n## {}\n", plan.title);
        }
        if let Some(question) = &plan.question {
            let _ = write!(text, "\n{}\n", question.trim());
        }
        let _ = write!(text, "\n{}\n\n### What was found\n\n", progress(analysis));
        let found = findings(analysis);
        if let Some((first, rest)) = found.split_first() {
            let _ = write!(text, "**{first}**\n\n");
            for line in rest {
                let _ = writeln!(text, "- {line}");
            }
        }
        let cautions = cautions(analysis);
        if !cautions.is_empty() {
            text.push_str("\nMind:\n\n");
            for line in cautions {
                let _ = writeln!(text, "- {line}");
            }
        }
        text.push_str("\n### Results\n\n");
        markdown_table(&mut text, &main_table(analysis));
        if let (Some(paper), Some(rows)) = (&plan.paper, paper_table(analysis)) {
            let _ = write!(text, "\n### The paper's numbers\n\n{}\n\n", paper.source);
            markdown_table(&mut text, &rows);
            text.push_str(
                "\nAnother model on other data: to compare orders and signs, not numbers.\n",
            );
            if let Some(note) = &paper.note {
                let _ = write!(text, "\n{}\n", note.trim());
            }
        }
        let own = own(analysis);
        if own.is_some() || analysis.weights.is_some() {
            text.push_str("\n### The weights\n\n");
        }
        if let Some(own) = own {
            markdown_table(&mut text, &own);
            let _ = write!(text, "\n{OWN}\n\n");
        }
        if let Some(weights) = &analysis.weights {
            markdown_table(&mut text, &weights.groups());
            let _ = write!(text, "\n{PAIRS}\n\n");
            for note in weights.notes() {
                let _ = writeln!(text, "- {note}");
            }
        }
        for figure in part.figures {
            let ending = if part.pngs { "png" } else { "svg" };
            let _ = write!(
                text,
                "\n### {0}\n\n![{0}]({1}/{2}.{ending})\n\n{3} ([SVG]({1}/{2}.svg), [numbers]({1}/{2}.csv))\n",
                figure.title, part.folder, figure.name, figure.caption
            );
        }
        for metric in &analysis.metrics {
            let rows = comparison_table(analysis, metric);
            if !rows.rows.is_empty() {
                let _ = write!(text, "\n### {}: differences\n\n", name_in(analysis, metric));
                markdown_table(&mut text, &rows);
            }
        }
        let _ = write!(text, "\n### How\n\n{}\n", method(analysis));
    }
    text
}

fn markdown_table(text: &mut String, table: &Table) {
    let cell = |cell: &String| cell.replace('|', "\\|").replace('\n', " ");
    let line = |cells: &[String]| {
        format!("| {} |", cells.iter().map(cell).collect::<Vec<_>>().join(" | "))
    };
    let _ = writeln!(text, "{}", line(&table.header));
    let _ = writeln!(text, "|{}", " --- |".repeat(table.header.len()));
    for row in table.rows.iter().take(MOST_ROWS) {
        let _ = writeln!(text, "{}", line(row));
    }
}

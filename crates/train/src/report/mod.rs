//! `report.html`: a run on one page that needs no other file and no network.

mod chart;
mod gates;

use crate::heads::HeadSummary;
use crate::routing::Routing;
use chart::{Chart, Series, Style};
use hydralora_data::escape_markup as escape;
use serde::Serialize;
use serde_json::Value;
use std::fmt::Write;

/// Steps that the shown training loss is the mean of.
const AVERAGED: usize = 10;

/// What the report shows.
pub struct ReportInput<'a> {
    /// Heading.
    pub title: &'a str,
    /// Facts in the order to show them: model, method, parameters, data.
    pub facts: &'a [(String, String)],
    /// Rows of `metrics.jsonl` by name; the first is the run the report is about.
    pub runs: &'a [(String, Vec<Value>)],
    /// Held-out loss per domain for each named adapter; the first is what the others are compared
    /// with.
    pub comparison: &'a [(String, Vec<(String, f64)>)],
    /// Answers to the same questions.
    pub answers: &'a [Answers],
    /// Mean gates, if the adapter routes.
    pub routing: Option<&'a Routing>,
    /// What the heads have in common, if there are several.
    pub heads: Option<&'a HeadSummary>,
    /// The resolved recipe.
    pub recipe: &'a str,
}

/// What models answered to a question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Answers {
    /// The question.
    pub question: String,
    /// Answers by model.
    pub answers: Vec<(String, String)>,
}

const STYLE: &str = include_str!("style.css");
/// Colours of runs, in order; they are told apart by the colour-blind too.
const COLORS: [&str; 3] = ["var(--a)", "var(--b)", "var(--c)"];

/// Renders the page.
pub fn render(input: &ReportInput<'_>) -> String {
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{0}</title><style>{STYLE}</style><h1>{0}</h1>",
        escape(input.title)
    );
    page.push_str("<table class=\"facts\">");
    for (name, value) in input.facts {
        let _ = write!(
            page,
            "<tr><td class=\"soft\">{}</td><td>{}</td></tr>",
            escape(name),
            escape(value)
        );
    }
    page.push_str("</table>");
    if !input.comparison.is_empty() {
        page.push_str("<h2>Held-out loss per domain</h2>");
        page.push_str(&comparison_table(input.comparison));
    }
    page.push_str("<h2>Loss</h2>");
    page.push_str(&losses(input.runs));
    if !input.answers.is_empty() {
        page.push_str("<h2>Answers</h2>");
        page.push_str(&answers_table(input.answers));
    }
    if let Some(routing) = input.routing {
        page.push_str("<h2>Routing</h2>");
        page.push_str(&gates::section(routing, input.heads));
    }
    page.push_str("<h2>Speed and memory</h2>");
    page.push_str(&speed(input.runs));
    let _ = write!(
        page,
        "<h2>Recipe</h2><details><summary>every value that was used</summary><pre>{}</pre></details></html>",
        escape(input.recipe)
    );
    page
}

/// Training and held-out loss of every run over the steps.
fn losses(runs: &[(String, Vec<Value>)]) -> String {
    let mut series = Vec::new();
    let of = |name: &str, what: &str| {
        if runs.len() > 1 { format!("{name}, {what}") } else { what.to_owned() }
    };
    for ((name, metrics), color) in runs.iter().zip(COLORS.iter().cycle()) {
        let each = points(metrics, "loss");
        let mean = moving_average(&each, AVERAGED);
        if runs.len() == 1 {
            let name = "training, each step".to_owned();
            series.push(Series { name, color, points: each, style: Style::Faint });
        }
        let name_of = of(name, &format!("training, mean of {AVERAGED} steps"));
        series.push(Series { name: name_of, color, points: mean, style: Style::Line });
        let held_out = points(metrics, "valid_loss");
        let color = if runs.len() == 1 { "var(--b)" } else { color };
        series.push(Series {
            name: of(name, "held-out"),
            color,
            points: held_out,
            style: Style::Dots,
        });
        for (set, color) in sets(metrics).into_iter().zip(COLORS.iter().rev().cycle()) {
            let points = points_of_set(metrics, &set);
            let name = of(name, &format!("held-out, {set}"));
            series.push(Series { name, color, points, style: Style::Dots });
        }
    }
    let (name, x_title, y_title) = ("Loss by step", "step", "loss per token, nats");
    Chart { name, x_title, y_title, from_zero: false, series }.draw()
}

fn speed(runs: &[(String, Vec<Value>)]) -> String {
    let mut series = Vec::new();
    let mut words = String::new();
    for ((name, metrics), color) in runs.iter().zip(COLORS.iter().cycle()) {
        let points = points(metrics, "tokens_per_s");
        let mut rates: Vec<f64> = points.iter().map(|point| point.1).collect();
        rates.sort_unstable_by(f64::total_cmp);
        let peak = metrics.iter().filter_map(|row| row["peak_rss_mb"].as_f64()).fold(0.0, f64::max);
        if let Some(median) = rates.get(rates.len() / 2) {
            let _ =
                write!(words, "<p>{}: {median:.0} tokens per second at the median", escape(name));
            if peak > 0.0 {
                let _ = write!(words, ", largest resident memory {peak:.0} MB");
            }
            words.push_str(".</p>");
        }
        series.push(Series { name: name.clone(), color, points, style: Style::Line });
    }
    let (name, x_title, y_title) = ("Tokens per second by step", "step", "tokens per second");
    Chart { name, x_title, y_title, from_zero: true, series }.draw() + &words
}

fn points(metrics: &[Value], key: &str) -> Vec<(f64, f64)> {
    let point = |row: &Value| Some((row["step"].as_f64()?, row[key].as_f64()?));
    metrics.iter().filter_map(point).filter(|point| point.1.is_finite()).collect()
}

/// The evaluation sets of a run, in their order.
fn sets(metrics: &[Value]) -> Vec<String> {
    let rows = metrics.iter().filter_map(|row| row["sets"].as_array());
    let mut found: Vec<String> = Vec::new();
    for name in rows.flatten().filter_map(|of| of["set"].as_str()) {
        if !found.iter().any(|known| known == name) {
            found.push(name.to_owned());
        }
    }
    found
}

fn points_of_set(metrics: &[Value], set: &str) -> Vec<(f64, f64)> {
    let point = |row: &Value| {
        let of_set = row["sets"].as_array()?.iter().find(|of| of["set"] == set)?;
        Some((row["step"].as_f64()?, of_set["loss"].as_f64()?))
    };
    metrics.iter().filter_map(point).collect()
}

/// Each point with the mean of the last `window` values up to it.
fn moving_average(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    (0..points.len())
        .map(|last| {
            let recent = &points[(last + 1).saturating_sub(window)..=last];
            let mean = recent.iter().map(|point| point.1).sum::<f64>() / recent.len() as f64;
            (points[last].0, mean)
        })
        .collect()
}

fn comparison_table(comparison: &[(String, Vec<(String, f64)>)]) -> String {
    let mut table = String::from("<div class=\"scroll\"><table><tr><th>domain</th>");
    for (name, _) in comparison {
        let _ = write!(table, "<th>{}</th>", escape(name));
    }
    table.push_str("</tr>");
    let first = &comparison[0].1;
    for (row, (domain, base)) in first.iter().enumerate() {
        let _ = write!(table, "<tr><td>{}</td><td>{base:.4}</td>", escape(domain));
        for (_, losses) in &comparison[1..] {
            match losses.get(row) {
                Some((_, loss)) => {
                    let change = 100.0 * (loss / base - 1.0);
                    let _ = write!(
                        table,
                        "<td>{loss:.4} <span class=\"soft\">({change:+.1} %)</span></td>"
                    );
                }
                None => table.push_str("<td></td>"),
            }
        }
        table.push_str("</tr>");
    }
    table.push_str("</table></div>");
    table
}

fn answers_table(answers: &[Answers]) -> String {
    let mut table = String::new();
    for Answers { question, answers } in answers {
        let _ = write!(table, "<p>{}</p><table class=\"answers\">", escape(question));
        for (who, answer) in answers {
            let _ = write!(
                table,
                "<tr><td class=\"soft\">{}</td><td>{}</td></tr>",
                escape(who),
                escape(answer)
            );
        }
        table.push_str("</table>");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::SiteRouting;
    use serde_json::json;

    #[test]
    fn the_page_escapes_and_shows_every_part() {
        let metrics = [
            json!({"step": 1, "loss": 3.0, "tokens_per_s": 100.0, "peak_rss_mb": 900.0}),
            json!({"step": 2, "loss": 2.5, "tokens_per_s": 120.0}),
            json!({"step": 2, "valid_loss": 2.75, "sets": [{"set": "new & old", "loss": 2.5}]}),
        ];
        let routing = Routing {
            domains: vec!["law".into(), "<math>".into()],
            sites: vec![SiteRouting {
                site: "model.layers.0.mlp.up_proj".into(),
                layer: 0,
                mean_gate: vec![vec![0.7, 0.3], vec![0.4, 0.6]],
                ..SiteRouting::default()
            }],
        };
        let page = render(&ReportInput {
            title: "a <b> run",
            facts: &[("model".into(), "x & y".into())],
            runs: &[("hydralora".into(), metrics.to_vec()), ("<lora>".into(), metrics.to_vec())],
            comparison: &[
                ("base".into(), vec![("law".into(), 2.0)]),
                ("hydralora".into(), vec![("law".into(), 1.5)]),
            ],
            answers: &[Answers {
                question: "1 < 2?".into(),
                answers: vec![("base".into(), "yes & no".into())],
            }],
            routing: Some(&routing),
            heads: None,
            recipe: "method: {name: hydralora}",
        });
        for part in [
            "a &lt;b&gt; run",
            "x &amp; y",
            "-25.0 %",
            "&lt;math&gt;",
            "900 MB",
            "polyline",
            "1 &lt; 2?",
            "yes &amp; no",
            "&lt;lora&gt;, held-out",
            "hydralora, held-out, new &amp; old",
        ] {
            assert!(page.contains(part), "{part} is missing");
        }
        assert!(!page.contains("<b>"));
        assert!((routing.specialisation() - 0.3).abs() < 1e-12);
    }

    #[test]
    fn averages_look_back() {
        let points = [(1.0, 4.0), (2.0, 2.0), (3.0, 0.0)];
        assert_eq!(moving_average(&points, 2), [(1.0, 4.0), (2.0, 3.0), (3.0, 1.0)]);
    }
}

//! What was found, as pictures: plain SVG with its own colours, and a page that needs no other file.

use super::report::HeadsReport;
use crate::picture::{
    COLORS, INK, LINE, SOFT, code, color, mark, open, page_start, shortened, text,
};
use crate::shown::escape_markup as escape;
use hydralora_cluster::Rule;
use std::fmt::Write;

/// One curve over k with its spread: k, value, deviation.
struct Panel<'a> {
    title: &'a str,
    points: Vec<(usize, f64, f64)>,
    /// What a rule chose from it.
    chosen: Option<usize>,
}

fn panel(svg: &mut String, panel: &Panel<'_>, left: f64, top: f64, range: (usize, usize)) {
    const WIDTH: f64 = 400.0;
    const HEIGHT: f64 = 200.0;
    let (x0, y0) = (left + 56.0, top + 30.0);
    let (width, height) = (WIDTH - 76.0, HEIGHT - 64.0);
    let _ = write!(svg, "{}", text(left + 8.0, top + 18.0, "start", INK, panel.title));
    let low = panel.points.iter().map(|p| p.1 - p.2).fold(f64::INFINITY, f64::min);
    let high = panel.points.iter().map(|p| p.1 + p.2).fold(f64::NEG_INFINITY, f64::max);
    if !(low.is_finite() && high.is_finite()) {
        let _ = write!(svg, "{}", text(x0, y0 + 20.0, "start", SOFT, "nothing was measured"));
        return;
    }
    let span = (high - low).max(1e-9);
    let x = |k: usize| {
        let steps = (range.1 - range.0).max(1) as f64;
        x0 + 12.0 + (width - 24.0) * (k - range.0) as f64 / steps
    };
    let y = |value: f64| y0 + height - 6.0 - (height - 12.0) * (value - low) / span;
    for part in 0..=2 {
        let value = low + span * f64::from(part) / 2.0;
        let at = y(value);
        let _ = write!(
            svg,
            "<line x1=\"{x0}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"{LINE}\"/>{}",
            x0 + width,
            text(x0 - 6.0, at + 4.0, "end", SOFT, &format!("{value:.2}"))
        );
    }
    if let Some(chosen) = panel.chosen {
        let at = x(chosen);
        let _ = write!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{y0}\" y2=\"{:.1}\" stroke=\"{}\" \
             stroke-dasharray=\"4 3\" stroke-width=\"1.5\"/>",
            y0 + height,
            COLORS[1]
        );
    }
    let line: Vec<String> =
        panel.points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
    let _ = write!(
        svg,
        "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.8\" points=\"{}\"/>",
        COLORS[0],
        line.join(" ")
    );
    let blue = COLORS[0];
    for &(k, value, deviation) in &panel.points {
        let (at, here) = (x(k), y(value));
        let _ = write!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{blue}\" \
             stroke-opacity=\".5\"/><circle cx=\"{at:.1}\" cy=\"{here:.1}\" r=\"3.2\" fill=\"{blue}\">\
             <title>k = {k}: {value:.4} ± {deviation:.4}</title></circle>",
            y(value - deviation),
            y(value + deviation),
        );
    }
    for k in range.0..=range.1 {
        // Every label of a short axis, few of a long one.
        if (k - range.0).is_multiple_of((range.1 - range.0) / 12 + 1) {
            let _ =
                write!(svg, "{}", text(x(k), y0 + height + 16.0, "middle", SOFT, &k.to_string()));
        }
    }
}

/// The four curves the rules read, each with its rule's choice: squared error with the elbow,
/// silhouette, gap, prediction strength.
pub fn elbow_svg(report: &HeadsReport) -> String {
    let mut svg = open(820.0, 450.0, "Number of clusters");
    let curve = &report.curve;
    let range = (curve.first().map_or(1, |s| s.k), curve.last().map_or(1, |s| s.k));
    let chosen = |rule: Rule| {
        report.rules.iter().find(|choice| choice.rule == rule).and_then(|choice| choice.chosen)
    };
    let title = |name: &str, rule: Rule| {
        let choice = chosen(rule).map_or_else(|| "none".to_owned(), |k| k.to_string());
        let used = if rule == report.rule { ", the rule used" } else { "" };
        format!("{name}: {} says {choice}{used}", rule.name())
    };
    let titles = [
        title("squared error per row", Rule::Elbow),
        title("mean silhouette", Rule::Silhouette),
        title("gap statistic", Rule::Gap),
        title("prediction strength", Rule::Stability),
    ];
    let points = [
        curve.iter().map(|s| (s.k, s.error, s.error_deviation)).collect::<Vec<_>>(),
        curve
            .iter()
            .filter_map(|s| Some((s.k, s.silhouette?, s.silhouette_deviation.unwrap_or(0.0))))
            .collect(),
        curve.iter().map(|s| (s.k, s.gap, s.gap_deviation)).collect(),
        curve
            .iter()
            .filter_map(|s| Some((s.k, s.strength?, s.strength_deviation.unwrap_or(0.0))))
            .collect(),
    ];
    let rules = [Rule::Elbow, Rule::Silhouette, Rule::Gap, Rule::Stability];
    for (at, ((title, points), rule)) in titles.iter().zip(points).zip(rules).enumerate() {
        let (left, top) = ((at % 2) as f64 * 410.0, (at / 2) as f64 * 210.0);
        panel(&mut svg, &Panel { title, points, chosen: chosen(rule) }, left, top, range);
    }
    svg.push_str(&text(
        410.0,
        438.0,
        "middle",
        SOFT,
        &format!(
            "number of clusters; mean and standard deviation over {} repetitions",
            report.seeds
        ),
    ));
    svg.push_str("</svg>");
    svg
}

/// A sample of rows in two dimensions, coloured by cluster; beside it the same by domain, where
/// there are several.
pub fn map_svg(report: &HeadsReport) -> String {
    const SIDE: f64 = 400.0;
    let several = report.domains.len() > 1;
    let clusters: Vec<String> = (report.clusters.iter().enumerate())
        .map(|(at, cluster)| {
            let terms: Vec<&str> = cluster.terms.iter().take(3).map(String::as_str).collect();
            format!("{} ({:.0} %) {}", at + 1, 100.0 * cluster.share, terms.join(", "))
        })
        .collect();
    let legends = clusters.len().max(if several { report.domains.len() } else { 0 });
    let width = if several { 2.0 * SIDE + 20.0 } else { SIDE };
    let height = SIDE + 34.0 + 18.0 * legends as f64;
    let mut svg = open(width, height, "Map of the rows");
    if report.map.is_empty() {
        svg.push_str(&text(SIDE / 2.0, SIDE / 2.0, "middle", SOFT, "all rows are alike"));
    }
    let bounds = |pick: fn(&super::report::MapPoint) -> f32| {
        let values = report.map.iter().map(pick);
        values.fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)))
    };
    let ((left, right), (low, high)) = (bounds(|p| p.x), bounds(|p| p.y));
    let scale = |value: f32, (from, to): (f32, f32)| {
        let part = f64::from((value - from) / (to - from).max(1e-9));
        16.0 + (SIDE - 32.0) * part
    };
    let mut draw =
        |offset: f64, title: &str, names: &[String], of: fn(&super::report::MapPoint) -> u32| {
            svg.push_str(&text(offset + 8.0, 18.0, "start", INK, title));
            for point in &report.map {
                let (x, y) = (scale(point.x, (left, right)), scale(point.y, (low, high)));
                svg.push_str(&mark(offset + x, 24.0 + y, 2.6, of(point) as usize));
            }
            for (at, name) in names.iter().enumerate() {
                let y = SIDE + 34.0 + 18.0 * at as f64;
                svg.push_str(&mark(offset + 18.0, y - 4.0, 5.0, at));
                svg.push_str(&text(offset + 30.0, y, "start", INK, &shortened(name, 52)));
            }
        };
    draw(0.0, "by cluster", &clusters, |point| point.cluster);
    if several {
        draw(SIDE + 20.0, "by domain", &report.domains, |point| point.domain);
    }
    svg.push_str("</svg>");
    svg
}

/// The page.
pub fn page(report: &HeadsReport) -> String {
    let title = match report.num_experts {
        1 => "1 head".to_owned(),
        n => format!("{n} heads"),
    };
    let mut page = page_start(&title);
    let _ = write!(
        page,
        "<h1>Suggested: {title}</h1><p class=\"soft\">{} rows, {} features of {} dimensions, seed \
         {}.</p><ul>",
        report.features.rows, report.features.kind, report.features.dimensions, report.seed
    );
    for reason in &report.reasons {
        let _ = write!(page, "<li>{}</li>", code(reason));
    }
    for note in &report.notes {
        let _ = write!(page, "<li><em>Note:</em> {}</li>", code(note));
    }
    page.push_str("</ul>");
    if !report.curve.is_empty() {
        let _ = write!(
            page,
            "<h2>Number of clusters</h2><div class=\"scroll\">{}</div>",
            elbow_svg(report)
        );
        page.push_str("<div class=\"scroll\"><table><tr><th>rule</th><th class=\"n\">chosen</th><th>by each repetition (how many)</th></tr>");
        for choice in &report.rules {
            let mark = if choice.rule == report.rule { " (used)" } else { "" };
            let _ = write!(
                page,
                "<tr><td>{}{mark}</td><td class=\"n\">{}</td><td>{}</td></tr>",
                choice.rule.name(),
                choice.chosen.map_or_else(|| "none".to_owned(), |k| k.to_string()),
                escape(&choice.spread())
            );
        }
        page.push_str("</table></div>");
    }
    page.push_str("<h2>Clusters</h2><div class=\"scroll\"><table><tr><th>cluster</th><th class=\"n\">rows</th><th>foremost terms, and the row nearest to the centre</th>");
    if report.domains.len() > 1 {
        page.push_str("<th>domains</th>");
    }
    page.push_str("</tr>");
    for (at, cluster) in report.clusters.iter().enumerate() {
        let _ = write!(
            page,
            "<tr><td><b class=\"dot\" style=\"background:{}\"></b>{}</td><td class=\"n\">{}<br>\
             <span class=\"soft\">{:.1} %</span></td><td>{}<br><span class=\"soft\">{}</span></td>",
            color(at),
            at + 1,
            cluster.size,
            100.0 * cluster.share,
            escape(&cluster.terms.join(", ")),
            escape(&cluster.example)
        );
        if report.domains.len() > 1 {
            let names: Vec<String> = cluster
                .domains
                .iter()
                .take(5)
                .map(|d| format!("{}&nbsp;{}", escape(&d.domain), d.rows))
                .collect();
            let _ = write!(page, "<td>{}</td>", names.join("<br>"));
        }
        page.push_str("</tr>");
    }
    page.push_str("</table></div>");
    if let Some(agreement) = &report.agreement {
        let _ = write!(
            page,
            "<p>Agreement with the domains: adjusted Rand index {:.3}, normalised mutual information \
             {:.3}.</p>",
            agreement.adjusted_rand, agreement.normalized_mutual_information
        );
    }
    if !report.map.is_empty() {
        let _ = write!(page, "<h2>Map</h2><div class=\"scroll\">{}</div>", map_svg(report));
    }
    page.push_str("</html>");
    page
}

#[cfg(test)]
mod tests {
    use super::super::{Corpus, Features, HeadsOptions, find_heads};
    use super::*;

    #[test]
    fn pictures_hold_what_was_found_and_escape_it() {
        let mut corpus = Corpus::default();
        for at in 0..60 {
            corpus.push(format!("a <b> cat purrs at milk & mice {at}"), "<cats>");
            corpus.push(format!("the court ruled on contract law \u{1} {at}"), "law");
        }
        let features = Features::tfidf(&corpus, 4, 0).unwrap();
        let options = HeadsOptions { k_max: 4, seeds: 3, ..HeadsOptions::default() };
        let report = find_heads(&features, &corpus, &options).unwrap();
        let page = page(&report);
        for part in ["2 heads", "&lt;cats&gt;", "by domain", "prediction strength", "index 1.000"] {
            assert!(page.contains(part), "{part} is missing");
        }
        assert!(page.contains("<code>stability</code>") && !page.contains('`'), "{page}");
        assert!(!page.contains("<b> cat") && !page.contains('\u{1}'));
        for svg in [elbow_svg(&report), map_svg(&report)] {
            assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
            assert!(!svg.contains("NaN") && !svg.contains("inf"));
        }
    }
}

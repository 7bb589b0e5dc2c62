//! `report.html`: a run on one page that needs no other file and no network.

use crate::routing::Routing;
use hydralora_data::shown;
use serde_json::Value;
use std::fmt::Write;

/// What the report shows beside the metrics.
pub struct ReportInput<'a> {
    /// Heading.
    pub title: &'a str,
    /// Facts in the order to show them: model, method, parameters, data.
    pub facts: &'a [(String, String)],
    /// Rows of `metrics.jsonl`.
    pub metrics: &'a [Value],
    /// Held-out loss per domain for each named adapter; the first is what the others are compared
    /// with.
    pub comparison: &'a [(String, Vec<(String, f64)>)],
    /// Mean gates, if the adapter routes.
    pub routing: Option<&'a Routing>,
    /// The resolved recipe.
    pub recipe: &'a str,
}

const STYLE: &str = "\
:root{--ink:#1c2230;--soft:#5f6b7f;--line:#dfe4ec;--a:#2458c5;--b:#c2571a;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e8ebf1;--soft:#9aa5b8;--line:#333b49;--a:#7aa5ff;--b:#f09a5f;--back:#14181f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--line);padding-bottom:.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .8rem .2rem 0;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}.soft{color:var(--soft)}svg text{fill:var(--soft);font-size:11px}
pre{background:color-mix(in srgb,var(--line) 35%,transparent);padding:.8rem;overflow:auto;font-size:13px}
.heat{display:flex;flex-wrap:wrap;gap:1.2rem}.heat figure{margin:0}figcaption{font-size:13px;color:var(--soft)}";

/// The page.
pub fn render(input: &ReportInput<'_>) -> String {
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{0}</title><style>{STYLE}</style><h1>{0}</h1>",
        escape(input.title)
    );
    page.push_str("<table>");
    for (name, value) in input.facts {
        let _ = write!(
            page,
            "<tr><td class=\"soft\">{}</td><td style=\"text-align:left\">{}</td></tr>",
            escape(name),
            escape(value)
        );
    }
    page.push_str("</table>");
    page.push_str("<h2>Loss</h2>");
    let losses = points(input.metrics, "loss");
    page.push_str(&line_chart(&[
        Series { name: "each step", color: "var(--line)", points: losses.clone(), dots: false },
        Series {
            name: "training",
            color: "var(--a)",
            points: moving_average(&losses, 10),
            dots: false,
        },
        Series {
            name: "held-out",
            color: "var(--b)",
            points: points(input.metrics, "valid_loss"),
            dots: true,
        },
    ]));
    if !input.comparison.is_empty() {
        page.push_str("<h2>Held-out loss per domain</h2>");
        page.push_str(&comparison_table(input.comparison));
    }
    if let Some(routing) = input.routing {
        page.push_str("<h2>Routing</h2>");
        let _ = write!(
            page,
            "<p class=\"soft\">Mean gate of each expert (column) in each decoder layer (row, first \
             at the top), averaged over the layer's routed projections. An even split is {:.2}; \
             specialisation over domains: {:.3}.</p>",
            1.0 / routing.sites.first().map_or(1, |site| site.mean_gate[0].len().max(1)) as f64,
            routing.specialisation()
        );
        page.push_str(&heat_maps(routing));
    }
    page.push_str("<h2>Speed and memory</h2>");
    page.push_str(&line_chart(&[Series {
        name: "tokens per second",
        color: "var(--a)",
        points: points(input.metrics, "tokens_per_s"),
        dots: false,
    }]));
    let peak =
        input.metrics.iter().filter_map(|row| row["peak_rss_mb"].as_f64()).fold(0.0, f64::max);
    if peak > 0.0 {
        let _ = write!(page, "<p>Largest resident memory: {peak:.0} MB.</p>");
    }
    let _ = write!(page, "<h2>Recipe</h2><pre>{}</pre></html>", escape(input.recipe));
    page
}

fn escape(text: &str) -> String {
    shown(text)
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn points(metrics: &[Value], key: &str) -> Vec<(f64, f64)> {
    let point = |row: &Value| Some((row["step"].as_f64()?, row[key].as_f64()?));
    metrics.iter().filter_map(point).filter(|point| point.1.is_finite()).collect()
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

struct Series {
    name: &'static str,
    color: &'static str,
    points: Vec<(f64, f64)>,
    dots: bool,
}

/// An SVG line chart over steps.
fn line_chart(series: &[Series]) -> String {
    const WIDTH: f64 = 900.0;
    const HEIGHT: f64 = 280.0;
    const LEFT: f64 = 52.0;
    const BOTTOM: f64 = 30.0;
    const TOP: f64 = 26.0;
    let all = || series.iter().flat_map(|series| series.points.iter());
    if all().count() == 0 {
        return "<p class=\"soft\">No steps were recorded.</p>".to_owned();
    }
    let low = all().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = all().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let last = all().map(|p| p.0).fold(1.0, f64::max);
    let step = nice_step((high - low).max(high.abs() * 1e-3).max(1e-9) / 5.0);
    let (bottom, top) =
        ((low / step).floor() * step, ((high / step).ceil() * step).max(low + step));
    let x = |v: f64| LEFT + (WIDTH - LEFT - 10.0) * v / last;
    let y = |v: f64| HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (v - bottom) / (top - bottom);
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"100%\" role=\"img\">");
    let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    let mut tick = bottom;
    while tick <= top + step * 1e-6 {
        let at = y(tick);
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"var(--line)\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick:.decimals$}</text>",
            LEFT - 6.0,
            at + 4.0
        );
        tick += step;
    }
    let every = nice_step(last / 8.0).max(1.0);
    let mut tick = 0.0;
    while tick <= last {
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{tick:.0}</text>",
            x(tick),
            HEIGHT - 10.0
        );
        tick += every;
    }
    for (index, Series { name, color, points, dots }) in series.iter().enumerate() {
        if points.is_empty() {
            continue;
        }
        let line: Vec<String> =
            points.iter().map(|&(a, b)| format!("{:.1},{:.1}", x(a), y(b))).collect();
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\" points=\"{}\"/>",
            line.join(" ")
        );
        if *dots {
            for &(a, b) in points {
                let _ = write!(
                    svg,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.2\" fill=\"{color}\"><title>step {a}: {b:.4}</title></circle>",
                    x(a),
                    y(b)
                );
            }
        }
        let at = LEFT + 10.0 + index as f64 * 130.0;
        let _ = write!(
            svg,
            "<rect x=\"{at}\" y=\"6\" width=\"12\" height=\"4\" fill=\"{color}\"/><text x=\"{}\" y=\"12\">{name}</text>",
            at + 17.0
        );
    }
    svg.push_str("</svg>");
    svg
}

/// The nearest 1, 2 or 5 times a power of ten above `raw`.
fn nice_step(raw: f64) -> f64 {
    let power = 10_f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= raw).unwrap_or(10.0);
    factor * power
}

fn comparison_table(comparison: &[(String, Vec<(String, f64)>)]) -> String {
    let mut table = String::from("<table><tr><th>domain</th>");
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
    table.push_str("</table>");
    table
}

/// One grid per domain: layers down, experts across.
fn heat_maps(routing: &Routing) -> String {
    const CELL: (f64, f64) = (34.0, 9.0);
    let experts = routing.sites.first().map_or(0, |site| site.mean_gate[0].len());
    let layers = routing.sites.iter().map(|site| site.layer).max().unwrap_or(0) + 1;
    let mean = |domain: usize, layer: usize, expert: usize| {
        let of_layer = routing.sites.iter().filter(|site| site.layer == layer);
        let (sum, count) = of_layer.fold((0.0, 0.0), |(sum, count), site| {
            (sum + site.mean_gate[domain][expert], count + 1.0)
        });
        if count > 0.0 { Some(sum / count) } else { None }
    };
    let even = 1.0 / experts.max(1) as f64;
    let mut largest: f64 = 1e-6;
    for domain in 0..routing.domains.len() {
        for layer in 0..layers {
            for expert in 0..experts {
                if let Some(gate) = mean(domain, layer, expert) {
                    largest = largest.max((gate - even).abs());
                }
            }
        }
    }
    let mut html = String::from("<div class=\"heat\">");
    for (domain, name) in routing.domains.iter().enumerate() {
        let (width, height) = (CELL.0 * experts as f64, CELL.1 * layers as f64 + 14.0);
        let _ = write!(html, "<figure><svg width=\"{width}\" height=\"{height}\" role=\"img\">");
        for layer in 0..layers {
            for expert in 0..experts {
                let Some(gate) = mean(domain, layer, expert) else { continue };
                let strength = (gate - even) / largest;
                let color = if strength >= 0.0 { "var(--a)" } else { "var(--b)" };
                let _ = write!(
                    html,
                    "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{color}\" \
                     fill-opacity=\"{:.3}\"><title>layer {layer}, expert {expert}: {gate:.3}</title></rect>",
                    CELL.0 * expert as f64,
                    CELL.1 * layer as f64,
                    CELL.0 - 1.0,
                    CELL.1 - 1.0,
                    0.06 + 0.94 * strength.abs()
                );
            }
        }
        for expert in 0..experts {
            let _ = write!(
                html,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{expert}</text>",
                CELL.0 * (expert as f64 + 0.5),
                height - 2.0
            );
        }
        let _ = write!(html, "</svg><figcaption>{}</figcaption></figure>", escape(name));
    }
    let _ = write!(
        html,
        "</div><p class=\"soft\">Blue: more than an even share; orange: less. Full colour is {largest:.3} away from it.</p>"
    );
    html
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
            json!({"step": 2, "valid_loss": 2.75}),
        ];
        let routing = Routing {
            domains: vec!["law".into(), "<math>".into()],
            sites: vec![SiteRouting {
                site: "model.layers.0.mlp.up_proj".into(),
                layer: 0,
                mean_gate: vec![vec![0.7, 0.3], vec![0.4, 0.6]],
            }],
        };
        let page = render(&ReportInput {
            title: "a <b> run",
            facts: &[("model".into(), "x & y".into())],
            metrics: &metrics,
            comparison: &[
                ("base".into(), vec![("law".into(), 2.0)]),
                ("hydralora".into(), vec![("law".into(), 1.5)]),
            ],
            routing: Some(&routing),
            recipe: "method: {name: hydralora}",
        });
        for part in
            ["a &lt;b&gt; run", "x &amp; y", "-25.0 %", "&lt;math&gt;", "900 MB", "polyline"]
        {
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

    #[test]
    fn steps_are_round_numbers() {
        for (raw, nice) in [(0.13, 0.2), (1.0, 1.0), (3.0, 5.0), (70.0, 100.0)] {
            assert!((nice_step(raw) - nice).abs() < 1e-9);
        }
    }
}
